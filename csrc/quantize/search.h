/* The trellis search of the quantizer: the bit stream whose 256 values come closest to a tile. search.c says how.
 * Knows nothing of torch; shares the choice of a level, threads and memory with the CPU backend (cpu/cpu.h). */
#ifndef MM_QUANTIZE_SEARCH_H
#define MM_QUANTIZE_SEARCH_H

#include "cpu/cpu.h"

#define MM_STATES (1 << MM_WINDOW_BITS)

/* The arithmetic at one SIMD level. Every level computes the same bits: fma(d, d, cost) with d = x - value, and minima. */
struct mm_search_level {
    const char *name; /* the ops' levels whose names begin with it run it */
    /* ordered [MM_STATES] = the values [MM_STATES], by state, in the order in which the level's step reads them */
    void (*order)(float *ordered, const float *values, int bits, int next_bits);
    /* next [2^(16 - next_bits)] from costs [2^(16 - bits)] (search.c); all 64-byte aligned */
    void (*step)(float *next, const float *costs, const float *ordered, float x, int bits, int next_bits);
    int (*narrow)(float *least, int count, const float *costs, int stride, const float *values, int spread, int ways, int nodes, float x);
};

/* Slowest first; NULL where the machine or the build lacks the level. */
const struct mm_search_level *mm_search_scalar(void);
const struct mm_search_level *mm_search_neon(void);
const struct mm_search_level *mm_search_avx2(void);
const struct mm_search_level *mm_search_avx512(void);
#define MM_SEARCH_LEVELS(X) X(scalar) X(neon) X(avx2) X(avx512)

/* For each of count tiles [count, 16, 16], finite and at most 65504 in size: stream [count, MM_TILE_BYTES(rate2)] as files hold it, and
 * values [count, 16, 16], what it decodes to. False: out of memory. */
bool mm_search(const float *tiles, int64_t count, int rate2, int codebook, uint8_t *stream, float *values);

/* The level that mm_search runs while the ops run `level`. */
const struct mm_search_level *mm_search_level_of(const struct mm_kernels *level);

#endif
