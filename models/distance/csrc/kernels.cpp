// The l_p-distance operator in float32 on CPUs. Compiled once per instruction set; see vector.h.
//
// Vectors run along the inputs i, so inputs and weights are read as they lie in memory. Values: a tile of a few samples
// times a few outputs is held in registers while i runs. Two ways to a finite p:
//
//   direct  p a small integer: u^p by repeated squaring, no scaling. Right while the sum stays in the range of floats;
//           outputs where it does not are computed again the other way.
//   scaled  any p: first the largest term m, keeping the maxima of groups of vectors; then (|d|/m)^p = 2^(p log2(|d|/m))
//           for those terms alone that can change the sum. The larger p, the fewer these are.
//
// Gradients: every thread owns a range of inputs i, and therefore its columns of both gradients: one pass serves both,
// without sharing. Nothing that is computed depends on the number of threads.
#include "vector.h"

#include <atomic>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include <pybind11/pybind11.h>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

constexpr int N = Vec::size;
constexpr int GROUP = 4;                         // vectors whose maximum is kept together
constexpr int RB = 4, RO = N == 16 ? 4 : 2;      // a tile: samples times outputs
constexpr int64_t SLICE = 1024;                  // inputs of a tile at a time: four rows of a sample fit into level 1
constexpr int64_t OUTPUT_BLOCK = 32;             // outputs whose slices stay in level 2 while the samples pass
constexpr float LOW = 0x1p-90f, HIGH = 0x1p120f; // a direct sum in here has lost nothing that counts

// While it lives, denormals are flushed to zero, or kept. Powers of small ratios are denormal, hence slow, long before
// they matter; of bounds, the smallest difference counts.
class Denormals {
#if defined(__SSE__)
    static constexpr unsigned FLUSHED = 0x8040;
    unsigned before = _mm_getcsr();

  public:
    explicit Denormals(bool flush) { _mm_setcsr(flush ? before | FLUSHED : before & ~FLUSHED); }
    ~Denormals() { _mm_setcsr(before); }
#else
  public:
    explicit Denormals(bool) {}
#endif
};

// Numbers that begin at a cache line, so that no vector of them lies across two.
template <class T = float>
class Buffer {
    std::unique_ptr<T[]> storage;

  public:
    explicit Buffer(int64_t n) : storage(new T[n + 64 / sizeof(T)]) {}
    T* data() { return storage.get() + (-reinterpret_cast<uintptr_t>(storage.get()) & 63) / sizeof(T); }
};

struct Threads {
    int all, useful;  // all that may run, and how many there is work for
};

// Runs job on several threads at once. Where torch has brought the OpenMP library of GCC, they are its threads: those
// spin for a while after every matrix product, and would keep the cores from others. Give it as many as torch does, be
// there work for them or not: the library ends threads that a call leaves out, and starts them anew for the next.
template <class F>
void on_threads(int threads, F job) {
    using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);
    static const auto region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    if (threads == 1) {
        job();
    } else if (region) {
        region([](void* data) { (*static_cast<F*>(data))(); }, &job, (unsigned)threads, 0);
    } else {
        std::vector<std::thread> others;
        for (int k = 1; k < threads; ++k) others.emplace_back(job);
        job();
        for (auto& other : others) other.join();
    }
}

// work(begin, end) on parts of [0, items) that are multiples of `grain`, on as many threads as are useful.
template <class F>
void parallel(Threads threads, int64_t items, int64_t grain, F work) {
    const int64_t grains = (items + grain - 1) / grain;
    const int parts = (int)std::max<int64_t>(1, std::min<int64_t>(threads.useful, grains));
    std::atomic<int> next{0};
    std::exception_ptr failure;  // for want of memory: it must not pass through the OpenMP library
    std::mutex guard;
    on_threads(parts == 1 ? 1 : threads.all, [&] {
        const Denormals flushed(true);
        try {
            for (int part; (part = next++) < parts;) {
                const int64_t begin = grains * part / parts * grain, end = grains * (part + 1) / parts * grain;
                work(begin, std::min(end, items));
            }
        } catch (...) {
            const std::lock_guard<std::mutex> lock(guard);
            failure = std::current_exception();
        }
    });
    if (failure) std::rethrow_exception(failure);
}

Threads threads_for(int threads, double terms) {  // waking a thread costs about as much as 200 thousand cheap terms
    return {threads, (int)std::min<double>(threads, 1 + terms / 2e5)};
}

// ---------------------------------------------------------------------------------------------------- powers

// Several vectors go side by side, so that a constant is loaded once for all and one's steps fill the other's waits.

