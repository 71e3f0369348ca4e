// Upper limits of kernel speed on this core: the arithmetic of the kernels with all operands in registers.
#pragma once

#include "powers.h"
#include "threads.h"
#include "tiles.h"
#include "vector.h"

#include <cstdint>
#include <type_traits>

namespace {

// Makes the compiler assume that v has changed.
inline void renew(Vec& v) {
#if defined(__AVX512F__)
    asm volatile("" : "+v"(v.v));
#elif defined(__AVX2__)
    asm volatile("" : "+x"(v.v));
#else
    asm volatile("" : : "g"(&v) : "memory");
#endif
}

// Runs the arithmetic of a kernel with all operands in registers, and returns the number of terms |x_i - w_i|.
template <class T, bool GRADIENT>
int64_t run_in_registers(int64_t rounds) {
    const Denormals flushed(true);
    const Vec one = hidden_one();
    Vec x[4], acc[4][2], w[2];
    unrolled<4>([&](auto r) {
        x[r] = Vec::all(0.1f * (float)r);
        acc[r][0] = acc[r][1] = Vec::all(0.0f);
    });
    w[0] = w[1] = Vec::all(0.7f);
    for (int64_t k = 0; k < rounds; ++k) {
        renew(w[0]);
        renew(w[1]);
        unrolled<8>([&](auto pair) {
            constexpr int r = pair % 4, c = pair / 4;
            if constexpr (GRADIENT) {  // acc[r][1] simulates grad_w
                const Vec g = x[r] * T::slope(x[r] - w[c]);
                acc[r][0] = acc[r][0] + g;
                acc[c][1] = acc[c][1] - g;
            } else if constexpr (std::is_same_v<T, Largest>) {
                acc[r][c] = T::add(acc[r][c], x[r], w[c], x[r], w[1 - c], one);
            } else {
                acc[r][c] = T::add(acc[r][c], x[r] - w[c]);
            }
        });
    }
    unrolled<8>([&](auto pair) { renew(acc[pair % 4][pair / 4]); });
    return rounds * 8 * N * (std::is_same_v<T, Largest> ? 2 : 1);
}

// Runs the arithmetic of a matrix product, sums of x_i w_i, and returns the number of terms.
int64_t multiply_in_registers(int64_t rounds) {
    constexpr int COUNT = 12;  // enough to hide the latency of two multiply-adds per cycle
    Vec acc[COUNT], w = Vec::all(0.7f);
    const Vec x = hidden_one();
    unrolled<COUNT>([&](auto k) {
        acc[k] = Vec::all(0.0f);
        renew(acc[k]);  // else the compiler sees that all sums are equal
    });
    for (int64_t round = 0; round < rounds; ++round) {
        renew(w);
        unrolled<COUNT>([&](auto k) { acc[k] = Vec::fma(x, w, acc[k]); });
    }
    unrolled<COUNT>([&](auto k) { renew(acc[k]); });
    return rounds * COUNT * N;
}

}  // namespace
