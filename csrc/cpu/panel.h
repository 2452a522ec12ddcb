/* Products over decoded panels: the codebooks' exact values in float32, 128 inputs x 32 columns of them in the first-level cache,
 * multiplied by one or many rows. Included by a level's file after kernels.h.
 *
 * How a tile is decoded: 16 lanes hold the same place of 16 groups of 16 positions (int16.h says more), so a product's low and high
 * halfwords are vectors of their own, and so are the two binary16 numbers of 3inst and mcg. Wider registers hold two tiles side by side.
 *
 * A rotated row is "paired": 8 pairs a tile, rows r and r + 4, since two neighbouring lanes are those rows of one column. Every sum
 * starts at 0 in each block of 128 inputs and takes them in order, so a row's result does not depend on its neighbours, and its
 * error grows with 64 + k / 128 terms.
 *
 * A level defines before:
 *   halves, shorts, floats         vectors of one size: halfwords, unsigned and signed, and floats
 *   COLUMNS_TOGETHER               of tiles, decoded at once: neighbours in memory, one or several vectors
 *   PANEL_ROWS                     rows multiplied at once: how many sums the registers hold
 *   FUNNEL (funnel.h), product_high, sums_of_bytes, halves_of_tiles   as int16.h has them, for 16 positions a lane
 *   values_of_products(out, low, high, addend, codebook, rounded)   out [2][2] floats: the values of two vectors of products, low [2] and
 *                                  high [2]; rounded to binary16, or if it defines UNROUNDED_PAIRS, for 3inst and mcg maybe not
 *   LANE_TILE(vector, lane), LANE_COLUMN(vector, lane)     where a value of out is: vector 2 * (8 columns on) + place in out
 *   repeat_pair(pair)              two floats, as often as they fit
 *   store_columns(y, sums)         y [16 for each tile] = sums [4], neighbouring lanes added */
#include "cpu/funnel.h"

#define PAIRS (MM_TILE / 2)
#define PAIR_ROW(pair) (2 * ((pair) / 4) + ((pair) & 1) + 8 * ((pair) / 2 & 1)) /* and the row 4 below */
#define PAIR_VECTORS 4                            /* of a pair */
#define PANEL_VECTORS (BLOCK_TILES * PAIRS * PAIR_VECTORS) /* 8 KB for a column of tiles */
#define FLOAT_LANES ((int)(sizeof(floats) / sizeof(float)))
#define VECTOR_TILES (FLOAT_LANES / 8)            /* side by side in a vector */
#define PANELS (COLUMNS_TOGETHER / VECTOR_TILES)

/* ---- rows ---- */

#define INPUT_AT(place) (PAIR_ROW((place) / 2) + (place) % 2 * 4)
#include "cpu/rows.h"

/* Spread as the vectors of a pair are: every column twice, in half of the memory that cpu.h allows. */
static void rotate_grad(float *spread, const float *grad, const uint16_t *svh, int64_t n, int64_t used) {
    for (int64_t i = 0; i < n; i += MM_HADAMARD) {
        wide rotated[WIDES];
        scale_rotate(rotated, grad + i, svh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile += VECTOR_TILES)
            for (int v = 0; v < PAIR_VECTORS; v++)
                for (int lane = 0; lane < FLOAT_LANES; lane++)
                    *spread++ = h[(tile + LANE_TILE(v, lane)) * MM_TILE + LANE_COLUMN(v, lane)];
    }
}

/* ---- decoding ---- */

#define POSITION(pair, side) ((pair) / 4 * 8 + (pair) % 4 + 4 * (side)) /* in its group; side 1 is 8 columns on */

#define CUT_POSITIONS 16
#define CUT_TILES VECTOR_TILES
#include "cpu/states.h"

/* A product's halves, from states */
INLINE void multiply_state(halves *low, halves *high, halves state, uint32_t multiplier) {
    const halves zero = {0}, m_low = zero + (uint16_t)multiplier, m_high = zero + (uint16_t)(multiplier >> 16);
    *low = state * m_low;
    *high = product_high(state, m_low) + state * m_high;
}

/* out [2][2]: the values of two vectors of states */
INLINE void decode_two(floats (*out)[2], const halves *left, const halves *right, uint32_t multiplier, uint32_t addend, int codebook,
                       bool rounded) {
    halves low[2], high[2];
    for (int i = 0; i < 2; i++) multiply_state(&low[i], &high[i], i ? *right : *left, multiplier);
    values_of_products(out, low, high, addend, codebook, rounded);
}

