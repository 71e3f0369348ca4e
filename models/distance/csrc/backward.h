// Gradients of the l_p distance. Every thread owns a range of inputs i, and thus these columns of both gradients. One
// pass computes both, and threads share no output.
#pragma once

#include "outer.h"
#include "powers.h"
#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace {

constexpr int CHUNK = 8;  // vectors of inputs that are processed together

struct Gradients {
    const float *x, *w, *y, *grad_y;
    float *grad_x, *grad_w;  // initially zero
    Shape s;
};

// Packed layout of numbers of pairs, in the order of all_gradients: by blocks of outputs, then by samples.
struct Packed {
    const Shape s;

    int64_t width(int64_t o0) const { return std::min(OUTPUT_BLOCK, s.outputs - o0); }
    // Returns the index of sample b and the first output of a block; the other outputs of the block follow.
    int64_t at(int64_t b, int64_t o0) const { return o0 * s.samples + b * width(o0); }
    // Calls f(place, pair, n) for up to N adjacent pairs, where pair = b outputs + o.
    template <class F>
    void each(F f) const {
        for (int64_t o0 = 0; o0 < s.outputs; o0 += OUTPUT_BLOCK)
            for (int64_t b = 0; b < s.samples; ++b)
                for (int64_t c = 0; c < width(o0); c += N)
                    f(at(b, o0) + c, b * s.outputs + o0 + c, (int)std::min<int64_t>(N, width(o0) - c));
    }
};

// Slopes map differences d of inputs and weights, transformed by `before`, to derivatives for TB samples of one output.
// `at` is the packed index of the first sample, `stride` the step to the next. Gradients are derivatives times `factor`.
// If FUSED, they are added by multiply-adds, with one rounding. This slope only multiplies.
template <class T, bool FUSED>
struct DirectSlope {
    static constexpr bool fused = FUSED;
    const float* factor;  // grad_y (scale y)^(1 - p), packed
    float scale;

    Vec before(Vec v) const { return v * Vec::all(scale); }
    template <int TB>
    void operator()(Vec (&d)[TB], int64_t, int64_t) const {
        for (int r = 0; r < TB; ++r) d[r] = T::slope(d[r]);
    }
};

// Slope for any p: grad_y sign(d) (|d| / y)^(p - 1).
template <class Power, bool FUSED>
struct DenseSlope {
    static constexpr bool fused = FUSED;
    const float *factor, *inverse;  // grad_y and 1 / y, packed
    Power raise;

    Vec before(Vec v) const { return v; }
    template <int TB>
    void operator()(Vec (&d)[TB], int64_t at, int64_t stride) const {
        Vec u[TB];
        for (int r = 0; r < TB; ++r) u[r] = Vec::abs(d[r]) * Vec::all(inverse[at + r * stride]);
        raise(u);
        for (int r = 0; r < TB; ++r) d[r] = Vec::with_sign(u[r], d[r]);
    }
};

constexpr int64_t SAMPLE_BLOCK = 512;  // samples whose chunks stay in L2

// Adds gradients to gx, and subtracts them from gw (adds them if fused), for one vector of inputs, TB samples from
// `place` on and a block of outputs. `stride` is the step between samples and between outputs.
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
            const Vec factor = Vec::all(slope.factor[place + o + r * outputs]);
            if constexpr (Slope::fused) {
                gxv[r] = Vec::fma(factor, g[r], gxv[r]);
                gwv = Vec::fma(factor, g[r], gwv);
            } else {
                g[r] = factor * g[r];
                gxv[r] = gxv[r] + g[r];
                gwv = gwv - g[r];
            }
        }
        gwv.store(gw + o * stride);
    }
    for (int r = 0; r < TB; ++r) gxv[r].store(gx + r * stride);
}

