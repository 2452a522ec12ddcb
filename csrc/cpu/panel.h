/* Products over decoded panels: the codebooks' exact values in float32, 128 inputs x 32 columns of them in the first-level cache,
 * multiplied by one or many rows. Included by a level's file after kernels.h.
 *
 * How a tile is decoded: 16 lanes hold the same place of 16 groups of 16 positions (int16.h says more), so a product's low and high
 * halfwords are vectors of their own, and so are the two binary16 numbers of 3inst and mcg. Their exponents are 12 .. 15: a shift
 * turns them into the halves of a float, and floats into sums; two fused multiply-adds round those to binary16.
 *
 * A rotated row is "paired": 8 pairs a tile, rows r and r + 4, since two neighbouring lanes are those rows of one column. Every sum
 * starts at 0 in each block of 128 inputs and takes them in order, so a row's result does not depend on its neighbours, and its
 * error grows with 64 + k / 128 terms.
 *
 * A level defines before:
 *   half16, short16                16 halfwords, unsigned and signed
 *   multiply_high, byte_sums, gather_halves, as int16.h's product_high, sums_of_bytes, halves_of_tiles of 16 positions a lane
 *   interleave(out, low, high)     out [2] = words low + 65536 * high: of lanes 0..3 and 8..11, of 4..7 and 12..15
 *   repeat_pair(pair)              two floats, 4 times
 *   add_pairs(a, b)                sums of neighbouring lanes: a's 4 lower, b's 4 lower, a's upper, b's upper */
#define PAIRS (MM_TILE / 2)
#define PAIR_ROW(pair) (2 * ((pair) / 4) + ((pair) & 1) + 8 * ((pair) / 2 & 1)) /* and the row 4 below */
#define PAIR_VECTORS 4                            /* of a pair: columns {0, 1, 4, 5}, {2, 3, 6, 7}, 8 more for either */
#define VECTOR_COLUMN(vector, lane) (8 * ((vector) / 2) + 2 * ((vector) & 1) + 4 * ((lane) / 4) + ((lane) / 2 & 1))
#define TILE_VECTORS (PAIRS * PAIR_VECTORS)
#define PANEL_VECTORS (BLOCK_TILES * TILE_VECTORS) /* a column of tiles: 8 KB */
#define PANEL_COLUMNS 2                           /* columns of tiles decoded together: neighbours in memory */

/* ---- rows ---- */

static int64_t row_floats(int codebook) {
    (void)codebook;
    return MM_HADAMARD;
}

static void rotate_in(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook) {
    (void)codebook;
    for (int64_t i = 0; i < k; i += MM_HADAMARD) {
        vec8 rotated[16];
        scale_rotate(rotated, x + i, suh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile++, h += MM_TILE)
            for (int pair = 0; pair < PAIRS; pair++, row += 2) {
                row[0] = h[PAIR_ROW(pair)];
                row[1] = h[PAIR_ROW(pair) + 4];
            }
    }
}

/* Spread as the vectors of a pair are: every column twice, in half of the memory that cpu.h allows. */
static void rotate_grad(float *spread, const float *grad, const uint16_t *svh, int64_t n, int64_t used) {
    for (int64_t i = 0; i < n; i += MM_HADAMARD) {
        vec8 rotated[16];
        scale_rotate(rotated, grad + i, svh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile++, h += MM_TILE)
            for (int at = 0; at < PAIR_VECTORS * 8; at++) *spread++ = h[VECTOR_COLUMN(at / 8, at % 8)];
    }
}

/* ---- decoding ---- */

#define POSITION(pair, side) ((pair) / 4 * 8 + (pair) % 4 + 4 * (side)) /* in its group; side 1 is 8 columns on */

/* states [tiles, 16]: the windows of a column of 8 tiles, stride bytes apart; rate2 is a constant when inlined */
INLINE void cut_states(half16 *states, const uint8_t *tile, int64_t stride, int64_t tiles, int rate2) {
    for (int64_t t = 0; t < tiles; t++, tile += stride, states += 16) {
        half16 h[10];
        __builtin_prefetch(tile + BLOCK_TILES * stride);
        gather_halves(h, rate2, tile);
        UNROLL(16) for (int j = 0; j < 16; j++) {
            int end = (j + 1) * rate2 >> 1, i = (end + 15) / 16, shift = end - 16 * (i - 1);
            states[j] = h[i];
            if (shift < 16) states[j] = h[i - 1] << shift | h[i] >> (16 - shift);
        }
    }
}

