/* Rotated rows that hold each input once, 128 floats for 128 inputs. Included by panel.h and columns.h, which define before:
 *   INPUT_AT(place)  which of a tile's 16 inputs stands at a place of it */

static int64_t row_floats(int codebook) {
    (void)codebook;
    return MM_HADAMARD;
}

static void rotate_in(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook, int64_t rows) {
    (void)codebook, (void)rows;
    for (int64_t i = 0; i < k; i += MM_HADAMARD) {
        wide rotated[WIDES];
        scale_rotate(rotated, x + i, suh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile++, h += MM_TILE)
            for (int place = 0; place < MM_TILE; place++) *row++ = h[INPUT_AT(place)];
    }
}
