/* Products by AMX's tiles of 8 bits. Included by a level's file after int16.h: inputs are its rows of 8 bits, halves hold two tiles of weights, and
 * the integer sums are those of INT8_LEVEL. A level defines before: AMX_LEVEL, its name.
 *
 * Up to two tiles of rows of mul1, the bytes of the products are multiplied as they come, as INT8_LEVEL does for one row: an input stands twice in a
 * row, once for each byte of a halfword. 32 inputs are 64 bytes of a row, and what two tiles under each other and two side by side decode to
 * is four tiles of AMX, side by half: a register of halfwords is one row of such a tile, its dwords the 16 columns, each with the two inputs
 * that neighbouring lanes share. For more rows, and for 3inst and mcg, weights become integers of 16 bits first, whose lower and upper bytes are
 * multiplied for themselves: two bytes a weight instead of four. */

#define AMX_TILE 16 /* rows of a tile, and dwords in each */

struct amx_config { /* as ldtilecfg reads it */
    uint8_t palette, start_row, unused[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct amx_config) == 64, "Intel's manual");

/* The tile registers: four for sums, two for the inputs of two tiles of rows, and two for weights, so that one is loaded while the other is at
 * work. */
#define SUMS(i, j) (2 * (i) + (j))
#define INPUTS(rows) (4 + (rows))
#define WEIGHTS(part) (6 + (part))

static void amx_configure(int rows) {
    struct amx_config config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = (uint8_t)(tile < WEIGHTS(0) ? rows : AMX_TILE);
    }
    TILE_CONFIGURE(config);
}

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
    int shift; /* left, of the second part of a sum */
    halves *panel;
    sums32 *sums;            /* of the pass before: [side, tile, part, AMX_TILE] */
    struct amx_pass pending; /* what they belong to: added to y while the next pass is under way */
};
#define SUMS_AT(side, tile, part) ((((side) * 2 + (tile)) * 2 + (part)) * AMX_TILE)

static void clear_sums(void) {
    TILE_ZERO(SUMS(0, 0));
    TILE_ZERO(SUMS(0, 1));
    TILE_ZERO(SUMS(1, 0));
    TILE_ZERO(SUMS(1, 1));
}