/* The values of `tiles` tiles: to panel [tiles, 8 pairs, 4], or, with a row, times the row and added to sums [4]. */
INLINE void decode_states(floats *panel, floats *sums, const float *row, const halves *states, int64_t tiles, uint32_t multiplier,
                          uint32_t addend, int codebook, bool rounded) {
    floats sum[PAIR_VECTORS] = {0};
    for (int64_t t = 0; t < tiles; t++, states += 16)
        UNROLL(8) for (int pair = 0; pair < PAIRS; pair++) {
            floats out[2][2];
            decode_two(out, states + POSITION(pair, 0), states + POSITION(pair, 1), multiplier, addend, codebook, rounded);
            if (row) {
                floats x = repeat_pair(row + 2 * (t * PAIRS + pair));
                for (int i = 0; i < PAIR_VECTORS; i++) sum[i] += out[i / 2][i % 2] * x;
            } else
                for (int i = 0; i < PAIR_VECTORS; i++) panel[(t * PAIRS + pair) * PAIR_VECTORS + i] = out[i / 2][i % 2];
        }
    if (row)
        for (int i = 0; i < PAIR_VECTORS; i++) sums[i] += sum[i];
}

/* decode_states of a column's first tiles, with the codebook a constant */
INLINE void decode_column(floats *panel, floats *sums, const float *row, const struct mm_weight *weight, const struct column *column,
                          int64_t tiles, bool rounded) {
    halves states[BLOCK_TILES * 16];
    cutter_of(weight->rate2)(states, column, tiles);
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates) \
    case id: decode_states(panel, sums, row, states, tiles, multiplier, addend, id, rounded); break;
        MM_CODEBOOKS(X)
#undef X
    default: break;
    }
}

/* panel [tiles, 8 pairs, 4]: up to 8 tiles of a column */
static void decode_panel(floats *panel, const struct mm_weight *weight, const struct column *column, int64_t tiles) {
    decode_column(panel, NULL, NULL, weight, column, tiles, true);
}

/* sums [4] += a row times a column of 8 tiles: as decode_panel and multiply_panel, term by term */
static void multiply_column(floats *sums, const struct mm_weight *weight, const struct column *column, const float *row) {
    decode_column(NULL, sums, row, weight, column, BLOCK_TILES, true);
}

#ifdef UNROUNDED_PAIRS /* the same without the rounding */
static void decode_unrounded(floats *panel, const struct mm_weight *weight, const struct column *column, int64_t tiles) {
    decode_column(panel, NULL, NULL, weight, column, tiles, false);
}

static void multiply_unrounded_column(floats *sums, const struct mm_weight *weight, const struct column *column, const float *row) {
    decode_column(NULL, sums, row, weight, column, BLOCK_TILES, false);
}
#endif

typedef void (*panel_decoder)(floats *panel, const struct mm_weight *weight, const struct column *column, int64_t tiles);
typedef void (*column_multiplier)(floats *sums, const struct mm_weight *weight, const struct column *column, const float *row);

/* ---- products ---- */

