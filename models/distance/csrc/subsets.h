// Masked l_p distance: each group of samples uses a subset of the inputs.
//
// The inputs of a group are packed: samples once, and weights in blocks of rows that stay in L2, for each group in
// turn. The kernels of forward.h and backward.h run on packed rows. Rows are zero-padded, so differences there are 0.
#pragma once

#include "backward.h"
#include "forward.h"
#include "powers.h"
#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t PACKED_FLOATS = 1 << 15;  // weights packed together: they and their originals stay in L2

struct Subsets {
    Shape s;
    int64_t group, groups, vectors;
    std::vector<uint32_t> masks;              // per group and vector of inputs
    std::vector<std::vector<int32_t>> where;  // the inputs that each group uses

    Subsets(Shape s, const bool* kept, int64_t group)
        : s(s), group(group), groups((s.samples + group - 1) / group), vectors((s.inputs + N - 1) / N),
          masks(groups * vectors), where(groups) {
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t i = 0; i < s.inputs; ++i)
                if (kept[g * s.inputs + i]) {
                    masks[g * vectors + i / N] |= 1u << i % N;
                    where[g].push_back((int32_t)i);
                }
    }

    int64_t first(int64_t g) const { return g * group; }
    int64_t samples(int64_t g) const { return std::min(group, s.samples - first(g)); }
    // Returns how many inputs from begin (a multiple of N) to end a group uses, rounded up to whole vectors.
    int64_t padded(int64_t g, int64_t begin, int64_t end) const {
        int64_t count = 0;
        for (int64_t i = begin; i < end; i += N) count += __builtin_popcount(masks[g * vectors + i / N]);
        return (count + N - 1) / N * N;
    }
    double terms() const {
        double terms = 0;
        for (int64_t g = 0; g < groups; ++g) terms += (double)where[g].size() * samples(g) * s.outputs;
        return terms;
    }

    // Calls f(mask, i, n, count) for each vector of a row: n inputs from i on, after `count` packed inputs.
    template <class F>
    void each(int64_t g, int64_t begin, int64_t end, F f) const {
        int64_t count = 0, i = begin;
        const uint32_t* mask = masks.data() + g * vectors + begin / N;
        for (; i + N <= end; i += N, ++mask) {
            f(*mask, i, std::integral_constant<int, N>(), count);
            count += __builtin_popcount(*mask);
        }
        if (i < end) f(*mask, i, (int)(end - i), count);
    }

    // Packs rows with step `stride`; writes up to two vectors beyond the last.
    template <class Before>
    void pack(int64_t g, int64_t begin, int64_t end, const float* from, int64_t rows, float* to, int64_t stride,
              Before before) const {
        for (int64_t r = 0; r < rows; ++r, from += s.inputs, to += stride) {
            int64_t packed = 0;
            each(g, begin, end, [&](uint32_t mask, int64_t i, auto n, int64_t count) {
                Vec::store_packed(mask, before(load(from + i, n)), to + count);
                packed = count + __builtin_popcount(mask);
            });
            Vec::all(0.0f).store(to + packed);
        }
    }

    // Adds packed rows to the rows that they come from.
    void add(int64_t g, int64_t begin, int64_t end, const float* from, int64_t stride, int64_t rows, float* to) const {
        for (int64_t r = 0; r < rows; ++r, from += stride, to += s.inputs)
            each(g, begin, end, [&](uint32_t mask, int64_t i, auto n, int64_t count) {
                store(load(to + i, n) + Vec::load_packed(mask, from + count), to + i, n);
            });
    }

  private:
    static Vec load(const float* p, std::integral_constant<int, N>) { return Vec::load(p); }
    static Vec load(const float* p, int n) { return Vec::load(p, n); }
    static void store(Vec v, float* p, std::integral_constant<int, N>) { v.store(p); }
    static void store(Vec v, float* p, int n) { v.store(p, n); }
};

inline Vec unchanged(Vec v) { return v; }

// Memory that is reused, since fresh pages are slow.
class Room {
    int64_t size = 0;
    Buffer<> buffer{0};

  public:
    float* of(int64_t n) {
        if (n > size) {
            size = n + n / 8;
            buffer = Buffer<>(size);
        }
        return buffer.data();
    }
};

// Packed samples of the groups from g0 to g1.
struct PackedSamples {
    std::vector<int64_t> stride, place;  // per group; the last element of `place` is the total size
    int64_t most = 0;                    // the largest stride
    float* x;