/* The registers' sums to four places in run->sums. */
INLINE void take_sums(struct amx_run *run, int first, int second, int third, int fourth) {
    TILE_STORE(run->sums + first, 64, SUMS(0, 0));
    TILE_STORE(run->sums + second, 64, SUMS(0, 1));
    TILE_STORE(run->sums + third, 64, SUMS(1, 0));
    TILE_STORE(run->sums + fourth, 64, SUMS(1, 1));
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

/* two_parts: of every sum. Not inlined: the loops that call it have all registers in use. */
static __attribute__((noinline)) void add_pending(struct amx_run *run, bool two_parts) {
    const struct amx_pass *pass = &run->pending;
    if (!pass->y) return;
    for (int64_t r = pass->done; r < pass->end; r++) {
        int tile = r >= pass->first[0] + run->tile_rows;
        const sums32 *sums = run->sums + r - pass->first[tile];
        const struct row16 *in = (const struct row16 *)(const void *)(pass->row + r * run->ld);
        sums32 left = sums[SUMS_AT(0, tile, 0)] + in->offset, right = sums[SUMS_AT(1, tile, 0)] + in->offset;
        if (two_parts) {
            left += sums[SUMS_AT(0, tile, 1)] << run->shift;
            right += sums[SUMS_AT(1, tile, 1)] << run->shift;
        }
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

static const struct row16 *inputs_of(const struct amx_run *run, const struct amx_pass *pass, int tile) {
    return (const struct row16 *)(const void *)(pass->row + pass->first[tile] * run->ld);
}

/* ---- the bytes of products: mul1, few rows ---- */

/* A unit: the products of one side of two columns' next two tiles, 64 bytes of a row, lower halves and upper ones. It is multiplied after the next
 * one is decoded, so that neither waits: by then its stores have reached the cache, where tiles are loaded from. The two buffers, used in
 * turn, are 4 KB together: a load waits for a store before it whose address has the same lower 12 bits. */
#define UNIT (2 * AMX_TILE)
#define QUARTERS (BLOCK_TILES / 2)

/* rate2 and side are constants when inlined */
INLINE void decode_unit(halves *unit, halves (*h)[POSITIONS / 2 + 1], int rate2, int side) {
    for (int t = 0; t < 2; t++)
        UNROLL(8) for (int step = 0; step < STEPS; step++) {
            halves low, high;
            multiply_state(&low, &high, window(h[t], step / 4 * 8 + side * 4 + step % 4, rate2), MM_MUL1_MULTIPLIER);
            unit[t * STEPS + step] = low;
            unit[AMX_TILE + t * STEPS + step] = high;
        }
}

/* The unit of that side; its inputs are loaded. The registers' sums are [side, half of a product] of a lone tile of rows, since each would wait
 * for its own last addition, or [side, tile of rows]. */
INLINE void multiply_unit(const halves *units, int side, int row_tiles) {
#define X(of, half)                                                                                  \
    if (side == (of)) {                                                                              \
        TILE_LOAD(WEIGHTS(half), units + (of) * UNIT + (half) * AMX_TILE, 64);                       \
        if (row_tiles == 1) TILE_MULTIPLY_UNSIGNED(SUMS(of, half), INPUTS(0), WEIGHTS(half));         \
        if (row_tiles == 2) TILE_MULTIPLY_UNSIGNED(SUMS(of, 0), INPUTS(0), WEIGHTS(half));            \
        if (row_tiles == 2) TILE_MULTIPLY_UNSIGNED(SUMS(of, 1), INPUTS(1), WEIGHTS(half));            \
    }
    X(0, 0) X(0, 1) X(1, 0) X(1, 1)
#undef X
}

/* The last unit of a panel, and its sums, which wait to be added. */
INLINE void finish_panel(struct amx_run *run, const struct amx_pass *pass, int row_tiles) {
    multiply_unit(run->panel, 1, row_tiles);
    if (row_tiles == 1)
        take_sums(run, SUMS_AT(0, 0, 0), SUMS_AT(0, 0, 1), SUMS_AT(1, 0, 0), SUMS_AT(1, 0, 1));
    else
        take_sums(run, SUMS_AT(0, 0, 0), SUMS_AT(0, 1, 0), SUMS_AT(1, 0, 0), SUMS_AT(1, 1, 0));
    run->pending = *pass;
}

/* All panels of a block of columns; rate2 and row_tiles are constants when inlined. */
INLINE void multiply_products(struct amx_run *run, float *y, const struct mm_weight *weight, int64_t block, const float *row, int rate2,
                              int row_tiles) {
    struct amx_pass pass = {0};
    int64_t ld = run->ld * (int64_t)sizeof(float);
    for (int64_t b = 0; b < weight->k / MM_HADAMARD; b++) {
        struct column first = column_of(weight, block, b, 0, BLOCK_TILES);
        for (int j = 0; j < BLOCK_TILES; j += TILES, first.tile += TILES * MM_TILE_BYTES(rate2)) {
            struct amx_pass next = pass_of(run, y + j * MM_TILE, row + b * ROW16_FLOATS, 0);
            struct column column = first;
            ROLLED for (int quarter = 0; quarter < QUARTERS; quarter++) {
                halves h[2][POSITIONS / 2 + 1];
                for (int t = 0; t < 2; t++, column.tile += column.stride) {
                    prefetch_tiles(column.tile, column.ahead, TILES * MM_TILE_BYTES(rate2));
                    halves_of_tiles(h[t], rate2, column.tile);
                }
                decode_unit(run->panel, h, rate2, 0);
                if (quarter > 0)
                    multiply_unit(run->panel, 1, row_tiles);
                else if (pass.y)
                    finish_panel(run, &pass, row_tiles);
                if (quarter == 2) add_pending(run, row_tiles == 1);
                TILE_LOAD(INPUTS(0), inputs_of(run, &next, 0)->repeated + 64 * quarter, ld);
                if (row_tiles == 2) TILE_LOAD(INPUTS(1), inputs_of(run, &next, 1)->repeated + 64 * quarter, ld);
                decode_unit(run->panel + UNIT, h, rate2, 1);
                multiply_unit(run->panel, 0, row_tiles);
            }
            pass = next;
        }
    }
    finish_panel(run, &pass, row_tiles);
    add_pending(run, row_tiles == 1);
}

#define X(rate2)                                                                                                                        \
    static void multiply_products_##rate2(struct amx_run *run, float *y, const struct mm_weight *weight, int64_t block, const float *row) { \
        if (run->rows <= AMX_TILE)                                                                                                      \
            multiply_products(run, y, weight, block, row, rate2, 1);                                                                    \
        else                                                                                                                            \
            multiply_products(run, y, weight, block, row, rate2, 2);                                                                    \
    }
MM_ALL_RATES2(X)
#undef X

typedef void (*products_multiplier)(struct amx_run *run, float *y, const struct mm_weight *weight, int64_t block, const float *row);

static products_multiplier products_multiplier_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return multiply_products_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}

/* ---- the bytes of integers, byte sums (mul1) or pairs.h's, lower and upper ones multiplied for themselves ---- */

#define PANEL_HALVES 2 /* four tiles under each other: 64 inputs, a byte each */
#define PANEL_AT(half, side, part) ((((half) * 2 + (side)) * 2 + (part)) * AMX_TILE)

/* panel [half, side, lower and upper bytes, 16]: a halfword has steps s and s + 4 of a tile */
INLINE void split_states(halves *panel, const halves *states, uint32_t multiplier, uint32_t addend, int codebook) {
    for (int t = 0; t < BLOCK_TILES; t++, states += POSITIONS)
        UNROLL(8) for (int i = 0; i < POSITIONS / 2; i++) {
            halves a = states[i], b = states[i + 8];
            if (codebook != MM_CODEBOOK_MUL1) a = integers_of_states(a, multiplier, addend), b = integers_of_states(b, multiplier, addend);
            halves *out = panel + PANEL_AT(t / 4, i / 4, 0) + t % 4 * 4 + i % 4;
            out[0] = (a & 0xFF) | b << 8;
            out[AMX_TILE] = a >> 8 | (b & 0xFF00);
        }
}

static void decode_bytes(halves *panel, const struct mm_weight *weight, const struct column *column) {
    halves states[BLOCK_TILES * POSITIONS]; /* or mul1's byte sums */
    if (weight->codebook == MM_CODEBOOK_MUL1)
        decoder_of(weight->rate2)(states, column);
    else
        cutter_of(weight->rate2)(states, column, BLOCK_TILES);
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates) \
    case id: split_states(panel, states, multiplier, addend, id); break;
        MM_CODEBOOKS(X)
#undef X
    default: break;
    }
}