/* sums [rows, PANELS, 4] += rows times panels [columns, 8 tiles, 8 pairs, 4]; rows and columns are constants when inlined */
INLINE void multiply_panel(floats *sums, const floats *panel, const float *row, int64_t ld, int rows, int columns) {
    floats sum[PANEL_ROWS][PANELS][PAIR_VECTORS] = {0};
    for (int pair = 0; pair < BLOCK_TILES * PAIRS; pair++) {
        floats x[PANEL_ROWS];
        for (int r = 0; r < rows; r++) x[r] = repeat_pair(row + r * ld + 2 * pair);
        for (int c = 0; c < columns; c++)
            for (int i = 0; i < PAIR_VECTORS; i++) {
                floats w = panel[c * PANEL_VECTORS + pair * PAIR_VECTORS + i];
                for (int r = 0; r < rows; r++) sum[r][c][i] += w * x[r];
            }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            for (int i = 0; i < PAIR_VECTORS; i++) sums[(r * PANELS + c) * PAIR_VECTORS + i] += sum[r][c][i];
}

INLINE void multiply_values(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                            float *scratch, panel_decoder decode, column_multiplier multiply_one) {
    const int row_sums = PANELS * PAIR_VECTORS;
    floats *sums = (floats *)(void *)scratch, *panel = sums + rows * row_sums;
    int64_t vector_bytes = VECTOR_TILES * MM_TILE_BYTES(weight->rate2);
    for (int j = 0; j < BLOCK_TILES; j += COLUMNS_TOGETHER) {
        memset(sums, 0, (size_t)(rows * row_sums) * sizeof *sums);
        for (int64_t k = 0; k < weight->k; k += MM_HADAMARD) {
            struct column column = column_of(weight, block, k / MM_HADAMARD, j, COLUMNS_TOGETHER);
            for (int c = 0; c < PANELS; c++, column.tile += vector_bytes)
                if (rows == 1)
                    multiply_one(sums + c * PAIR_VECTORS, weight, &column, row + k);
                else
                    decode(panel + c * PANEL_VECTORS, weight, &column, BLOCK_TILES);
            if (rows == 1) continue;
            int64_t r = 0;
#define X(count)                                                                                                              \
    for (; count <= PANEL_ROWS && r + count <= rows; r += count)                                                              \
        for (int c = 0; c < PANELS; c++)                                                                                      \
            multiply_panel(sums + r * row_sums + c * PAIR_VECTORS, panel + c * PANEL_VECTORS, row + r * ld + k, ld,           \
                           count <= PANEL_ROWS ? count : 1, 1);
            X(6) X(3) X(2)
#undef X
            if (r < rows) multiply_panel(sums + r * row_sums, panel, row + r * ld + k, ld, 1, PANELS);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int c = 0; c < PANELS; c++)
                store_columns(y + r * MM_HADAMARD + (j + c * VECTOR_TILES) * MM_TILE, sums + r * row_sums + c * PAIR_VECTORS);
    }
}

static void multiply(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                     float *scratch) {
    multiply_values(y, weight, block, row, ld, rows, scratch, decode_panel, multiply_column);
}

#ifdef UNROUNDED_PAIRS
static void multiply_unrounded(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                               float *scratch) {
    multiply_values(y, weight, block, row, ld, rows, scratch, decode_unrounded, multiply_unrounded_column);
}
#endif

/* dx: a row's own term is the sum of the lanes of its side */
INLINE void add_sides(float *out, const float *lanes) {
    float sides[2] = {0, 0};
    for (int first = 0; first < FLOAT_LANES; first += 8)
        for (int side = 0; side < 2; side++) {
            const float *s = lanes + first + side;
            sides[side] += (s[0] + s[2]) + (s[4] + s[6]);
        }
    out[0] = sides[0];
    out[4] = sides[1];
}

static void multiply_transposed(float *dx, const struct mm_weight *weight, int64_t block, const float *spread,
                                int64_t rows, float *scratch) {
    floats *sums = (floats *)(void *)scratch, *tile = sums + rows * PAIRS;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int kt = 0; kt < BLOCK_TILES; kt++) {
        const uint8_t *tiles = weight->tiles + (block * BLOCK_TILES + kt) * n_tiles * tile_bytes;
        memset(sums, 0, (size_t)(rows * PAIRS) * sizeof *sums);
        for (int64_t j = 0; j < n_tiles; j += VECTOR_TILES) {
            decode_panel(tile, weight, &(struct column){.tile = tiles + j * tile_bytes}, 1);
            for (int64_t r = 0; r < rows; r++) {
                const floats *grad = (const floats *)(const void *)(spread + r * 4 * weight->n) + j / VECTOR_TILES * PAIR_VECTORS;
                for (int pair = 0; pair < PAIRS; pair++)
                    for (int i = 0; i < PAIR_VECTORS; i++) sums[r * PAIRS + pair] += tile[pair * PAIR_VECTORS + i] * grad[i];
            }
        }
        for (int64_t r = 0; r < rows; r++)
            for (int pair = 0; pair < PAIRS; pair++)
                add_sides(dx + r * MM_HADAMARD + kt * MM_TILE + PAIR_ROW(pair), (const float *)&sums[r * PAIRS + pair]);
    }
}

static void decode_block(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block) {
    floats panel[PANEL_VECTORS];
    const float *values = (const float *)panel;
    for (int j = 0; j < BLOCK_TILES; j += VECTOR_TILES) {
        struct column column = column_of(weight, n_block, k_block, j, VECTOR_TILES);
        decode_panel(panel, weight, &column, BLOCK_TILES);
        for (int at = 0; at < PANEL_VECTORS * FLOAT_LANES; at++) {
            int lane = at % FLOAT_LANES, vector = at / FLOAT_LANES % PAIR_VECTORS, pair = at / FLOAT_LANES / PAIR_VECTORS;
            int row = pair / PAIRS * MM_TILE + PAIR_ROW(pair % PAIRS) + 4 * (lane & 1);
            out[row * MM_HADAMARD + (j + LANE_TILE(vector, lane)) * MM_TILE + LANE_COLUMN(vector, lane)] = values[at];
        }
    }
}
