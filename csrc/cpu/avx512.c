/* The AVX-512 levels (avx512.h). */
#if defined(__x86_64__)
#define TARGET AVX512_TARGET
#define WIDE_LANES 16
#define LEVEL "avx512"
#define INT16_LEVEL "avx512-int16"
#define INT8_LEVEL "avx512-int8"
#include "cpu/x86_asm.h"
#include "cpu/x86.h"

BEGIN_TARGET
#include "cpu/avx512.h"
END_TARGET

const struct mm_kernels *mm_kernels_avx512(void) { return HAS_AVX512(0) ? &kernels : 0; }
const struct mm_kernels *mm_kernels_avx512_int16(void) { return HAS_AVX512(0) ? &kernels_int16 : 0; }
const struct mm_kernels *mm_kernels_avx512_int8(void) { return HAS_AVX512(0) ? &kernels_int8 : 0; }
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx512(void) { return 0; }
const struct mm_kernels *mm_kernels_avx512_int16(void) { return 0; }
const struct mm_kernels *mm_kernels_avx512_int8(void) { return 0; }
#endif
