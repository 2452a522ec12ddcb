/* binary16 and bfloat16 in portable C: exact conversions, rounding to nearest even, subnormals kept.
 * Levels with hardware conversions use those; the results are the same bits. */
#ifndef MM_CPU_HALF_H
#define MM_CPU_HALF_H

#include <stdint.h>
#include <string.h>

static inline float mm_float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t mm_bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float mm_float_of_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = (half >> 10) & 0x1Fu, mantissa = half & 0x3FFu;
    if (exponent == 0x1Fu) /* infinity, or NaN, made quiet as hardware does */
        return mm_float_of_bits(sign | 0x7F800000u | (mantissa ? 0x400000u : 0u) | mantissa << 13);
    if (exponent) return mm_float_of_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
    if (!mantissa) return mm_float_of_bits(sign);
    /* Subnormal: normalize by hand, since flush-to-zero modes would eat a float subnormal trick. */
    exponent = 113u;
    while (!(mantissa & 0x400u)) {
        mantissa <<= 1;
        exponent--;
    }
    return mm_float_of_bits(sign | exponent << 23 | (mantissa & 0x3FFu) << 13);
}

static inline uint16_t mm_half_of_float(float value) {
    uint32_t bits = mm_bits_of_float(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00u | (magnitude >> 13 & 0x3FFu)); /* NaN, made quiet */
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u); /* 65520 and up round to infinity */
    if (magnitude >= 0x38800000u) { /* normal: drop 13 bits, ties to even; a carry moves into the exponent */
        uint32_t rounded = magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u);
        return (uint16_t)(sign | rounded >> 13);
    }
    if (magnitude < 0x33000000u) return (uint16_t)sign; /* below half of the smallest subnormal */
    uint32_t shift = 126u - (magnitude >> 23), mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
    uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1u), tie = 1u << (shift - 1u);
    kept += rest > tie || (rest == tie && (kept & 1u));
    return (uint16_t)(sign | kept);
}

static inline float mm_float_of_bfloat16(uint16_t value) { return mm_float_of_bits((uint32_t)value << 16); }

static inline uint16_t mm_bfloat16_of_float(float value) {
    uint32_t bits = mm_bits_of_float(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(bits >> 16 | 0x40u); /* NaN, made quiet */
    return (uint16_t)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

#endif
