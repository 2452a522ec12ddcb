/* The AVX2 levels (with FMA and F16C): exact values in panels of float32 (panel.h), and mul1 in 16-bit integers (int16.h). Used only
 * where the CPU has it. */
#if defined(__x86_64__) || defined(__i386__)
#define TARGET "avx2,fma,f16c"
#define LEVEL "avx2"
#include "cpu/x86.h"

BEGIN_TARGET

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

/* ---- mul1 in 16-bit integers ---- */

#define INT16_LEVEL "avx2-int16"
#define POSITIONS 16
#define MOST_ROWS 4

INLINE void add_products(sums32 *sums, halves s, const int16_t *q, int step) {
    int32_t pair;
    memcpy(&pair, q + 2 * step, sizeof pair);
    sums[0] += (sums32)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi32(pair));
    /* Keeps the compiler from regrouping a long chain of sums into a tree that does not fit the registers (1.5 x slower). */
    __asm__("" : "+x"(sums[0]));
}

#include "cpu/int16.h"

END_TARGET

static bool has_avx2(void) { return cpu_has(SAVES_YMM, bit_AVX2, 0, 0); }

const struct mm_kernels *mm_kernels_avx2(void) { return has_avx2() ? &kernels : 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return has_avx2() ? &kernels_int16 : 0; }
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx2(void) { return 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return 0; }
#endif