INLINE void multiply_half(const halves *panel, int half, int side, bool alone) {
#define X(part, MULTIPLY)                                                  \
    TILE_LOAD(WEIGHTS(part), panel + PANEL_AT(half, side, part), 64);       \
    if (alone && side == 0) MULTIPLY(SUMS(0, part), INPUTS(0), WEIGHTS(part)); \
    if (alone && side == 1) MULTIPLY(SUMS(1, part), INPUTS(0), WEIGHTS(part)); \
    if (!alone) MULTIPLY(SUMS(0, part), INPUTS(0), WEIGHTS(part));         \
    if (!alone) MULTIPLY(SUMS(1, part), INPUTS(1), WEIGHTS(part));
    X(0, TILE_MULTIPLY_UNSIGNED) X(1, TILE_MULTIPLY_SIGNED)
#undef X
}

/* The registers' sums are [tile, part] of a side, or [side, part] of a lone tile. */
INLINE void multiply_integer_pass(struct amx_run *run, const struct amx_pass *pass) {
    const int8_t *first = inputs_of(run, pass, 0)->once, *second = inputs_of(run, pass, 1)->once;
    int64_t ld = run->ld * (int64_t)sizeof(float);
    if (pass->tiles == 1) {
        for (int half = 0; half < PANEL_HALVES; half++) {
            TILE_LOAD(INPUTS(0), first + 64 * half, ld);
            multiply_half(run->panel, half, 0, true);
            multiply_half(run->panel, half, 1, true);
        }
        add_pending(run, true);
        take_sums(run, SUMS_AT(0, 0, 0), SUMS_AT(0, 0, 1), SUMS_AT(1, 0, 0), SUMS_AT(1, 0, 1));
        return;
    }
    for (int side = 0; side < 2; side++) {
        for (int half = 0; half < PANEL_HALVES; half++) {
            TILE_LOAD(INPUTS(0), first + 64 * half, ld);
            TILE_LOAD(INPUTS(1), second + 64 * half, ld);
            multiply_half(run->panel, half, side, false);
        }
        add_pending(run, true);
        take_sums(run, SUMS_AT(side, 0, 0), SUMS_AT(side, 0, 1), SUMS_AT(side, 1, 0), SUMS_AT(side, 1, 1));
    }
}

