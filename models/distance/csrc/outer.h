// Distances with outputs in the lanes of vectors, as in matrix products.
//
// A tile of samples and outputs stays in registers during a loop over inputs, which subtracts weights of one vector of
// outputs from a single number of a sample. So no sums over lanes remain at the end. Operands are packed in the order
// of use: weights as [input][output] for the outputs of a tile, samples as [input][sample] for the samples of a tile.
#pragma once

#include "powers.h"
#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

constexpr int ROWS = N == 16 ? 12 : 6;     // samples of a tile, in steps of a third
constexpr int COLUMNS = 2;                 // vectors of outputs of a tile
constexpr int64_t BLOCK = 64;              // inputs of a block: BLOCK_INPUTS of reference.py
constexpr int64_t SLICE_FLOATS = 1 << 18;  // packed samples of a slice of the inputs, which stay in L2

// Replaces N vectors by those of the transposed matrix.
inline void transpose(Vec (&rows)[N]) {
    unrolled<N == 16 ? 4 : 3>([&](auto) {
        Vec mixed[N];
        unrolled<N / 2>([&](auto k) {
            mixed[2 * k] = rows[k];
            mixed[2 * k + 1] = rows[k + N / 2];
            Vec::zip(mixed[2 * k], mixed[2 * k + 1]);
        });
        unrolled<N>([&](auto k) { rows[k] = mixed[k]; });
    });
}

// Stores to[c to_stride + r] = scale from[r from_stride + c], for all rows r and columns c.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t to_stride,
               float scale = 1.0f) {
    const auto change = [&](Vec v) { return v * Vec::all(scale); };
    for (int64_t r = 0; r < rows; r += N)
        for (int64_t c = 0; c < columns; c += N) {
            const int height = (int)std::min<int64_t>(N, rows - r), width = (int)std::min<int64_t>(N, columns - c);
            const float* source = from + r * from_stride + c;
            float* target = to + c * to_stride + r;
            Vec block[N];
            if (height == N && width == N) {
                unrolled<N>([&](auto k) { block[k] = change(Vec::load(source + k * from_stride)); });
                transpose(block);
                unrolled<N>([&](auto k) { block[k].store(target + k * to_stride); });
            } else {
                unrolled<N>([&](auto k) {
                    block[k] = k < height ? change(Vec::load(source + k * from_stride, width)) : Vec::all(0.0f);
                });
                transpose(block);
                unrolled<N>([&](auto k) {
                    if (k < width) block[k].store(target + k * to_stride, height);
                });
            }
        }
}

// Parts of the inputs of equal size, in whole blocks.
struct Slices {
    int64_t inputs, depth;

    Slices(int64_t rows, int64_t inputs) : inputs(inputs) {
        const int64_t most = std::max<int64_t>(4 * BLOCK, SLICE_FLOATS / rows);
        const int64_t blocks = (inputs + BLOCK - 1) / BLOCK, slices = (inputs + most - 1) / most;
        depth = (blocks + slices - 1) / slices * BLOCK;
    }
    // Returns the number of inputs with padding, for loops over two inputs at once.
    static int64_t even(int64_t n) { return n + n % 2; }
    template <class F>
    void each(F f) const {  // f(first input, inputs)
        for (int64_t i = 0; i < inputs; i += depth) f(i, std::min(depth, inputs - i));
    }
};

// Packed rows of samples: panels of up to ROWS samples, for each slice of the inputs in turn.
class Panels {
    Buffer<> buffer;

  public:
    Slices slices;
    int64_t rows, padded, count;

    Panels(int64_t rows, int64_t inputs)
        : buffer((rows + ROWS) * Slices::even(inputs) + N), slices(rows, inputs), rows(rows),
          padded((rows + ROWS / 3 - 1) / (ROWS / 3) * (ROWS / 3)), count((rows + ROWS - 1) / ROWS) {}

