// Forward pass of the l_p distance. There are two methods for finite p:
//
//   direct  p is a small integer: u^p by repeated squaring, without scaling by m. Outputs whose sum leaves the range of
//           floats are recomputed by the scaled method.
//   scaled  any p: a first pass computes the largest term m and the maxima of groups of vectors. A second pass computes
//           (|d|/m)^p = 2^(p log2(|d|/m)) only for terms that can change the sum. The larger p, the fewer these are.
#pragma once

#include "outer.h"
#include "powers.h"
#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

namespace {

constexpr int64_t LEAST_ROWS = 2 * ROWS;  // samples that repay the packing of weights at p = inf
constexpr float LOW = 0x1p-90f, HIGH = 0x1p120f;  // range in which direct sums are accurate

template <class T, int TB, int TO>
void direct_tile(const float* x, const float* w, int64_t stride, int64_t n, float scale, bool first, float* y,
                 int64_t y_stride) {
    const auto scaled = [&](Vec v) { return T::scaled ? v * Vec::all(scale) : v; };
    Vec acc[TB][TO];
    for (auto& row : acc)
        for (auto& a : row) a = Vec::all(0.0f);
    int64_t i = 0;
    if constexpr (std::is_same_v<T, Largest> && N == 16) {
        const Vec one = hidden_one();
        for (; i + 2 * N <= n; i += 2 * N) {
            Vec w0[TO], w1[TO];
            for (int c = 0; c < TO; ++c) w0[c] = Vec::load(w + c * stride + i), w1[c] = Vec::load(w + c * stride + i + N);
            for (int r = 0; r < TB; ++r) {
                const Vec x0 = Vec::load(x + r * stride + i), x1 = Vec::load(x + r * stride + i + N);
                for (int c = 0; c < TO; ++c) acc[r][c] = T::add(acc[r][c], x0, w0[c], x1, w1[c], one);
            }
        }
    }
    const auto vector = [&](auto load) {
        Vec wv[TO];
        for (int c = 0; c < TO; ++c) wv[c] = scaled(load(w + c * stride + i));
        for (int r = 0; r < TB; ++r) {
            const Vec xv = scaled(load(x + r * stride + i));
            for (int c = 0; c < TO; ++c) acc[r][c] = T::add(acc[r][c], xv - wv[c]);
        }
    };
    for (; i + N <= n; i += N) vector([](const float* p) { return Vec::load(p); });
    if (i < n) vector([=](const float* p) { return Vec::load(p, (int)(n - i)); });
    for (int r = 0; r < TB; ++r)
        for (int c = 0; c < TO; ++c) {
            const float value = T::reduce(acc[r][c]);
            float& out = y[r * y_stride + c];
            out = first ? value : T::join(out, value);
        }
}

template <class T>
void direct_block(const float* x, const float* w, float* y, Shape s, float scale, int64_t b0, int64_t b1, int64_t o0,
                  int64_t o1) {
    for (int64_t i = 0; i < s.inputs; i += SLICE)
        for (int64_t o = o0; o < o1; o += OUTPUT_BLOCK)
            tiles<RB, RO>(b0, b1, o, std::min(o + OUTPUT_BLOCK, o1), [&](int64_t tb, int64_t to, auto nb, auto no) {
                direct_tile<T, decltype(nb)::value, decltype(no)::value>(
                    x + tb * s.inputs + i, w + to * s.inputs + i, s.inputs, std::min(SLICE, s.inputs - i), scale, i == 0,
                    y + tb * s.outputs + to, s.outputs);
            });
}

struct Scaled {  // constants of the scaled method
    float p, ratio;  // terms below ratio times the largest are negligible
    bool dense;      // most terms count, so a search for them does not pay

