/* The search's NEON level, for every arm64 CPU. */
#include "quantize/search.h"

#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#include <arm_neon.h>

#include "cpu/vector.h"

#define LEVEL "neon"
#define LANES 4
typedef float vec __attribute__((vector_size(16), may_alias));

INLINE vec splat(float value) { return (vec)vdupq_n_f32(value); }
INLINE vec add_square(vec d, vec cost) { return (vec)vfmaq_f32((float32x4_t)cost, (float32x4_t)d, (float32x4_t)d); }
INLINE vec minimum(vec a, vec b) { return (vec)vminq_f32((float32x4_t)a, (float32x4_t)b); }

INLINE void interleave(vec *v, int bits) {
    (void)bits; /* 1 */
    float32x4_t a = (float32x4_t)v[0], b = (float32x4_t)v[1];
    v[0] = (vec)vzip1q_f32(a, b);
    v[1] = (vec)vzip2q_f32(a, b);
}

#include "quantize/step.h"

const struct mm_search_level *mm_search_neon(void) { return &level; }
#else
const struct mm_search_level *mm_search_neon(void) { return 0; }
#endif
