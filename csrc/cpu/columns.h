/* Products over decoded panels whose lanes are columns: the codebooks' exact values in float32, 128 inputs x 16 columns of them in the
 * first-level cache, multiplied by one or many rows. For vectors of 128 bits and multiplication by a lane. Included by a level's file
 * after kernels.h.
 *
 * How a tile is decoded: lane c of a vector of 8 halfwords has the 32 positions of columns c and c + 8 (int16.h says more), so that a
 * state's product fills a vector of 4 dwords, a value 4 floats of a panel's row, and an input is one lane of a vector of inputs.
 *
 * A rotated row is "stepped": each tile's inputs in the order in which the positions of a column have them. Every sum starts at 0 in each
 * block of 128 inputs and takes them in order, so a row's result does not depend on its neighbours, and its error grows with
 * 128 + k / 128 terms.
 *
 * A level defines before:
 *   halves                         a vector of 8 halfwords; FUNNEL (funnel.h) and halves_of_tiles as int16.h has them, for 32 positions a lane
 *   values_of_states(out, states, multiplier, addend, codebook, sha3)   out [2] float32x4_t: the values of 8 states
 * It may define LEVEL_TARGET, what all is compiled for (arm.h), SHA3_TARGET, what decoding is compiled for a second
 * time, with sha3 true, and has_sha3: whether that one is to run. */
#include "cpu/funnel.h"

#define PANEL_ROWS 4   /* rows multiplied at once: 16 sums, 4 vectors of the panel and 4 of the rows in 32 registers */
#define ROW_VECTORS 4  /* of a panel: columns 0..3, 4..7, ... of a tile */
#define TILE_VECTORS (MM_TILE * ROW_VECTORS)
#define STEP_ROW(step) MM_TILE_ROW((step) / 4 * 8 + (step) % 4)

typedef float32x4_t floats;

/* ---- rows ---- */

#define INPUT_AT(place) STEP_ROW(place)
#include "cpu/rows.h"

/* Not spread at all, in a quarter of the memory that cpu.h allows. */
static void rotate_grad(float *spread, const float *grad, const uint16_t *svh, int64_t n, int64_t used) {
    for (int64_t i = 0; i < n; i += MM_HADAMARD) {
        wide rotated[WIDES];
        scale_rotate(rotated, grad + i, svh + i, used - i);
        memcpy(spread + i, rotated, sizeof rotated);
    }
}

/* ---- decoding ---- */

#define CUT_POSITIONS 32
#define CUT_TILES 1
#include "cpu/states.h"

INLINE floats add_product(floats sum, floats w, floats x, int lane) {
    switch (lane) {
    case 0: return vfmaq_laneq_f32(sum, w, x, 0);
    case 1: return vfmaq_laneq_f32(sum, w, x, 1);
    case 2: return vfmaq_laneq_f32(sum, w, x, 2);
    default: return vfmaq_laneq_f32(sum, w, x, 3);
    }
}

/* The values of `tiles` tiles: to panel [tiles, 16 steps, 4], or, with a row, times the row and added to y [16]. */
INLINE void decode_states(floats *panel, float *y, const float *row, const halves *states, int64_t tiles, uint32_t multiplier,
                          uint32_t addend, int codebook, bool sha3) {
    floats sum[ROW_VECTORS] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
    for (int64_t group = 0; group < 4 * tiles; group++, states += 8) {
        floats x = row ? vld1q_f32(row + 4 * group) : sum[0];
        UNROLL(4) for (int i = 0; i < 4; i++)
            UNROLL(2) for (int side = 0; side < 2; side++) {
                floats out[2];
                values_of_states(out, states[4 * side + i], multiplier, addend, codebook, sha3);
                for (int half = 0; half < 2; half++)
                    if (row)
                        sum[2 * side + half] = add_product(sum[2 * side + half], out[half], x, i);
                    else
                        panel[(4 * group + i) * ROW_VECTORS + 2 * side + half] = out[half];
            }
    }
    for (int i = 0; row && i < ROW_VECTORS; i++) vst1q_f32(y + 4 * i, vaddq_f32(vld1q_f32(y + 4 * i), sum[i]));
}

INLINE void decode_codebook(floats *panel, float *y, const float *row, const halves *states, int64_t tiles, int codebook, bool sha3) {
    switch (codebook) {
#define X(id, name, multiplier, addend, half_rates)                                                \
    case id:                                                                                       \
        if (row)                                                                                   \
            decode_states(NULL, y, row, states, tiles, multiplier, addend, id, sha3);              \
        else                                                                                       \
            decode_states(panel, NULL, NULL, states, tiles, multiplier, addend, id, sha3);         \
        break;
        MM_CODEBOOKS(X)
#undef X
    default: break;
    }
}

static void decode_plain(floats *panel, float *y, const float *row, const halves *states, int64_t tiles, int codebook) {
    decode_codebook(panel, y, row, states, tiles, codebook, false);
}

