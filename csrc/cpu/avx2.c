/* The AVX2 levels (with FMA and F16C): exact values in panels of float32 (x86.h), and mul1 in 16-bit integers (int16.h). Compiled for
 * AVX2 whatever the build's flags, and used only where the CPU has it. */
#if defined(__x86_64__) || defined(__i386__)
#define LEVEL "avx2"
#include "cpu/x86.h"

/* ---- mul1 in 16-bit integers ---- */

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define INT16_LEVEL "avx2-int16"
#define POSITIONS 16
#define MOST_ROWS 4
#define FUNNEL(before, after, shift) ((before) << (shift) | (after) >> (16 - (shift)))
typedef half16 halves;
typedef ivec8 sums32;
#define product_high multiply_high
#define sums_of_bytes byte_sums
#define halves_of_tiles gather_halves
#define prepare_int16 prepare

INLINE void add_products(sums32 *sums, halves s, const int16_t *q, int step) {
    int32_t pair;
    memcpy(&pair, q + 2 * step, sizeof pair);
    sums[0] += (sums32)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi32(pair));
    /* Keeps the compiler from regrouping a long chain of sums into a tree that does not fit the registers (1.5 x slower). */
    __asm__("" : "+x"(sums[0]));
}

#include "cpu/int16.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

static bool has_avx2(void) { return cpu_has(SAVES_YMM, bit_AVX2, 0); }

const struct mm_kernels *mm_kernels_avx2(void) { return has_avx2() ? &kernels : 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return has_avx2() ? &kernels_int16 : 0; }
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx2(void) { return 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return 0; }
#endif
