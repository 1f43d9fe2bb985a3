// LANES channels in a register, 8 or 16: loading and storing them in float32 and bf16, and GELU of them (training/kernels.cpp).

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bf16 {
    uint16_t bits;
};

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline vec load(const bf16* p) {
    halves v;
    std::memcpy(&v, p, sizeof v);
    return vec(__builtin_convertvector(v, ints) << 16);
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(bf16* p, vec v) {  // to nearest even
#if defined(__AVX512BF16__) && LANES == 16
    const __m256bh rounded = _mm512_cvtneps_pbh(__m512(v));
#else
    const ints bits = ints(v);
    const halves rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);
#endif
    std::memcpy(p, &rounded, sizeof rounded);
}

inline void add(float* p, vec v) { store(p, load(p) + v); }

struct Normal {
    vec cumulative, density;
};

// The normal distribution, by Abramowitz & Stegun 7.1.26 (error below 1.5e-7); both need the same exponential.
inline Normal normal(vec z) {
    const vec magnitude = z < 0 ? -z : z;
    vec exponent = z * z * -0.72134752f;  // exp(-z²/2) = 2^exponent
    exponent = exponent < -126.0f ? exponent - exponent - 126.0f : exponent;
    const vec shifted = exponent + 12582912.0f;  // 1.5 · 2^23: the nearest integer is now in the low bits
    const vec r = exponent - (shifted - 12582912.0f);
    vec power = r * 1.3333558e-3f + 9.6181291e-3f;
    power = power * r + 5.5504109e-2f;
    power = power * r + 2.4022651e-1f;
    power = power * r + 6.9314718e-1f;
    power = power * r + 1.0f;
    const vec e = vec(ints(power) + (ints(shifted) << 23));
    const vec t = 1.0f / (magnitude * 0.23164190f + 1.0f);
    vec tail = t * 0.530702715f - 0.726576013f;
    tail = tail * t + 0.710706871f;
    tail = tail * t - 0.142248368f;
    tail = tail * t + 0.127414796f;
    tail = tail * t * e;
    return {z < 0 ? tail : 1.0f - tail, e * 0.39894228f};
}

struct Gelu {
    vec value, slope;
};

template <typename T>
inline Gelu gelu_and_slope(vec z) {
    const Normal n = normal(z);
    return {z * n.cumulative, n.cumulative + z * n.density};
}

template <typename T>
inline vec gelu(vec z) {
    return z * normal(z).cumulative;
}

// Of values that are rounded to bf16 (2^-9) polynomials are enough instead of an exponential and a division: the cumulative
// distribution within 3.4e-5, the slope of GELU within 5.2e-4, by the least maximum error on [0, 4] that ends in 1 there.
// Both are 1/2 plus an odd function of z.
constexpr float CUMULATIVE[] = {3.98805693e-01f, -6.60644867e-02f, 9.58167183e-03f, -1.02113397e-03f,
                                7.62040694e-05f, -3.71076914e-06f, 1.04491076e-07f, -1.27879132e-09f};
constexpr float SLOPE[] = {7.98968530e-01f, -2.66277956e-01f, 5.84496084e-02f, -8.38185442e-03f,
                           7.87557498e-04f, -4.62694624e-05f, 1.52772350e-06f, -2.15016784e-08f};

inline vec clamp(vec z) {
    const vec bound = vec{} + 4.0f, above = z > -bound ? z : -bound;
    return above < bound ? above : bound;
}

inline vec half_plus_odd(const float (&coefficients)[8], vec z, vec square) {
    vec sum = vec{} + coefficients[7];
#pragma GCC unroll 8
    for (int i = 6; i >= 0; --i) sum = sum * square + coefficients[i];
    return sum * z + 0.5f;
}

template <>
inline Gelu gelu_and_slope<bf16>(vec z) {
    const vec near = clamp(z), square = near * near;
    return {z * half_plus_odd(CUMULATIVE, near, square), half_plus_odd(SLOPE, near, square)};
}

template <>
inline vec gelu<bf16>(vec z) {
    const vec near = clamp(z);
    return z * half_plus_odd(CUMULATIVE, near, near * near);
}