#ifdef SHA3_TARGET
END_TARGET
BEGIN_TARGET(SHA3_TARGET)
static void decode_sha3(floats *panel, float *y, const float *row, const halves *states, int64_t tiles, int codebook) {
    decode_codebook(panel, y, row, states, tiles, codebook, true);
}
END_TARGET
BEGIN_TARGET(LEVEL_TARGET)
#define DECODE (has_sha3 ? decode_sha3 : decode_plain)
#else
#define DECODE decode_plain
#endif

/* panel [tiles, 16, 4]: up to 8 tiles of a column */
static void decode_panel(floats *panel, const struct mm_weight *weight, const struct column *column, int64_t tiles) {
    halves states[BLOCK_TILES * 32];
    cutter_of(weight->rate2)(states, column, tiles);
    DECODE(panel, NULL, NULL, states, tiles, weight->codebook);
}

/* y [16] += a row times a column of 8 tiles: as decode_panel and multiply_panel, term by term */
static void multiply_column(float *y, const struct mm_weight *weight, const struct column *column, const float *row) {
    halves states[BLOCK_TILES * 32];
    cutter_of(weight->rate2)(states, column, BLOCK_TILES);
    DECODE(NULL, y, row, states, BLOCK_TILES, weight->codebook);
}

/* ---- products ---- */

/* y [rows, 16 columns of 128] += rows times a panel [8 tiles, 16, 4]; rows is a constant when inlined */
INLINE void multiply_panel(float *y, const floats *panel, const float *row, int64_t ld, int rows) {
    floats sum[PANEL_ROWS][ROW_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < ROW_VECTORS; i++) sum[r][i] = vdupq_n_f32(0);
    for (int step = 0; step < MM_HADAMARD; step += 4) {
        floats x[PANEL_ROWS];
        for (int r = 0; r < rows; r++) x[r] = vld1q_f32(row + r * ld + step);
        UNROLL(4) for (int lane = 0; lane < 4; lane++)
            for (int i = 0; i < ROW_VECTORS; i++) {
                floats w = panel[(step + lane) * ROW_VECTORS + i];
                for (int r = 0; r < rows; r++) sum[r][i] = add_product(sum[r][i], w, x[r], lane);
            }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < ROW_VECTORS; i++) {
            float *out = y + r * MM_HADAMARD + 4 * i;
            vst1q_f32(out, vaddq_f32(vld1q_f32(out), sum[r][i]));
        }
}

static void multiply(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                     float *scratch) {
    floats *panel = (floats *)(void *)scratch;
    memset(y, 0, (size_t)(rows * MM_HADAMARD) * sizeof *y);
    for (int j = 0; j < BLOCK_TILES; j++) {
        float *out = y + j * MM_TILE;
        for (int64_t k = 0; k < weight->k; k += MM_HADAMARD) {
            struct column column = column_of(weight, block, k / MM_HADAMARD, j, 1);
            if (rows == 1) {
                multiply_column(out, weight, &column, row + k);
                continue;
            }
            decode_panel(panel, weight, &column, BLOCK_TILES);
            int64_t r = 0;
#define X(count) \
    for (; r + count <= rows; r += count) multiply_panel(out + r * MM_HADAMARD, panel, row + r * ld + k, ld, count);
            X(4) X(3) X(2) X(1)
#undef X
        }
    }
}

static void multiply_transposed(float *dx, const struct mm_weight *weight, int64_t block, const float *spread,
                                int64_t rows, float *scratch) {
    floats *sums = (floats *)(void *)scratch, *tile = sums + rows * MM_TILE;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int kt = 0; kt < BLOCK_TILES; kt++) {
        const uint8_t *tiles = weight->tiles + (block * BLOCK_TILES + kt) * n_tiles * tile_bytes;
        memset(sums, 0, (size_t)(rows * MM_TILE) * sizeof *sums);
        for (int64_t j = 0; j < n_tiles; j++) {
            decode_panel(tile, weight, &(struct column){.tile = tiles + j * tile_bytes}, 1);
            for (int64_t r = 0; r < rows; r++) {
                const float *grad = spread + r * 4 * weight->n + j * MM_TILE;
                for (int step = 0; step < MM_TILE; step++)
                    for (int i = 0; i < ROW_VECTORS; i++)
                        sums[r * MM_TILE + step] =
                            vfmaq_f32(sums[r * MM_TILE + step], tile[step * ROW_VECTORS + i], vld1q_f32(grad + 4 * i));
            }
        }
        for (int64_t r = 0; r < rows; r++)
            for (int step = 0; step < MM_TILE; step++)
                dx[r * MM_HADAMARD + kt * MM_TILE + STEP_ROW(step)] = vaddvq_f32(sums[r * MM_TILE + step]);
    }
}

static void decode_block(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block) {
    floats panel[BLOCK_TILES * TILE_VECTORS];
    for (int j = 0; j < BLOCK_TILES; j++) {
        struct column column = column_of(weight, n_block, k_block, j, 1);
        decode_panel(panel, weight, &column, BLOCK_TILES);
        for (int row = 0; row < MM_HADAMARD; row++)
            memcpy(out + (row / MM_TILE * MM_TILE + STEP_ROW(row % MM_TILE)) * MM_HADAMARD + j * MM_TILE, panel + row * ROW_VECTORS,
                   ROW_VECTORS * sizeof *panel);
    }
}
