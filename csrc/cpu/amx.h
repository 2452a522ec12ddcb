/* mul1 by AMX's products of 8-bit tiles. Included by a level's file after int16.h: inputs are its rows of 8 bits, halves hold two tiles, and the
 * integer sums are those of INT8_LEVEL. A level defines before: AMX_LEVEL, its name.
 *
 * The bytes of the products are multiplied as they come, without being summed first, as INT8_LEVEL does for one row: an input stands twice in a
 * row, once for each byte of a halfword. 32 inputs are 64 bytes of a row, and what two tiles under each other and two side by side decode to is
 * four tiles of AMX, side by half: a register of halfwords is one row of such a tile, its dwords the 16 columns, each with the two inputs
 * that neighbouring lanes share. */

#define AMX_TILE 16 /* rows of a tile, and dwords in each */
#define MOST_DIRECT_ROWS 3 /* that INT8_LEVEL multiplies as fast: a panel of products costs 256 stores */

struct amx_config { /* as ldtilecfg reads it */
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct amx_config) == 64, "Intel's manual");

/* The tile registers: sums of two sides for two tiles of rows, their inputs, and two for products, so that one is loaded while the other is
 * at work. */
#define SUMS(rows, side) (2 * (rows) + (side))
#define INPUTS(rows) (4 + (rows))
#define PRODUCTS(half) (6 + (half))

static void amx_configure(int rows) {
    struct amx_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = (uint8_t)(tile < PRODUCTS(0) ? rows : AMX_TILE);
    }
    TILE_CONFIGURE(config);
}

#define QUARTERS (BLOCK_TILES / 2) /* two tiles under each other: 64 bytes of a row */
#define QUARTER (4 * AMX_TILE)     /* halves of it: side, half, AMX_TILE */

/* One or two tiles of rows times a panel of 128 inputs. The last tile may begin before the rows that are left; those that were summed already
 * are left out then. */
struct amx_pass {
    float *y;         /* of the panel's columns; 0: nothing to add */
    const float *row; /* of the panel's inputs */
    int tiles;
    int64_t first[2];  /* row of each */
    int64_t done, end; /* the rows to add */
};

struct amx_run {
    int64_t ld, rows, tile_rows;
    halves *panel;
    sums32 *sums;            /* of the pass before: [tile, side, AMX_TILE]; of a lone tile [half, side, AMX_TILE] */
    struct amx_pass pending; /* what they belong to: added to y while the next pass is under way */
};

/* quarter [side, half, 16]: the products of two columns' next two tiles; rate2 is a constant when inlined */
INLINE void decode_quarter(halves *quarter, struct column *column, int rate2) {
    for (int t = 0; t < 2; t++, column->tile += column->stride, quarter += STEPS) {
        prefetch_tiles(column->tile, column->ahead, TILES * MM_TILE_BYTES(rate2));
        FOR_PRODUCTS(j, low, high, column->tile, rate2, {
            int side = j / 4 % 2, step = j / 8 * 4 + j % 4;
            quarter[side * 2 * AMX_TILE + step] = low;
            quarter[(side * 2 + 1) * AMX_TILE + step] = high;
        });
    }
}

/* The tile registers' sums += a quarter. A lone tile of rows has the upper halves' products in the other's place: a sum would wait for its own
 * last addition. */
INLINE void multiply_quarter(const halves *quarter, const int8_t *first, const int8_t *second, int64_t stride) {
    TILE_LOAD(INPUTS(0), first, stride);
    if (second) TILE_LOAD(INPUTS(1), second, stride);
#define X(side)                                                               \
    TILE_LOAD(PRODUCTS(0), quarter + 2 * side * AMX_TILE, 64);                \
    TILE_MULTIPLY(SUMS(0, side), INPUTS(0), PRODUCTS(0));                     \
    if (second) TILE_MULTIPLY(SUMS(1, side), INPUTS(1), PRODUCTS(0));         \
    TILE_LOAD(PRODUCTS(1), quarter + (2 * side + 1) * AMX_TILE, 64);          \
    if (second) TILE_MULTIPLY(SUMS(0, side), INPUTS(0), PRODUCTS(1));         \
    if (second) TILE_MULTIPLY(SUMS(1, side), INPUTS(1), PRODUCTS(1));         \
    if (!second) TILE_MULTIPLY(SUMS(1, side), INPUTS(0), PRODUCTS(1));
    X(0) X(1)
#undef X
}

static void clear_sums(void) {
    TILE_ZERO(SUMS(0, 0));
    TILE_ZERO(SUMS(0, 1));
    TILE_ZERO(SUMS(1, 0));
    TILE_ZERO(SUMS(1, 1));
}

/* Ends a pass. */
static void take_sums(struct amx_run *run, const struct amx_pass *pass) {
    TILE_STORE(run->sums, 64, SUMS(0, 0));
    TILE_STORE(run->sums + AMX_TILE, 64, SUMS(0, 1));
    TILE_STORE(run->sums + 2 * AMX_TILE, 64, SUMS(1, 0));
    TILE_STORE(run->sums + 3 * AMX_TILE, 64, SUMS(1, 1));
    run->pending = *pass;
    clear_sums();
}

