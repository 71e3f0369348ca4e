// Powers of floats by logarithms, by a fitted polynomial, or by multiplication for small integer exponents.
#pragma once

#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace {

// K vectors are processed together, so that each constant is loaded once and latencies overlap.

template <int K>
inline void log2_of(Vec (&a)[K]) {  // relative error below 3e-7 for positive normal a; finite for others
    // Least-squares fit of log2(1 + f) / f at Chebyshev points of [-0.25, 0.5].
    constexpr float c[] = {1.44269526f,    -0.72135066986f, 0.48084750772f, -0.36033529043f,
                           0.29007357359f, -0.25065219402f, 0.20412734151f, -0.096163973212f};
    Vec exponent[K], f[K], r[K];
    for (int k = 0; k < K; ++k) exponent[k] = Vec::exponent(a[k], f[k]);
    for (int k = 0; k < K; ++k) f[k] = f[k] - Vec::all(1.0f);
    for (int k = 0; k < K; ++k) r[k] = Vec::fma(Vec::all(c[7]), f[k], Vec::all(c[6]));
    for (int degree = 5; degree >= 0; --degree)
        for (int k = 0; k < K; ++k) r[k] = Vec::fma(r[k], f[k], Vec::all(c[degree]));
    for (int k = 0; k < K; ++k) a[k] = Vec::fma(f[k], r[k], exponent[k]);
}

template <int K>
inline void exp2_of(Vec (&t)[K]) {  // relative error below 3e-7 for t up to 127; 2^-126 for t below -126
    // Least-squares fit of 2^f at Chebyshev points of [-0.5, 0.5].
    constexpr float c[] = {1.0f,           0.69314718246f, 0.24022106826f,
                           0.05550327152f, 0.0096760373563f, 0.0013400432654f};
    Vec shifted[K], f[K], r[K];
    for (int k = 0; k < K; ++k) t[k] = Vec::max(t[k], Vec::all(-126.0f));
    for (int k = 0; k < K; ++k) shifted[k] = t[k] + Vec::all(ROUNDER);
    for (int k = 0; k < K; ++k) f[k] = t[k] - (shifted[k] - Vec::all(ROUNDER));
    for (int k = 0; k < K; ++k) r[k] = Vec::fma(Vec::all(c[5]), f[k], Vec::all(c[4]));
    for (int degree = 3; degree >= 0; --degree)
        for (int k = 0; k < K; ++k) r[k] = Vec::fma(r[k], f[k], Vec::all(c[degree]));
    for (int k = 0; k < K; ++k) t[k] = Vec::scale(r[k], shifted[k]);
}

// Computes max(u^power, 2^-126) for u in [0, 1].
template <int K>
inline void to_the_power(Vec (&u)[K], Vec power) {
    log2_of(u);
    for (auto& t : u) t = t * power;
    exp2_of(u);
}

inline Vec log2_of(Vec a) {
    Vec one[] = {a};
    log2_of(one);
    return one[0];
}

inline Vec exp2_of(Vec t) {
    Vec one[] = {t};
    exp2_of(one);
    return one[0];
}

inline Vec to_the_power(Vec u, Vec power) {
    Vec one[] = {u};
    to_the_power(one, power);
    return one[0];
}

// Power of u in [0, 1] by logarithms, for dense sums and slopes.
struct LogPower {
    Vec exponent;

    template <int K>
    void operator()(Vec (&u)[K]) const {
        Vec t[K];
        for (int k = 0; k < K; ++k) t[k] = u[k];
        to_the_power(t, exponent);
        for (int k = 0; k < K; ++k)
            u[k] = Vec::keep(Vec::at_least(u[k], Vec::all(std::numeric_limits<float>::min())), t[k]);
    }
};

template <int P>
inline Vec power(Vec u);

// Power of u in [0, 1] with half the instructions: u^n times a polynomial near u^(exponent - n) where u^n is not small.
template <int BASE>
struct FittedPower {  // n = BASE
    const float* c;