static void multiply_by_bytes(struct amx_run *run, float *y, const struct mm_weight *weight, int64_t block, const float *row) {
    for (int64_t b = 0; b < weight->k / MM_HADAMARD; b++) {
        struct column column = column_of(weight, block, b, 0, BLOCK_TILES);
        for (int j = 0; j < BLOCK_TILES; j += TILES, column.tile += TILES * MM_TILE_BYTES(weight->rate2)) {
            decode_bytes(run->panel, weight, &column);
            for (int64_t done = 0; done < run->rows;) {
                struct amx_pass pass = pass_of(run, y + j * MM_TILE, row + b * ROW16_FLOATS, done);
                multiply_integer_pass(run, &pass);
                run->pending = pass;
                done = pass.end;
            }
        }
    }
    add_pending(run, true);
}

/* ---- both ---- */

static bool takes_products(int codebook, int64_t rows) { return codebook == MM_CODEBOOK_MUL1 && rows <= 2 * AMX_TILE; }

/* Whether INT8_LEVEL multiplies as fast: a panel of bytes costs 128 stores. */
static bool goes_direct(int codebook, int64_t rows) { return rows <= (codebook == MM_CODEBOOK_MUL1 ? 1 : 3); }

static void rotate_in_amx(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook, int64_t rows) {
    if (goes_direct(codebook, rows))
        rotate_in_int8(row, x, suh, k, used, codebook, rows);
    else
        rotate_to_integers(row, x, suh, k, used, INT8_MAX, codebook, takes_products(codebook, rows) ? REPEATED_BYTES : BYTES);
}

static void multiply_amx(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                         float *scratch) {
    if (goes_direct(weight->codebook, rows)) {
        multiply_int8(y, weight, block, row, ld, rows, scratch);
        return;
    }
    bool products = takes_products(weight->codebook, rows);
    int64_t row_tiles = (rows + AMX_TILE - 1) / AMX_TILE;
    struct amx_run run = {.ld = ld, .rows = rows, .tile_rows = (rows + row_tiles - 1) / row_tiles, .shift = products ? 0 : 8,
                          .panel = (halves *)(void *)scratch};
    run.sums = (sums32 *)(void *)(run.panel + BLOCK_TILES * POSITIONS);
    amx_configure((int)run.tile_rows);
    clear_sums();
    start_columns(y, row, ld, rows, weight->k / MM_HADAMARD);
    if (products)
        products_multiplier_of(weight->rate2)(&run, y, weight, block, row);
    else
        multiply_by_bytes(&run, y, weight, block, row);
    TILE_RELEASE();
}

static const struct mm_kernels kernels_amx = {
    .name = AMX_LEVEL,
    .input_limits = INT8_LIMITS,
    .prepare = prepare,
    .row_floats = row_floats_int8,
    .rotate_in = rotate_in_amx,
    .multiply = multiply_amx,
    SHARED_KERNELS,
};
