/* Products tile by tile, the same C for any vector unit. Included by a level's file after kernels.h; the file first defines
 *   tile_reader                 what decoding one tile needs
 *   tile_open(rate2, tile)      -> tile_reader
 *   tile_decode(&reader, group, codebook) -> vec8: trellis positions 8 group .. 8 group + 7
 * A rotated row is "tiled" (cpu.h). The order of additions is the same for every batch size, so a row's result does not depend on
 * its neighbours. */
#define GROUPS (MM_TILE_WEIGHTS / 8)     /* vectors in a tile: 8 columns c x 4 row groups q */
#define PANEL_TILES 16 /* tiles decoded ahead for many rows: 16 KB, half of a small L1 */
#define FUSED_ROWS 4   /* up to this many rows, weights go from the decoder straight into the sums */

static int64_t row_floats(int codebook) {
    (void)codebook;
    return 2 * MM_HADAMARD;
}

static void rotate_in(float *tiled, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook, int64_t rows) {
    (void)codebook, (void)rows;
    for (int64_t i = 0; i < k; i += MM_HADAMARD) {
        wide rotated[WIDES];
        scale_rotate(rotated, x + i, suh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile++, h += MM_TILE)
            for (int q = 0; q < 4; q++, tiled += 8) {
                tiled[0] = tiled[4] = h[2 * q];
                tiled[1] = tiled[5] = h[2 * q + 1];
                tiled[2] = tiled[6] = h[2 * q + 8];
                tiled[3] = tiled[7] = h[2 * q + 9];
            }
    }
}

static void rotate_grad(float *spread, const float *grad, const uint16_t *svh, int64_t n, int64_t used) {
    for (int64_t i = 0; i < n; i += MM_HADAMARD) {
        wide rotated[WIDES];
        scale_rotate(rotated, grad + i, svh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile++, h += MM_TILE)
            for (int c = 0; c < 8; c++, spread += 8) {
                spread[0] = spread[1] = spread[2] = spread[3] = h[c];
                spread[4] = spread[5] = spread[6] = spread[7] = h[c + 8];
            }
    }
}

/* Few rows: every tile of the block's column is decoded into registers and multiplied at once.
 * sums [rows, 8 tiles, 8 columns] vectors; tiles of one tile row lie side by side, so memory is read in order. */
INLINE void multiply_fused(vec8 *sums, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld,
                           int rows, int codebook) {
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), row_bytes = weight->n / MM_TILE * tile_bytes;
    const uint8_t *tiles = weight->tiles + block * BLOCK_TILES * tile_bytes;
    for (int64_t kt = 0; kt < weight->k / MM_TILE; kt++, tiles += row_bytes) {
        for (int j = 0; j < BLOCK_TILES; j++) {
            tile_reader reader = tile_open(weight->rate2, tiles + j * tile_bytes);
            for (int c = 0; c < 8; c++) {
                vec8 w[4];
                for (int q = 0; q < 4; q++) w[q] = tile_decode(&reader, 4 * c + q, codebook);
                for (int r = 0; r < rows; r++) {
                    const vec8 *x = (const vec8 *)(const void *)(tiled + r * ld + kt * 32);
                    vec8 sum = sums[(r * BLOCK_TILES + j) * 8 + c];
                    for (int q = 0; q < 4; q++) sum += w[q] * x[q];
                    sums[(r * BLOCK_TILES + j) * 8 + c] = sum;
                }
            }
        }
    }
}

/* sums [rows, 8 columns] += tiled rows times a decoded panel [tiles, 8 columns, 4]; rows is a constant when inlined */
INLINE void multiply_panel_rows(vec8 *sums, const vec8 *panel, int64_t tiles, const float *tiled, int64_t ld, int rows) {
    for (int c = 0; c < 8; c += 2) {
        vec8 sum[FUSED_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sums[r * 8 + c], sum[r][1] = sums[r * 8 + c + 1];
        for (int64_t t = 0; t < tiles; t++)
            for (int q = 0; q < 4; q++) {
                vec8 w0 = panel[(t * 8 + c) * 4 + q], w1 = panel[(t * 8 + c + 1) * 4 + q];
                for (int r = 0; r < rows; r++) {
                    vec8 x = ((const vec8 *)(const void *)(tiled + r * ld))[t * 4 + q];
                    sum[r][0] += w0 * x;
                    sum[r][1] += w1 * x;
                }
            }
        for (int r = 0; r < rows; r++) sums[r * 8 + c] = sum[r][0], sums[r * 8 + c + 1] = sum[r][1];
    }
}

static void multiply_panel(vec8 *sums, const vec8 *panel, int64_t tiles, const float *tiled, int64_t ld, int64_t rows) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 4);
    if (rows - r == 3) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 3);
    if (rows - r == 2) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 2);
    if (rows - r == 1) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 1);
}

INLINE void decode_tile(vec8 *out, int rate2, const uint8_t *tile, int codebook) {
    tile_reader reader = tile_open(rate2, tile);
    for (int group = 0; group < GROUPS; group++) out[group] = tile_decode(&reader, group, codebook);
}

/* `count` tiles, stride bytes apart, in trellis order. The codebook becomes a constant here, once for all callers. */
static void decode_tiles(vec8 *out, const struct mm_weight *weight, const uint8_t *tiles, int64_t stride, int64_t count) {
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates)                                                               \
    case id:                                                                                                      \
        for (int64_t i = 0; i < count; i++) decode_tile(out + i * GROUPS, weight->rate2, tiles + i * stride, id); \
        break;
        MM_CODEBOOKS(X)