#define X(rate2)                                                                                            \
    static void cut_states_##rate2(half16 *states, const uint8_t *tile, int64_t stride, int64_t tiles) {    \
        cut_states(states, tile, stride, tiles, rate2);                                                     \
    }
MM_ALL_RATES2(X)
#undef X

typedef void (*state_cutter)(half16 *states, const uint8_t *tile, int64_t stride, int64_t tiles);

static state_cutter cutter_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return cut_states_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}

/* To binary16 and back, for what the codebooks' sums can be: 8193 v keeps 11 bits more than 8192 v has, and ties go to even as they
 * should. That no other float ever comes is what makes it right; tests/levels.c goes through every state. */
INLINE vec8 round_to_half(vec8 v) { return (v * 8192.0f + v) - v * 8192.0f; }

/* out [2]: a binary16 number with an exponent of 12 .. 15, which only its sign and lowest 12 bits tell from others, after an
 * exclusive or with `flip`; as a float, lanes as interleave says. */
INLINE void floats_of_halves(vec8 *out, half16 x, uint16_t flip) {
    const uint16_t kept = (MM_PAIR_AND & 0x8000u) | (MM_PAIR_AND & 0x0FFFu) >> 3;
    const uint16_t bits = (uint16_t)((flip & 0x8000u) | (((flip & 0x7FFFu) >> 3) + ((127 - 15) << 7)));
    _Static_assert((MM_PAIR_XOR & 7u) == 0 && (MM_PAIR_AND & 0xFFFFu) == 0x8FFFu, "the lowest bits pass unchanged");
    interleave(out, x << 13, ((half16)((short16)x >> 3) & kept) ^ bits);
}

/* out [2][2]: the values of two vectors of 16 states, lanes as interleave says. In step, which keeps the units a little busier. */
INLINE void decode_two(vec8 (*out)[2], const half16 *left, const half16 *right, uint32_t multiplier, uint32_t addend, int codebook) {
    const half16 zero = {0}, m_low = zero + (uint16_t)multiplier, m_high = zero + (uint16_t)(multiplier >> 16);
    half16 low[2], high[2];
    for (int i = 0; i < 2; i++) {
        half16 state = i ? *right : *left;
        low[i] = state * m_low;
        high[i] = multiply_high(state, m_low) + state * m_high;
    }
    for (int i = 0; i < 2; i++) {
        vec8 a[2], b[2];
        if (codebook == MM_CODEBOOK_MUL1) {
            half16 sum = byte_sums(low[i], high[i]); /* at most 1020: it becomes the float 1024 + sum */
            interleave(a, sum << 13, (sum >> 3) + (uint16_t)0x4480);
            for (int e = 0; e < 2; e++) out[i][e] = a[e] * MM_MUL1_SCALE + MM_MUL1_BIAS;
            continue;
        }
        uint16_t flip = (uint16_t)MM_PAIR_XOR;
        if (addend) { /* its carry asks for an unsigned comparison: a signed one of flipped top bits */
            const short16 first = (short16)zero + (int16_t)((int)(addend & 0xFFFFu) - 0x8000);
            low[i] += (half16)first;
            high[i] += (uint16_t)(addend >> 16);
            high[i] -= (half16)((short16)low[i] < first);
            flip ^= 0x8000u;
        }
        floats_of_halves(a, low[i], flip);
        floats_of_halves(b, high[i], (uint16_t)(MM_PAIR_XOR >> 16));
        for (int e = 0; e < 2; e++) out[i][e] = a[e] + b[e]; /* exact: 15 bits */
    }
    for (int i = 0; i < 2; i++)
        for (int e = 0; e < 2; e++) out[i][e] = round_to_half(out[i][e]);
}

