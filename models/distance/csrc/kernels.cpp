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

#include <limits>
#include <thread>
#include <utility>
#include <vector>

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
constexpr float DENSE_BELOW = 0.45f;             // see Scaled
constexpr float LOW = 0x1p-90f, HIGH = 0x1p120f; // a direct sum in here has lost nothing that counts

// Flush denormals to zero while it lives: powers of small ratios are denormal, hence slow, long before they matter.
class FlushDenormals {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();

  public:
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// work(begin, end) on parts of [0, items) that are multiples of `grain`, on up to `threads` threads.
template <class F>
void parallel(int threads, int64_t items, int64_t grain, F work) {
    const int64_t grains = (items + grain - 1) / grain;
    const int parts = (int)std::max<int64_t>(1, std::min<int64_t>(threads, grains));
    auto run = [&](int part) {
        FlushDenormals flush;
        const int64_t begin = grains * part / parts * grain, end = grains * (part + 1) / parts * grain;
        work(begin, std::min(end, items));
    };
    std::vector<std::thread> others;
    for (int part = 1; part < parts; ++part) others.emplace_back(run, part);
    run(0);
    for (auto& other : others) other.join();
}

int useful_threads(int threads, double terms) {  // starting a thread costs about as much as 2 million cheap terms
    return (int)std::min<double>(threads, 1 + terms / 2e6);
}

// ---------------------------------------------------------------------------------------------------- powers

// Polynomials are summed by Estrin's scheme: more products than Horner's, but fewer that wait for one another.

inline Vec log2_of(Vec a) {  // relative error below 3e-7 for positive normal a; finite for others
    Vec mantissa;
    const Vec exponent = Vec::exponent(a, mantissa);
    const Vec f = mantissa - Vec::all(1.0f), f2 = f * f, f4 = f2 * f2;
    // fit of log2(1 + f) / f on [-0.25, 0.5], by least squares at Chebyshev points
    const Vec c01 = Vec::fma(Vec::all(-0.72135066986f), f, Vec::all(1.44269526f));
    const Vec c23 = Vec::fma(Vec::all(-0.36033529043f), f, Vec::all(0.48084750772f));
    const Vec c45 = Vec::fma(Vec::all(-0.25065219402f), f, Vec::all(0.29007357359f));
    const Vec c67 = Vec::fma(Vec::all(-0.096163973212f), f, Vec::all(0.20412734151f));
    const Vec ratio = Vec::fma(Vec::fma(c67, f2, c45), f4, Vec::fma(c23, f2, c01));
    return Vec::fma(f, ratio, exponent);
}

inline Vec exp2_of(Vec t) {  // relative error below 3e-7 for t up to 127; 2^-126 for t below -126
    t = Vec::max(t, Vec::all(-126.0f));
    const Vec shifted = t + Vec::all(ROUNDER), f = t - (shifted - Vec::all(ROUNDER)), f2 = f * f;
    // the same kind of fit of 2^f on [-0.5, 0.5]
    const Vec c01 = Vec::fma(Vec::all(0.69314718246f), f, Vec::all(1.0000001192f));
    const Vec c23 = Vec::fma(Vec::all(0.05550327152f), f, Vec::all(0.24022106826f));
    const Vec c45 = Vec::fma(Vec::all(0.0013400432654f), f, Vec::all(0.0096760373563f));
    return Vec::scale(Vec::fma(Vec::fma(c45, f2, c23), f2, c01), shifted);
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

// What a direct tile accumulates over the differences d.
struct Largest {
    static Vec add(Vec acc, Vec d) { return Vec::max_abs(d, acc); }
    static float reduce(Vec acc) { return largest(acc); }
    static float join(float a, float b) { return std::max(a, b); }
};

template <int P>
struct SumOfPowers {  // of |d|^P; slope: sign(d) |d|^(P - 1)
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
    const int useful = useful_threads(threads, s.terms());
    if (s.outputs >= s.samples)
        parallel(useful, s.outputs, 8, [&](int64_t o0, int64_t o1) { f(0, s.samples, o0, o1); });
    else
        parallel(useful, s.samples, 8, [&](int64_t b0, int64_t b1) { f(b0, b1, 0, s.outputs); });
}

template <class T, int TB, int TO>
void direct_tile(const float* x, const float* w, int64_t stride, int64_t n, bool first, float* y, int64_t y_stride) {
    Vec acc[TB][TO];
    for (auto& row : acc)
        for (auto& a : row) a = Vec::all(0.0f);
    int64_t i = 0;
    for (; i + N <= n; i += N) {
        Vec wv[TO];
        for (int c = 0; c < TO; ++c) wv[c] = Vec::load(w + c * stride + i);
        for (int r = 0; r < TB; ++r) {
            const Vec xv = Vec::load(x + r * stride + i);
            for (int c = 0; c < TO; ++c) acc[r][c] = T::add(acc[r][c], xv - wv[c]);
        }
    }
    if (i < n) {
        for (int r = 0; r < TB; ++r)
            for (int c = 0; c < TO; ++c)
                acc[r][c] = T::add(acc[r][c], Vec::load(x + r * stride + i, (int)(n - i)) -
                                                  Vec::load(w + c * stride + i, (int)(n - i)));
    }
    for (int r = 0; r < TB; ++r)
        for (int c = 0; c < TO; ++c) {
            const float value = T::reduce(acc[r][c]);
            float& out = y[r * y_stride + c];
            out = first ? value : T::join(out, value);
        }
}

template <class T>
void direct_block(const float* x, const float* w, float* y, Shape s, int64_t b0, int64_t b1, int64_t o0, int64_t o1) {
    for (int64_t i = 0; i < s.inputs; i += SLICE)
        for (int64_t o = o0; o < o1; o += OUTPUT_BLOCK)
            tiles<RB, RO>(b0, b1, o, std::min(o + OUTPUT_BLOCK, o1), [&](int64_t tb, int64_t to, auto nb, auto no) {
                direct_tile<T, decltype(nb)::value, decltype(no)::value>(
                    x + tb * s.inputs + i, w + to * s.inputs + i, s.inputs, std::min(SLICE, s.inputs - i), i == 0,
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
        dense = ratio < DENSE_BELOW;
    }
};

// The sum of (|x_i - w_i| / m)^p, of all terms.
inline float dense_sum(const float* x, const float* w, int64_t n, float p, float inverse) {
    const Vec power = Vec::all(p), scale = Vec::all(inverse);
    auto term = [&](Vec d) { return exp2_of(power * log2_of(Vec::abs(d) * scale)); };
    Vec total[2] = {Vec::all(0.0f), Vec::all(0.0f)};
    int64_t i = 0;
    for (; i + 2 * N <= n; i += 2 * N)
        for (int v = 0; v < 2; ++v) total[v] = total[v] + term(Vec::load(x + i + v * N) - Vec::load(w + i + v * N));
    for (; i < n; i += N) {  // differences of 0 beyond the end come to 2^-126
        const int left = (int)std::min<int64_t>(N, n - i);
        total[0] = total[0] + term(Vec::load(x + i, left) - Vec::load(w + i, left));
    }
    return sum(total[0] + total[1]);
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

// A tile by the scaled way, for all its pairs of sample and output together: their steps depend on one another, and
// overlap only with those of other pairs.
template <int TB, int TO>
void scaled_tile(const float* x, const float* w, int64_t n, Scaled k, float* y, int64_t y_stride, float* scratch) {
    constexpr int PAIRS = TB * TO;
    static_assert(PAIRS <= N);
    const int64_t groups = (n + GROUP * N - 1) / (GROUP * N);
    float *maxima = scratch, *found = scratch + groups * PAIRS * N;
    Vec most[PAIRS];
    for (auto& m : most) m = Vec::all(0.0f);
    auto group = [&](int64_t g, int vectors, auto load) {
        Vec acc[TB][TO];
        for (auto& row : acc)
            for (auto& a : row) a = Vec::all(0.0f);
        for (int v = 0; v < vectors; ++v) {
            const int64_t i = (g * GROUP + v) * N;
            Vec wv[TO];
            for (int c = 0; c < TO; ++c) wv[c] = load(w + c * n, i);
            for (int r = 0; r < TB; ++r) {
                const Vec xv = load(x + r * n, i);
                for (int c = 0; c < TO; ++c) acc[r][c] = Vec::max_abs(xv - wv[c], acc[r][c]);
            }
        }
        for (int r = 0; r < TB; ++r)
            for (int c = 0; c < TO; ++c) {
                const int pair = r * TO + c;
                acc[r][c].store(maxima + (pair * groups + g) * N);
                most[pair] = Vec::max(acc[r][c], most[pair]);
            }
    };
    const int64_t whole = n / (GROUP * N);
    for (int64_t g = 0; g < whole; ++g) group(g, GROUP, [](const float* p, int64_t i) { return Vec::load(p + i); });
    if (whole < groups)
        group(whole, (int)((n - whole * GROUP * N + N - 1) / N),
              [&](const float* p, int64_t i) { return Vec::load(p + i, (int)std::min<int64_t>(N, n - i)); });

    float scale[N] = {}, inverse[N] = {}, total[N] = {};
    for (int pair = 0; pair < PAIRS; ++pair) {
        scale[pair] = largest(most[pair]);
        inverse[pair] = scale[pair] > 0 ? 1 / scale[pair] : 0.0f;
    }
    if (k.dense) {
        for (int pair = 0; pair < PAIRS; ++pair)
            total[pair] = dense_sum(x + pair / TO * n, w + pair % TO * n, n, k.p, inverse[pair]);
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
            exp2_of(Vec::all(k.p) * log2_of(Vec::abs(Vec::load(found + j)))).store(found + j);
        for (int pair = 0; pair < PAIRS; ++pair)
            for (int64_t j = count[pair]; j < count[pair + 1]; ++j) total[pair] += found[j];
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

void scaled_block(const float* x, const float* w, float* y, Shape s, Scaled k, int64_t b0, int64_t b1, int64_t o0,
                  int64_t o1) {
    std::vector<float> scratch(scaled_scratch(s.inputs, RB * 2));
    const int64_t block = block_of(s.inputs);
    for (int64_t o = o0; o < o1; o += block)
        tiles<RB, 2>(b0, b1, o, std::min(o + block, o1), [&](int64_t tb, int64_t to, auto nb, auto no) {
            scaled_tile<decltype(nb)::value, decltype(no)::value>(x + tb * s.inputs, w + to * s.inputs, s.inputs, k,
                                                                  y + tb * s.outputs + to, s.outputs, scratch.data());
        });
}

// y holds sums of p-th powers: take the p-th root, or compute anew where the sum left the range of floats.
void take_roots(const float* x, const float* w, float* y, Shape s, Scaled k, int64_t b0, int64_t b1, int64_t o0,
                int64_t o1) {
    std::vector<float> scratch(scaled_scratch(s.inputs, 1));
    for (int64_t b = b0; b < b1; ++b)
        for (int64_t o = o0; o < o1; o += N) {
            float* row = y + b * s.outputs;
            const int n = (int)std::min<int64_t>(N, o1 - o);
            const Vec sums = Vec::load(row + o, n);
            const uint32_t good = Vec::at_least(sums, Vec::all(LOW)) & Vec::at_least(Vec::all(HIGH), sums);
            const Vec root = k.p == 1 ? sums : k.p == 2 ? Vec::sqrt(sums) : exp2_of(log2_of(sums) * Vec::all(1 / k.p));
            root.store(row + o, n);
            for (int c = 0; c < n; ++c)
                if (!(good >> c & 1))
                    scaled_tile<1, 1>(x + b * s.inputs, w + (o + c) * s.inputs, s.inputs, k, row + o + c, 1,
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

void forward(const float* x, const float* w, float* y, Shape s, double p, int threads) {
    if (std::isinf(p)) {
        over_plane(threads, s, [&](auto... range) { direct_block<Largest>(x, w, y, s, range...); });
    } else {
        const Scaled k(p, s.inputs);
        const bool direct = with_direct(p, [&](auto term) {
            over_plane(threads, s, [&](auto... range) {
                direct_block<decltype(term)>(x, w, y, s, range...);
                take_roots(x, w, y, s, k, range...);
            });
        });
        if (!direct) over_plane(threads, s, [&](auto... range) { scaled_block(x, w, y, s, k, range...); });
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

// How a gradient g = grad_y slope(d) is made at [sample, output] from d: by powers that need no scaling ...
template <class T>
struct DirectSlope {
    const float* coefficient;  // grad_y y^(1 - p)

    Vec operator()(Vec d, int64_t at) const { return Vec::all(coefficient[at]) * T::slope(d); }
};

// ... or, for any p, as grad_y sign(d) 2^((p - 1) log2(|d| / y)).
struct DenseSlope {
    const float *grad_y, *inverse;  // inverse: 1 / y
    Vec power;

    Vec operator()(Vec d, int64_t at) const {
        const Vec u = Vec::abs(d) * Vec::all(inverse[at]);
        const uint32_t mask = Vec::at_least(u, Vec::all(std::numeric_limits<float>::min()));
        const Vec magnitude = Vec::keep(mask, exp2_of(power * log2_of(u)));
        return Vec::all(grad_y[at]) * Vec::with_sign(magnitude, d);
    }
};

// One vector of inputs, TB samples, a block of outputs: gradients are added to grad_x and taken from grad_w.
template <int TB, class Slope, class Load, class Store>
void add_gradients(const Gradients& q, Slope slope, int64_t b, int64_t o0, int64_t o1, int64_t i, Load load,
                   Store store) {
    const int64_t stride = q.s.inputs;
    Vec xv[TB], gx[TB];
    for (int r = 0; r < TB; ++r) {
        xv[r] = load(q.x + (b + r) * stride + i);
        gx[r] = load(q.grad_x + (b + r) * stride + i);
    }
    for (int64_t o = o0; o < o1; ++o) {
        const Vec wv = load(q.w + o * stride + i);
        Vec gw = load(q.grad_w + o * stride + i);
        for (int r = 0; r < TB; ++r) {
            const Vec g = slope(xv[r] - wv, (b + r) * q.s.outputs + o);
            gx[r] = gx[r] + g;
            gw = gw - g;
        }
        store(q.grad_w + o * stride + i, gw);
    }
    for (int r = 0; r < TB; ++r) store(q.grad_x + (b + r) * stride + i, gx[r]);
}

// All samples and outputs, inputs from begin to end.
template <class Slope>
void all_gradients(const Gradients& q, Slope slope, int64_t begin, int64_t end) {
    auto column = [&](auto samples, int64_t b, int64_t o0, int64_t o1) {
        constexpr int TB = decltype(samples)::value;
        int64_t i = begin;
        for (; i + N <= end; i += N)
            add_gradients<TB>(q, slope, b, o0, o1, i, [](const float* p) { return Vec::load(p); },
                              [](float* p, Vec v) { v.store(p); });
        const int left = (int)(end - i);
        if (left > 0)
            add_gradients<TB>(q, slope, b, o0, o1, i, [=](const float* p) { return Vec::load(p, left); },
                              [=](float* p, Vec v) { v.store(p, left); });
    };
    for (int64_t o = 0; o < q.s.outputs; o += OUTPUT_BLOCK) {
        const int64_t o1 = std::min(o + OUTPUT_BLOCK, q.s.outputs);
        int64_t b = 0;
        for (; b + RB <= q.s.samples; b += RB) column(std::integral_constant<int, RB>(), b, o, o1);
        for (; b < q.s.samples; ++b) column(std::integral_constant<int, 1>(), b, o, o1);
    }
}

struct ScaledSlope {  // constants of sign(d) (|d| / y)^(p - 1)
    float power, ratio;  // terms below ratio times y are too small to count
    bool dense;

    ScaledSlope(double p, int64_t inputs) : power((float)(p - 1)) {
        const double bits = 26 + 0.5 * std::log2((double)inputs);  // what is left out adds up in the Euclidean norm
        ratio = p > 1 ? (float)std::exp2(-bits / (p - 1)) : 0.0f;
        dense = ratio < DENSE_BELOW;
    }
};

// Bits of those lanes of the window of groups at i, for TO outputs, whose largest |x_i - w_i| reaches the thresholds.
template <int TO>
inline void scan(const float* x, const float* w, int64_t stride, int64_t i, int64_t end, const Vec* thresholds,
                 uint64_t* words) {
    uint64_t marked[TO] = {};
    for (int g = 0; g < WINDOW && i < end; ++g, i += GROUP * N) {
        Vec most[TO];
        for (auto& m : most) m = Vec::all(0.0f);
        if (i + GROUP * N <= end) {
            for (int v = 0; v < GROUP; ++v) {
                const Vec xv = Vec::load(x + i + v * N);
                for (int c = 0; c < TO; ++c) most[c] = Vec::max_abs(xv - Vec::load(w + c * stride + i + v * N), most[c]);
            }
        } else {
            for (int64_t at = i; at < end; at += N) {
                const int left = (int)std::min<int64_t>(N, end - at);
                for (int c = 0; c < TO; ++c)
                    most[c] = Vec::max_abs(Vec::load(x + at, left) - Vec::load(w + c * stride + at, left), most[c]);
            }
        }
        for (int c = 0; c < TO; ++c) marked[c] |= (uint64_t)Vec::at_least(most[c], thresholds[c]) << (g * N);
    }
    for (int c = 0; c < TO; ++c) words[c] = marked[c];
}

struct Found {  // differences that count, and where they are
    std::vector<float> d, slope;
    std::vector<int32_t> where;

    explicit Found(int64_t n) : d(n + 1), slope(n + 1 + N), where(n + 1) {}
};

// One sample and TO outputs, on inputs from begin to end.
template <int TO>
void sparse_gradient(const Gradients& q, ScaledSlope k, int64_t b, int64_t o, int64_t begin, int64_t end,
                     Found* found) {
    const int64_t n = q.s.inputs, at = b * q.s.outputs + o;
    const float *x = q.x + b * n, *w = q.w + o * n;
    float least[TO];
    Vec thresholds[TO];
    int64_t count[TO] = {};
    for (int c = 0; c < TO; ++c) {
        least[c] = std::max(q.y[at + c] * k.ratio, std::numeric_limits<float>::min());
        thresholds[c] = Vec::all(least[c]);
    }
    for (int64_t i = begin; i < end; i += WINDOW * GROUP * N) {
        uint64_t words[TO];
        scan<TO>(x, w, n, i, end, thresholds, words);
        for (int c = 0; c < TO; ++c)
            count[c] = collect(words[c], x, w + c * n, i, end, least[c], 1.0f, count[c], found[c].d.data(),
                               found[c].where.data());
    }
    for (int c = 0; c < TO; ++c) {
        const Vec inverse = Vec::all(1 / q.y[at + c]), gradient = Vec::all(q.grad_y[at + c]);
        float* slope = found[c].slope.data();
        for (int64_t j = 0; j < count[c]; j += N) {
            const Vec d = Vec::load(found[c].d.data() + j, (int)std::min<int64_t>(N, count[c] - j));
            const Vec magnitude = exp2_of(Vec::all(k.power) * log2_of(Vec::abs(d) * inverse));
            (gradient * Vec::with_sign(magnitude, d)).store(slope + j);
        }
        float *gx = q.grad_x + b * n, *gw = q.grad_w + (o + c) * n;
        for (int64_t j = 0; j < count[c]; ++j) {
            const int32_t i = found[c].where[j];
            gx[i] += slope[j];
            gw[i] -= slope[j];
        }
    }
}

void sparse_gradients(const Gradients& q, ScaledSlope k, int64_t begin, int64_t end) {
    Found found[2] = {Found(end - begin), Found(end - begin)};
    const int64_t block = block_of(end - begin);
    for (int64_t o = 0; o < q.s.outputs; o += block)
        tiles<1, 2>(0, q.s.samples, o, std::min(o + block, q.s.outputs), [&](int64_t b, int64_t to, auto, auto no) {
            sparse_gradient<decltype(no)::value>(q, k, b, to, begin, end, found);
        });
}

// The first input whose |d| is y, for TO outputs: twice its position, plus one where d is negative; -1 where y is 0, or
// not a number.
template <int TO>
void find_largest(const Gradients& q, int64_t b, int64_t o, int32_t* where) {
    const int64_t n = q.s.inputs;
    const float *x = q.x + b * n, *w = q.w + o * n, *y = q.y + b * q.s.outputs + o;
    Vec thresholds[TO];
    bool open = false;
    for (int c = 0; c < TO; ++c) {
        where[c] = -1;
        thresholds[c] = Vec::all(y[c] > 0 ? y[c] : std::numeric_limits<float>::quiet_NaN());
        open |= y[c] > 0;
    }
    for (int64_t i = 0; i < n && open; i += WINDOW * GROUP * N) {
        uint64_t words[TO];
        scan<TO>(x, w, n, i, n, thresholds, words);
        open = false;
        for (int c = 0; c < TO; ++c) {
            if (where[c] < 0 && words[c]) {
                // lanes of a group are not in the order of inputs: take the first of all that are marked
                int64_t first = 2 * n;
                for (uint64_t word = words[c]; word; word &= word - 1) {
                    const int bit = __builtin_ctzll(word);
                    for (int v = 0; v < GROUP; ++v) {
                        const int64_t at = std::min(i + bit / N * GROUP * N + v * N + bit % N, n - 1);
                        const float d = x[at] - w[c * n + at];
                        first = std::min(first, std::fabs(d) >= y[c] ? 2 * at + (d < 0) : 2 * n);
                    }
                }
                where[c] = (int32_t)first;
            }
            open |= where[c] < 0 && y[c] > 0;
        }
    }
}

// p = inf. `where` (samples x outputs) holds the inputs found between the two gradients.
void largest_gradients(const Gradients& q, int32_t* where, int threads) {
    const Shape s = q.s;
    const int64_t n = s.inputs, block = block_of(n);
    const auto add = [&](float* row, int32_t found, float grad) {
        if (found >= 0) row[found >> 1] += grad * (float)(1 - 2 * (found & 1));  // a branch on the sign would be guessed
    };
    parallel(threads, s.samples, 1, [&](int64_t b0, int64_t b1) {
        for (int64_t o = 0; o < s.outputs; o += block)
            tiles<1, 2>(b0, b1, o, std::min(o + block, s.outputs), [&](int64_t b, int64_t to, auto, auto no) {
                constexpr int TO = decltype(no)::value;
                const int64_t at = b * s.outputs + to;
                find_largest<TO>(q, b, to, where + at);
                for (int c = 0; c < TO; ++c) add(q.grad_x + b * n, where[at + c], q.grad_y[at + c]);
            });
    });
    parallel(threads, s.outputs, 16, [&](int64_t o0, int64_t o1) {
        for (int64_t first = o0; first < o1; first += block)
            for (int64_t b = 0; b < s.samples; ++b)
                for (int64_t o = first; o < std::min(first + block, o1); ++o)
                    add(q.grad_w + o * n, where[b * s.outputs + o], -q.grad_y[b * s.outputs + o]);
    });
}

// `scratch` (samples x outputs) holds coefficients, or indices at p = inf.
void backward(const Gradients& q, float* scratch, double p, int threads) {
    const Shape s = q.s;
    const int useful = useful_threads(threads, s.terms());
    if (std::isinf(p)) {
        largest_gradients(q, reinterpret_cast<int32_t*>(scratch), useful);
        return;
    }
    const ScaledSlope k(p, s.inputs);
    // as long chunks as keep all threads at work
    const int64_t vectors = (s.inputs + N - 1) / N;
    const int64_t chunk = N * std::max<int64_t>(1, std::min<int64_t>(CHUNK, vectors / useful));
    auto over_chunks = [&](auto work) {
        parallel(useful, s.inputs, chunk, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i += chunk) work(i, std::min(i + chunk, end));
        });
    };
    const int64_t pairs = s.samples * s.outputs;
    std::vector<int64_t> others;  // pairs for which the powers leave the range of floats
    const bool direct = with_direct(p, [&](auto term) {
        FlushDenormals flush;
        for (int64_t at = 0; at < pairs; at += N) {
            const int n = (int)std::min<int64_t>(N, pairs - at);
            const Vec bits = Vec::all(k.power) * log2_of(Vec::load(q.y + at, n));
            const uint32_t good = Vec::at_least(Vec::all(80.0f), Vec::abs(bits));
            const Vec coefficient = Vec::load(q.grad_y + at, n) * exp2_of(Vec::all(0.0f) - bits);
            Vec::keep(good, coefficient).store(scratch + at, n);
            for (int c = 0; c < n; ++c)
                if (!(good >> c & 1) && q.y[at + c] > 0) others.push_back(at + c);
        }
        if ((int64_t)others.size() <= pairs / 8)
            over_chunks([&](int64_t i, int64_t end) {
                all_gradients(q, DirectSlope<decltype(term)>{scratch}, i, end);
            });
    });
    if (direct && others.empty()) return;
    if (direct && (int64_t)others.size() <= pairs / 8) {
        parallel(useful, s.inputs, N, [&](int64_t begin, int64_t end) {
            Found found(end - begin);
            for (const int64_t at : others)
                sparse_gradient<1>(q, k, at / s.outputs, at % s.outputs, begin, end, &found);
        });
    } else if (k.dense) {
        for (int64_t at = 0; at < pairs; ++at) scratch[at] = q.y[at] > 0 ? 1 / q.y[at] : 0.0f;
        over_chunks([&](int64_t i, int64_t end) {
            all_gradients(q, DenseSlope{q.grad_y, scratch, Vec::all(k.power)}, i, end);
        });
    } else {
        parallel(useful, s.inputs, N, [&](int64_t begin, int64_t end) { sparse_gradients(q, k, begin, end); });
    }
}

// ---------------------------------------------------------------------------------------------------- bounds

// The exact range of max_i |x_i - w_i| over the box lower <= x <= upper. Coordinates move freely, so the largest value
// is the largest of max(u - w, w - l), the smallest the largest of max(l - w, w - u, 0).
template <int TB, int TO>
void bounds_tile(const float* lower, const float* upper, const float* w, int64_t n, float* lo, float* hi,
                 int64_t y_stride) {
    const Vec far = Vec::all(std::numeric_limits<float>::infinity());
    Vec max_u[TB][TO], min_u[TB][TO], max_l[TB][TO], min_l[TB][TO];  // of u - w and of l - w
    for (int r = 0; r < TB; ++r)
        for (int c = 0; c < TO; ++c) {
            max_u[r][c] = max_l[r][c] = Vec::all(0.0f) - far;
            min_u[r][c] = min_l[r][c] = far;
        }
    auto step = [&](int64_t i, auto load) {
        for (int c = 0; c < TO; ++c) {
            const Vec wv = load(w + c * n + i);
            for (int r = 0; r < TB; ++r) {
                const Vec u = load(upper + r * n + i) - wv, l = load(lower + r * n + i) - wv;
                max_u[r][c] = Vec::max(u, max_u[r][c]);
                min_u[r][c] = Vec::min(u, min_u[r][c]);
                max_l[r][c] = Vec::max(l, max_l[r][c]);
                min_l[r][c] = Vec::min(l, min_l[r][c]);
            }
        }
    };
    int64_t i = 0;
    for (; i + N <= n; i += N) step(i, [](const float* p) { return Vec::load(p); });
    float high[TB][TO], low[TB][TO];
    for (int r = 0; r < TB; ++r)
        for (int c = 0; c < TO; ++c) {
            const Vec none = Vec::all(0.0f);
            high[r][c] = largest(Vec::max(max_u[r][c], none - min_l[r][c]));
            low[r][c] = largest(Vec::max(max_l[r][c], none - min_u[r][c]));
            for (int64_t j = i; j < n; ++j) {
                const float u = upper[r * n + j] - w[c * n + j], l = lower[r * n + j] - w[c * n + j];
                high[r][c] = std::max(high[r][c], std::max(u, -l));
                low[r][c] = std::max(low[r][c], std::max(l, -u));
            }
            hi[r * y_stride + c] = high[r][c];
            lo[r * y_stride + c] = std::max(low[r][c], 0.0f);
        }
}

void bounds(const float* lower, const float* upper, const float* w, float* lo, float* hi, Shape s, int threads) {
    constexpr int TB = N == 16 ? 2 : 1;
    over_plane(threads, s, [&](int64_t b0, int64_t b1, int64_t o0, int64_t o1) {
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
}
