/* halves_of_tiles for AVX2 (see int16.h): the halfwords of a tile's 16 groups, one lane a group, in the groups' order.
 * A memory dword is the stream's 4 bytes in reverse, so its first halfword is the high one. Rates 1, 2 and 4 are a few shuffles
 * of whole registers; 1.5, 2.5 and 3 shuffle the bytes of two groups at a time, the others those of one, by tables, and transpose. */

/* For one load of 16 bytes: where it starts, and which of its bytes go where. A load before the tile's start wraps around. */
struct gather_plan {
    alignas(32) uint8_t shuffle[16][16];
    uint8_t offset[16];
};
static struct gather_plan gather_plans[MM_MAX_RATE2 + 1];

#define PAIRED(rate2) ((rate2) == 3 || (rate2) == 5 || (rate2) == 6) /* tables for two groups */
#define PRECEDED(rate2) ((rate2) % 2 || (rate2) == 6)                /* a table also brings the 16 bits before a group */

/* Byte `at` of a load that starts at stream byte `base` (a multiple of 4) becomes the stream's byte `byte`. */
static void plan_byte(uint8_t *shuffle, int at, int byte, int base, bool used) {
    int source = ((byte + 4) ^ 3) - 4 - base;
    assert(!used || (source >= 0 && source < 16));
    shuffle[at] = (uint8_t)(used ? source : 0x80);
}

static void plan_gather(struct gather_plan *plan, int rate2) {
    int bytes = MM_TILE_BYTES(rate2), together = PAIRED(rate2) ? 2 : 1, first = PRECEDED(rate2) ? -1 : 0;
    for (int load = 0; load < 16 / together; load++) {
        int start = load * together * rate2 + 2 * first, base = start < 0 ? -4 : start & ~3;
        if (base > bytes - 16) base = bytes - 16;
        plan->offset[load] = (uint8_t)(base < 0 ? 0 : base);
        for (int i = 0; i < 8; i++) { /* halfwords in order, those of two groups side by side */
            int half = i / together + first, group = load * together + i % together;
            for (int low = 0; low < 2; low++) {
                int byte = 2 * half + 1 - low; /* in the group; its first byte is a halfword's upper one */
                plan_byte(plan->shuffle[load], 2 * i + low, group * rate2 + byte, base, byte < rate2);
            }
        }
    }
}

static void prepare(void) {
#define X(rate2) \
    if (rate2 != 2 && rate2 != 4 && rate2 != 8) plan_gather(&gather_plans[rate2], rate2);
    MM_ALL_RATES2(X)
#undef X
}

/* Lane g becomes lane g - 1, lane 0 the last: what stands before each group, since a tile is circular. */
INLINE halves previous(halves h) {
    __m256i before = _mm256_permutevar8x32_epi32((__m256i)h, _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
    return (halves)_mm256_blend_epi16(_mm256_srli_epi32(before, 16), _mm256_slli_epi32((__m256i)h, 16), 0xAA);
}

INLINE __m256i load_two(const uint8_t *low, const uint8_t *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)low)),
                                   _mm_loadu_si128((const __m128i *)(const void *)high), 1);
}

/* Loads `low` and `high` of a plan, shuffled. */
INLINE __m256i load_planned(int rate2, const uint8_t *tile, int low, int high) {
    const struct gather_plan *plan = &gather_plans[rate2];
    __m256i bytes = load_two(tile + plan->offset[low], tile + plan->offset[high]);
    if (low == 0 && PRECEDED(rate2)) {
        __m128i head = _mm_loadu_si128((const __m128i *)(const void *)tile);
        __m128i tail = _mm_loadu_si128((const __m128i *)(const void *)(tile + MM_TILE_BYTES(rate2) - 16));
        bytes = _mm256_inserti128_si256(bytes, _mm_alignr_epi8(head, tail, 12), 0);
    }
    return _mm256_shuffle_epi8(bytes, load_two(plan->shuffle[low], plan->shuffle[high]));
}

/* out [4]: the dwords of 4 registers transposed, in each half */
INLINE void transpose_dwords(halves *out, const __m256i *in) {
    __m256i a = _mm256_unpacklo_epi32(in[0], in[1]), b = _mm256_unpackhi_epi32(in[0], in[1]);
    __m256i c = _mm256_unpacklo_epi32(in[2], in[3]), d = _mm256_unpackhi_epi32(in[2], in[3]);
    out[0] = (halves)_mm256_unpacklo_epi64(a, c);
    out[1] = (halves)_mm256_unpackhi_epi64(a, c);
    out[2] = (halves)_mm256_unpacklo_epi64(b, d);
    out[3] = (halves)_mm256_unpackhi_epi64(b, d);
}

/* out [8]: the words of 8 registers transposed, in each half */
INLINE void transpose_words(halves *out, const __m256i *in) {
    __m256i low[4], high[4];
    for (int i = 0; i < 4; i++) {
        low[i] = _mm256_unpacklo_epi16(in[2 * i], in[2 * i + 1]);
        high[i] = _mm256_unpackhi_epi16(in[2 * i], in[2 * i + 1]);
    }
    transpose_dwords(out, low);
    transpose_dwords(out + 4, high);
}

INLINE void halves_of_tiles(halves *h, int rate2, const uint8_t *tile) {
    __m256i in[8];
    if (rate2 == 2) {
        __m256i bytes = _mm256_loadu_si256((const __m256i *)(const void *)tile);
        h[1] = (halves)_mm256_or_si256(_mm256_slli_epi32(bytes, 16), _mm256_srli_epi32(bytes, 16));
    } else if (rate2 == 4) {
        const __m256i order = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14,
                                               15, 0, 1, 4, 5, 8, 9, 12, 13);
        for (int i = 0; i < 2; i++) /* 4 groups in each half: 0 and 8, 4 and 12 */
            in[i] = _mm256_shuffle_epi8(load_two(tile + 16 * i, tile + 32 + 16 * i), order);
        h[1] = (halves)_mm256_unpacklo_epi64(in[0], in[1]);
        h[2] = (halves)_mm256_unpackhi_epi64(in[0], in[1]);
    } else if (rate2 == 8) {
        const __m256i order = _mm256_setr_epi8(2, 3, 10, 11, 0, 1, 8, 9, 6, 7, 14, 15, 4, 5, 12, 13, 2, 3, 10, 11, 0, 1, 8, 9,
                                               6, 7, 14, 15, 4, 5, 12, 13);
        for (int i = 0; i < 4; i++) in[i] = _mm256_shuffle_epi8(load_two(tile + 16 * i, tile + 64 + 16 * i), order);
        transpose_dwords(h + 1, in);
    } else if (PAIRED(rate2)) {
        for (int i = 0; i < 4; i++) in[i] = load_planned(rate2, tile, i, i + 4);
        transpose_dwords(h, in);
    } else {
        for (int i = 0; i < 8; i++) in[i] = load_planned(rate2, tile, i, i + 8);
        transpose_words(h + !PRECEDED(rate2), in);
    }
    if (!PRECEDED(rate2)) h[0] = previous(h[(rate2 + 1) / 2]);
}