/* The values of `tiles` tiles: to panel [tiles, 8 pairs, 4], or, with a row, times the row and added to sums [4]. */
INLINE void decode_states(vec8 *panel, vec8 *sums, const float *row, const half16 *states, int64_t tiles, uint32_t multiplier,
                          uint32_t addend, int codebook) {
    vec8 sum[PAIR_VECTORS] = {0};
    for (int64_t t = 0; t < tiles; t++, states += 16)
        UNROLL(8) for (int pair = 0; pair < PAIRS; pair++) {
            vec8 out[2][2];
            decode_two(out, states + POSITION(pair, 0), states + POSITION(pair, 1), multiplier, addend, codebook);
            if (row) {
                vec8 x = repeat_pair(row + 2 * (t * PAIRS + pair));
                for (int i = 0; i < PAIR_VECTORS; i++) sum[i] += out[i / 2][i % 2] * x;
            } else
                for (int i = 0; i < PAIR_VECTORS; i++) panel[(t * PAIRS + pair) * PAIR_VECTORS + i] = out[i / 2][i % 2];
        }
    if (row)
        for (int i = 0; i < PAIR_VECTORS; i++) sums[i] += sum[i];
}

/* panel [tiles, 8 pairs, 4]: up to 8 tiles, stride bytes apart */
static void decode_panel(vec8 *panel, const struct mm_weight *weight, const uint8_t *tile, int64_t stride, int64_t tiles) {
    half16 states[BLOCK_TILES * 16];
    cutter_of(weight->rate2)(states, tile, stride, tiles);
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates) \
    case id: decode_states(panel, NULL, NULL, states, tiles, multiplier, addend, id); break;
        MM_CODEBOOKS(X)
#undef X
    default: break;
    }
}

/* sums [4] += a row times a column of 8 tiles: as decode_panel and multiply_panel, term by term */
static void multiply_column(vec8 *sums, const struct mm_weight *weight, const uint8_t *tile, int64_t stride, const float *row) {
    half16 states[BLOCK_TILES * 16];
    cutter_of(weight->rate2)(states, tile, stride, BLOCK_TILES);
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates) \
    case id: decode_states(NULL, sums, row, states, BLOCK_TILES, multiplier, addend, id); break;
        MM_CODEBOOKS(X)
#undef X
    default: break;
    }
}

/* ---- products ---- */

/* sums [rows, PANEL_COLUMNS, 4] += rows times panels [columns, 8 tiles, 8 pairs, 4]; rows and columns are constants when inlined */
INLINE void multiply_panel(vec8 *sums, const vec8 *panel, const float *row, int64_t ld, int rows, int columns) {
    vec8 sum[4][PANEL_COLUMNS][PAIR_VECTORS] = {0};
    for (int pair = 0; pair < BLOCK_TILES * PAIRS; pair++) {
        vec8 x[4];
        for (int r = 0; r < rows; r++) x[r] = repeat_pair(row + r * ld + 2 * pair);
        for (int c = 0; c < columns; c++)
            for (int i = 0; i < PAIR_VECTORS; i++) {
                vec8 w = panel[c * PANEL_VECTORS + pair * PAIR_VECTORS + i];
                for (int r = 0; r < rows; r++) sum[r][c][i] += w * x[r];
            }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++)
            for (int i = 0; i < PAIR_VECTORS; i++) sums[(r * PANEL_COLUMNS + c) * PAIR_VECTORS + i] += sum[r][c][i];
}