    int64_t first(int64_t panel) const { return panel * ROWS; }
    int64_t height(int64_t panel) const { return std::min<int64_t>(ROWS, padded - first(panel)); }
    int64_t used(int64_t panel) const { return std::min(height(panel), rows - first(panel)); }
    float* at(int64_t panel, int64_t i, int64_t inputs) {
        return buffer.data() + padded * i + first(panel) * Slices::even(inputs);
    }
    // Packs the panels from p0 to p1.
    void pack(const float* from, int64_t stride, int64_t p0, int64_t p1, float scale = 1.0f) {
        slices.each([&](int64_t i, int64_t inputs) {
            for (int64_t p = p0; p < p1; ++p) {
                float* to = at(p, i, inputs);
                if (used(p) < height(p) || inputs % 2) std::fill(to, to + height(p) * Slices::even(inputs), 0.0f);
                transpose(from + first(p) * stride + i, stride, used(p), inputs, to, height(p), scale);
            }
        });
    }
};

// Distances of a tile: y and, if not null, the first block of inputs that contains the largest term.
struct Outer {
    float* y;
    int32_t* blocks;
    int64_t stride;

    Outer at(int64_t b, int64_t o) const {
        return {y + b * stride + o, blocks ? blocks + b * stride + o : nullptr, stride};
    }
};

// Calls f(r, c) for all vectors of a tile, with constants.
template <int R, int C, class F>
[[gnu::always_inline]] inline void each_vector(F f) {
    unrolled<R>([&](auto r) __attribute__((always_inline)) {
        unrolled<C>([&](auto c) __attribute__((always_inline)) { f(r, c); });
    });
}

// Adds the terms of some inputs to the sums of a tile. Inlined, the sums would not stay in registers.
template <class T, int R, int C>
[[gnu::noinline]] void outer_terms(const float* x, const float* w, int64_t inputs, float (&sums)[R][C][N]) {
    Vec acc[R][C];
    each_vector<R, C>([&](auto r, auto c) { acc[r][c] = Vec::load(sums[r][c]); });
    if constexpr (std::is_same_v<T, Largest> && N == 16) {
        const Vec one = hidden_one();
        for (int64_t i = 0; i < inputs; i += 2, x += 2 * R, w += 2 * C * N) {
            Vec w0[C], w1[C];
            unrolled<C>([&](auto c) { w0[c] = Vec::load(w + c * N), w1[c] = Vec::load(w + (C + c) * N); });
            each_vector<R, C>([&](auto r, auto c) {
                acc[r][c] = T::add(acc[r][c], Vec::all(x[r]), w0[c], Vec::all(x[R + r]), w1[c], one);
            });
        }
    } else {
        for (int64_t i = 0; i < inputs; ++i, x += R, w += C * N) {
            Vec wv[C];
            unrolled<C>([&](auto c) { wv[c] = Vec::load(w + c * N); });
            each_vector<R, C>([&](auto r, auto c) { acc[r][c] = T::add(acc[r][c], Vec::all(x[r]) - wv[c]); });
        }
    }
    each_vector<R, C>([&](auto r, auto c) { acc[r][c].store(sums[r][c]); });
}

// Computes a tile for a slice of the inputs that starts with input i, and adds it to the result of earlier slices.
template <class T, int R, int C, bool RECORD>
void outer_tile(const float* x, const float* w, int64_t i, int64_t inputs, int64_t rows, int64_t columns, Outer to) {
    const auto width = [&](int c) { return (int)std::min<int64_t>(N, columns - c * N); };
    alignas(64) float sums[R][C][N], before[RECORD ? R : 1][C][N], blocks[RECORD ? R : 1][C][N];
    each_vector<R, C>([&](auto r, auto c) {
        const bool known = i > 0 && r < rows;
        const int64_t at = r * to.stride + c * N;
        (known ? Vec::load(to.y + at, width(c)) : Vec::all(0.0f)).store(sums[r][c]);
        if constexpr (RECORD)
            (known ? Vec::load_integers(to.blocks + at, width(c)) : Vec::all(0.0f)).store(blocks[r][c]);
    });
    for (int64_t j = 0; j < inputs; j += RECORD ? BLOCK : inputs) {
        if constexpr (RECORD) std::memcpy(before, sums, sizeof sums);
        const int64_t n = RECORD ? std::min(BLOCK, inputs - j) : inputs;
        outer_terms<T, R, C>(x + j * R, w + j * C * N, Slices::even(n), sums);
        if constexpr (RECORD)
            each_vector<R, C>([&](auto r, auto c) {
                const Vec number = Vec::all((float)((i + j) / BLOCK));
                Vec::where_same(Vec::load(sums[r][c]), Vec::load(before[r][c]), Vec::load(blocks[r][c]), number)
                    .store(blocks[r][c]);
            });
    }
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < C; ++c) {
            Vec::load(sums[r][c]).store(to.y + r * to.stride + c * N, width(c));
            if constexpr (RECORD)
                Vec::load(blocks[r][c]).store_integers(to.blocks + r * to.stride + c * N, width(c));
        }
}

