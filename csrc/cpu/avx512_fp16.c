/* The AVX-512 levels with arithmetic on binary16 (avx512.h): Sapphire Rapids was the first to have it. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* syscall under -std=c11 */
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && (__GNUC__ >= 12 || __clang_major__ >= 14)
#define TARGET AVX512_TARGET
#define WIDE_LANES 16
#define LEVEL "avx512-fp16"
#define INT16_LEVEL "avx512-fp16-int16"
#define INT8_LEVEL "avx512-fp16-int8"
#define AMX_LEVEL "amx-int8"
#define HALF_ARITHMETIC
#include "cpu/x86_asm.h"
#include "cpu/x86.h"

BEGIN_TARGET
#include "cpu/avx512.h"
#include "cpu/amx.h"
END_TARGET

#define HAS_FP16 (1u << 23) /* of edx */

const struct mm_kernels *mm_kernels_avx512_fp16(void) { return HAS_AVX512(HAS_FP16) ? &kernels : 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int16(void) { return HAS_AVX512(HAS_FP16) ? &kernels_int16 : 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int8(void) { return HAS_AVX512(HAS_FP16) ? &kernels_int8 : 0; }
const struct mm_kernels *mm_kernels_amx_int8(void) { return HAS_AVX512(HAS_FP16) && HAS_AMX ? &kernels_amx : 0; }
#else /* or an assembler that may not know the instructions */
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx512_fp16(void) { return 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int16(void) { return 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int8(void) { return 0; }
const struct mm_kernels *mm_kernels_amx_int8(void) { return 0; }
#endif