template <int K>
inline void log2_of(Vec (&a)[K]) {  // relative error below 3e-7 for positive normal a; finite for others
    // fit of log2(1 + f) / f on [-0.25, 0.5], by least squares at Chebyshev points
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
    // the same kind of fit of 2^f on [-0.5, 0.5]
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

// u^power for u in [0, 1], or 2^-126 where that is less.
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

// How dense sums and slopes raise numbers u of [0, 1] to a power: by logarithms ...
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

// ... or, in half the instructions, as u^n times a polynomial that is near u^(exponent - n) where u^n is not small.
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

// The coefficients of the polynomial of degree 7, by least squares with weights u^(0.6 n): the error of u^exponent, in all,
// is below 2^-22, and far below that where u is small.
void fit_power(double exponent, int base, float (&c)[8]) {
    constexpr int POINTS = 128, DEGREE = 7;
    double q[DEGREE + 1][POINTS], target[POINTS], inverse[DEGREE + 1][DEGREE + 1] = {};
    for (int k = 0; k < POINTS; ++k) {
        const double u = 0.5 + 0.5 * std::cos(M_PI * (k + 0.5) / POINTS), weight = std::pow(u, 0.6 * base);
        target[k] = std::pow(u, exponent - base) * weight;
        for (int j = 0; j <= DEGREE; ++j) q[j][k] = std::cos(j * M_PI * (k + 0.5) / POINTS) * weight;
    }
    // modified Gram-Schmidt, twice over; inverse[j] are the Chebyshev coefficients of q[j]
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
    // Chebyshev polynomials in 2 u - 1 to powers of u
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

constexpr double LARGEST_FIT = 40;  // beyond, so few terms count that looking for them is faster

// Calls f with what raises to this power.
template <class F>
void with_power(double exponent, F f) {
    float c[8];
    // below 8 small ratios count as well, and the fit is not exact enough for them
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

// What a direct tile accumulates over the differences d. Where `scaled`, in the forward pass inputs and weights are first
// multiplied by a power of two that brings typical distances near 1, for else too many sums would leave the range of
// floats.
struct Largest {
    static constexpr bool scaled = false;
    static Vec add(Vec acc, Vec d) { return Vec::max_positive(Vec::abs(d), acc); }
    // Two terms, in four instructions that keep adders and multipliers alike busy.
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

// Calls f with SumOfPowers<p> where p is an integer whose direct sum pays; returns whether it did.
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

// ---------------------------------------------------------------------------------------------------- values

struct Shape {
    int64_t samples, outputs, inputs;
    double terms() const { return (double)samples * outputs * inputs; }
};

// As many outputs as keep their weights on these inputs in level 2.
int64_t block_of(int64_t inputs) { return std::max<int64_t>(2, std::min<int64_t>(OUTPUT_BLOCK, 32 * SLICE / inputs)); }

// Calls f(first sample, samples, first output, outputs) for tiles that cover [b0, b1) x [o0, o1): RB x RO, and narrower
// ones at the edges. f is a generic lambda that takes the tile's size as integral constants.
template <int TB, int TO, class F>
void tiles(int64_t b0, int64_t b1, int64_t o0, int64_t o1, F f) {
    using std::integral_constant;
    int64_t b = b0;
    for (; b + TB <= b1; b += TB) {
        int64_t o = o0;
        for (; o + TO <= o1; o += TO) f(b, o, integral_constant<int, TB>(), integral_constant<int, TO>());
        for (; o < o1; ++o) f(b, o, integral_constant<int, TB>(), integral_constant<int, 1>());
    }
    for (; b < b1; ++b) {
        int64_t o = o0;
        for (; o + TO <= o1; o += TO) f(b, o, integral_constant<int, 1>(), integral_constant<int, TO>());
        for (; o < o1; ++o) f(b, o, integral_constant<int, 1>(), integral_constant<int, 1>());
    }
}

// Runs f(b0, b1, o0, o1) on threads that share the (samples, outputs) plane along its longer side.
template <class F>
void over_plane(int threads, Shape s, F f) {
    const Threads useful = threads_for(threads, s.terms());
    if (s.outputs >= s.samples)
        parallel(useful, s.outputs, 8, [&](int64_t o0, int64_t o1) { f(0, s.samples, o0, o1); });
    else
        parallel(useful, s.samples, 8, [&](int64_t b0, int64_t b1) { f(b0, b1, 0, s.outputs); });
}

// A one that the compiler does not know, lest it turn `minus` into a subtraction.
inline Vec hidden_one() {
    Vec one = Vec::all(1.0f);
#if defined(__AVX2__)
    asm("" : "+x"(one.v));
#endif
    return one;
}

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

struct Scaled {  // constants of the scaled way to p
    float p, ratio;  // terms below ratio times the largest are too small to count
    bool dense;      // most terms count: then looking for them costs more than it saves

    Scaled(double p, int64_t inputs) : p((float)p) {
        // I terms of 2^-bits each change y by I 2^-bits / p at most
        const double bits = 24 + std::max(0.0, std::log2((double)inputs / p));
        ratio = (float)std::exp2(-bits / p);
        dense = p < LARGEST_FIT;
    }
};

// The sum of (|x_i - w_i| / m)^p, of all terms.
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
    for (; i < n; i += N) {  // differences beyond the end are 0, and so are their powers
        const int left = (int)std::min<int64_t>(N, n - i);
        Vec u[] = {Vec::abs(Vec::load(x + i, left) - Vec::load(w + i, left)) * scale};
        raise(u);
        total[0] = total[0] + u[0];
    }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

constexpr int WINDOW = 64 / N;  // groups whose masks make one word: bit g N + l stands for lane l of group g

// Appends to `found` the differences, times `factor`, at the marked lanes of a window of groups that begins at i, where
// |d| >= least; `where`, if given, gets their positions. Returns the new count. Branches on the word alone, since whether a single
// term counts is hard to predict.
inline int64_t collect(uint64_t word, const float* x, const float* w, int64_t i, int64_t end, float least,
                       float factor, int64_t count, float* found, int32_t* where) {
    for (; word; word &= word - 1) {
        const int bit = __builtin_ctzll(word);
        const int64_t first = i + bit / N * GROUP * N + bit % N;
        for (int v = 0; v < GROUP; ++v) {
            const int64_t at = first + v * N;
            if (at >= end) break;
            const float d = x[at] - w[at];
            found[count] = d * factor;
            if (where) where[count] = (int32_t)at;
            count += std::fabs(d) >= least;
        }
    }
    return count;
}

// The largest |x_i - w_i| in each lane of the G vectors at i, for every pair of a tile.
template <int G, int TB, int TO>
inline void largest_of_group(const float* x, const float* w, int64_t stride, int64_t i, int64_t end, Vec one,
                             Vec (&most)[TB * TO]) {
    const auto group = [&](auto load) {
        for (int v = 0; v < G; v += 2) {
            Vec w0[TO], w1[TO];
            for (int c = 0; c < TO; ++c) w0[c] = load(w + c * stride, v), w1[c] = load(w + c * stride, v + 1);
            for (int r = 0; r < TB; ++r) {
                const Vec x0 = load(x + r * stride, v), x1 = load(x + r * stride, v + 1);
                for (int c = 0; c < TO; ++c) {
                    const Vec two = Vec::max_abs(x0 - w0[c], Vec::minus(x1, w1[c], one));
                    Vec& so_far = most[r * TO + c];
                    so_far = v ? Vec::max_positive(two, so_far) : two;
                }
            }
        }
    };
    if (i + G * N <= end)
        group([=](const float* p, int v) { return Vec::load(p + i + v * N); });
    else  // differences beyond the end are 0
        group([=](const float* p, int v) {
            const int64_t left = end - i - v * N;
            return left > 0 ? Vec::load(p + i + v * N, (int)std::min<int64_t>(N, left)) : Vec::all(0.0f);
        });
}

// A tile by the scaled way, for all its pairs of sample and output together: their steps depend on one another, and
// overlap only with those of other pairs.
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

// Floats that scaled_tile needs: maxima of the groups, and all terms if all count.
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

// y holds sums of p-th powers: take the p-th root, or compute anew where the sum left the range of floats.
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

// 0 for every row of finite numbers, NaN for others: maxima do not carry NaN along, so it is added to what they give.
std::vector<float> poison_of(const float* rows, int64_t count, int64_t n) {
    std::vector<float> poison(count);
    for (int64_t r = 0; r < count; ++r) {
        Vec acc = Vec::all(0.0f);
        int64_t i = 0;
        for (; i + N <= n; i += N) acc = Vec::fma(Vec::load(rows + r * n + i), Vec::all(0.0f), acc);
        if (i < n) acc = Vec::fma(Vec::load(rows + r * n + i, (int)(n - i)), Vec::all(0.0f), acc);
        poison[r] = sum(acc);
    }
    return poison;
}

void add_poison(const float* x, const float* w, float* y, Shape s) {
    const auto of_x = poison_of(x, s.samples, s.inputs), of_w = poison_of(w, s.outputs, s.inputs);
    const auto bad = [](float a) { return a != a; };
    if (std::none_of(of_x.begin(), of_x.end(), bad) && std::none_of(of_w.begin(), of_w.end(), bad)) return;
    for (int64_t b = 0; b < s.samples; ++b)
        for (int64_t o = 0; o < s.outputs; ++o) y[b * s.outputs + o] += of_x[b] + of_w[o];
}

// The power of two that brings a typical one of `count` positive numbers near 1, going by a few of them.
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

void forward(const float* x, const float* w, float* y, Shape s, double p, int threads) {
    if (s.terms() == 0) return;
    if (std::isinf(p)) {
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

// ---------------------------------------------------------------------------------------------------- gradients

constexpr int CHUNK = 8;  // vectors of inputs that are worked on together

struct Gradients {
    const float *x, *w, *y, *grad_y;
    float *grad_x, *grad_w;  // zero at first
    Shape s;
};

// Numbers of pairs are packed in the order in which all_gradients takes them: by blocks of outputs, then by samples.
struct Packed {
    const Shape s;

    int64_t width(int64_t o0) const { return std::min(OUTPUT_BLOCK, s.outputs - o0); }
    // of the pair of sample b and the first output of a block; its other outputs follow
    int64_t at(int64_t b, int64_t o0) const { return o0 * s.samples + b * width(o0); }
    // Calls f(place, pair, n) for up to N neighbours at a time; pair: b outputs + o.
    template <class F>
    void each(F f) const {
        for (int64_t o0 = 0; o0 < s.outputs; o0 += OUTPUT_BLOCK)
            for (int64_t b = 0; b < s.samples; ++b)
                for (int64_t c = 0; c < width(o0); c += N)
                    f(at(b, o0) + c, b * s.outputs + o0 + c, (int)std::min<int64_t>(N, width(o0) - c));
    }
};

// How differences d of what `before` makes of inputs and weights become gradients grad_y slope(d), for TB samples of one
// output; `at` is the place of the first of them, and from one to the next it is `stride`. By multiplications alone ...
template <class T>
struct DirectSlope {
    const float* coefficient;  // grad_y (scale y)^(1 - p), packed
    float scale;

    Vec before(Vec v) const { return v * Vec::all(scale); }
    template <int TB>
    void operator()(Vec (&d)[TB], int64_t at, int64_t stride) const {
        for (int r = 0; r < TB; ++r) d[r] = Vec::all(coefficient[at + r * stride]) * T::slope(d[r]);
    }
};

// ... or, for any p, as grad_y sign(d) (|d| / y)^(p - 1).
template <class Power>
struct DenseSlope {
    const float *grad_y, *inverse;  // inverse: 1 / y; both packed
    Power raise;

    Vec before(Vec v) const { return v; }
    template <int TB>
    void operator()(Vec (&d)[TB], int64_t at, int64_t stride) const {
        Vec u[TB];
        for (int r = 0; r < TB; ++r) u[r] = Vec::abs(d[r]) * Vec::all(inverse[at + r * stride]);
        raise(u);
        for (int r = 0; r < TB; ++r) d[r] = Vec::with_sign(u[r], d[r]) * Vec::all(grad_y[at + r * stride]);
    }
};

constexpr int64_t SAMPLE_BLOCK = 512;  // samples whose chunks stay in level 2

// One vector of inputs, TB samples from `place` on, a block of outputs: gradients are added to gx and taken from gw.
// From one sample or output to the next it is `stride`.
template <int TB, class Slope>
void add_gradients(const float* x, float* gx, const float* w, float* gw, int64_t stride, Slope slope, int64_t place,
                   int64_t outputs) {
    Vec xv[TB], gxv[TB];
    for (int r = 0; r < TB; ++r) {
        xv[r] = Vec::load(x + r * stride);
        gxv[r] = Vec::load(gx + r * stride);
    }
    for (int64_t o = 0; o < outputs; ++o) {
        const Vec wv = Vec::load(w + o * stride);
        Vec gwv = Vec::load(gw + o * stride);
        Vec g[TB];
        for (int r = 0; r < TB; ++r) g[r] = xv[r] - wv;
        slope(g, place + o, outputs);
        for (int r = 0; r < TB; ++r) {
            gxv[r] = gxv[r] + g[r];
            gwv = gwv - g[r];
        }
        gwv.store(gw + o * stride);
    }
    for (int r = 0; r < TB; ++r) gxv[r].store(gx + r * stride);
}

// All samples and outputs, a chunk of inputs from begin to end. The chunk is copied, padded by zeros whose gradients are
// zero: rows that lie a power of two apart would drive one another out of the caches.
template <class Slope>
void all_gradients(const Gradients& q, Slope slope, int64_t begin, int64_t end) {
    const int64_t inputs = q.s.inputs, stride = (end - begin + N - 1) / N * N;
    const int64_t most = std::min(SAMPLE_BLOCK, q.s.samples);
    Buffer<> xs(most * stride), gxs(most * stride), ws(OUTPUT_BLOCK * stride), gws(OUTPUT_BLOCK * stride);
    float *x = xs.data(), *gx = gxs.data(), *w = ws.data(), *gw = gws.data();
    const auto each = [&](int64_t rows, auto f) {  // f(place of the copy, place of the original, n)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < end - begin; i += N)
                f(r * stride + i, r * inputs + begin + i, (int)std::min<int64_t>(N, end - begin - i));
    };
    const auto load = [&](const float* from, int64_t rows, float* to, float* gradients) {
        each(rows, [&](int64_t copy, int64_t original, int n) {
            slope.before(Vec::load(from + original, n)).store(to + copy);
            Vec::all(0.0f).store(gradients + copy);
        });
    };
    const auto add = [&](const float* gradients, int64_t rows, float* to) {
        each(rows, [&](int64_t copy, int64_t original, int n) {
            (Vec::load(to + original, n) + Vec::load(gradients + copy)).store(to + original, n);
        });
    };
    const Packed pairs{q.s};
    for (int64_t b0 = 0; b0 < q.s.samples; b0 += SAMPLE_BLOCK) {
        const int64_t samples = std::min(SAMPLE_BLOCK, q.s.samples - b0);
        load(q.x + b0 * inputs, samples, x, gx);
        for (int64_t o0 = 0; o0 < q.s.outputs; o0 += OUTPUT_BLOCK) {
            const int64_t outputs = pairs.width(o0);
            load(q.w + o0 * inputs, outputs, w, gw);
            const auto tile = [&](auto nb, int64_t b) {
                for (int64_t i = 0; i < stride; i += N)
                    add_gradients<decltype(nb)::value>(x + b * stride + i, gx + b * stride + i, w + i, gw + i, stride,
                                                       slope, pairs.at(b0 + b, o0), outputs);
            };
            int64_t b = 0;
            for (; b + RB <= samples; b += RB) tile(std::integral_constant<int, RB>(), b);
            for (; b < samples; ++b) tile(std::integral_constant<int, 1>(), b);
            add(gw, outputs, q.grad_w + o0 * inputs);
        }
        add(gx, samples, q.grad_x + b0 * inputs);
    }
}

struct ScaledSlope {  // constants of sign(d) (|d| / y)^(p - 1)
    float power, ratio;  // terms below ratio times y are too small to count
    bool dense;

    ScaledSlope(double p, int64_t inputs) : power((float)(p - 1)) {
        const double bits = 26 + 0.5 * std::log2((double)inputs);  // what is left out adds up in the Euclidean norm
        ratio = p > 1 ? (float)std::exp2(-bits / (p - 1)) : 0.0f;
        dense = p < LARGEST_FIT;
    }
};

struct Found {  // differences that count, and where they are
    Buffer<float> d, slope;
    Buffer<int32_t> where;

    explicit Found(int64_t n) : d(n + 1), slope(n + 1 + N), where(n + 1) {}
};

// A tile of samples and outputs, on inputs from begin to end; `found` is one for every pair.
template <int TB, int TO>
void sparse_gradient(const Gradients& q, ScaledSlope k, int64_t b, int64_t o, int64_t begin, int64_t end,
                     Found* found) {
    constexpr int PAIRS = TB * TO;
    const int64_t n = q.s.inputs;
    const float *x = q.x + b * n, *w = q.w + o * n;
    const auto at = [&](int pair) { return (b + pair / TO) * q.s.outputs + o + pair % TO; };
    float least[PAIRS];
    int64_t count[PAIRS] = {};
    const Vec one = hidden_one();
    for (int pair = 0; pair < PAIRS; ++pair)
        least[pair] = std::max(q.y[at(pair)] * k.ratio, std::numeric_limits<float>::min());
    for (int64_t i = begin; i < end; i += WINDOW * GROUP * N) {
        uint64_t words[PAIRS] = {};
        for (int g = 0; g < WINDOW && i + g * GROUP * N < end; ++g) {
            Vec most[PAIRS];
            largest_of_group<GROUP, TB, TO>(x, w, n, i + g * GROUP * N, end, one, most);
            for (int pair = 0; pair < PAIRS; ++pair)
                words[pair] |= (uint64_t)Vec::at_least(most[pair], Vec::all(least[pair])) << (g * N);
        }
        for (int pair = 0; pair < PAIRS; ++pair)
            count[pair] = collect(words[pair], x + pair / TO * n, w + pair % TO * n, i, end, least[pair], 1.0f,
                                  count[pair], found[pair].d.data(), found[pair].where.data());
    }
    for (int pair = 0; pair < PAIRS; ++pair) {
        const Vec y = Vec::all(q.y[at(pair)]), gradient = Vec::all(q.grad_y[at(pair)]);
        float* slope = found[pair].slope.data();
        const int32_t* where = found[pair].where.data();
        for (int64_t j = 0; j < count[pair]; j += N) {
            const Vec d = Vec::load(found[pair].d.data() + j, (int)std::min<int64_t>(N, count[pair] - j));
            const Vec ratio = Vec::min(Vec::abs(d) / y, Vec::all(1.0f));
            const Vec magnitude = to_the_power(ratio, Vec::all(k.power));
            (gradient * Vec::with_sign(magnitude, d)).store(slope + j);
        }
        float *gx = q.grad_x + (b + pair / TO) * n, *gw = q.grad_w + (o + pair % TO) * n;
        for (int64_t j = 0; j < count[pair]; ++j) {
            const int32_t i = where[j];
            gx[i] += slope[j];
            gw[i] -= slope[j];
        }
    }
}

void sparse_gradients(const Gradients& q, ScaledSlope k, int64_t begin, int64_t end) {
    std::vector<Found> found;
    for (int pair = 0; pair < RB * 2; ++pair) found.emplace_back(end - begin);
    const int64_t block = block_of(end - begin);
    for (int64_t o = 0; o < q.s.outputs; o += block)
        tiles<RB, 2>(0, q.s.samples, o, std::min(o + block, q.s.outputs), [&](int64_t b, int64_t to, auto nb, auto no) {
            sparse_gradient<decltype(nb)::value, decltype(no)::value>(q, k, b, to, begin, end, found.data());
        });
}

// The gradient of a pair at p = inf: `slope` at `input`, nothing elsewhere.
struct Slope {
    int32_t input;
    float slope;
};

// For every pair of a tile the first input whose |d| is y. Without branches, which could not be predicted.
template <int TB, int TO>
void find_largest(const Gradients& q, int64_t b, int64_t o, Slope (&found)[TB * TO]) {
    constexpr int PAIRS = TB * TO;
    const int64_t n = q.s.inputs, step = 2 * N;
    const float *x = q.x + b * n, *w = q.w + o * n;
    const auto at = [&](int pair) { return (b + pair / TO) * q.s.outputs + o + pair % TO; };
    const Vec one = hidden_one();
    Vec sought[PAIRS], group[PAIRS];  // by lane: the first group in which y was found
#pragma GCC unroll 8
    for (int pair = 0; pair < PAIRS; ++pair) {
        const float y = q.y[at(pair)];
        sought[pair] = Vec::all(y > 0 ? y : -1.0f);
        group[pair] = Vec::all(-1.0f);
    }
    for (int64_t g = (n - 1) / step; g >= 0; --g) {
        Vec most[PAIRS];
        largest_of_group<2, TB, TO>(x, w, n, g * step, n, one, most);
#pragma GCC unroll 8
        for (int pair = 0; pair < PAIRS; ++pair)
            group[pair] = Vec::where_same(most[pair], sought[pair], Vec::all((float)g), group[pair]);
    }
    float groups[PAIRS][N];
#pragma GCC unroll 8
    for (int pair = 0; pair < PAIRS; ++pair) group[pair].store(groups[pair]);
    for (int pair = 0; pair < PAIRS; ++pair) {
        const float y = q.y[at(pair)];
        uint32_t lanes = Vec::at_least(Vec::load(groups[pair]), Vec::all(0.0f));
        uint32_t first = lanes ? -1 : 0;  // twice its position, plus one where d is negative
        found[pair].slope = lanes ? q.grad_y[at(pair)] : 0.0f;  // none where y is 0, or not a number
        for (; lanes; lanes &= lanes - 1) {  // once, but for ties
            const int lane = __builtin_ctz(lanes);
            const int64_t base = (int64_t)groups[pair][lane] * step + lane;
            for (int v = 0; v < 2; ++v) {
                const int64_t i = std::min(base + v * N, n - 1);
                const float d = x[pair / TO * n + i] - w[pair % TO * n + i];
                const uint32_t missed = 0u - (std::fabs(d) != y);
                first = std::min(first, (uint32_t)(2 * i + std::signbit(d)) | missed);
            }
        }
        found[pair].input = (int32_t)(first >> 1);
        found[pair].slope *= (float)(1 - 2 * (int32_t)(first & 1));
    }
}

// p = inf. Slopes are kept between the two gradients, by output: then the rows of grad_w are worked on one after another.
void largest_gradients(const Gradients& q, Threads threads) {
    const Shape s = q.s;
    const int64_t n = s.inputs, block = block_of(n);
    std::vector<Slope> slopes(s.samples * s.outputs);
    parallel(threads, s.samples, RB, [&](int64_t b0, int64_t b1) {
        for (int64_t o = 0; o < s.outputs; o += block)
            tiles<RB, 2>(b0, b1, o, std::min(o + block, s.outputs), [&](int64_t tb, int64_t to, auto nb, auto no) {
                constexpr int TB = decltype(nb)::value, TO = decltype(no)::value;
                Slope found[TB * TO];
                find_largest<TB, TO>(q, tb, to, found);
                for (int pair = 0; pair < TB * TO; ++pair) {
                    const int64_t b = tb + pair / TO, to_pair = to + pair % TO;
                    q.grad_x[b * n + found[pair].input] += found[pair].slope;
                    slopes[to_pair * s.samples + b] = found[pair];
                }
            });
    });
    parallel(threads, s.outputs, 1, [&](int64_t o0, int64_t o1) {
        for (int64_t o = o0; o < o1; ++o)
            for (int64_t b = 0; b < s.samples; ++b) {
                const Slope at = slopes[o * s.samples + b];
                q.grad_w[o * n + at.input] -= at.slope;
            }
    });
}

// The ways to gradients at finite p, where all pairs use all inputs.
struct InputsAlike {
    const Gradients& q;
    Threads threads;

    // by a slope for all pairs and inputs
    template <class Slope>
    void all(Slope slope) const {
        // as long chunks as keep all threads at work
        const int64_t vectors = (q.s.inputs + N - 1) / N;
        const int64_t chunk = N * std::max<int64_t>(1, std::min<int64_t>(CHUNK, vectors / threads.useful));
        parallel(threads, q.s.inputs, chunk, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i += chunk) all_gradients(q, slope, i, std::min(i + chunk, end));
        });
    }

    // of the terms that count, of all pairs ...
    void sparse(ScaledSlope k) const {
        parallel(threads, q.s.inputs, N, [&](int64_t begin, int64_t end) { sparse_gradients(q, k, begin, end); });
    }

    // ... or of some
    void sparse(ScaledSlope k, const std::vector<int64_t>& pairs) const {
        parallel(threads, q.s.inputs, N, [&](int64_t begin, int64_t end) {
            Found found(end - begin);
            for (const int64_t at : pairs)
                sparse_gradient<1, 1>(q, k, at / q.s.outputs, at % q.s.outputs, begin, end, &found);
        });
    }
};

// `scratch` (samples x outputs) holds coefficients.
template <class Inputs>
void finite_gradients(const Gradients& q, float* scratch, double p, const Inputs& inputs) {
    const Shape s = q.s;
    const ScaledSlope k(p, s.inputs);
    const int64_t pairs = s.samples * s.outputs;
    std::vector<int64_t> others;  // pairs for which the powers leave the range of floats ...
    bool wild = false;            // ... too many, or upwards, where zero times infinity would spoil sums
    const bool direct = with_direct(p, [&](auto term) {
        const Denormals flushed(true);
        const float scale = scale_for(pairs, [&](int64_t at) { return q.y[at]; });
        Packed{s}.each([&](int64_t place, int64_t pair, int n) {
            const Vec bits = Vec::all(k.power) * log2_of(Vec::load(q.y + pair, n) * Vec::all(scale));
            const Vec grad_y = Vec::load(q.grad_y + pair, n);
            const Vec coefficient = grad_y * exp2_of(Vec::all(0.0f) - bits);
            // a coefficient so small that it may have been flushed, of a gradient that is not zero, is lost
            const uint32_t kept = Vec::at_least(Vec::abs(coefficient), Vec::all(0x1p-100f)) |
                                  Vec::at_least(Vec::all(0.0f), Vec::abs(grad_y));
            const uint32_t good = Vec::at_least(Vec::all(80.0f), Vec::abs(bits)) & kept;
            wild |= Vec::at_least(bits, Vec::all(126.0f)) != 0;
            Vec::keep(good, coefficient).store(scratch + place, n);
            for (int c = 0; c < n; ++c)
                if (!(good >> c & 1) && q.y[pair + c] > 0) others.push_back(pair + c);
        });
        wild |= (int64_t)others.size() > pairs / 8;
        if (!wild) inputs.all(DirectSlope<decltype(term)>{scratch, scale});
    });
    if (direct && !wild) {
        inputs.sparse(k, others);
    } else if (k.dense) {
        std::vector<float> grad_y(pairs);
        Packed{s}.each([&](int64_t place, int64_t pair, int n) {
            for (int c = 0; c < n; ++c) {
                grad_y[place + c] = q.grad_y[pair + c];
                scratch[place + c] = q.y[pair + c] > 0 ? 1 / q.y[pair + c] : 0.0f;
            }
        });
        with_power(k.power, [&](auto raise) {
            inputs.all(DenseSlope<decltype(raise)>{grad_y.data(), scratch, raise});
        });
    } else {
        inputs.sparse(k);
    }
}

void backward(const Gradients& q, float* scratch, double p, int threads) {
    if (q.s.terms() == 0) return;
    const Threads useful = threads_for(threads, q.s.terms());
    if (std::isinf(p))
        largest_gradients(q, useful);
    else
        finite_gradients(q, scratch, p, InputsAlike{q, useful});
}

// ---------------------------------------------------------------------------------------------------- bounds

// The exact range of max_i |x_i - w_i| over the box lower <= x <= upper. Coordinates move freely, so the largest value
// is the largest of |u - w| and |l - w|, the smallest the largest of l - w, w - u and 0.
template <int TB, int TO>
void bounds_tile(const float* lower, const float* upper, const float* w, int64_t n, float* lo, float* hi,
                 int64_t y_stride) {
    const Vec one = hidden_one();
    Vec high[TB][TO], low[TB][TO];
    for (int r = 0; r < TB; ++r)
        for (int c = 0; c < TO; ++c) high[r][c] = low[r][c] = Vec::all(0.0f);
    const auto vector = [&](int64_t i, auto load) {
        Vec wv[TO];
        for (int c = 0; c < TO; ++c) wv[c] = load(w + c * n + i);
        for (int r = 0; r < TB; ++r) {
            const Vec u = load(upper + r * n + i), l = load(lower + r * n + i);
            for (int c = 0; c < TO; ++c) {
                const Vec below = l - wv[c], above = Vec::minus(wv[c], u, one);  // where positive, how far w is outside
                high[r][c] = Vec::max_positive(Vec::max_abs(below, above), high[r][c]);
                low[r][c] = Vec::max_positive(above, Vec::max_positive(below, low[r][c]));
            }
        }
    };
    int64_t i = 0;
    for (; i + N <= n; i += N) vector(i, [](const float* p) { return Vec::load(p); });
    if (i < n) vector(i, [=](const float* p) { return Vec::load(p, (int)(n - i)); });  // differences beyond the end are 0
    for (int r = 0; r < TB; ++r)
        for (int c = 0; c < TO; ++c) {
            hi[r * y_stride + c] = largest(high[r][c]);
            lo[r * y_stride + c] = largest(low[r][c]);
        }
}

void bounds(const float* lower, const float* upper, const float* w, float* lo, float* hi, Shape s, int threads) {
    constexpr int TB = N == 16 ? 2 : 1;
    over_plane(threads, s, [&](int64_t b0, int64_t b1, int64_t o0, int64_t o1) {
        const Denormals kept(false);
        const int64_t block = block_of(s.inputs);
        for (int64_t o = o0; o < o1; o += block)
            tiles<TB, 2>(b0, b1, o, std::min(o + block, o1), [&](int64_t tb, int64_t to, auto nb, auto no) {
                bounds_tile<decltype(nb)::value, decltype(no)::value>(lower + tb * s.inputs, upper + tb * s.inputs,
                                                                      w + to * s.inputs, s.inputs,
                                                                      lo + tb * s.outputs + to,
                                                                      hi + tb * s.outputs + to, s.outputs);
            });
    });
    for (float* y : {lo, hi})
        for (const float* x : {lower, upper}) add_poison(x, w, y, s);
}

}  // namespace

#include "sort.h"
#include "subsets.h"

namespace {

// ---------------------------------------------------------------------------------------------------- limits

// The compiler must take v for changed.
void renew(Vec& v) {
#if defined(__AVX2__)
    asm volatile("" : "+x"(v.v));
#else
    asm volatile("" : : "g"(&v) : "memory");
#endif
}

// How fast this core runs the arithmetic of a kernel with all operands in registers: terms |x_i - w_i| done.
template <class T, bool GRADIENT>
int64_t run_in_registers(int64_t rounds) {
    const Denormals flushed(true);
    const Vec one = hidden_one();
    Vec x[4], acc[4][2], w[2];
    for (int r = 0; r < 4; ++r) {
        x[r] = Vec::all(0.1f * (float)r);
        acc[r][0] = acc[r][1] = Vec::all(0.0f);
    }
    w[0] = w[1] = Vec::all(0.7f);
    for (int64_t k = 0; k < rounds; ++k) {
        renew(w[0]);
        renew(w[1]);
        for (int c = 0; c < 2; ++c)
            for (int r = 0; r < 4; ++r) {
                if constexpr (GRADIENT) {  // acc[r][1] stands for grad_w
                    const Vec g = x[r] * T::slope(x[r] - w[c]);
                    acc[r][0] = acc[r][0] + g;
                    acc[c][1] = acc[c][1] - g;
                } else if constexpr (std::is_same_v<T, Largest>) {
                    acc[r][c] = T::add(acc[r][c], x[r], w[c], x[r], w[1 - c], one);
                } else {
                    acc[r][c] = T::add(acc[r][c], x[r] - w[c]);
                }
            }
    }
    for (auto& row : acc)
        for (auto& a : row) renew(a);
    return rounds * 8 * N * (std::is_same_v<T, Largest> ? 2 : 1);
}

// The same for what a matrix product does: products x_i w_i added up.
int64_t multiply_in_registers(int64_t rounds) {
    Vec acc[8], w = Vec::all(0.7f);
    const Vec x = hidden_one();
    for (auto& a : acc) a = Vec::all(0.0f);
    for (int64_t k = 0; k < rounds; ++k) {
        renew(w);
        for (auto& a : acc) a = Vec::fma(x, w, a);
    }
    for (auto& a : acc) renew(a);
    return rounds * 8 * N;
}

template <class T = float>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

// Tensors come as addresses of contiguous float32 arrays; the caller has checked shapes.
PYBIND11_MODULE(MODULE_NAME, module) {
    namespace py = pybind11;
    const auto free = py::call_guard<py::gil_scoped_release>();
    module.attr("isa") = LINFLAB_ISA;
    module.attr("sources") = SOURCES;
    module.def("multiply_in_registers", &multiply_in_registers, free);
    module.def("run_in_registers_inf", &run_in_registers<Largest, false>, free);
    module.def("run_in_registers_8", &run_in_registers<SumOfPowers<8>, false>, free);
    module.def("run_in_registers_8_backward", &run_in_registers<SumOfPowers<8>, true>, free);
    module.def(
        "forward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, int64_t samples, int64_t outputs, int64_t inputs, double p,
           int threads) { forward(at(x), at(w), at(y), {samples, outputs, inputs}, p, threads); },
        free);
    module.def(
        "backward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w,
           uintptr_t scratch, int64_t samples, int64_t outputs, int64_t inputs, double p, int threads) {
            backward({at(x), at(w), at(y), at(grad_y), at(grad_x), at(grad_w), {samples, outputs, inputs}},
                     at(scratch), p, threads);
        },
        free);
    module.def(
        "bounds",
        [](uintptr_t lower, uintptr_t upper, uintptr_t w, uintptr_t lo, uintptr_t hi, int64_t samples,
           int64_t outputs, int64_t inputs, int threads) {
            bounds(at(lower), at(upper), at(w), at(lo), at(hi), {samples, outputs, inputs}, threads);
        },
        free);
    module.def(
        "forward_on_subsets",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t kept, int64_t samples, int64_t outputs, int64_t inputs,
           double p, int64_t group, int threads) {
            forward_on_subsets(at(x), at(w), at(y), {{samples, outputs, inputs}, at<bool>(kept), group}, p, threads);
        },
        free);
    module.def(
        "backward_on_subsets",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w,
           uintptr_t scratch, uintptr_t kept, int64_t samples, int64_t outputs, int64_t inputs, double p, int64_t group,
           int threads) {
            const Shape s = {samples, outputs, inputs};
            backward_on_subsets({at(x), at(w), at(y), at(grad_y), at(grad_x), at(grad_w), s},
                                {s, at<bool>(kept), group}, at(scratch), p, threads);
        },
        free);
    module.def(
        "sort_forward",
        [](uintptr_t x, uintptr_t w, uintptr_t y, uintptr_t coefficients, int64_t samples, int64_t outputs,
           int64_t inputs, int terms, int threads) {
            sort_forward(at(x), at(w), at(y), {samples, outputs, inputs}, {at(coefficients), terms}, threads);
        },
        free);
    module.def(
        "sort_backward",
        [](uintptr_t x, uintptr_t w, uintptr_t grad_y, uintptr_t grad_x, uintptr_t grad_w, uintptr_t coefficients,
           int64_t samples, int64_t outputs, int64_t inputs, int terms, int threads) {
            sort_backward(
                {at(x), at(w), nullptr, at(grad_y), at(grad_x), at(grad_w), {samples, outputs, inputs}},
                {at(coefficients), terms}, threads);
        },
        free);
    module.def(
        "sort_bounds",
        [](uintptr_t lower, uintptr_t upper, uintptr_t w, uintptr_t lo, uintptr_t hi, uintptr_t coefficients,
           int64_t samples, int64_t outputs, int64_t inputs, int terms, int threads) {
            sort_bounds(at(lower), at(upper), at(w), at(lo), at(hi), {samples, outputs, inputs},
                        {at(coefficients), terms}, threads);
        },
        free);
}
