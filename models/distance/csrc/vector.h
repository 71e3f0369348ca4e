// Vector of floats with the width of the target instruction set, and the operations that the kernels need. Results are
// exact or rounded once, unless a comment states otherwise. Some operations exist in two forms, for cores that add and
// multiply on different execution units:
//
//   max_abs(a, b)        max(|a|, |b|)
//   max_positive(a, b)   max(a, b) if at least one is not negative, since such floats are ordered like their bits
//   minus(a, b, one)     a - b as the fused a one - b, where `one` holds 1
//   where_same(a, b, yes, no)   lanes of yes where a equals b, else lanes of no
//   store_packed(mask, a, p)    stores the lanes of a in the mask contiguously; overwrites a whole vector
//   load_packed(mask, p)        loads contiguous numbers into the lanes in the mask, 0 elsewhere; reads a whole vector
//   lookup(table, shifted)      table[k] for shifted = k + ROUNDER, 0 <= k < 16
//   load_integers(p, n), store_integers(p, n)   as load and store, converted from and to integers
//   zip(a, b)            replaces a, b by the halves of a0 b0 a1 b1 ...
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Adding and subtracting it rounds a float below 2^22 to an integer. The low bits of the sum are that integer.
constexpr float ROUNDER = 0x1.8p23f;

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define LINFLAB_ISA "avx512"

struct Vec {
    static constexpr int size = 16;
    __m512 v;

    static __m512i integers(Vec a) { return _mm512_castps_si512(a.v); }
    static Vec integers(__m512i a) { return {_mm512_castsi512_ps(a)}; }
    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p)}; }
    static Vec all(float a) { return {_mm512_set1_ps(a)}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(float* p, int n) const { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
    static Vec load_integers(const int32_t* p, int n) {
        return {_mm512_cvtepi32_ps(_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p))};
    }
    void store_integers(int32_t* p, int n) const {
        _mm512_mask_storeu_epi32(p, (__mmask16)((1u << n) - 1), _mm512_cvtps_epi32(v));
    }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    static Vec max_abs(Vec a, Vec b) { return {_mm512_range_ps(a.v, b.v, 0b1011)}; }
    static Vec max_positive(Vec a, Vec b) { return integers(_mm512_max_epi32(integers(a), integers(b))); }
    static Vec minus(Vec a, Vec b, Vec one) { return {_mm512_fmsub_ps(a.v, one.v, b.v)}; }
    static Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
    static Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
    static uint32_t at_least(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
    static Vec where_same(Vec a, Vec b, Vec yes, Vec no) {
        return {_mm512_mask_blend_ps(_mm512_cmpeq_epi32_mask(integers(a), integers(b)), no.v, yes.v)};
    }
    static void zip(Vec& a, Vec& b) {
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512 first = _mm512_permutex2var_ps(a.v, low, b.v);
        b.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), b.v);
        a.v = first;
    }
    static Vec keep(uint32_t mask, Vec a) { return {_mm512_maskz_mov_ps((__mmask16)mask, a.v)}; }
    // Both use a register: on Zen 4 the memory forms of these instructions take many times as long.
    static void store_packed(uint32_t mask, Vec a, float* p) { Vec{_mm512_maskz_compress_ps((__mmask16)mask, a.v)}.store(p); }
    static Vec load_packed(uint32_t mask, const float* p) {
        __m512 packed = _mm512_loadu_ps(p);
        asm("" : "+v"(packed));  // prevents the compiler from merging load and expansion
        return {_mm512_maskz_expand_ps((__mmask16)mask, packed)};
    }
    static Vec lookup(const float* table, Vec shifted) {
        return {_mm512_permutexvar_ps(integers(shifted), _mm512_loadu_ps(table))};
    }
    static Vec with_sign(Vec magnitude, Vec sign) {
        const __m512i bits = _mm512_set1_epi32((int)0x80000000);
        return {_mm512_castsi512_ps(
            _mm512_ternarylogic_epi32(bits, _mm512_castps_si512(sign.v), _mm512_castps_si512(magnitude.v), 0xCA))};
    }
    static Vec exponent(Vec a, Vec& mantissa) {  // a = mantissa 2^exponent, mantissa in [0.75, 1.5)
        // After subtracting the bits of 0.75, the exponent field counts from 0.75.
        const __m512i bits = _mm512_castps_si512(a.v);
        const __m512i count = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3F400000)), 23);
        mantissa = {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(count, 23)))};
        return {_mm512_cvtepi32_ps(count)};
    }
    static Vec scale(Vec a, Vec shifted) {  // a 2^k for shifted = k + ROUNDER, if the result is normal
        return {_mm512_castsi512_ps(
            _mm512_add_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23)))};
    }
};

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define LINFLAB_ISA "avx2"

struct Packing {  // for every mask, the source lane of each lane in a byte
    uint64_t packed[256] = {}, unpacked[256] = {};

