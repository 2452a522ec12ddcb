/* The AVX2 levels (with FMA and F16C): exact values in panels of float32 (panel.h), and mul1 in 16-bit integers (int16.h).
 * Compiled for AVX2 whatever the build's flags, and used only where the CPU has it. */
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <cpuid.h>

#include <assert.h>
#include <stdalign.h>

#include "cpu/cpu.h"
#include "cpu/vector.h"

typedef uint16_t half16 __attribute__((vector_size(32), may_alias));
typedef int16_t short16 __attribute__((vector_size(32), may_alias));

#include "cpu/gather_avx2.h"

#define LEVEL "avx2"

static void load_half(float *out, const uint16_t *in, int64_t count) {
    int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(in + i))));
    for (int64_t i = whole; i < count; i++) out[i] = _cvtsh_ss(in[i]);
}

static void store_half(uint16_t *out, const float *in, int64_t count) {
    int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        _mm_storeu_si128((__m128i *)(void *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    for (int64_t i = whole; i < count; i++) out[i] = (uint16_t)_cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

#include "cpu/kernels.h"

/* ---- exact, in float32 ---- */

#if defined(__clang__)
#define UNROLL(count) _Pragma("unroll")
#else
#define UNROLL_PRAGMA(text) _Pragma(#text)
#define UNROLL(count) UNROLL_PRAGMA(GCC unroll count)
#endif

INLINE half16 multiply_high(half16 a, half16 b) { return (half16)_mm256_mulhi_epu16((__m256i)a, (__m256i)b); }

INLINE half16 byte_sums(half16 low, half16 high) {
    __m256i one = _mm256_set1_epi8(1);
    return (half16)_mm256_maddubs_epi16((__m256i)low, one) + (half16)_mm256_maddubs_epi16((__m256i)high, one);
}

INLINE void interleave(vec8 *out, half16 low, half16 high) {
    out[0] = (vec8)_mm256_unpacklo_epi16((__m256i)low, (__m256i)high);
    out[1] = (vec8)_mm256_unpackhi_epi16((__m256i)low, (__m256i)high);
}

INLINE vec8 repeat_pair(const float *pair) { return (vec8)_mm256_castpd_ps(_mm256_broadcast_sd((const double *)(const void *)pair)); }

INLINE vec8 add_pairs(vec8 a, vec8 b) { return (vec8)_mm256_hadd_ps((__m256)a, (__m256)b); }

#include "cpu/panel.h"

/* ---- mul1 in 16-bit integers ---- */

#define INT16_LEVEL "avx2-int16"
/* Keeps the compiler from regrouping a long chain of sums into a tree that does not fit the registers (1.5 x slower). */
#define KEEP(vector) __asm__("" : "+x"(vector))

INLINE ivec8 add_products(ivec8 sums, half16 s, int32_t pair) {
    return sums + (ivec8)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi32(pair));
}

INLINE ivec8 round_values(vec8 v) { return (ivec8)_mm256_cvtps_epi32((__m256)v); }

#include "cpu/int16.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

/* Asked of the CPU itself: __builtin_cpu_supports needs a start-up routine that zig's runtime library lacks. */
static bool cpu_has_avx2(void) {
    unsigned eax, ebx, ecx, edx, saved_registers, high;
    const unsigned wanted = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & wanted) != wanted) return false;
    __asm__("xgetbv" : "=a"(saved_registers), "=d"(high) : "c"(0));
    if ((saved_registers & 6) != 6) return false; /* the system does not save xmm and ymm when it switches threads */
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_AVX2);
}

const struct mm_kernels *mm_kernels_avx2(void) { return cpu_has_avx2() ? &kernels : 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return cpu_has_avx2() ? &kernels_int16 : 0; }
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx2(void) { return 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return 0; }
#endif
