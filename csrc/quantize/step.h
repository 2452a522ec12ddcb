/* One step of the trellis search (search.c), the same C for any vector unit. Included by a level's file, which first defines
 *   LEVEL, LANES, vec              its name, floats in a vector, the vector
 *   splat(float)                   -> vec
 *   add_square(d, cost)            -> vec: fma(d, d, cost)
 *   minimum(a, b)                  -> vec
 *   interleave(vec *v, bits)       v [2^bits] in place: lane l of v[n] becomes element 2^bits l + n; for 2^bits < LANES
 * A state brings `bits` new bits, so 2^bits states in a row come from one node. Where those fill vectors, a node's cost is splat and states
 * lie in the vector's lanes. Otherwise the lanes are nodes, each vector has one value of the new bits, and the minima are interleaved.
 * The values lie in the order in which this reads them: a step is a walk through 256 KB. */
#include <math.h>

#include "cpu/vector.h"
#include "quantize/search.h"

#define BLOCK 4 /* vectors of minima at a time, where states lie in the lanes */

static void order(float *ordered, const float *values, int bits, int next_bits) {
    const int next_nodes = MM_STATES >> next_bits, ways = 1 << next_bits, stride = next_nodes >> bits;
    if (1 << bits >= LANES) {
        for (int first = 0; first < next_nodes; first += BLOCK * LANES)
            for (int way = 0; way < ways; way++)
                for (int i = 0; i < BLOCK * LANES; i++) *ordered++ = values[way * next_nodes + first + i];
        return;
    }
    for (int first = 0; first < stride; first += LANES)
        for (int way = 0; way < ways; way++)
            for (int news = 0; news < 1 << bits; news++)
                for (int lane = 0; lane < LANES; lane++) *ordered++ = values[(way * stride + first + lane) << bits | news];
}

/* The last two are constants when inlined. */
INLINE void step_of(vec *next, const float *costs, const vec *ordered, float x, const int bits, const int next_bits) {
    const int next_nodes = MM_STATES >> next_bits, ways = 1 << next_bits, stride = next_nodes >> bits;
    const vec target = splat(x);
    if (1 << bits >= LANES) {
        for (int first = 0; first < next_nodes; first += BLOCK * LANES, next += BLOCK) {
            vec best[BLOCK];
            for (int way = 0; way < ways; way++) {
                const float *from = costs + ((way * next_nodes + first) >> bits);
                UNROLL(BLOCK)
                for (int i = 0; i < BLOCK; i++) {
                    vec cost = add_square(target - *ordered++, splat(from[(i * LANES) >> bits]));
                    best[i] = way ? minimum(best[i], cost) : cost;
                }
            }
            for (int i = 0; i < BLOCK; i++) next[i] = best[i];
        }
        return;
    }
    for (int first = 0; first < stride; first += LANES, next += 1 << bits) {
        vec best[LANES / 2];
        UNROLL(8)
        for (int way = 0; way < ways; way++) {
            vec from = *(const vec *)(const void *)(costs + way * stride + first);
            UNROLL(8)
            for (int news = 0; news < 1 << bits; news++) {
                vec cost = add_square(target - *ordered++, from);
                best[news] = way ? minimum(best[news], cost) : cost;
            }
        }
        interleave(best, bits);
        UNROLL(8)
        for (int i = 0; i < 1 << bits; i++) next[i] = best[i];
    }
}

/* X(bits, next_bits): what the format's rates have */
#define STEPS(X) X(1, 1) X(2, 2) X(3, 3) X(4, 4) X(5, 5) X(6, 6) X(7, 7) X(8, 8) X(1, 2) X(2, 1) X(2, 3) X(3, 2) X(3, 4) X(4, 3)

static void step(float *next, const float *costs, const float *ordered, float x, int bits, int next_bits) {
    vec *to = (vec *)(void *)next;
    const vec *values = (const vec *)(const void *)ordered;
    switch (bits * 16 + next_bits) {
#define X(bits, next_bits) \
    case bits * 16 + next_bits: step_of(to, costs, values, x, bits, next_bits); break;
        STEPS(X)
#undef X
    default:
        break;
    }
}

INLINE float add_square_float(float d, float cost) { return __builtin_fmaf(d, d, cost); } /* all these levels have the instruction */

#include "quantize/narrow.h"

static const struct mm_search_level level = {LEVEL, order, step, narrow};