    template <class Before>
    PackedSamples(const Subsets& sets, const float* from, int64_t begin, int64_t end, int64_t g0, int64_t g1, Room& room,
                  Before before)
        : place{0} {
        for (int64_t g = g0; g < g1; ++g) {
            stride.push_back(sets.padded(g, begin, end));
            place.push_back(place.back() + sets.samples(g) * stride.back());
            most = std::max(most, stride.back());
        }
        x = room.of(place.back() + 2 * N);
        for (int64_t g = g0; g < g1; ++g)
            sets.pack(g, begin, end, from + sets.first(g) * sets.s.inputs, sets.samples(g), x + place[g - g0],
                      stride[g - g0], before);
    }
};

// Calls work(shape, first sample, first output, g, x, w) with packed x and w, for blocks of outputs and all groups that
// use any input. Threads divide the outputs. Each block of weights is read once from memory and cached for all groups.
template <class Work>
void over_subsets(const Subsets& sets, const float* x, const float* w, int threads, Work work) {
    const Shape s = sets.s;
    Room room;
    const PackedSamples samples(sets, x, 0, s.inputs, 0, sets.groups, room, unchanged);
    const int64_t most = samples.most;
    if (most == 0) return;
    const int64_t block = std::max<int64_t>(RO, std::min<int64_t>(OUTPUT_BLOCK, PACKED_FLOATS / most / RO * RO));
    parallel(threads_for(threads, sets.terms()), s.outputs, RO, [&](int64_t begin, int64_t end) {
        Buffer<> packed(block * most + 2 * N);
        for (int64_t o = begin; o < end; o += block)
            for (int64_t g = 0; g < sets.groups; ++g) {
                const int64_t outputs = std::min(block, end - o), stride = samples.stride[g];
                if (stride == 0) continue;
                sets.pack(g, 0, s.inputs, w + o * s.inputs, outputs, packed.data(), stride, unchanged);
                work(Shape{sets.samples(g), outputs, stride}, sets.first(g), o, g, samples.x + samples.place[g],
                     packed.data());
            }
    });
}

void forward_on_subsets(const float* x, const float* w, float* y, const Subsets& sets, double p, int threads) {
    const Shape s = sets.s;
    std::fill(y, y + s.samples * s.outputs, 0.0f);
    if (sets.terms() == 0) return;
    const auto finite = [&](const float* rows, int64_t count) {
        const auto poison = poison_of(rows, count, s.inputs);
        return std::all_of(poison.begin(), poison.end(), [](float a) { return a == 0; });
    };
    const bool clean = finite(x, s.samples) && finite(w, s.outputs);
    const auto with = [&](auto block) {  // block(x, w, y, shape) computes packed distances
        over_subsets(sets, x, w, threads, [&](Shape of, int64_t b0, int64_t o0, int64_t, const float* xs, const float* ws) {
            Buffer<> ys(of.samples * of.outputs);
            block(xs, ws, ys.data(), of);
            if (!clean) add_poison(xs, ws, ys.data(), of);
            for (int64_t b = 0; b < of.samples; ++b)
                std::copy_n(ys.data() + b * of.outputs, of.outputs, y + (b0 + b) * s.outputs + o0);
        });
    };
    if (std::isinf(p))
        return with([](const float* xs, const float* ws, float* ys, Shape of) {
            direct_block<Largest>(xs, ws, ys, of, 1.0f, 0, of.samples, 0, of.outputs);
        });
    const Scaled k(p, s.inputs);
    const bool direct = with_direct(p, [&](auto term) {
        using Term = decltype(term);
        const auto largest_of_pair = [&](int64_t at) {
            const int64_t b = at / s.outputs, o = at % s.outputs;
            float value = 0;
            for (const int32_t i : sets.where[b / sets.group])
                value = std::max(value, std::fabs(x[b * s.inputs + i] - w[o * s.inputs + i]));
            return value;
        };
        const float scale = Term::scaled ? scale_for(s.samples * s.outputs, largest_of_pair) : 1.0f;
        with([&](const float* xs, const float* ws, float* ys, Shape of) {
            direct_block<Term>(xs, ws, ys, of, scale, 0, of.samples, 0, of.outputs);
            take_roots(xs, ws, ys, of, k, scale, 0, of.samples, 0, of.outputs);
        });
    });
    if (!direct)
        with_power(p, [&](auto raise) {
            with([&](const float* xs, const float* ws, float* ys, Shape of) {
                scaled_block(xs, ws, ys, of, k, raise, 0, of.samples, 0, of.outputs);
            });
        });
}

