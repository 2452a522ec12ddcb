/* The search's AVX-512 level: AVX512F alone, but offered where the ops have theirs. Compiled for it whatever the build's flags. */
#include "quantize/search.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f")
#endif

#include "cpu/vector.h"

#define LEVEL "avx512"
#define LANES 16
typedef float vec __attribute__((vector_size(64), may_alias));

INLINE vec splat(float value) { return (vec)_mm512_set1_ps(value); }
INLINE vec add_square(vec d, vec cost) { return (vec)_mm512_fmadd_ps((__m512)d, (__m512)d, (__m512)cost); }
INLINE vec minimum(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }

/* a0 b0 a1 b1 ... of vectors a and b */
INLINE void zip(vec *a, vec *b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    __m512 first = (__m512)*a, second = (__m512)*b;
    *a = (vec)_mm512_permutex2var_ps(first, low, second);
    *b = (vec)_mm512_permutex2var_ps(first, high, second);
}

/* Zips the halves into pairs, twice as long lanes as before each time: v[n] with v[n + 2^bits / 2], ..., at last v[n] with v[n + 1]. */
INLINE void interleave(vec *v, int bits) {
    if (bits == 1) zip(&v[0], &v[1]);
    if (bits == 2) {
        zip(&v[0], &v[2]), zip(&v[1], &v[3]);
        zip(&v[0], &v[1]), zip(&v[2], &v[3]);
    }
    if (bits == 3) {
        zip(&v[0], &v[4]), zip(&v[1], &v[5]), zip(&v[2], &v[6]), zip(&v[3], &v[7]);
        zip(&v[0], &v[2]), zip(&v[1], &v[3]), zip(&v[4], &v[6]), zip(&v[5], &v[7]);
        zip(&v[0], &v[1]), zip(&v[2], &v[3]), zip(&v[4], &v[5]), zip(&v[6], &v[7]);
    }
}

#include "quantize/step.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const struct mm_search_level *mm_search_avx512(void) { return mm_kernels_avx512_int16() ? &level : 0; }
#else
const struct mm_search_level *mm_search_avx512(void) { return 0; }
#endif
