/* 8-wide float vectors in the compilers' portable vector extension: one source for AVX2 registers, pairs of NEON or SSE
 * registers, or plain scalars. Included by each SIMD level's file before its own code. */
#ifndef MM_CPU_VECTOR_H
#define MM_CPU_VECTOR_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vec8 __attribute__((vector_size(32), may_alias));
typedef int32_t ivec8 __attribute__((vector_size(32), may_alias));
typedef float uvec8 __attribute__((vector_size(32), aligned(4), may_alias)); /* unaligned loads */

/* Before a loop: fully unrolled, so that what is indexed by its counter lies in registers. */
#if defined(__clang__)
#define UNROLL(count) _Pragma("unroll")
#else
#define UNROLL_PRAGMA(text) _Pragma(#text)
#define UNROLL(count) UNROLL_PRAGMA(GCC unroll count)
#endif

/* Vectors never cross a call boundary here (all is inlined): the build silences -Wpsabi, which warns how they would. */

#endif
