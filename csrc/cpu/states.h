/* The windows of a column of tiles, or of tiles side by side, in vectors: what the exact kernels look up. Included by panel.h and columns.h, which
 * define before:
 *   CUT_POSITIONS  of a lane: 16 or 32
 *   CUT_TILES      side by side in a vector
 * and by then have halves_of_tiles (gather_*.h) and funnel.h. */

/* states [tiles, CUT_POSITIONS]: of a column's first tiles; rate2 is a constant when inlined */
INLINE void cut_states(halves *states, struct column column, int64_t tiles, int rate2) {
    for (int64_t t = 0; t < tiles; t++, column.tile += column.stride, states += CUT_POSITIONS) {
        halves h[CUT_POSITIONS / 2 + 2]; /* AVX2 writes past the last that it needs */
        prefetch_tiles(column.tile, column.ahead, CUT_TILES * MM_TILE_BYTES(rate2));
        halves_of_tiles(h, rate2, column.tile);
        UNROLL(32) for (int j = 0; j < CUT_POSITIONS; j++) states[j] = window(h, j, rate2);
    }
}

#define X(rate2) \
    static void cut_states_##rate2(halves *states, const struct column *column, int64_t tiles) { cut_states(states, *column, tiles, rate2); }
MM_ALL_RATES2(X)
#undef X

typedef void (*state_cutter)(halves *states, const struct column *column, int64_t tiles);

static state_cutter cutter_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return cut_states_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}
