/* The scalar level: decodes by the letter of docs/format.md, through a table of each codebook's 65,536 values.
 * Runs everywhere and is what the other levels are checked against; kernels.h may still become SSE or NEON code. */
#include "cpu/vector.h"

#include "cpu/cpu.h"
#include "cpu/half.h"

#define LEVEL "scalar"

static float codebook_table[MM_CODEBOOK_COUNT][1 << MM_WINDOW_BITS];

static float codebook_value(int codebook, uint32_t state) {
    static const uint32_t multipliers[] = {
#define X(id, name, multiplier, addend, half_rates) multiplier,
        MM_CODEBOOKS(X)
#undef X
    };
    static const uint32_t addends[] = {
#define X(id, name, multiplier, addend, half_rates) addend,
        MM_CODEBOOKS(X)
#undef X
    };
    uint32_t word = state * multipliers[codebook] + addends[codebook];
    float exact; /* both sums are exact in float, so rounding to binary16 is the only rounding */
    if (codebook == MM_CODEBOOK_MUL1) {
        uint32_t bytes = (word & 255u) + (word >> 8 & 255u) + (word >> 16 & 255u) + (word >> 24);
        exact = (float)(1024u + bytes) * MM_MUL1_SCALE + MM_MUL1_BIAS;
    } else {
        word = (word & MM_PAIR_AND) ^ MM_PAIR_XOR;
        exact = mm_float_of_half((uint16_t)word) + mm_float_of_half((uint16_t)(word >> 16));
    }
    return mm_float_of_half(mm_half_of_float(exact));
}

static void prepare(void) {
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++)
        for (uint32_t state = 0; state < 1u << MM_WINDOW_BITS; state++)
            codebook_table[codebook][state] = codebook_value(codebook, state);
}

typedef struct {
    const uint8_t *tile;
    uint32_t rate2, bits; /* bits in the tile's circular stream */
} tile_reader;

INLINE tile_reader tile_open(int rate2, const uint8_t *tile) {
    return (tile_reader){tile, (uint32_t)rate2, (uint32_t)MM_TILE_BYTES(rate2) * 8};
}

/* Stream bit p is bit 31 - p % 32 of little-endian word p / 32; stream byte b is therefore byte b ^ 3 in memory. */
INLINE uint32_t stream_byte(const tile_reader *reader, uint32_t index) { return reader->tile[index ^ 3u]; }

INLINE vec8 tile_decode(const tile_reader *reader, int group, int codebook) {
    vec8 out = {0};
    for (uint32_t j = 0; j < 8; j++) {
        uint32_t end = ((uint32_t)group * 8 + j + 1) * reader->rate2 >> 1; /* the window's last bit, plus one */
        uint32_t start = end < MM_WINDOW_BITS ? end + reader->bits - MM_WINDOW_BITS : end - MM_WINDOW_BITS;
        uint32_t bytes = reader->bits / 8, first = start / 8;
        uint32_t second = first + 1 == bytes ? 0 : first + 1, third = second + 1 == bytes ? 0 : second + 1;
        uint32_t window = stream_byte(reader, first) << 16 | stream_byte(reader, second) << 8 | stream_byte(reader, third);
        out[j] = codebook_table[codebook][window >> (8 - start % 8) & 0xFFFFu];
    }
    return out;
}

static void load_half(float *out, const uint16_t *in, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = mm_float_of_half(in[i]);
}

static void store_half(uint16_t *out, const float *in, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = mm_half_of_float(in[i]);
}

INLINE wide wide_of_halves(const uint16_t *in) {
    wide out;
    for (int i = 0; i < WIDE_LANES; i++) out[i] = mm_float_of_half(in[i]);
    return out;
}

#include "cpu/kernels.h"
#include "cpu/tiles.h"

const struct mm_kernels *mm_kernels_scalar(void) { return &kernels; }