static void multiply(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                     float *scratch) {
    const int row_sums = PANEL_COLUMNS * PAIR_VECTORS;
    vec8 *sums = (vec8 *)(void *)scratch, *panel = sums + rows * row_sums;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), row_bytes = weight->n / MM_TILE * tile_bytes;
    for (int j = 0; j < BLOCK_TILES; j += PANEL_COLUMNS) {
        const uint8_t *column = weight->tiles + (block * BLOCK_TILES + j) * tile_bytes;
        memset(sums, 0, (size_t)(rows * row_sums) * sizeof *sums);
        for (int64_t k = 0; k < weight->k; k += MM_HADAMARD, column += BLOCK_TILES * row_bytes) {
            if (rows == 1) {
                for (int c = 0; c < PANEL_COLUMNS; c++)
                    multiply_column(sums + c * PAIR_VECTORS, weight, column + c * tile_bytes, row_bytes, row + k);
                continue;
            }
            for (int c = 0; c < PANEL_COLUMNS; c++)
                decode_panel(panel + c * PANEL_VECTORS, weight, column + c * tile_bytes, row_bytes, BLOCK_TILES);
            int64_t r = 0;
            for (; r + 3 <= rows; r += 3)
                for (int c = 0; c < PANEL_COLUMNS; c++)
                    multiply_panel(sums + r * row_sums + c * PAIR_VECTORS, panel + c * PANEL_VECTORS, row + r * ld + k, ld, 3, 1);
            if (rows - r == 2)
                for (int c = 0; c < PANEL_COLUMNS; c++)
                    multiply_panel(sums + r * row_sums + c * PAIR_VECTORS, panel + c * PANEL_VECTORS, row + r * ld + k, ld, 2, 1);
            if (rows - r == 1) multiply_panel(sums + r * row_sums, panel, row + r * ld + k, ld, 1, PANEL_COLUMNS);
        }
        for (int64_t r = 0; r < rows; r++)
            for (int half = 0; half < 2 * PANEL_COLUMNS; half++) {
                const vec8 *sum = sums + r * row_sums + 2 * half;
                *(uvec8 *)(void *)(y + r * MM_HADAMARD + j * MM_TILE + 8 * half) = add_pairs(sum[0], sum[1]);
            }
    }
}

static void multiply_transposed(float *dx, const struct mm_weight *weight, int64_t block, const float *spread,
                                int64_t rows, float *scratch) {
    vec8 *sums = (vec8 *)(void *)scratch, *tile = sums + rows * PAIRS;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int kt = 0; kt < BLOCK_TILES; kt++) {
        const uint8_t *tiles = weight->tiles + (block * BLOCK_TILES + kt) * n_tiles * tile_bytes;
        memset(sums, 0, (size_t)(rows * PAIRS) * sizeof *sums);
        for (int64_t j = 0; j < n_tiles; j++) {
            decode_panel(tile, weight, tiles + j * tile_bytes, 0, 1);
            for (int64_t r = 0; r < rows; r++) {
                const vec8 *grad = (const vec8 *)(const void *)(spread + r * 4 * weight->n) + j * PAIR_VECTORS;
                for (int pair = 0; pair < PAIRS; pair++)
                    for (int i = 0; i < PAIR_VECTORS; i++) sums[r * PAIRS + pair] += tile[pair * PAIR_VECTORS + i] * grad[i];
            }
        }
        for (int64_t r = 0; r < rows; r++)
            for (int pair = 0; pair < PAIRS; pair++) {
                float *out = dx + r * MM_HADAMARD + kt * MM_TILE + PAIR_ROW(pair);
                const float *s = (const float *)&sums[r * PAIRS + pair];
                out[0] = (s[0] + s[2]) + (s[4] + s[6]);
                out[4] = (s[1] + s[3]) + (s[5] + s[7]);
            }
    }
}

static void decode_block(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block) {
    vec8 panel[PANEL_VECTORS];
    const float *values = (const float *)panel;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int j = 0; j < BLOCK_TILES; j++) {
        int64_t index = k_block * BLOCK_TILES * n_tiles + n_block * BLOCK_TILES + j;
        decode_panel(panel, weight, weight->tiles + index * tile_bytes, n_tiles * tile_bytes, BLOCK_TILES);
        for (int at = 0; at < PANEL_VECTORS * 8; at++) {
            int vector = at / 8 % PAIR_VECTORS, lane = at % 8, pair = at / 8 / PAIR_VECTORS % PAIRS, tile = at / 8 / TILE_VECTORS;
            out[(tile * MM_TILE + PAIR_ROW(pair) + 4 * (lane & 1)) * MM_HADAMARD + j * MM_TILE + VECTOR_COLUMN(vector, lane)] =
                values[at];
        }
    }
}