    template <int K>
    void operator()(Vec (&u)[K]) const {
        Vec r[K];
        for (int k = 0; k < K; ++k) r[k] = Vec::fma(Vec::all(c[7]), u[k], Vec::all(c[6]));
        for (int degree = 5; degree >= 0; --degree)
            for (int k = 0; k < K; ++k) r[k] = Vec::fma(r[k], u[k], Vec::all(c[degree]));
        for (int k = 0; k < K; ++k) u[k] = power<BASE>(u[k]) * r[k];
    }
};

// Computes the coefficients of the polynomial of degree 7, by least squares with weights u^(0.6 n). The total error of
// u^exponent is below 2^-22, and far smaller for small u.
void fit_power(double exponent, int base, float (&c)[8]) {
    constexpr int POINTS = 128, DEGREE = 7;
    double q[DEGREE + 1][POINTS], target[POINTS], inverse[DEGREE + 1][DEGREE + 1] = {};
    for (int k = 0; k < POINTS; ++k) {
        const double u = 0.5 + 0.5 * std::cos(M_PI * (k + 0.5) / POINTS), weight = std::pow(u, 0.6 * base);
        target[k] = std::pow(u, exponent - base) * weight;
        for (int j = 0; j <= DEGREE; ++j) q[j][k] = std::cos(j * M_PI * (k + 0.5) / POINTS) * weight;
    }
    // Modified Gram-Schmidt with two passes; inverse[j] are the Chebyshev coefficients of q[j].
    double result[DEGREE + 1] = {};
    for (int j = 0; j <= DEGREE; ++j) {
        inverse[j][j] = 1;
        for (int pass = 0; pass < 2; ++pass)
            for (int i = 0; i < j; ++i) {
                double dot = 0;
                for (int k = 0; k < POINTS; ++k) dot += q[i][k] * q[j][k];
                for (int k = 0; k < POINTS; ++k) q[j][k] -= dot * q[i][k];
                for (int m = 0; m <= j; ++m) inverse[j][m] -= dot * inverse[i][m];
            }
        double norm = 0, dot = 0;
        for (int k = 0; k < POINTS; ++k) norm += q[j][k] * q[j][k];
        norm = std::sqrt(norm);
        for (int k = 0; k < POINTS; ++k) q[j][k] /= norm;
        for (int m = 0; m <= j; ++m) inverse[j][m] /= norm;
        for (int k = 0; k < POINTS; ++k) dot += q[j][k] * target[k];
        for (int k = 0; k < POINTS; ++k) target[k] -= dot * q[j][k];
        for (int m = 0; m <= j; ++m) result[m] += dot * inverse[j][m];
    }
    // Convert Chebyshev polynomials in 2 u - 1 to powers of u.
    double before[DEGREE + 1] = {1}, now[DEGREE + 1] = {-1, 2}, sums[DEGREE + 1] = {};
    for (int m = 0; m <= DEGREE; ++m) {
        for (int j = 0; j <= DEGREE; ++j) sums[j] += result[m] * before[j];
        double next[DEGREE + 1];
        for (int j = 0; j <= DEGREE; ++j) next[j] = 2 * ((j ? 2 * now[j - 1] : 0) - now[j]) - before[j];
        std::copy(now, now + DEGREE + 1, before);
        std::copy(next, next + DEGREE + 1, now);
    }
    for (int j = 0; j <= DEGREE; ++j) c[j] = (float)sums[j];
}

constexpr double LARGEST_FIT = 40;  // for larger exponents few terms count, and a search for them is faster

// Calls f with a function object that computes this power.
template <class F>
void with_power(double exponent, F f) {
    float c[8];
    // Below 8 small ratios count too, for which the fit is not accurate enough.
    const int base = exponent < 8 || exponent >= LARGEST_FIT ? 0 : (int)exponent / 8 * 8;
    if (base) fit_power(exponent, base, c);
    switch (base) {
        case 8: return f(FittedPower<8>{c});
        case 16: return f(FittedPower<16>{c});
        case 24: return f(FittedPower<24>{c});
        case 32: return f(FittedPower<32>{c});
        default: return f(LogPower{Vec::all((float)exponent)});
    }
}