// Functions outer_tile by vectors of outputs and by thirds of ROWS, so that code around them is compiled once.
struct OuterTiles {
    void (*of[COLUMNS][3])(const float*, const float*, int64_t, int64_t, int64_t, int64_t, Outer);

    template <class T, bool RECORD>
    static OuterTiles make() {
        constexpr int R = ROWS / 3;
        return {{{outer_tile<T, R, 1, RECORD>, outer_tile<T, 2 * R, 1, RECORD>, outer_tile<T, 3 * R, 1, RECORD>},
                 {outer_tile<T, R, 2, RECORD>, outer_tile<T, 2 * R, 2, RECORD>, outer_tile<T, 3 * R, 2, RECORD>}}};
    }
};

// Computes the panels p0 to p1 of samples, packed with `scale`, for `outputs` rows of weights.
void outer_block(const OuterTiles& tiles, Panels& samples, int64_t p0, int64_t p1, const float* w, int64_t inputs,
                 int64_t outputs, Outer to, float scale = 1.0f) {
    const Slices slices = samples.slices;
    Buffer<> packed(std::min(slices.depth, Slices::even(inputs)) * COLUMNS * N + N);
    slices.each([&](int64_t i, int64_t n) {
        for (int64_t o = 0; o < outputs; o += COLUMNS * N) {
            const int64_t width = std::min<int64_t>(COLUMNS * N, outputs - o), vectors = (width + N - 1) / N;
            if (width % N || n % 2) std::fill(packed.data(), packed.data() + Slices::even(n) * vectors * N, 0.0f);
            transpose(w + o * inputs + i, inputs, width, n, packed.data(), vectors * N, scale);
            for (int64_t p = p0; p < p1; ++p)
                tiles.of[vectors - 1][samples.height(p) / (ROWS / 3) - 1](samples.at(p, i, n), packed.data(), i, n,
                                                                        samples.used(p), width,
                                                                        to.at(samples.first(p), o));
        }
    });
}

// Computes distances at p = inf and, if `blocks` is not null, the first block of inputs with the largest term. Threads
// divide the outputs, or the samples if the outputs are few.
void outer_largest(const float* x, const float* w, float* y, int32_t* blocks, Shape s, Threads threads) {
    const OuterTiles tiles = blocks ? OuterTiles::make<Largest, true>() : OuterTiles::make<Largest, false>();
    Panels samples(s.samples, s.inputs);
    const Outer to{y, blocks, s.outputs};
    parallel(threads, samples.count, 1, [&](int64_t p0, int64_t p1) { samples.pack(x, s.inputs, p0, p1); });
    const auto block = [&](int64_t p0, int64_t p1, int64_t o0, int64_t o1) {
        outer_block(tiles, samples, p0, p1, w + o0 * s.inputs, s.inputs, o1 - o0, to.at(0, o0));
    };
    if (s.outputs >= (int64_t)threads.useful * COLUMNS * N)
        parallel(threads, s.outputs, COLUMNS * N, [&](int64_t o0, int64_t o1) { block(0, samples.count, o0, o1); });
    else
        parallel(threads, samples.count, 1, [&](int64_t p0, int64_t p1) { block(p0, p1, 0, s.outputs); });
}

}  // namespace
