// l_p distances of image patches to filters, without the unfolded tensor.
//
// A thread copies the images of a few samples with zero padding and channels last. So a patch is a few contiguous runs,
// one per row of the kernel. The patches of a tile of positions are packed as rows in L2, and the kernels for rows
// compute with them: filters are the samples, patches are the outputs. Filters have their inputs in the order of patches:
// kernel row, kernel column, channel. Only gradients at p = inf use the order of `lp_distance_conv2d`: channel, kernel
// row, kernel column. There the first of equal terms gets the gradient.
#pragma once

#include "backward.h"
#include "forward.h"
#include "outer.h"
#include "powers.h"
#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

namespace {

constexpr int64_t TILE_FLOATS = 1 << 16;     // patches of a tile, which stay in L2 with their gradients
constexpr int64_t MOST_POSITIONS = 512;      // positions of a tile
constexpr int64_t GROUP_POSITIONS = 256;     // positions of a group of samples, of which the last tile may have fewer
constexpr int64_t PARTIAL_FLOATS = 1 << 24;  // limit of partial gradients of the filters
constexpr int64_t MOST_PARTS = 32;           // groups of samples with partial gradients

struct Images {
    int64_t samples, channels, height, width, filters, kernel_height, kernel_width, stride, padding;

    int64_t rows() const { return (height + 2 * padding - kernel_height) / stride + 1; }
    int64_t columns() const { return (width + 2 * padding - kernel_width) / stride + 1; }
    int64_t positions() const { return rows() * columns(); }
    int64_t run() const { return kernel_width * channels; }
    int64_t inputs() const { return kernel_height * run(); }
    int64_t pixels() const { return channels * height * width; }
    int64_t padded_row() const { return (width + 2 * padding) * channels; }
    int64_t padded_image() const { return (height + 2 * padding) * padded_row(); }
    // Returns the number of positions in a tile, in whole vectors.
    int64_t tile() const {
        constexpr int64_t vectors = COLUMNS * N;
        return std::max(vectors, std::min(MOST_POSITIONS, TILE_FLOATS / inputs()) / vectors * vectors);
    }
    // Returns the number of samples whose padded images are in memory together.
    int64_t group() const { return std::max<int64_t>(1, std::min(samples, GROUP_POSITIONS / positions())); }
    double terms() const { return (double)samples * positions() * filters * inputs(); }
};

// Patches of a group of samples from b0 on, and distances of a tile of them to all filters, (filters, positions).
class Patches {
    const Images& of;
    int64_t b0, samples;
    Buffer<> padded, rows;

  public:
    int64_t q0 = 0, count = 0;  // positions of the tile, counted over the samples of the group

    explicit Patches(const Images& of) : of(of), padded(of.group() * of.padded_image()), rows(of.tile() * of.inputs()) {
        std::fill(padded.data(), padded.data() + of.group() * of.padded_image(), 0.0f);
    }

    float* data() { return rows.data(); }

    // Calls f(packed image row, image row, columns) for every row of the images of the group.
    template <class F>
    void each_row(float* images, F f) const {
        for (int64_t b = 0; b < samples; ++b)
            for (int64_t y = 0; y < of.height; ++y)
                f(images + b * of.padded_image() + (y + of.padding) * of.padded_row() + of.padding * of.channels,
                  (b0 + b) * of.pixels() + y * of.width);
    }

    void load(const float* x, int64_t first, int64_t number) {
        b0 = first, samples = number;
        each_row(padded.data(), [&](float* to, int64_t from) {
            transpose(x + from, of.height * of.width, of.channels, of.width, to, of.channels);
        });
    }

    // Stores the gradients of padded images as gradients of the images of the group.
    void unload(float* gradients, float* grad_x) const {
        each_row(gradients, [&](const float* from, int64_t to) {
            transpose(from, of.channels, of.width, of.channels, grad_x + to, of.height * of.width);
        });
    }

    // Calls work() for every tile, with packed patches.
    template <class Work>
    void each_tile(Work work) {
        for (q0 = 0; q0 < samples * of.positions(); q0 += of.tile()) {
            count = std::min(of.tile(), samples * of.positions() - q0);
            each_run(rows.data(), padded.data(), [](float* patch, float* pixels, auto... n) {
                Vec::load(pixels, n...).store(patch, n...);
            });
            work();
        }
    }

    // Calls f(part of a packed patch, pixels) for all vectors of the tile's patches, with n if only n lanes count.
    template <class F>
    void each_run(float* patch, float* images, F f) const {
        const int64_t columns = of.columns(), rows = of.rows(), run = of.run();
        int64_t b = q0 / of.positions(), y = q0 % of.positions() / columns, x = q0 % of.positions() % columns;
        for (int64_t q = 0; q < count; ++q) {
            float* pixels = images + b * of.padded_image() + of.stride * (y * of.padded_row() + x * of.channels);
            for (int64_t row = 0; row < of.kernel_height; ++row, patch += run, pixels += of.padded_row()) {
                int64_t k = 0;
                for (; k + N <= run; k += N) f(patch + k, pixels + k);
                if (k < run) f(patch + k, pixels + k, (int)(run - k));
            }
            if (++x == columns) x = 0, ++y;
            if (y == rows) y = 0, ++b;
        }
    }

