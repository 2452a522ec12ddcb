/* The NEON levels for every arm64 CPU: Armv8.0 has all that they use (neon.h). */
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#include <stdbool.h>
#include <string.h>

#define LEVEL "neon"
#define INT16_LEVEL "neon-int16"
#include "cpu/neon.h"

const struct mm_kernels *mm_kernels_neon(void) { return &kernels; }
const struct mm_kernels *mm_kernels_neon_int16(void) { return &kernels_int16; }
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_neon(void) { return 0; }
const struct mm_kernels *mm_kernels_neon_int16(void) { return 0; }
#endif