// Computes the gradients of all samples and outputs for a chunk of inputs from begin to end. The chunk is copied, since
// rows at a power-of-two distance would evict each other from the caches. It is zero-padded, with zero gradients.
template <class Slope>
void all_gradients(const Gradients& q, Slope slope, int64_t begin, int64_t end) {
    const int64_t inputs = q.s.inputs, stride = (end - begin + N - 1) / N * N;
    const int64_t most = std::min(SAMPLE_BLOCK, q.s.samples);
    Buffer<> xs(most * stride), gxs(most * stride), ws(OUTPUT_BLOCK * stride), gws(OUTPUT_BLOCK * stride);
    float *x = xs.data(), *gx = gxs.data(), *w = ws.data(), *gw = gws.data();
    const auto each = [&](int64_t rows, auto f) {  // f(index in the copy, index in the original, n)
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
    const auto add = [&](const float* gradients, int64_t rows, float* to, float sign = 1.0f) {
        each(rows, [&](int64_t copy, int64_t original, int n) {
            Vec::fma(Vec::load(gradients + copy), Vec::all(sign), Vec::load(to + original, n)).store(to + original, n);
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
            add(gw, outputs, q.grad_w + o0 * inputs, Slope::fused ? -1.0f : 1.0f);
        }
        add(gx, samples, q.grad_x + b0 * inputs);
    }
}

struct ScaledSlope {  // constants of sign(d) (|d| / y)^(p - 1)
    float power, ratio;  // terms below ratio times y are negligible
    bool dense;

    ScaledSlope(double p, int64_t inputs) : power((float)(p - 1)) {
        const double bits = 26 + 0.5 * std::log2((double)inputs);  // omitted terms add up in the Euclidean norm
        ratio = p > 1 ? (float)std::exp2(-bits / (p - 1)) : 0.0f;
        dense = p < LARGEST_FIT;
    }
};

struct Found {  // differences that count, and their positions
    Buffer<float> d, slope;
    Buffer<int32_t> where;

    explicit Found(int64_t n) : d(n + 1), slope(n + 1 + N), where(n + 1) {}
};

// Adds the gradients of a tile for inputs from begin to end; `found` has one element per pair.
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

// Gradient of a pair at p = inf: `slope` at `input`, 0 elsewhere.
struct Slope {
    int32_t input;
    float slope;
};

// Finds the first input with |d| = y in the block of inputs that contains it.
inline Slope find_in_block(const float* x, const float* w, int64_t inputs, float y, int32_t block, float grad_y) {
    const int64_t i = block * BLOCK;
    const Vec least = Vec::all(y);
    uint64_t found = 0;
    if (i + BLOCK <= inputs)
        unrolled<BLOCK / N>([&](auto v) {
            const Vec d = Vec::load(x + i + v * N) - Vec::load(w + i + v * N);
            found |= (uint64_t)Vec::at_least(Vec::abs(d), least) << (v * N);
        });
    else
        for (int64_t j = i; j < inputs; j += N) {
            const int n = (int)std::min<int64_t>(N, inputs - j);
            const Vec d = Vec::load(x + j, n) - Vec::load(w + j, n);
            found |= (uint64_t)Vec::at_least(Vec::abs(d), least) << (j - i);
        }
    if (!found || !(y > 0)) return {0, 0.0f};
    const int64_t at = i + __builtin_ctzll(found);
    return {(int32_t)at, std::copysign(1.0f, x[at] - w[at]) * grad_y};
}

constexpr int64_t SAMPLES_TOGETHER = 8;  // their slopes for an output fill a cache line

// Computes the gradients at p = inf, given the blocks of inputs with the largest terms. One thread adds to both gradients
// at once. Several threads store slopes by output for grad_w, whose rows are then processed in order.
void largest_gradients(const Gradients& q, const int32_t* blocks, Threads threads) {
    const Shape s = q.s;
    const int64_t n = s.inputs, step = block_of(n);
    const auto each = [&](int64_t b0, int64_t b1, auto f) {  // f(first sample, output, slopes, samples)
        Slope found[OUTPUT_BLOCK][SAMPLES_TOGETHER];
        for (int64_t o0 = 0; o0 < s.outputs; o0 += step)
            for (int64_t b = b0; b < b1; b += SAMPLES_TOGETHER) {
                const int64_t outputs = std::min(step, s.outputs - o0), samples = std::min(SAMPLES_TOGETHER, b1 - b);
                for (int64_t r = 0; r < samples; ++r)
                    for (int64_t c = 0; c < outputs; ++c) {
                        const int64_t at = (b + r) * s.outputs + o0 + c;
                        found[c][r] = find_in_block(q.x + (b + r) * n, q.w + (o0 + c) * n, n, q.y[at], blocks[at],
                                                    q.grad_y[at]);
                    }
                for (int64_t r = 0; r < samples; ++r)
                    for (int64_t c = 0; c < outputs; ++c)
                        q.grad_x[(b + r) * n + found[c][r].input] += found[c][r].slope;
                for (int64_t c = 0; c < outputs; ++c) f(b, o0 + c, found[c], samples);
            }
    };
    const auto add = [&](int64_t o, const Slope* slopes, int64_t samples) {
        for (int64_t b = 0; b < samples; ++b) q.grad_w[o * n + slopes[b].input] -= slopes[b].slope;
    };
    if (threads.useful == 1)
        return each(0, s.samples, [&](int64_t, int64_t o, const Slope* found, int64_t samples) { add(o, found, samples); });
    std::vector<Slope> slopes(s.samples * s.outputs);
    parallel(threads, s.samples, SAMPLES_TOGETHER, [&](int64_t b0, int64_t b1) {
        each(b0, b1, [&](int64_t b, int64_t o, const Slope* found, int64_t samples) {
            std::copy_n(found, samples, slopes.data() + o * s.samples + b);
        });
    });
    parallel(threads, s.outputs, 1, [&](int64_t o0, int64_t o1) {
        for (int64_t o = o0; o < o1; ++o) add(o, slopes.data() + o * s.samples, s.samples);
    });
}

void largest_backward(const Gradients& q, const int32_t* blocks, int threads) {
    if (q.s.terms() > 0) largest_gradients(q, blocks, threads_for(threads, (double)q.s.samples * q.s.outputs * BLOCK));
}

// Gradients at finite p if all pairs use all inputs.
template <bool FUSED = false>
struct InputsAlike {
    static constexpr bool fused = FUSED;
    const Gradients& q;
    Threads threads;

    // Adds the gradients of all pairs and inputs, by a slope.
    template <class Slope>
    void all(Slope slope) const {
        // Chunks are as long as possible while all threads have work.
        const int64_t vectors = (q.s.inputs + N - 1) / N;
        const int64_t chunk = N * std::max<int64_t>(1, std::min<int64_t>(CHUNK, vectors / threads.useful));
        parallel(threads, q.s.inputs, chunk, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i += chunk) all_gradients(q, slope, i, std::min(i + chunk, end));
        });
    }

    // Adds the gradients of the terms that count, for all pairs.
    void sparse(ScaledSlope k) const {
        parallel(threads, q.s.inputs, N, [&](int64_t begin, int64_t end) { sparse_gradients(q, k, begin, end); });
    }

    // Adds the gradients of the terms that count, for some pairs.
    void sparse(ScaledSlope k, const std::vector<int64_t>& pairs) const {
        parallel(threads, q.s.inputs, N, [&](int64_t begin, int64_t end) {
            Found found(end - begin);
            for (const int64_t at : pairs)
                sparse_gradient<1, 1>(q, k, at / q.s.outputs, at % q.s.outputs, begin, end, &found);
        });
    }
};