    // Adds the gradients of the tile's patches to those of padded images.
    void add(float* gradients, float* images) const {
        each_run(gradients, images, [](float* patch, float* pixels, auto... n) {
            (Vec::load(pixels, n...) + Vec::load(patch, n...)).store(pixels, n...);
        });
    }

    // Calls f(index in distances of the tile, index in distances of all samples, n) for the same n positions.
    template <class F>
    void each_map(F f) const {
        for (int64_t q = q0; q < q0 + count;) {
            const int64_t b = b0 + q / of.positions(), at = q % of.positions();
            const int64_t n = std::min(of.positions() - at, q0 + count - q);
            for (int64_t o = 0; o < of.filters; ++o)
                f(o * count + q - q0, (b * of.filters + o) * of.positions() + at, n);
            q += n;
        }
    }
};

// Returns the largest term of a patch and a filter, for pair = (sample filters + filter) positions + position.
float largest_of_pair(const float* x, const float* w, const Images& s, int64_t pair) {
    const int64_t q = pair % s.positions(), o = pair / s.positions() % s.filters, b = pair / s.positions() / s.filters;
    float most = 0;
    for (int64_t ky = 0; ky < s.kernel_height; ++ky)
        for (int64_t kx = 0; kx < s.kernel_width; ++kx)
            for (int64_t c = 0; c < s.channels; ++c) {
                const int64_t row = q / s.columns() * s.stride + ky - s.padding;
                const int64_t column = q % s.columns() * s.stride + kx - s.padding;
                const bool inside = row >= 0 && row < s.height && column >= 0 && column < s.width;
                const float pixel = inside ? x[b * s.pixels() + (c * s.height + row) * s.width + column] : 0.0f;
                most = std::max(most, std::fabs(pixel - w[o * s.inputs() + ky * s.run() + kx * s.channels + c]));
            }
    return most;
}

bool all_finite(const float* rows, int64_t count, int64_t n) {
    const auto poison = poison_of(rows, count, n);
    return std::all_of(poison.begin(), poison.end(), [](float a) { return a == 0; });
}

// Computes distances; compute(patches, shape, y) computes those of a tile.
using Compute = std::function<void(const float*, Shape, float*)>;

void over_tiles(const float* x, const float* w, float* y, const Images& s, int threads, const Compute& compute) {
    const bool finite = all_finite(x, s.samples, s.pixels()) && all_finite(w, s.filters, s.inputs());
    const int64_t group = s.group();
    parallel(threads_for(threads, s.terms()), s.samples, group, [&](int64_t begin, int64_t end) {
        Patches patches(s);
        Buffer<> tile(s.filters * s.tile());
        for (int64_t b = begin; b < end; b += group) {
            patches.load(x, b, std::min(group, end - b));
            patches.each_tile([&] {
                const Shape shape{s.filters, patches.count, s.inputs()};
                compute(patches.data(), shape, tile.data());
                if (!finite) add_poison(w, patches.data(), tile.data(), shape);
                patches.each_map(
                    [&](int64_t from, int64_t to, int64_t n) { std::copy_n(tile.data() + from, n, y + to); });
            });
        }
    });
}

// Computes distances by sums of the scaled inputs, or maxima.
void outer_convolution(const OuterTiles& tiles, const float* x, const float* w, float* y, const Images& s, double p,
                       float scale, int threads) {
    const Scaled k(p, s.inputs());
    Panels filters(s.filters, s.inputs());
    filters.pack(w, s.inputs(), 0, filters.count, scale);
    over_tiles(x, w, y, s, threads, [&](const float* patches, Shape shape, float* tile) {
        outer_block(tiles, filters, 0, filters.count, patches, shape.inputs, shape.outputs,
                    {tile, nullptr, shape.outputs}, scale);
        if (!std::isinf(p)) take_roots(w, patches, tile, shape, k, scale, 0, shape.samples, 0, shape.outputs);
    });
}

void convolution(const float* x, const float* w, float* y, const Images& s, double p, int threads) {
    if (s.terms() == 0) return;
    if (std::isinf(p)) return outer_convolution(OuterTiles::make<Largest, false>(), x, w, y, s, p, 1.0f, threads);
    const bool direct = with_direct(p, [&](auto term) {
        using Term = decltype(term);
        const auto largest = [&](int64_t pair) { return largest_of_pair(x, w, s, pair); };
        const float scale = Term::scaled ? scale_for(s.samples * s.filters * s.positions(), largest) : 1.0f;
        outer_convolution(OuterTiles::make<Term, false>(), x, w, y, s, p, scale, threads);
    });
    if (!direct)
        with_power(p, [&](auto raise) {
            const Scaled k(p, s.inputs());
            over_tiles(x, w, y, s, threads, [&](const float* patches, Shape shape, float* tile) {
                scaled_block(w, patches, tile, shape, k, raise, 0, shape.samples, 0, shape.outputs);
            });
        });
}

// Copies packed patches with channels first, or back to channels last.
void reorder(const float* from, const Images& s, int64_t count, bool channels_first, float* to) {
    const int64_t area = s.kernel_height * s.kernel_width, n = s.inputs();
    for (int64_t q = 0; q < count; ++q)
        if (channels_first)
            transpose(from + q * n, s.channels, area, s.channels, to + q * n, area);
        else
            transpose(from + q * n, area, s.channels, area, to + q * n, s.channels);
}

// Gradients of the tiles of one thread.
class TileGradients {
    const Images& s;
    const double p;
    const float* w;
    Patches patches;
    Panels filters;  // at p = inf
    Buffer<> first, rows, images, y, grad_y, scratch;
    std::vector<int32_t> blocks;