    Packing() {
        for (uint64_t mask = 0; mask < 256; ++mask)
            for (uint64_t lane = 0, count = 0; lane < 8; ++lane)
                if (mask >> lane & 1) {
                    packed[mask] |= lane << 8 * count;
                    unpacked[mask] |= count++ << 8 * lane;
                }
    }
};
static const Packing PACKING;

struct Vec {
    static constexpr int size = 8;
    __m256 v;

    static __m256i integers(Vec a) { return _mm256_castps_si256(a.v); }
    static Vec integers(__m256i a) { return {_mm256_castsi256_ps(a)}; }
    static __m256i first(int n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
    static Vec all(float a) { return {_mm256_set1_ps(a)}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
    static Vec load_integers(const int32_t* p, int n) {
        return {_mm256_cvtepi32_ps(_mm256_maskload_epi32(p, first(n)))};
    }
    void store_integers(int32_t* p, int n) const { _mm256_maskstore_epi32(p, first(n), _mm256_cvtps_epi32(v)); }
    friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
    static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
    static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
    static Vec max_abs(Vec a, Vec b) { return max_positive(abs(a), abs(b)); }
    static Vec max_positive(Vec a, Vec b) { return integers(_mm256_max_epi32(integers(a), integers(b))); }
    static Vec minus(Vec a, Vec b, Vec one) { return {_mm256_fmsub_ps(a.v, one.v, b.v)}; }
    static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
    static Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
    static uint32_t at_least(Vec a, Vec b) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)); }
    static Vec where_same(Vec a, Vec b, Vec yes, Vec no) {
        return {_mm256_blendv_ps(no.v, yes.v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(integers(a), integers(b))))};
    }
    static void zip(Vec& a, Vec& b) {
        const __m256 low = _mm256_unpacklo_ps(a.v, b.v), high = _mm256_unpackhi_ps(a.v, b.v);
        a.v = _mm256_permute2f128_ps(low, high, 0x20);
        b.v = _mm256_permute2f128_ps(low, high, 0x31);
    }
    static Vec keep(uint32_t mask, Vec a) {
        const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)mask), bit), bit);
        return {_mm256_and_ps(_mm256_castsi256_ps(on), a.v)};
    }
    static void store_packed(uint32_t mask, Vec a, float* p) {
        Vec{_mm256_permutevar8x32_ps(a.v, lanes(PACKING.packed[mask & 255]))}.store(p);
    }
    static Vec load_packed(uint32_t mask, const float* p) {
        return keep(mask, {_mm256_permutevar8x32_ps(_mm256_loadu_ps(p), lanes(PACKING.unpacked[mask & 255]))});
    }
    static __m256i lanes(uint64_t bytes) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes)); }
    static Vec lookup(const float* table, Vec shifted) {
        const __m256i k = integers(shifted);
        return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), k),
                                 _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), k),
                                 _mm256_castsi256_ps(_mm256_slli_epi32(k, 28)))};  // moves bit 3 of k to the sign bit
    }
    static Vec with_sign(Vec magnitude, Vec sign) {
        const __m256 bits = _mm256_set1_ps(-0.0f);
        return {_mm256_or_ps(_mm256_andnot_ps(bits, magnitude.v), _mm256_and_ps(bits, sign.v))};
    }
    static Vec exponent(Vec a, Vec& mantissa) {
        const __m256i bits = _mm256_castps_si256(a.v);
        const __m256i count = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3F400000)), 23);
        mantissa = {_mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(count, 23)))};
        return {_mm256_cvtepi32_ps(count)};
    }
    static Vec scale(Vec a, Vec shifted) {
        return {_mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23)))};
    }
};

#else
#define LINFLAB_ISA "portable"

struct Vec {  // short loops, which compilers vectorize for the target
    static constexpr int size = 8;
    float v[8];

