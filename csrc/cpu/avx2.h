/* The body of the levels for registers of 256 bits: exact values in panels of float32 (panel.h), and what products in integers (int16.h)
 * need but the multiply-adds. Included by a level's file between x86.h and END_TARGET. */

typedef uint16_t halves __attribute__((vector_size(32), may_alias));
typedef int16_t shorts __attribute__((vector_size(32), may_alias));
typedef vec8 floats;
typedef ivec8 sums32;
#define FUNNEL(before, after, shift) ((before) << (shift) | (after) >> (16 - (shift)))

INLINE halves product_high(halves a, halves b) { return (halves)_mm256_mulhi_epu16((__m256i)a, (__m256i)b); }

INLINE halves sums_of_bytes(halves low, halves high) {
    __m256i one = _mm256_set1_epi8(1);
    return (halves)_mm256_maddubs_epi16((__m256i)low, one) + (halves)_mm256_maddubs_epi16((__m256i)high, one);
}

#include "cpu/gather_avx2.h"

/* ---- exact, in float32 ---- */

INLINE void interleave(floats *out, halves low, halves high) {
    out[0] = (floats)_mm256_unpacklo_epi16((__m256i)low, (__m256i)high);
    out[1] = (floats)_mm256_unpackhi_epi16((__m256i)low, (__m256i)high);
}

INLINE floats repeat_pair(const float *pair) { return (floats)_mm256_castpd_ps(_mm256_broadcast_sd((const double *)(const void *)pair)); }

INLINE void store_columns(float *y, const floats *sums) {
    for (int side = 0; side < 2; side++) *(uvec8 *)(void *)(y + 8 * side) = add_pairs(sums[2 * side], sums[2 * side + 1]);
}

#define COLUMNS_TOGETHER 2
#define PANEL_ROWS 3
#include "cpu/values.h"
#include "cpu/panel.h"

/* ---- in integers ---- */

#define POSITIONS 16
#define MOST_ROWS 4
