/* What an arm64 CPU has beyond Armv8.0, asked of the system when the module is loaded, and how to compile for it: functions between
 * BEGIN_TARGET(names) and END_TARGET are compiled for Armv8.2 and those extensions, "+one+other", whatever the build's flags (target.h). */
#include <stdbool.h>
#include <stddef.h>
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu/target.h"

#define BEGIN_TARGET(names) COMPILE_FOR(names, "arch=armv8.2-a", names)

#if defined(__APPLE__)
/* The names are macOS 12's and later; what the compiler may use without asking, every Mac has. */
static bool sysctl_says(const char *name) {
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, NULL, 0) && value;
}
#define ARM_HAS(name, word, bit) sysctl_says("hw.optional.arm.FEAT_" #name)
#elif defined(__linux__)
#define ARM_HAS(name, word, bit) (getauxval(word) >> (bit) & 1) /* bits of the kernel's asm/hwcap.h, older headers lack some */
#else
#define ARM_HAS(name, word, bit) false
#endif

static inline bool arm_has_fp16(void) {
#if defined(__ARM_FEATURE_FP16_VECTOR_ARITHMETIC)
    return true;
#else
    return ARM_HAS(FP16, AT_HWCAP, 10); /* asimdhp */
#endif
}

static inline bool arm_has_dotprod(void) {
#if defined(__ARM_FEATURE_DOTPROD)
    return true;
#else
    return ARM_HAS(DotProd, AT_HWCAP, 20);
#endif
}

static inline bool arm_has_sha3(void) {
#if defined(__ARM_FEATURE_SHA3)
    return true;
#else
    return ARM_HAS(SHA3, AT_HWCAP, 17);
#endif
}

static inline bool arm_has_i8mm(void) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return true;
#else
    return ARM_HAS(I8MM, AT_HWCAP2, 13);
#endif
}
