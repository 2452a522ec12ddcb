/* The search's scalar level: by the letter of search.c. Runs everywhere and is what the other levels are checked against. */
#include "quantize/fused.h"
#include "quantize/search.h"

static void order(float *ordered, const float *values, int bits, int next_bits) {
    (void)bits, (void)next_bits;
    memcpy(ordered, values, MM_STATES * sizeof *ordered);
}

static void step(float *next, const float *costs, const float *ordered, float x, int bits, int next_bits) {
    const int nodes = MM_STATES >> next_bits;
    for (int node = 0; node < nodes; node++) {
        float best = INFINITY;
        for (int state = node; state < MM_STATES; state += nodes) {
            float cost = mm_fused_square(x - ordered[state], costs[state >> bits]);
            best = cost < best ? cost : best;
        }
        next[node] = best;
    }
}

#define add_square_float mm_fused_square
#include "quantize/narrow.h"

static const struct mm_search_level level = {"scalar", order, step, narrow};

const struct mm_search_level *mm_search_scalar(void) { return &level; }