// Finds the first input with |d| = y for every pair of a tile, without branches, which would be unpredictable.
template <int TB, int TO>
void find_largest(const Gradients& q, int64_t b, int64_t o, Slope (&found)[TB * TO]) {
    constexpr int PAIRS = TB * TO;
    const int64_t n = q.s.inputs, step = 2 * N;
    const float *x = q.x + b * n, *w = q.w + o * n;
    const auto at = [&](int pair) { return (b + pair / TO) * q.s.outputs + o + pair % TO; };
    const Vec one = hidden_one();
    Vec sought[PAIRS], group[PAIRS];  // by lane: the first group that contains y
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
        uint32_t first = lanes ? -1 : 0;  // twice its position, plus 1 if d is negative
        found[pair].slope = lanes ? q.grad_y[at(pair)] : 0.0f;  // 0 if y is 0 or NaN
        for (; lanes; lanes &= lanes - 1) {  // one iteration, except for ties
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

// Computes the gradients at p = inf. Slopes are stored by sample for grad_x.
void largest_gradients_on_subsets(const Gradients& q, const Subsets& sets, int threads) {
    const Shape s = q.s;
    std::vector<Slope> slopes(s.samples * s.outputs);
    over_subsets(sets, q.x, q.w, threads, [&](Shape of, int64_t b0, int64_t o0, int64_t g, const float* xs, const float* ws) {
        const int64_t pair0 = b0 * s.outputs + o0;
        const Gradients packed{xs, ws, q.y + pair0, q.grad_y + pair0, nullptr, nullptr, {of.samples, s.outputs, of.inputs}};
        tiles<RB, 2>(0, of.samples, 0, of.outputs, [&](int64_t b, int64_t o, auto nb, auto no) {
            constexpr int TB = decltype(nb)::value, TO = decltype(no)::value;
            Slope found[TB * TO];
            find_largest<TB, TO>(packed, b, o, found);
            for (int pair = 0; pair < TB * TO; ++pair) {
                const int64_t to = o + pair % TO, input = sets.where[g][found[pair].input];
                q.grad_w[(o0 + to) * s.inputs + input] -= found[pair].slope;
                slopes[pair0 + (b + pair / TO) * s.outputs + to] = {(int32_t)input, found[pair].slope};
            }
        });
    });
    parallel(threads_for(threads, s.samples * s.outputs), s.samples, 1, [&](int64_t b0, int64_t b1) {
        for (int64_t b = b0; b < b1; ++b)
            for (int64_t o = 0; o < s.outputs; ++o) {
                const Slope at = slopes[b * s.outputs + o];
                q.grad_x[b * s.inputs + at.input] += at.slope;
            }
    });
}

// Computes the gradients for inputs from begin to end; work(packed, first sample, first output, outputs) adds to packed
// gradients.
template <class Before, class Work>
void packed_gradients(const Gradients& q, const Subsets& sets, int64_t begin, int64_t end, int64_t block, Room (&rooms)[4],
                      Before before, Work work) {
    const Shape s = q.s;
    const int64_t step = std::max<int64_t>(1, SAMPLE_BLOCK / 2 / sets.group);
    for (int64_t g0 = 0; g0 < sets.groups; g0 += step) {
        const int64_t g1 = std::min(g0 + step, sets.groups);
        const PackedSamples samples(sets, q.x, begin, end, g0, g1, rooms[0], before);
        float *gx = rooms[1].of(samples.place.back() + 2 * N), *ws = rooms[2].of(block * samples.most + 2 * N),
              *gws = rooms[3].of(block * samples.most + 2 * N);
        std::fill(gx, gx + samples.place.back(), 0.0f);
        for (int64_t o0 = 0; o0 < s.outputs; o0 += block)
            for (int64_t g = g0; g < g1; ++g) {
                const int64_t outputs = std::min(block, s.outputs - o0), stride = samples.stride[g - g0];
                if (stride == 0) continue;
                const int64_t place = samples.place[g - g0], pair = sets.first(g) * s.outputs + o0;
                sets.pack(g, begin, end, q.w + o0 * s.inputs, outputs, ws, stride, before);
                std::fill(gws, gws + outputs * stride, 0.0f);
                work(Gradients{samples.x + place, ws, q.y + pair, q.grad_y + pair, gx + place, gws,
                               {sets.samples(g), s.outputs, stride}},
                     sets.first(g), o0, outputs);
                sets.add(g, begin, end, gws, stride, outputs, q.grad_w + o0 * s.inputs);
            }
        for (int64_t g = g0; g < g1; ++g)
            sets.add(g, begin, end, gx + samples.place[g - g0], samples.stride[g - g0], sets.samples(g),
                     q.grad_x + sets.first(g) * s.inputs);
    }
}

// Gradients at finite p if groups use subsets of the inputs, see InputsAlike.
struct InputsOfSubsets {
    static constexpr bool fused = false;
    const Gradients& q;
    const Subsets& sets;
    Threads threads;

    template <class Slope>
    void all(Slope slope) const {
        // Chunks are longer than for all inputs, since the last packed vector is half empty on average.
        const double share = sets.terms() / q.s.terms();
        const int64_t longest = std::max<int64_t>(1, (int64_t)(3 * CHUNK / share));
        const int64_t chunk = N * std::max<int64_t>(1, std::min(longest, sets.vectors / threads.useful));
        const Packed pairs{q.s};
        const auto before = [&](Vec v) { return slope.before(v); };
        const auto work = [&](const Gradients& packed, int64_t b0, int64_t o0, int64_t outputs) {
            const int64_t stride = packed.s.inputs, samples = packed.s.samples;
            const auto tile = [&](auto nb, int64_t b) {
                for (int64_t i = 0; i < stride; i += N)
                    add_gradients<decltype(nb)::value>(packed.x + b * stride + i, packed.grad_x + b * stride + i,
                                                       packed.w + i, packed.grad_w + i, stride, slope,
                                                       pairs.at(b0 + b, o0), outputs);
            };
            int64_t b = 0;
            for (; b + RB <= samples; b += RB) tile(std::integral_constant<int, RB>(), b);
            for (; b < samples; ++b) tile(std::integral_constant<int, 1>(), b);
        };
        parallel(threads, q.s.inputs, chunk, [&](int64_t begin, int64_t end) {
            Room rooms[4];
            for (int64_t i = begin; i < end; i += chunk)
                packed_gradients(q, sets, i, std::min(i + chunk, end), OUTPUT_BLOCK, rooms, before, work);
        });
    }

    void sparse(ScaledSlope k) const {
        parallel(threads, q.s.inputs, N, [&](int64_t begin, int64_t end) {
            std::vector<Found> found;
            for (int pair = 0; pair < RB * 2; ++pair) found.emplace_back(end - begin + N);
            const auto work = [&](const Gradients& packed, int64_t, int64_t, int64_t outputs) {
                tiles<RB, 2>(0, packed.s.samples, 0, outputs, [&](int64_t b, int64_t o, auto nb, auto no) {
                    sparse_gradient<decltype(nb)::value, decltype(no)::value>(packed, k, b, o, 0, packed.s.inputs,
                                                                              found.data());
                });
            };
            Room rooms[4];
            packed_gradients(q, sets, begin, end, block_of(end - begin), rooms, unchanged, work);
        });
    }

    void sparse(ScaledSlope k, const std::vector<int64_t>& pairs) const {
        parallel(threads, q.s.inputs, N, [&](int64_t begin, int64_t end) {
            Found found(end - begin + N);
            const int64_t room = end - begin + 3 * N;
            Buffer<> x(room), w(room), gx(room), gw(room);
            for (const int64_t at : pairs) {
                const int64_t b = at / q.s.outputs, o = at % q.s.outputs, g = b / sets.group, n = q.s.inputs;
                const int64_t stride = sets.padded(g, begin, end);
                sets.pack(g, begin, end, q.x + b * n, 1, x.data(), stride, unchanged);
                sets.pack(g, begin, end, q.w + o * n, 1, w.data(), stride, unchanged);
                for (float* gradient : {gx.data(), gw.data()}) std::fill(gradient, gradient + stride + N, 0.0f);
                const Gradients packed{x.data(), w.data(), q.y + at, q.grad_y + at, gx.data(), gw.data(), {1, 1, stride}};
                sparse_gradient<1, 1>(packed, k, 0, 0, 0, stride, &found);
                sets.add(g, begin, end, gx.data(), stride, 1, q.grad_x + b * n);
                sets.add(g, begin, end, gw.data(), stride, 1, q.grad_w + o * n);
            }
        });
    }
};

void backward_on_subsets(const Gradients& q, const Subsets& sets, float* scratch, double p, int threads) {
    if (sets.terms() == 0) return;
    if (std::isinf(p)) return largest_gradients_on_subsets(q, sets, threads);
    const Threads useful = threads_for(threads, sets.terms());
    finite_gradients(q, scratch, p, InputsOfSubsets{q, sets, useful});
}

}  // namespace
