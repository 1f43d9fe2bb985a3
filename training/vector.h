// LANES channels in a register, 8 or 16: loading and storing them in float32 and bf16, and GELU of them (training/kernels.cpp).

#pragma once

#include <cstdint>
#include <cstring>

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

inline void store(bf16* p, vec v) {
    const ints bits = ints(v);
    const halves rounded = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, halves);  // to nearest even
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

inline vec gelu(vec z) { return z * normal(z).cumulative; }
