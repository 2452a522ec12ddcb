/* The search's AVX2 level, with FMA; compiled for them whatever the build's flags. */
#include "quantize/search.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "cpu/vector.h"

#define LEVEL "avx2"
#define LANES 8
typedef vec8 vec;

INLINE vec splat(float value) { return (vec)_mm256_set1_ps(value); }
INLINE vec add_square(vec d, vec cost) { return (vec)_mm256_fmadd_ps((__m256)d, (__m256)d, (__m256)cost); }
INLINE vec minimum(vec a, vec b) { return (vec)_mm256_min_ps((__m256)a, (__m256)b); }

INLINE void interleave(vec *v, int bits) {
    __m256 a = (__m256)v[0], b = (__m256)v[1];
    __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    if (bits == 1) {
        v[0] = (vec)_mm256_permute2f128_ps(low, high, 0x20);
        v[1] = (vec)_mm256_permute2f128_ps(low, high, 0x31);
        return;
    }
    __m256 c = (__m256)v[2], d = (__m256)v[3];
    __m256 low2 = _mm256_unpacklo_ps(c, d), high2 = _mm256_unpackhi_ps(c, d);
    __m256 w[4] = {_mm256_shuffle_ps(low, low2, 0x44), _mm256_shuffle_ps(low, low2, 0xEE), /* lanes 0 and 4, 1 and 5 */
                   _mm256_shuffle_ps(high, high2, 0x44), _mm256_shuffle_ps(high, high2, 0xEE)};
    v[0] = (vec)_mm256_permute2f128_ps(w[0], w[1], 0x20);
    v[1] = (vec)_mm256_permute2f128_ps(w[2], w[3], 0x20);
    v[2] = (vec)_mm256_permute2f128_ps(w[0], w[1], 0x31);
    v[3] = (vec)_mm256_permute2f128_ps(w[2], w[3], 0x31);
}

#include "quantize/step.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

/* What the ops' level of the same name asks for includes all of it. */
const struct mm_search_level *mm_search_avx2(void) { return mm_kernels_avx2() ? &level : 0; }
#else
const struct mm_search_level *mm_search_avx2(void) { return 0; }
#endif
