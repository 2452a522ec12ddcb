/* 3inst and mcg in integers: 4096 times a weight is an integer of 16 bits. Or the middle of two, for weights below a quarter; then it is
 * rounded, and the weight is 2^-13 off. So int16.h's panels of byte sums and their products serve these codebooks as well, on rows of 8
 * bits. Included by int16.h where a level defines
 *   INTEGERS_OF_PAIRS            a function (low, high, addend) -> halves: PAIR_SCALE times the weights of a product's halves, signed
 *   order_bytes(once, q)         the lower bytes of a row's inputs, steps 0 and 4 of a tile in turn, 1 and 5, ...
 * after panel.h, whose codebooks' states (states.h) are of the same tiles side by side as int16.h's, 16 positions a lane. */

INLINE halves integers_of_states(halves states, uint32_t multiplier, uint32_t addend) {
    halves low, high;
    multiply_state(&low, &high, states, multiplier);
    return INTEGERS_OF_PAIRS(low, high, addend);
}

INLINE void integers_in_place(halves *panel, uint32_t multiplier, uint32_t addend) {
    for (int t = 0; t < BLOCK_TILES; t++, panel += POSITIONS)
        UNROLL(16) for (int j = 0; j < POSITIONS; j++) panel[j] = integers_of_states(panel[j], multiplier, addend);
}

/* panel [8, POSITIONS]: what int16.h's decode_sums is for mul1 */
static void decode_pairs(halves *panel, const struct mm_weight *weight, const struct column *column) {
    cutter_of(weight->rate2)(panel, column, BLOCK_TILES);
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates) \
    case id: integers_in_place(panel, multiplier, addend); break;
        MM_PAIR_CODEBOOKS(X)
#undef X
    default: break;
    }
}

/* y [16 TILES columns of 128] += one block of a row times the columns of the states */
INLINE void multiply_states(float *y, const struct row16 *row, const halves *states, uint32_t multiplier, uint32_t addend) {
    sums32 sums[2][PARTS] = {{{0}}};
    for (int t = 0; t < BLOCK_TILES; t++, states += POSITIONS)
        UNROLL(16) for (int j = 0; j < POSITIONS; j++)
            add_products(sums[j / 4 % 2], integers_of_states(states[j], multiplier, addend), row->q + MM_TILE * t, j / 8 * 4 + j % 4);
    for (int side = 0; side < 2; side++) add_columns(y, sums[side], side, row->scale);
}

static void multiply_pair_row(float *y, const struct row16 *row, const struct mm_weight *weight, const struct column *column) {
    halves states[BLOCK_TILES * POSITIONS];
    cutter_of(weight->rate2)(states, column, BLOCK_TILES);
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates) \
    case id: multiply_states(y, row, states, multiplier, addend); break;
        MM_PAIR_CODEBOOKS(X)
#undef X
    default: break;
    }
}
