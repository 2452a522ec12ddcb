/* fma(d, d, cost), rounded once, on processors without the instruction too: the same bits everywhere, and whatever the compiler
 * contracts. */
#ifndef MM_QUANTIZE_FUSED_H
#define MM_QUANTIZE_FUSED_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float mm_fused_square(float d, float cost) {
#if defined(__FMA__) || defined(__aarch64__) || FLT_EVAL_METHOD != 0
    return fmaf(d, d, cost);
#else
    /* The square is exact in double. The sum is rounded to odd: its last bit tells the rounding to float that more bits follow.
     * (Boldo, Melquiond: Emulation of FMA and correctly rounded sums, 2008.) An infinite cost's error is NaN and changes nothing. */
    double square = (double)d * (double)d, base = (double)cost, sum = base + square, part = sum - base;
    double error = (base - (sum - part)) + (square - part);
    uint64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    if (!(bits & 1)) bits += (uint64_t)(error > 0) - (uint64_t)(error < 0);
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
#endif
}

#endif
