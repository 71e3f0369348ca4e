// Exact range of the l_inf distance over boxes of inputs.
#pragma once

#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <algorithm>
#include <cstdint>

namespace {

// Computes the exact range of max_i |x_i - w_i| over the box lower <= x <= upper. Coordinates are independent: the
// upper bound is the maximum of |u - w| and |l - w|, the lower bound is the maximum of l - w, w - u and 0.
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
                const Vec below = l - wv[c], above = Vec::minus(wv[c], u, one);  // if > 0: distance of w from the box
                high[r][c] = Vec::max_positive(Vec::max_abs(below, above), high[r][c]);
                low[r][c] = Vec::max_positive(above, Vec::max_positive(below, low[r][c]));
            }
        }
    };
    int64_t i = 0;
    for (; i + N <= n; i += N) vector(i, [](const float* p) { return Vec::load(p); });
    if (i < n) vector(i, [=](const float* p) { return Vec::load(p, (int)(n - i)); });  // 0 beyond the end
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