/* y [32 columns] += scale * sums */
INLINE void add_both_sides(float *y, sums32 left, sums32 right, float scale) {
    typedef float ufloats __attribute__((vector_size(64), aligned(4), may_alias));
    __m512 sides[2] = {_mm512_cvtepi32_ps((__m512i)left), _mm512_cvtepi32_ps((__m512i)right)};
    ufloats *out = (ufloats *)(void *)y;
    out[0] += (floats)_mm512_shuffle_f32x4(sides[0], sides[1], 0x44) * scale;
    out[1] += (floats)_mm512_shuffle_f32x4(sides[0], sides[1], 0xEE) * scale;
}

static void add_pending(struct amx_run *run) {
    const struct amx_pass *pass = &run->pending;
    if (!pass->y) return;
    for (int64_t r = pass->done; r < pass->end; r++) {
        int tile = r >= pass->first[0] + run->tile_rows;
        const sums32 *sums = run->sums + 2 * tile * AMX_TILE + r - pass->first[tile];
        const struct row16 *in = (const struct row16 *)(const void *)(pass->row + r * run->ld);
        sums32 left = sums[0] + in->offset, right = sums[AMX_TILE] + in->offset;
        if (pass->tiles == 1) left += sums[2 * AMX_TILE], right += sums[3 * AMX_TILE];
        add_both_sides(pass->y + r * MM_HADAMARD, left, right, in->scale);
    }
    run->pending.y = 0;
}

/* Two tiles of rows at once from `done` on, or one */
static struct amx_pass pass_of(const struct amx_run *run, float *y, const float *row, int64_t done) {
    int64_t last = run->rows - run->tile_rows, second = done + run->tile_rows;
    struct amx_pass pass = {.y = y, .row = row, .tiles = second < run->rows ? 2 : 1, .first = {done < last ? done : last, last}, .done = done};
    if (second < last) pass.first[1] = second;
    pass.end = pass.first[pass.tiles - 1] + run->tile_rows;
    return pass;
}

INLINE void multiply_pass(struct amx_run *run, const struct amx_pass *pass) {
    const int8_t *first = ((const struct row8 *)(const void *)(pass->row + pass->first[0] * run->ld))->repeated;
    const int8_t *second = ((const struct row8 *)(const void *)(pass->row + pass->first[1] * run->ld))->repeated;
    int64_t ld = run->ld * (int64_t)sizeof(float);
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
        if (pass->tiles == 2)
            multiply_quarter(run->panel + quarter * QUARTER, first + 64 * quarter, second + 64 * quarter, ld);
        else
            multiply_quarter(run->panel + quarter * QUARTER, first + 64 * quarter, 0, ld);
        if (quarter == 0) add_pending(run);
    }
    take_sums(run, pass);
}

/* y [rows, 32 columns of 128] += 128 inputs of the rows times two columns of 8 tiles; rate2 is a constant when inlined. (Slower: decoding a
 * quarter while the one before is multiplied, whether from two quarters in turn or from two panels.) */
INLINE void multiply_panel_of(struct amx_run *run, float *y, struct column column, const float *row, int rate2) {
    for (int quarter = 0; quarter < QUARTERS; quarter++) decode_quarter(run->panel + quarter * QUARTER, &column, rate2);
    for (int64_t done = 0; done < run->rows;) {
        struct amx_pass pass = pass_of(run, y, row, done);
        multiply_pass(run, &pass);
        done = pass.end;
    }
}

#define X(rate2)                                                                                                \
    static void multiply_panel_##rate2(struct amx_run *run, float *y, struct column column, const float *row) { \
        multiply_panel_of(run, y, column, row, rate2);                                                          \
    }
MM_ALL_RATES2(X)
#undef X

typedef void (*panel_multiplier)(struct amx_run *run, float *y, struct column column, const float *row);

static panel_multiplier panel_multiplier_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return multiply_panel_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}

static void multiply_amx(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                         float *scratch) {
    if (weight->codebook != MM_CODEBOOK_MUL1 || rows <= MOST_DIRECT_ROWS) {
        multiply_int8(y, weight, block, row, ld, rows, scratch);
        return;
    }
    panel_multiplier multiply_one = panel_multiplier_of(weight->rate2);
    int64_t row_tiles = (rows + AMX_TILE - 1) / AMX_TILE;
    struct amx_run run = {.ld = ld, .rows = rows, .tile_rows = (rows + row_tiles - 1) / row_tiles, .panel = (halves *)(void *)scratch};
    run.sums = (sums32 *)(void *)(run.panel + QUARTERS * QUARTER);
    amx_configure((int)run.tile_rows);
    clear_sums();
    start_columns(y, row, ld, rows, weight->k / MM_HADAMARD, ROW8_FLOATS);
    for (int64_t b = 0; b < weight->k / MM_HADAMARD; b++)
        for (int j = 0; j < BLOCK_TILES; j += TILES)
            multiply_one(&run, y + j * MM_TILE, column_of(weight, block, b, j, TILES, false), row + b * ROW8_FLOATS);
    add_pending(&run);
    TILE_RELEASE();
}

static const struct mm_kernels kernels_amx = {
    .name = AMX_LEVEL,
    .input_limit = INT8_MAX,
    .prepare = prepare,
    .row_floats = row_floats_int8,
    .rotate_in = rotate_in_int8,
    .multiply = multiply_amx,
    SHARED_KERNELS,
};
