/* The search's scalar level: by the letter of search.c. Runs everywhere and is what the other levels are checked against. */
#include "quantize/fused.h"
#include "quantize/search.h"

static void order(float *ordered, const float *values, int bits, int next_bits) {
    (void)bits, (void)next_bits;
    memcpy(ordered, values, MM_STATES * sizeof *ordered);
}

static void step(float *next, const float *costs, const float *ordered, const float *x, int tiles, int bits, int next_bits) {
    const uint32_t nodes = 1u << (MM_WINDOW_BITS - next_bits);
    for (int tile = 0; tile < tiles; tile++, costs += MM_STATES >> bits, next += nodes)
        for (uint32_t node = 0; node < nodes; node++) {
            float best = INFINITY;
            for (uint32_t state = node; state < MM_STATES; state += nodes) {
                float cost = mm_fused_square(x[tile] - ordered[state], costs[state >> bits]);
                best = cost < best ? cost : best;
            }
            next[node] = best;
        }
}

static const struct mm_search_level level = {"scalar", order, step};

const struct mm_search_level *mm_search_scalar(void) { return &level; }