    template <class F>
    static Vec map(F f) {
        Vec r;
        for (int k = 0; k < 8; ++k) r.v[k] = f(k);
        return r;
    }
    static Vec load(const float* p) { return map([=](int k) { return p[k]; }); }
    static Vec load(const float* p, int n) { return map([=](int k) { return k < n ? p[k] : 0.0f; }); }
    static Vec all(float a) { return map([=](int) { return a; }); }
    void store(float* p) const { std::memcpy(p, v, sizeof v); }
    void store(float* p, int n) const { std::memcpy(p, v, n * sizeof(float)); }
    static Vec load_integers(const int32_t* p, int n) { return map([=](int k) { return k < n ? (float)p[k] : 0.0f; }); }
    void store_integers(int32_t* p, int n) const {
        for (int k = 0; k < n; ++k) p[k] = (int32_t)v[k];
    }
    friend Vec operator+(Vec a, Vec b) { return map([&](int k) { return a.v[k] + b.v[k]; }); }
    friend Vec operator-(Vec a, Vec b) { return map([&](int k) { return a.v[k] - b.v[k]; }); }
    friend Vec operator*(Vec a, Vec b) { return map([&](int k) { return a.v[k] * b.v[k]; }); }
    friend Vec operator/(Vec a, Vec b) { return map([&](int k) { return a.v[k] / b.v[k]; }); }
    static Vec fma(Vec a, Vec b, Vec c) { return map([&](int k) { return a.v[k] * b.v[k] + c.v[k]; }); }  // rounded twice
    static Vec max(Vec a, Vec b) { return map([&](int k) { return a.v[k] > b.v[k] ? a.v[k] : b.v[k]; }); }
    static Vec min(Vec a, Vec b) { return map([&](int k) { return a.v[k] < b.v[k] ? a.v[k] : b.v[k]; }); }
    static Vec max_abs(Vec a, Vec b) { return max(abs(a), abs(b)); }
    static Vec max_positive(Vec a, Vec b) { return max(a, b); }
    static Vec minus(Vec a, Vec b, Vec) { return a - b; }
    static Vec abs(Vec a) { return map([&](int k) { return std::fabs(a.v[k]); }); }
    static Vec sqrt(Vec a) { return map([&](int k) { return std::sqrt(a.v[k]); }); }
    static uint32_t at_least(Vec a, Vec b) {
        uint32_t mask = 0;
        for (int k = 0; k < 8; ++k) mask |= (uint32_t)(a.v[k] >= b.v[k]) << k;
        return mask;
    }
    static Vec where_same(Vec a, Vec b, Vec yes, Vec no) {
        return map([&](int k) { return a.v[k] == b.v[k] ? yes.v[k] : no.v[k]; });
    }
    static void zip(Vec& a, Vec& b) {
        const Vec first = map([&](int k) { return k % 2 ? b.v[k / 2] : a.v[k / 2]; });
        b = map([&](int k) { return k % 2 ? b.v[4 + k / 2] : a.v[4 + k / 2]; });
        a = first;
    }
    static Vec keep(uint32_t mask, Vec a) { return map([&](int k) { return mask >> k & 1 ? a.v[k] : 0.0f; }); }
    static void store_packed(uint32_t mask, Vec a, float* p) {
        for (int k = 0, count = 0; k < 8; ++k) {
            p[count] = a.v[k];
            count += mask >> k & 1;
        }
    }
    static Vec load_packed(uint32_t mask, const float* p) {
        int count = 0;
        return map([&](int k) { return mask >> k & 1 ? p[count++] : 0.0f; });
    }
    static Vec lookup(const float* table, Vec shifted) {
        return map([&](int k) { return table[(int)(shifted.v[k] - ROUNDER) & 15]; });
    }
    static Vec with_sign(Vec magnitude, Vec sign) {
        return map([&](int k) { return std::copysign(magnitude.v[k], sign.v[k]); });
    }
    static Vec exponent(Vec a, Vec& mantissa) {
        return map([&](int k) {
            int32_t bits;
            std::memcpy(&bits, &a.v[k], 4);
            const int32_t count = (bits - 0x3F400000) >> 23;
            const int32_t rest = bits - (int32_t)((uint32_t)count << 23);
            std::memcpy(&mantissa.v[k], &rest, 4);
            return (float)count;
        });
    }
    static Vec scale(Vec a, Vec shifted) {
        return map([&](int k) { return std::ldexp(a.v[k], (int)(shifted.v[k] - ROUNDER)); });
    }
};
#endif

// Sum and maximum of the lanes, pairwise and in a fixed order.
#if defined(__AVX2__) && defined(__FMA__)
template <class F>
inline float fold(__m256 a, F f) {
    __m128 r = f(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = f(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(f(r, _mm_movehdup_ps(r)));
}
#if defined(__AVX512F__) && defined(__AVX512DQ__)
template <class F>
inline __m256 halved(Vec a, F f) {
    return f(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
#else
template <class F>
inline __m256 halved(Vec a, F) {
    return a.v;
}
#endif
inline float sum(Vec a) {
    return fold(halved(a, [](__m256 p, __m256 q) { return _mm256_add_ps(p, q); }),
                [](__m128 p, __m128 q) { return _mm_add_ps(p, q); });
}
inline float largest(Vec a) {
    return fold(halved(a, [](__m256 p, __m256 q) { return _mm256_max_ps(p, q); }),
                [](__m128 p, __m128 q) { return _mm_max_ps(p, q); });
}
#else
inline float sum(Vec a) {
    for (int half = Vec::size / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) a.v[k] += a.v[k + half];
    return a.v[0];
}
inline float largest(Vec a) {
    for (int half = Vec::size / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) a.v[k] = std::max(a.v[k], a.v[k + half]);
    return a.v[0];
}
#endif