template <int P>
inline Vec power(Vec u) {  // u^P by repeated squaring
    if constexpr (P == 1) {
        return u;
    } else if constexpr (P % 2) {
        return power<P - 1>(u) * u;
    } else {
        const Vec half = power<P / 2>(u);
        return half * half;
    }
}

// Accumulators of direct tiles over the differences d. If `scaled`, the forward pass multiplies inputs and weights by a
// power of two that brings typical distances near 1. Otherwise too many sums would overflow or underflow.
struct Largest {
    static constexpr bool scaled = false;
    static Vec add(Vec acc, Vec d) { return Vec::max_positive(Vec::abs(d), acc); }
    // Adds two terms with four instructions, balanced between adders and multipliers.
    static Vec add(Vec acc, Vec x0, Vec w0, Vec x1, Vec w1, Vec one) {
        return Vec::max_positive(Vec::max_abs(x0 - w0, Vec::minus(x1, w1, one)), acc);
    }
    static float reduce(Vec acc) { return largest(acc); }
    static float join(float a, float b) { return std::max(a, b); }
};

template <int P>
struct SumOfPowers {  // of |d|^P; slope: sign(d) |d|^(P - 1)
    static constexpr bool scaled = P > 16;
    static Vec add(Vec acc, Vec d) {
        if constexpr (P == 1) {
            return acc + Vec::abs(d);
        } else if constexpr (P % 2) {
            return Vec::fma(power<P - 1>(d), Vec::abs(d), acc);
        } else {
            const Vec half = power<P / 2>(d);
            return Vec::fma(half, half, acc);
        }
    }
    static float reduce(Vec acc) { return sum(acc); }
    static float join(float a, float b) { return a + b; }
    static Vec slope(Vec d) {
        if constexpr (P == 1) {
            return Vec::keep(Vec::at_least(Vec::abs(d), Vec::all(std::numeric_limits<float>::min())),
                             Vec::with_sign(Vec::all(1.0f), d));
        } else if constexpr (P % 2) {
            return Vec::with_sign(power<P - 1>(d), d);
        } else {
            return power<P - 1>(d);  // an odd power keeps the sign
        }
    }
};

// Calls f with SumOfPowers<p> and returns true if p is an integer for which direct sums are faster.
template <class F>
bool with_direct(double p, F f) {
    switch (p == std::floor(p) && p <= 64 ? (int)p : 0) {
        case 1: f(SumOfPowers<1>()); return true;
        case 2: f(SumOfPowers<2>()); return true;
        case 3: f(SumOfPowers<3>()); return true;
        case 4: f(SumOfPowers<4>()); return true;
        case 5: f(SumOfPowers<5>()); return true;
        case 6: f(SumOfPowers<6>()); return true;
        case 8: f(SumOfPowers<8>()); return true;
        case 10: f(SumOfPowers<10>()); return true;
        case 12: f(SumOfPowers<12>()); return true;
        case 16: f(SumOfPowers<16>()); return true;
        case 20: f(SumOfPowers<20>()); return true;
        case 24: f(SumOfPowers<24>()); return true;
        case 32: f(SumOfPowers<32>()); return true;
        case 48: f(SumOfPowers<48>()); return true;
        case 64: f(SumOfPowers<64>()); return true;
        default: return false;
    }
}

// Returns the power of two that brings a typical one of `count` positive numbers near 1, estimated from 64 of them.
template <class F>
float scale_for(int64_t count, F number) {
    double exponents = 0;
    int seen = 0;
    for (int64_t k = 0; k < 64; ++k) {
        const double value = number(k * count / 64);
        if (value > 0 && std::isfinite(value)) exponents += std::log2(value), ++seen;
    }
    return seen ? (float)std::exp2(-std::round(std::max(-60.0, std::min(60.0, exponents / seen)))) : 1.0f;
}

}  // namespace
