/* The AVX-512 levels with arithmetic on binary16 (avx512.h): Sapphire Rapids was the first to have it. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* syscall under -std=c11 */
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && (__GNUC__ >= 12 || __clang_major__ >= 14)
#define TARGET "avx2,fma,f16c,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni"
#define LEVEL "avx512-fp16"
#define INT16_LEVEL "avx512-fp16-int16"
#define INT8_LEVEL "avx512-fp16-int8"
#define AMX_LEVEL "amx-int8"
#define HALF_ARITHMETIC
#include "cpu/x86.h"

BEGIN_TARGET
#include "cpu/avx512.h"
#include "cpu/amx.h"
END_TARGET

#define HAS_FP16 (1u << 23) /* of edx */

/* Linux saves the tiles only for processes that asked: 8 KB a thread, and room for them on every signal's stack. */
static bool has_amx(void) {
#if defined(__linux__)
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    const unsigned has_tile = 1u << 24, has_int8 = 1u << 25; /* of edx */
    return cpu_has(SAVES_TILES, 0, 0, has_tile | has_int8) && !syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA);
#else
    return false;
#endif
}

const struct mm_kernels *mm_kernels_avx512_fp16(void) { return HAS_AVX512(HAS_FP16) ? &kernels : 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int16(void) { return HAS_AVX512(HAS_FP16) ? &kernels_int16 : 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int8(void) { return HAS_AVX512(HAS_FP16) ? &kernels_int8 : 0; }
const struct mm_kernels *mm_kernels_amx_int8(void) { return HAS_AVX512(HAS_FP16) && has_amx() ? &kernels_amx : 0; }
#else /* or an assembler that may not know the instructions */
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx512_fp16(void) { return 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int16(void) { return 0; }
const struct mm_kernels *mm_kernels_avx512_fp16_int8(void) { return 0; }
const struct mm_kernels *mm_kernels_amx_int8(void) { return 0; }
#endif
