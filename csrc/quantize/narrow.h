/* The search's way back (search.c), one node at a time. Included by a level's file, which first defines
 *   add_square_float(d, cost)      -> float: fma(d, d, cost) */

/* least[i] of `count` nodes: of ways 0 .. ways - 1, from costs[way * stride + i], to values[i * spread + way * nodes]. Returns the last
 * node's cheapest way, the lowest of equals. */
static int narrow(float *least, int count, const float *costs, int stride, const float *values, int spread, int ways, int nodes, float x) {
    int best_way = 0;
    for (int i = 0; i < count; i++) {
        float best = INFINITY;
        best_way = 0;
        for (int way = 0; way < ways; way++) {
            float cost = add_square_float(x - values[i * spread + way * nodes], costs[way * stride + i]);
            best_way = cost < best ? way : best_way;
            best = cost < best ? cost : best;
        }
        least[i] = best;
    }
    return best_way;
}
