/* One step of the trellis search (search.c), the same C for any vector unit. Included by a level's file, which first defines
 *   LEVEL, LANES, vec              its name, floats in a vector, the vector
 *   splat(float)                   -> vec
 *   add_square(d, cost)            -> vec: fma(d, d, cost)
 *   minimum(a, b)                  -> vec
 *   interleave(vec *v, bits)       v [2^bits] in place: lane l of v[n] becomes element 2^bits l + n; for 2^bits < LANES
 * A state brings `bits` new bits, so 2^bits states in a row come from one node. Where those fill vectors, a node's cost is splat and states
 * lie in the vector's lanes. Otherwise the lanes are nodes, each vector has one value of the new bits, and the minima are interleaved.
 * The values lie in the order in which this reads them: a step is a walk through 256 KB. */
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

/* The last three are constants when inlined. */
INLINE void step_of(vec *next, const float *costs, const vec *ordered, const float *x, const int tiles, const int bits, const int next_bits) {
    const int nodes = MM_STATES >> bits, next_nodes = MM_STATES >> next_bits, ways = 1 << next_bits, stride = next_nodes >> bits;
    vec target[MM_SEARCH_TILES];
    for (int tile = 0; tile < tiles; tile++) target[tile] = splat(x[tile]);
    if (1 << bits >= LANES) {
        for (int first = 0; first < next_nodes; first += BLOCK * LANES, next += BLOCK) {
            vec best[MM_SEARCH_TILES][BLOCK];
            UNROLL(1)
            for (int way = 0; way < ways; way++) {
                UNROLL(BLOCK)
                for (int i = 0; i < BLOCK; i++, ordered++) {
                    UNROLL(2)
                    for (int tile = 0; tile < tiles; tile++) {
                        const float *from = costs + tile * nodes + ((way * next_nodes + first) >> bits);
                        vec cost = add_square(target[tile] - *ordered, splat(from[(i * LANES) >> bits]));
                        best[tile][i] = way ? minimum(best[tile][i], cost) : cost;
                    }
                }
            }
            for (int tile = 0; tile < tiles; tile++)
                for (int i = 0; i < BLOCK; i++) next[tile * next_nodes / LANES + i] = best[tile][i];
        }
        return;
    }
    for (int first = 0; first < stride; first += LANES, next += 1 << bits) {
        vec best[MM_SEARCH_TILES][LANES / 2];
        UNROLL(8)
        for (int way = 0; way < ways; way++) {
            vec from[MM_SEARCH_TILES];
            for (int tile = 0; tile < tiles; tile++) from[tile] = *(const vec *)(const void *)(costs + tile * nodes + way * stride + first);
            UNROLL(8)
            for (int news = 0; news < 1 << bits; news++, ordered++) {
                UNROLL(2)
                for (int tile = 0; tile < tiles; tile++) {
                    vec cost = add_square(target[tile] - *ordered, from[tile]);
                    best[tile][news] = way ? minimum(best[tile][news], cost) : cost;
                }
            }
        }
        UNROLL(2)
        for (int tile = 0; tile < tiles; tile++) {
            interleave(best[tile], bits);
            UNROLL(8)
            for (int i = 0; i < 1 << bits; i++) next[tile * next_nodes / LANES + i] = best[tile][i];
        }
    }
}

/* X(bits, next_bits): what the format's rates have */
#define STEPS(X) X(1, 1) X(2, 2) X(3, 3) X(4, 4) X(5, 5) X(6, 6) X(7, 7) X(8, 8) X(1, 2) X(2, 1) X(2, 3) X(3, 2) X(3, 4) X(4, 3)

static void step(float *next, const float *costs, const float *ordered, const float *x, int tiles, int bits, int next_bits) {
    vec *to = (vec *)(void *)next;
    const vec *values = (const vec *)(const void *)ordered;
    switch ((tiles - 1) * 256 + bits * 16 + next_bits) {
#define X(bits, next_bits)                                                                                    \
    case bits * 16 + next_bits: step_of(to, costs, values, x, 1, bits, next_bits); break;                     \
    case 256 + bits * 16 + next_bits: step_of(to, costs, values, x, 2, bits, next_bits); break;
        STEPS(X)
#undef X
    default:
        break;
    }
}

static const struct mm_search_level level = {LEVEL, order, step};
