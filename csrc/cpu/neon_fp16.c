/* The NEON levels with Armv8.2's additions: arithmetic on binary16 (FEAT_FP16: every Mac, Graviton2 and later), and dot products of bytes
 * (FEAT_DotProd: the same), with FEAT_SHA3's and FEAT_I8MM's instructions where the CPU has them (neon.h, row8_neon.h). */
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__) && \
    (defined(__clang__) ? __clang_major__ >= 16 : __GNUC__ >= 10)
#include <arm_neon.h>
#include <stdbool.h>
#include <string.h>

#include "cpu/arm.h"
#include "cpu/cpu.h"
#include "cpu/half.h"
#define LEVEL "neon-fp16"
#define INT8_LEVEL "neon-int8"
#define OWN_ROW8 "cpu/row8_neon.h"
#define REPEATS 1
#define HALF_ARITHMETIC
#define LEVEL_TARGET "+fp16+dotprod"
#define SHA3_TARGET "+fp16+dotprod+sha3"
#define I8MM_TARGET "+fp16+dotprod+i8mm"

static bool has_sha3, has_i8mm; /* set when the level becomes active */

BEGIN_TARGET(LEVEL_TARGET)
#include "cpu/neon.h"
END_TARGET

/* In practice a CPU has both or neither. */
static bool has_both(void) { return arm_has_fp16() && arm_has_dotprod(); }

const struct mm_kernels *mm_kernels_neon_fp16(void) { return has_both() ? &kernels : 0; }
const struct mm_kernels *mm_kernels_neon_int8(void) { return has_both() ? &kernels_int8 : 0; }
#else /* or a compiler that may not know the instructions, or has them only where a whole file is compiled for them */
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_neon_fp16(void) { return 0; }
const struct mm_kernels *mm_kernels_neon_int8(void) { return 0; }
#endif