    // Adds the gradients of packed patches to `rows` and those of the filters to grad_w.
    void add(float* grad_w) {
        const Shape shape{s.filters, patches.count, s.inputs()};
        const Threads one{1, 1};
        Gradients q{w, patches.data(), y.data(), grad_y.data(), grad_w, rows.data(), shape};
        if (!std::isinf(p)) return finite_gradients(q, scratch.data(), p, InputsAlike<true>{q, one});
        reorder(patches.data(), s, patches.count, true, first.data());
        q.w = first.data();
        outer_block(OuterTiles::make<Largest, true>(), filters, 0, filters.count, q.w, shape.inputs, shape.outputs,
                    {scratch.data(), blocks.data(), shape.outputs});
        largest_gradients(q, blocks.data(), one);
        std::swap(first, rows);
        reorder(first.data(), s, patches.count, false, rows.data());
    }

  public:
    TileGradients(const Images& s, double p, const float* w)
        : s(s), p(p), w(w), patches(s), filters(std::isinf(p) ? s.filters : 1, s.inputs()),
          first(std::isinf(p) ? s.tile() * s.inputs() : 0), rows(s.tile() * s.inputs()),
          images(s.group() * s.padded_image()), y(s.filters * s.tile()), grad_y(s.filters * s.tile()),
          scratch(s.filters * s.tile()), blocks(s.filters * s.tile()) {
        if (std::isinf(p)) filters.pack(w, s.inputs(), 0, filters.count);
    }

    // Computes the gradients of a group of samples; grad_x may be null.
    void add_group(const float* x, const float* all_y, const float* all_grad_y, int64_t first_sample, float* grad_x,
                   float* grad_w) {
        patches.load(x, first_sample, std::min(s.group(), s.samples - first_sample));
        std::fill(images.data(), images.data() + s.group() * s.padded_image(), 0.0f);
        patches.each_tile([&] {
            patches.each_map([&](int64_t tile, int64_t map, int64_t n) {
                std::copy_n(all_y + map, n, y.data() + tile);
                std::copy_n(all_grad_y + map, n, grad_y.data() + tile);
            });
            std::fill(rows.data(), rows.data() + patches.count * s.inputs(), 0.0f);
            add(grad_w);
            if (grad_x) patches.add(rows.data(), images.data());
        });
        if (grad_x) patches.unload(images.data(), grad_x);
    }
};

// Computes gradients; grad_x may be null. At p = inf, w and grad_w have channels first. Each part of the samples has
// partial gradients of the filters, so that results do not depend on the number of threads.
void convolution_backward(const float* x, const float* w, const float* y, const float* grad_y, float* grad_x,
                          float* grad_w, const Images& s, double p, int threads) {
    if (s.terms() == 0) return;
    const int64_t group = s.group(), groups = (s.samples + group - 1) / group, weights = s.filters * s.inputs();
    const int64_t parts = std::max<int64_t>(1, std::min({groups, MOST_PARTS, PARTIAL_FLOATS / weights}));
    std::vector<float> partial(parts * weights);
    parallel(threads_for(threads, s.terms()), parts, 1, [&](int64_t begin, int64_t end) {
        TileGradients gradients(s, p, w);
        for (int64_t part = begin; part < end; ++part)
            for (int64_t g = groups * part / parts; g < groups * (part + 1) / parts; ++g)
                gradients.add_group(x, y, grad_y, g * group, grad_x, partial.data() + part * weights);
    });
    parallel(threads_for(threads, (double)partial.size()), weights, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t i = begin; i < end; ++i) grad_w[i] += partial[part * weights + i];
    });
}

}  // namespace
