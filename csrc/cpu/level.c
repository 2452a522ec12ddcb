/* Which SIMD level runs: the list of those this machine has, and the active one. */
#include "cpu/cpu.h"

const struct mm_kernels *mm_cpu;

int mm_cpu_levels(const struct mm_kernels **levels) {
    int count = 0;
#define X(name)                                            \
    if (mm_kernels_##name()) levels[count++] = mm_kernels_##name();
    MM_CPU_LEVELS(X)
#undef X
    return count;
}
