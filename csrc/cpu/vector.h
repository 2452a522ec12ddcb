/* 8-wide float vectors in the compilers' portable vector extension: one source for AVX2 registers, pairs of NEON or SSE
 * registers, or plain scalars; and "wide" ones, of WIDE_LANES, which a level's file may define as 16 before it includes this. */
#ifndef MM_CPU_VECTOR_H
#define MM_CPU_VECTOR_H

#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

typedef float vec8 __attribute__((vector_size(32), may_alias));
typedef int32_t ivec8 __attribute__((vector_size(32), may_alias));
typedef float uvec8 __attribute__((vector_size(32), aligned(4), may_alias)); /* unaligned loads */

#ifndef WIDE_LANES
#define WIDE_LANES 8
#endif
typedef float wide __attribute__((vector_size(4 * WIDE_LANES), may_alias));
typedef int32_t iwide __attribute__((vector_size(4 * WIDE_LANES), may_alias));
typedef float uwide __attribute__((vector_size(4 * WIDE_LANES), aligned(4), may_alias)); /* unaligned loads */

/* Lane i of the result is lane i ^ half of v, a power of two; and vectors of f(i, half). */
#define BY_LANE8(f, half, i) f(i, half), f(i + 1, half), f(i + 2, half), f(i + 3, half), f(i + 4, half), f(i + 5, half), f(i + 6, half), f(i + 7, half)
#if WIDE_LANES == 16
#define BY_LANE(f, half) BY_LANE8(f, half, 0), BY_LANE8(f, half, 8)
#else
#define BY_LANE(f, half) BY_LANE8(f, half, 0)
#endif
#define PARTNER(i, half) ((i) ^ (half))
#if defined(__clang__) || __GNUC__ >= 12
#define PARTNERS(v, half) __builtin_shufflevector(v, v, BY_LANE(PARTNER, half))
#else
#define PARTNERS(v, half) __builtin_shuffle(v, (iwide){BY_LANE(PARTNER, half)})
#endif

/* v = all its lanes combined by f(a, b), in every lane */
#define COMBINE_LANES(v, f)                               \
    do {                                                  \
        v = f(v, PARTNERS(v, 1));                         \
        v = f(v, PARTNERS(v, 2));                         \
        v = f(v, PARTNERS(v, 4));                         \
        if (WIDE_LANES > 8) v = f(v, PARTNERS(v, WIDE_LANES / 2)); \
    } while (0)

/* Before a loop: fully unrolled, so that what is indexed by its counter lies in registers; or not at all, a long body. */
#if defined(__clang__)
#define UNROLL(count) _Pragma("unroll")
#define ROLLED _Pragma("nounroll")
#else
#define ROLLED _Pragma("GCC unroll 1")
#define UNROLL_PRAGMA(text) _Pragma(#text)
#define UNROLL(count) UNROLL_PRAGMA(GCC unroll count)
#endif

/* Vectors never cross a call boundary here (all is inlined): the build silences -Wpsabi, which warns how they would. */

#endif