#undef X
    default:
        break;
    }
}

/* y [16 columns] of one row from its sums [8 columns]: the low half of a vector is column c, the high half c + 8 */
INLINE void reduce_columns(float *y, const vec8 *sums) {
    for (int c = 0; c < 8; c++) {
        const float *s = (const float *)&sums[c];
        y[c] = (s[0] + s[1]) + (s[2] + s[3]);
        y[c + 8] = (s[4] + s[5]) + (s[6] + s[7]);
    }
}

static void multiply_few(float *y, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld,
                         int64_t rows, vec8 *sums) {
    memset(sums, 0, (size_t)rows * BLOCK_TILES * 8 * sizeof *sums);
    switch (weight->codebook * FUSED_ROWS + (int)rows - 1) {
#define X(id, name, multiplier, addend, half_rates)                                                       \
    case id * FUSED_ROWS: multiply_fused(sums, weight, block, tiled, ld, 1, id); break;                       \
    case id * FUSED_ROWS + 1: multiply_fused(sums, weight, block, tiled, ld, 2, id); break;                   \
    case id * FUSED_ROWS + 2: multiply_fused(sums, weight, block, tiled, ld, 3, id); break;                   \
    case id * FUSED_ROWS + 3: multiply_fused(sums, weight, block, tiled, ld, 4, id); break;
        MM_CODEBOOKS(X)
#undef X
    default:
        break;
    }
    for (int64_t i = 0; i < rows * BLOCK_TILES; i++) reduce_columns(y + i * MM_TILE, sums + i * 8);
}

static void multiply_many(float *y, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld,
                          int64_t rows, vec8 *sums) {
    vec8 *panel = sums + rows * 8;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), row_bytes = weight->n / MM_TILE * tile_bytes;
    int64_t k_tiles = weight->k / MM_TILE;
    for (int j = 0; j < BLOCK_TILES; j++) {
        const uint8_t *column = weight->tiles + (block * BLOCK_TILES + j) * tile_bytes;
        memset(sums, 0, (size_t)rows * 8 * sizeof *sums);
        for (int64_t kt = 0; kt < k_tiles; kt += PANEL_TILES) {
            int64_t tiles = k_tiles - kt < PANEL_TILES ? k_tiles - kt : PANEL_TILES;
            decode_tiles(panel, weight, column + kt * row_bytes, row_bytes, tiles);
            multiply_panel(sums, panel, tiles, tiled + kt * 32, ld, rows);
        }
        for (int64_t r = 0; r < rows; r++) reduce_columns(y + r * MM_HADAMARD + j * MM_TILE, sums + r * 8);
    }
}

static void multiply(float *y, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld, int64_t rows,
                     float *scratch) {
    vec8 *sums = (vec8 *)(void *)scratch;
    if (rows <= FUSED_ROWS)
        multiply_few(y, weight, block, tiled, ld, rows, sums);
    else
        multiply_many(y, weight, block, tiled, ld, rows, sums);
}

static void multiply_transposed(float *dx, const struct mm_weight *weight, int64_t block, const float *spread,
                                int64_t rows, float *scratch) {
    vec8 *sums = (vec8 *)(void *)scratch, *tile = sums + rows * 4;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int kt = 0; kt < BLOCK_TILES; kt++) {
        const uint8_t *tiles = weight->tiles + (block * BLOCK_TILES + kt) * n_tiles * tile_bytes;
        memset(sums, 0, (size_t)rows * 4 * sizeof *sums);
        for (int64_t j = 0; j < n_tiles; j++) {
            decode_tiles(tile, weight, tiles + j * tile_bytes, 0, 1);
            for (int64_t r = 0; r < rows; r++) {
                const vec8 *grad = (const vec8 *)(const void *)(spread + r * 4 * weight->n + j * 64);
                vec8 sum[4] = {sums[r * 4], sums[r * 4 + 1], sums[r * 4 + 2], sums[r * 4 + 3]};
                for (int c = 0; c < 8; c++)
                    for (int q = 0; q < 4; q++) sum[q] += tile[c * 4 + q] * grad[c];
                for (int q = 0; q < 4; q++) sums[r * 4 + q] = sum[q];
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            float *out = dx + r * MM_HADAMARD + kt * MM_TILE;
            for (int q = 0; q < 4; q++) {
                const float *s = (const float *)&sums[r * 4 + q];
                out[2 * q] = s[0] + s[4];
                out[2 * q + 1] = s[1] + s[5];
                out[2 * q + 8] = s[2] + s[6];
                out[2 * q + 9] = s[3] + s[7];
            }
        }
    }
}

static void decode_block(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block) {
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int kt = 0; kt < BLOCK_TILES; kt++)
        for (int j = 0; j < BLOCK_TILES; j++) {
            vec8 tile[GROUPS];
            int64_t index = (k_block * BLOCK_TILES + kt) * n_tiles + n_block * BLOCK_TILES + j;
            decode_tiles(tile, weight, weight->tiles + index * tile_bytes, 0, 1);
            for (int t = 0; t < MM_TILE_WEIGHTS; t++)
                out[(kt * MM_TILE + MM_TILE_ROW(t)) * MM_HADAMARD + j * MM_TILE + MM_TILE_COLUMN(t)] =
                    ((const float *)tile)[t];
        }
}
