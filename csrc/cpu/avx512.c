/* The AVX-512 level: mul1 in 16-bit integers, two tiles at a time (int16.h), with VBMI's byte permute, VBMI2's funnel shift and VNNI's
 * multiply-add. Ice Lake and Zen 4 were the first to have all three; CPUs with less of AVX-512 run AVX2's level. Everything else is
 * AVX2's (x86.h). */
#if defined(__x86_64__)
#include "cpu/x86.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("fma,f16c,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("fma,f16c,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni")
#endif

#define INT16_LEVEL "avx512-int16"
#define POSITIONS 16
#define MOST_ROWS 8
#define FUNNEL(before, after, shift) (halves)_mm512_shldi_epi16((__m512i)(before), (__m512i)(after), shift)
typedef uint16_t halves __attribute__((vector_size(64), may_alias));
typedef int32_t sums32 __attribute__((vector_size(64), may_alias));

INLINE halves multiply_high(halves a, halves b) { return (halves)_mm512_mulhi_epu16((__m512i)a, (__m512i)b); }

INLINE halves byte_sums(halves low, halves high) {
    __m512i one = _mm512_set1_epi8(1);
    return (halves)_mm512_maddubs_epi16((__m512i)low, one) + (halves)_mm512_maddubs_epi16((__m512i)high, one);
}

INLINE void add_products(sums32 *sums, halves s, const int16_t *q, int step) {
    int32_t pair;
    memcpy(&pair, q + 2 * step, sizeof pair);
    /* Not the intrinsic: clang makes a multiply-add and an addition of it where it sees a long chain (1.7 x slower). */
    __asm__("vpdpwssd %2, %1, %0" : "+v"(sums[0]) : "v"(s), "v"(_mm512_set1_epi32(pair)));
}

#include "cpu/gather_avx512.h"
#include "cpu/int16.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const struct mm_kernels *mm_kernels_avx512_int16(void) {
    const unsigned ebx = bit_AVX2 | bit_AVX512F | bit_AVX512BW | bit_AVX512VL;
    return cpu_has(SAVES_YMM | SAVES_ZMM, ebx, bit_AVX512VBMI | bit_AVX512VBMI2 | bit_AVX512VNNI) ? &kernels_int16 : 0;
}
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx512_int16(void) { return 0; }
#endif
