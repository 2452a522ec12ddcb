/* What the levels for x86 share: the exact kernels, for AVX2 (with FMA and F16C) whatever the build's flags (panel.h), and what the CPU
 * and the system can do. Included once by a level's file, which may define LEVEL (kernels.h). */
#include <assert.h>
#include <cpuid.h>
#include <immintrin.h>
#include <stdalign.h>

#include "cpu/cpu.h"
#include "cpu/vector.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

typedef uint16_t half16 __attribute__((vector_size(32), may_alias));
typedef int16_t short16 __attribute__((vector_size(32), may_alias));

#include "cpu/gather_avx2.h"

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

INLINE ivec8 round_values(vec8 v) { return (ivec8)_mm256_cvtps_epi32((__m256)v); } /* for int16.h */

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* Asked of the CPU itself: __builtin_cpu_supports needs a start-up routine that zig's runtime library lacks. `registers` are the
 * bits of XCR0: those that the system saves when it switches threads; `ebx` and `ecx` are those of CPUID's leaf 7. */
static bool cpu_has(unsigned registers, unsigned ebx, unsigned ecx) {
    unsigned a, b, c, d, saved, high;
    const unsigned wanted = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return false;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & registers) != registers) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & ebx) == ebx && (c & ecx) == ecx;
}
#define SAVES_YMM 0x06u /* xmm and the upper halves of ymm */
#define SAVES_ZMM 0xE6u /* and mask registers, upper halves of zmm, zmm16 to zmm31 */