// Computes the gradients at finite p; `scratch` (samples x outputs) holds coefficients.
template <class Inputs>
void finite_gradients(const Gradients& q, float* scratch, double p, const Inputs& inputs) {
    const Shape s = q.s;
    const ScaledSlope k(p, s.inputs);
    const int64_t pairs = s.samples * s.outputs;
    std::vector<int64_t> others;  // pairs whose powers leave the range of floats
    bool wild = false;            // too many such pairs, or overflow: 0 times infinity would make sums NaN
    const bool direct = with_direct(p, [&](auto term) {
        const Denormals flushed(true);
        const float scale = scale_for(pairs, [&](int64_t at) { return q.y[at]; });
        Packed{s}.each([&](int64_t place, int64_t pair, int n) {
            const Vec bits = Vec::all(k.power) * log2_of(Vec::load(q.y + pair, n) * Vec::all(scale));
            const Vec grad_y = Vec::load(q.grad_y + pair, n);
            const Vec coefficient = grad_y * exp2_of(Vec::all(0.0f) - bits);
            // Coefficients of nonzero gradients are not accurate if they are so small that they may have been flushed.
            const uint32_t kept = Vec::at_least(Vec::abs(coefficient), Vec::all(0x1p-100f)) |
                                  Vec::at_least(Vec::all(0.0f), Vec::abs(grad_y));
            const uint32_t good = Vec::at_least(Vec::all(80.0f), Vec::abs(bits)) & kept;
            wild |= Vec::at_least(bits, Vec::all(126.0f)) != 0;
            Vec::keep(good, coefficient).store(scratch + place, n);
            for (int c = 0; c < n; ++c)
                if (!(good >> c & 1) && q.y[pair + c] > 0) others.push_back(pair + c);
        });
        wild |= (int64_t)others.size() > pairs / 8;
        if (!wild) inputs.all(DirectSlope<decltype(term), Inputs::fused>{scratch, scale});
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
            inputs.all(DenseSlope<decltype(raise), Inputs::fused>{grad_y.data(), scratch, raise});
        });
    } else {
        inputs.sparse(k);
    }
}

void backward(const Gradients& q, float* scratch, double p, int threads) {
    if (q.s.terms() == 0) return;
    const Threads useful = threads_for(threads, q.s.terms());
    if (!std::isinf(p)) return finite_gradients(q, scratch, p, InputsAlike<>{q, useful});
    std::vector<int32_t> blocks(q.s.samples * q.s.outputs);
    outer_largest(q.x, q.w, scratch, blocks.data(), q.s, useful);
    largest_gradients(q, blocks.data(), useful);
}

}  // namespace
