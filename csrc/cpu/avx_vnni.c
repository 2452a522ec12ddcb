/* The AVX-VNNI levels (avx2.h): products in integers only, since exact values are avx2's. Intel's client CPUs have it from Alder Lake on. */
#if (defined(__x86_64__) || defined(__i386__)) && (__GNUC__ >= 12 || __clang_major__ >= 14)
#define TARGET "avx2,fma,f16c"
#define LEVEL "avx-vnni"
#define INT16_LEVEL "avx-vnni-int16"
#define INT8_LEVEL "avx-vnni-int8"
#include "cpu/x86_asm.h"
#include "cpu/x86.h"

BEGIN_TARGET

#include "cpu/avx2.h"

INLINE void add_products(sums32 *sums, halves s, const int16_t *q, int step) {
    VEX_VPDPWSSD(sums[0], s, _mm256_set1_epi32(dword_at(q + 2 * step)));
}

INLINE void add_byte_products(sums32 *sums, halves s, const int8_t *q) {
    VEX_VPDPBUSD(*sums, s, _mm256_set1_epi32(dword_at(q)));
}

#include "cpu/int16.h"

END_TARGET

const struct mm_kernels *mm_kernels_avx_vnni_int16(void) { return HAS_AVX_VNNI ? &kernels_int16 : 0; }
const struct mm_kernels *mm_kernels_avx_vnni_int8(void) { return HAS_AVX_VNNI ? &kernels_int8 : 0; }
#else /* or an assembler that may not know the instructions */
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx_vnni_int16(void) { return 0; }
const struct mm_kernels *mm_kernels_avx_vnni_int8(void) { return 0; }
#endif
