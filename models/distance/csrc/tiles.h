// Tiles of the (samples, outputs) plane, and operations on all pairs of a tile.
//
// Vectors run along the inputs i, in memory order of inputs and weights. A tile of a few samples times a few outputs
// stays in registers during the loop over i.
#pragma once

#include "threads.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int N = Vec::size;
constexpr int GROUP = 4;                     // vectors with a common maximum
constexpr int RB = 4, RO = N == 16 ? 4 : 2;  // samples and outputs of a tile
constexpr int64_t SLICE = 1024;              // inputs per pass over a tile: four rows of samples fit in L1
constexpr int64_t OUTPUT_BLOCK = 32;         // outputs whose slices stay in L2 during the loop over samples

struct Shape {
    int64_t samples, outputs, inputs;
    double terms() const { return (double)samples * outputs * inputs; }
};

// Returns the number of outputs whose weights for these inputs stay in L2.
int64_t block_of(int64_t inputs) { return std::max<int64_t>(2, std::min<int64_t>(OUTPUT_BLOCK, 32 * SLICE / inputs)); }

// Calls f(first sample, first output, samples, outputs) for tiles that cover [b0, b1) x [o0, o1): TB x TO, with smaller
// tiles at the edges. f is a generic lambda that takes the size of the tile as integral constants.
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

// Runs f(b0, b1, o0, o1) on threads that divide the (samples, outputs) plane along its longer side.
template <class F>
void over_plane(int threads, Shape s, F f) {
    const Threads useful = threads_for(threads, s.terms());
    if (s.outputs >= s.samples)
        parallel(useful, s.outputs, 8, [&](int64_t o0, int64_t o1) { f(0, s.samples, o0, o1); });
    else
        parallel(useful, s.samples, 8, [&](int64_t b0, int64_t b1) { f(b0, b1, 0, s.outputs); });
}

// Calls f(0), ..., f(n - 1) with constants, so that arrays indexed by them stay in registers.
template <class F, int... K>
[[gnu::always_inline]] inline void unrolled(F f, std::integer_sequence<int, K...>) {
    (f(std::integral_constant<int, K>()), ...);
}
template <int n, class F>
[[gnu::always_inline]] inline void unrolled(F f) {
    unrolled(f, std::make_integer_sequence<int, n>());
}

// Returns a 1 that the compiler cannot see, so that it does not turn `minus` into a subtraction.
inline Vec hidden_one() {
    Vec one = Vec::all(1.0f);
#if defined(__AVX2__)
    asm("" : "+x"(one.v));
#endif
    return one;
}

constexpr int WINDOW = 64 / N;  // groups per 64-bit mask: bit g N + l is lane l of group g

// Appends the differences with |d| >= least, times `factor`, to `found`, and their positions to `where` unless it is
// null. Only the marked lanes of the window of groups at i are considered. Returns the new count. Only the word
// determines branches, since branches on single terms are hard to predict.
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

// Computes the largest |x_i - w_i| in each lane of the G vectors at i, for every pair of a tile.
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

// Returns 0 for every row of finite numbers, and NaN for others. Maxima drop NaN, so this is added to their results.
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

}  // namespace
