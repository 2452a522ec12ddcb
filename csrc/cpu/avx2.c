/* The AVX2 levels (with FMA and F16C; avx2.h). */
#if defined(__x86_64__) || defined(__i386__)
#define TARGET "avx2,fma,f16c"
#define LEVEL "avx2"
#define INT16_LEVEL "avx2-int16"
#include "cpu/x86.h"

BEGIN_TARGET

#include "cpu/avx2.h"

INLINE void add_products(sums32 *sums, halves s, const int16_t *q, int step) {
    sums[0] += (sums32)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi32(dword_at(q + 2 * step)));
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
