// Boxes as centers and radii in training: ReLU with its gradient, and sums over active and inactive units.
#pragma once

#include "threads.h"
#include "vector.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace {

constexpr int64_t BOX_GRAIN = 4096;  // numbers per part of a sum; parts do not depend on the number of threads

// Returns a in the lanes of the mask, and a times the factor elsewhere.
inline Vec scale_except(uint32_t mask, Vec a, Vec factor) { return Vec::keep(mask, a) + Vec::keep(~mask, a * factor); }

// Calls f, in parallel, with a function that loads a vector of n numbers and one that stores it, for each vector.
template <class F>
void over_vectors(int64_t n, int threads, F f) {
    parallel(threads_for(threads, (double)n), n, BOX_GRAIN, [&](int64_t begin, int64_t end) {
        int64_t i = begin;
        for (; i + Vec::size <= end; i += Vec::size)
            f([=](const float* p) { return Vec::load(p + i); }, [=](float* p, Vec a) { a.store(p + i); });
        const int rest = (int)(end - i);
        if (rest) f([=](const float* p) { return Vec::load(p + i, rest); }, [=](float* p, Vec a) { a.store(p + i, rest); });
    });
}

// Boxes of ReLU. If factor < 1, upper ends of unstable units are multiplied by it. NaN stays NaN.
void relu_of_boxes(const float* center, const float* radius, float* new_center, float* new_radius, int64_t n,
                   float factor, int threads) {
    const Vec zero = Vec::all(0.0f), half = Vec::all(0.5f), shrink = Vec::all(factor);
    over_vectors(n, threads, [=](auto load, auto store) {
        const Vec c = load(center), r = load(radius), lower = c - r;
        const Vec low = Vec::max(zero, lower);
        Vec high = Vec::max(zero, c + r);
        if (factor != 1.0f) high = scale_except(Vec::at_least(lower, zero), high, shrink);
        store(new_center, (low + high) * half);
        store(new_radius, (high - low) * half);
    });
}

void relu_of_boxes_backward(const float* center, const float* radius, const float* grad_new_center,
                            const float* grad_new_radius, float* grad_center, float* grad_radius, int64_t n,
                            float factor, int threads) {
    const Vec zero = Vec::all(0.0f), half = Vec::all(0.5f), shrink = Vec::all(factor);
    over_vectors(n, threads, [=](auto load, auto store) {
        const Vec c = load(center), r = load(radius), lower = c - r, gc = load(grad_new_center),
                  gr = load(grad_new_radius);
        const Vec low = Vec::keep(~Vec::at_least(zero, lower), (gc - gr) * half);
        Vec high = Vec::keep(~Vec::at_least(zero, c + r), (gc + gr) * half);
        if (factor != 1.0f) high = scale_except(Vec::at_least(lower, zero), high, shrink);
        store(grad_center, high + low);
        store(grad_radius, high - low);
    });
}

// Sums of radii and centers, and over active (lower end > 0) and over inactive units (upper end < 0): their number, and
// the sums of their centers and of the squares of their centers.
constexpr int BOX_SUMS = 8;

void sums_of_boxes(const float* __restrict center, const float* __restrict radius, double* sums, int64_t n,
                   int threads) {
    constexpr int LANES = 8;
    using Lanes = std::array<double, LANES>;
    const int64_t parts = (n + BOX_GRAIN - 1) / BOX_GRAIN;
    std::vector<std::array<double, BOX_SUMS>> partial((size_t)parts);
    parallel(threads_for(threads, (double)n), n, BOX_GRAIN, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin / BOX_GRAIN; part * BOX_GRAIN < end; ++part) {
            const int64_t stop = std::min(n, (part + 1) * BOX_GRAIN);
            Lanes lanes[BOX_SUMS] = {};
            const auto add = [&](int64_t i, int k) {
                const float c = center[i], r = radius[i];
                const double value = (double)c, active = c - r > 0.0f ? 1.0 : 0.0, inactive = c + r < 0.0f ? 1.0 : 0.0;
                lanes[0][k] += (double)r;
                lanes[1][k] += value;
                lanes[2][k] += active;
                lanes[3][k] += active * value;
                lanes[4][k] += active * value * value;
                lanes[5][k] += inactive;
                lanes[6][k] += inactive * value;
                lanes[7][k] += inactive * value * value;
            };
            int64_t i = part * BOX_GRAIN;
            for (; i + LANES <= stop; i += LANES)
                for (int k = 0; k < LANES; ++k) add(i + k, k);
            for (int k = 0; i + k < stop; ++k) add(i + k, k);
            for (int s = 0; s < BOX_SUMS; ++s) {
                double& total = partial[(size_t)part][(size_t)s] = 0.0;
                for (const double lane : lanes[s]) total += lane;
            }
        }
    });
    std::fill_n(sums, BOX_SUMS, 0.0);
    for (const auto& part : partial)
        for (int s = 0; s < BOX_SUMS; ++s) sums[s] += part[(size_t)s];
}

void sums_of_boxes_backward(const float* center, const float* radius, const double* grad_sums, float* grad_center,
                            float* grad_radius, int64_t n, int threads) {
    Vec g[BOX_SUMS];
    for (int s = 0; s < BOX_SUMS; ++s) g[s] = Vec::all((float)grad_sums[s]);
    const Vec zero = Vec::all(0.0f);
    over_vectors(n, threads, [=](auto load, auto store) {
        const Vec c = load(center), r = load(radius), twice = c + c;
        const Vec active = Vec::keep(~Vec::at_least(zero, c - r), Vec::fma(twice, g[4], g[3]));
        const Vec inactive = Vec::keep(~Vec::at_least(c + r, zero), Vec::fma(twice, g[7], g[6]));
        store(grad_center, g[1] + active + inactive);
        store(grad_radius, g[0]);
    });
}

// Mean and biased variance over samples and positions of each channel of x (samples, channels, positions).
void channel_moments(const float* x, float* mean, float* variance, int64_t samples, int64_t channels, int64_t positions,
                     int threads) {
    constexpr int LANES = 8;
    const double count = (double)(samples * positions);
    parallel(threads_for(threads, count * (double)channels), channels, 1, [&](int64_t begin, int64_t end) {
        const auto average = [&](int64_t channel, auto term) {
            double lanes[LANES] = {}, total = 0.0;
            for (int64_t b = 0; b < samples; ++b) {
                const float* row = x + (b * channels + channel) * positions;
                int64_t i = 0;
                for (; i + LANES <= positions; i += LANES)
                    for (int k = 0; k < LANES; ++k) lanes[k] += (double)term(row[i + k]);
                for (int k = 0; i + k < positions; ++k) lanes[k] += (double)term(row[i + k]);
            }
            for (const double lane : lanes) total += lane;
            return total / count;
        };
        for (int64_t channel = begin; channel < end; ++channel) {
            const float m = mean[channel] = (float)average(channel, [](float a) { return a; });
            variance[channel] = (float)average(channel, [m](float a) { return (a - m) * (a - m); });
        }
    });
}

}  // namespace