    Scaled(double p, int64_t inputs) : p((float)p) {
        // I terms of 2^-bits each change y by at most I 2^-bits / p.
        const double bits = 24 + std::max(0.0, std::log2((double)inputs / p));
        ratio = (float)std::exp2(-bits / p);
        dense = p < LARGEST_FIT;
    }
};

// Returns the sum of (|x_i - w_i| / m)^p over all terms.
template <class Power>
inline float dense_sum(const float* x, const float* w, int64_t n, Power raise, float inverse) {
    const Vec scale = Vec::all(inverse);
    Vec total[GROUP];
    for (auto& t : total) t = Vec::all(0.0f);
    int64_t i = 0;
    for (; i + GROUP * N <= n; i += GROUP * N) {
        Vec u[GROUP];
        for (int v = 0; v < GROUP; ++v) u[v] = Vec::abs(Vec::load(x + i + v * N) - Vec::load(w + i + v * N)) * scale;
        raise(u);
        for (int v = 0; v < GROUP; ++v) total[v] = total[v] + u[v];
    }
    for (; i < n; i += N) {  // differences and powers beyond the end are 0
        const int left = (int)std::min<int64_t>(N, n - i);
        Vec u[] = {Vec::abs(Vec::load(x + i, left) - Vec::load(w + i, left)) * scale};
        raise(u);
        total[0] = total[0] + u[0];
    }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// Computes a tile by the scaled method, for all its pairs of sample and output together: the steps of a pair depend on
// each other, so only steps of different pairs overlap.
template <int TB, int TO, class Power>
void scaled_tile(const float* x, const float* w, int64_t n, Scaled k, Power raise, float* y, int64_t y_stride,
                 float* scratch) {
    constexpr int PAIRS = TB * TO;
    static_assert(PAIRS <= N);
    const int64_t groups = (n + GROUP * N - 1) / (GROUP * N);
    float *maxima = scratch, *found = scratch + groups * PAIRS * N;
    const Vec one = hidden_one();
    Vec most[PAIRS];
    for (auto& m : most) m = Vec::all(0.0f);
    for (int64_t g = 0; g < groups; ++g) {
        Vec of_group[PAIRS];
        largest_of_group<GROUP, TB, TO>(x, w, n, g * GROUP * N, n, one, of_group);
        for (int pair = 0; pair < PAIRS; ++pair) {
            of_group[pair].store(maxima + (pair * groups + g) * N);
            most[pair] = Vec::max_positive(of_group[pair], most[pair]);
        }
    }

    float scale[N] = {}, inverse[N] = {}, total[N] = {};
    for (int pair = 0; pair < PAIRS; ++pair) {
        scale[pair] = largest(most[pair]);
        inverse[pair] = scale[pair] > 0 ? 1 / scale[pair] : 0.0f;
    }
    if (k.dense) {
        for (int pair = 0; pair < PAIRS; ++pair)
            total[pair] = dense_sum(x + pair / TO * n, w + pair % TO * n, n, raise, inverse[pair]);
    } else {
        int64_t count[PAIRS + 1] = {};
        for (int pair = 0; pair < PAIRS; ++pair) {
            const float least = scale[pair] * k.ratio;
            count[pair + 1] = count[pair];
            for (int64_t g = 0; g < groups; g += WINDOW) {
                const float* of_window = maxima + (pair * groups + g) * N;
                uint64_t word = 0;
                for (int j = 0; j < std::min<int64_t>(WINDOW, groups - g); ++j)
                    word |= (uint64_t)Vec::at_least(Vec::load(of_window + j * N), Vec::all(least)) << (j * N);
                count[pair + 1] = collect(word, x + pair / TO * n, w + pair % TO * n, g * GROUP * N, n, least,
                                          inverse[pair], count[pair + 1], found, nullptr);
            }
        }
        for (int64_t j = 0; j < count[PAIRS]; j += N)
            to_the_power(Vec::abs(Vec::load(found + j)), Vec::all(k.p)).store(found + j);
        for (int pair = 0; pair < PAIRS; ++pair) {
            double terms = 0;
            for (int64_t j = count[pair]; j < count[pair + 1]; ++j) terms += found[j];
            total[pair] = (float)terms;
        }
    }
    const Vec root = exp2_of(log2_of(Vec::load(total)) * Vec::all(1 / k.p)) * Vec::load(scale);
    float roots[N];
    root.store(roots);
    for (int pair = 0; pair < PAIRS; ++pair) y[pair / TO * y_stride + pair % TO] = roots[pair];
}

// Returns the number of floats that scaled_tile needs: maxima of groups, and all terms in case all count.
int64_t scaled_scratch(int64_t inputs, int pairs) {
    return pairs * ((inputs / (GROUP * N) + 1) * N + inputs) + 2 * N;
}

template <class Power>
void scaled_block(const float* x, const float* w, float* y, Shape s, Scaled k, Power raise, int64_t b0, int64_t b1,
                  int64_t o0, int64_t o1) {
    Buffer<> scratch(scaled_scratch(s.inputs, RB * 2));
    const int64_t block = block_of(s.inputs);
    for (int64_t o = o0; o < o1; o += block)
        tiles<RB, 2>(b0, b1, o, std::min(o + block, o1), [&](int64_t tb, int64_t to, auto nb, auto no) {
            scaled_tile<decltype(nb)::value, decltype(no)::value>(x + tb * s.inputs, w + to * s.inputs, s.inputs, k, raise,
                                                                  y + tb * s.outputs + to, s.outputs, scratch.data());
        });
}

// Replaces sums of p-th powers in y by their p-th roots, and recomputes outputs whose sum left the range of floats.
void take_roots(const float* x, const float* w, float* y, Shape s, Scaled k, float scale, int64_t b0, int64_t b1,
                int64_t o0, int64_t o1) {
    Buffer<> scratch(scaled_scratch(s.inputs, 1));
    for (int64_t b = b0; b < b1; ++b)
        for (int64_t o = o0; o < o1; o += N) {
            float* row = y + b * s.outputs;
            const int n = (int)std::min<int64_t>(N, o1 - o);
            const Vec sums = Vec::load(row + o, n);
            const uint32_t good = Vec::at_least(sums, Vec::all(LOW)) & Vec::at_least(Vec::all(HIGH), sums);
            const Vec root = k.p == 1 ? sums : k.p == 2 ? Vec::sqrt(sums) : exp2_of(log2_of(sums) * Vec::all(1 / k.p));
            (root * Vec::all(1 / scale)).store(row + o, n);
            for (int c = 0; c < n; ++c)
                if (!(good >> c & 1))
                    scaled_tile<1, 1>(x + b * s.inputs, w + (o + c) * s.inputs, s.inputs, k, LogPower{Vec::all(k.p)}, row + o + c, 1,
                                      scratch.data());
        }
}

void forward(const float* x, const float* w, float* y, Shape s, double p, int threads) {
    if (s.terms() == 0) return;
    if (std::isinf(p)) {
        if (s.samples >= LEAST_ROWS && s.outputs >= N)
            outer_largest(x, w, y, nullptr, s, threads_for(threads, s.terms()));
        else
            over_plane(threads, s, [&](auto... range) { direct_block<Largest>(x, w, y, s, 1.0f, range...); });
    } else {
        const Scaled k(p, s.inputs);
        const bool direct = with_direct(p, [&](auto term) {
            using Term = decltype(term);
            const auto largest_of_pair = [&](int64_t at) {
                float value = 0;
                direct_tile<Largest, 1, 1>(x + at / s.outputs * s.inputs, w + at % s.outputs * s.inputs, s.inputs,
                                           s.inputs, 1.0f, true, &value, 1);
                return value;
            };
            const float scale = Term::scaled ? scale_for(s.samples * s.outputs, largest_of_pair) : 1.0f;
            over_plane(threads, s, [&](auto... range) {
                direct_block<Term>(x, w, y, s, scale, range...);
                take_roots(x, w, y, s, k, scale, range...);
            });
        });
        if (!direct)
            with_power(p, [&](auto raise) {
                over_plane(threads, s, [&](auto... range) { scaled_block(x, w, y, s, k, raise, range...); });
            });
    }
    add_poison(x, w, y, s);
}

// Computes distances at p = inf, and the first block of inputs with the largest term.
void forward_with_blocks(const float* x, const float* w, float* y, int32_t* blocks, Shape s, int threads) {
    if (s.terms() == 0) return;
    outer_largest(x, w, y, blocks, s, threads_for(threads, s.terms()));
    add_poison(x, w, y, s);
}

}  // namespace
