/* halves_of_tiles for NEON (see int16.h): lane c is column c, 32 positions, rate2 halfwords of the tile's memory at a stride of rate2.
 * Even strides are halved by unzipping; what remains, 1, 3, 5 or 7, by table lookups. A memory dword is the stream's two halfwords in
 * reverse. */

/* Of `run` registers, lane by lane the halfwords at run * lane + i; exchanged: after the two halfwords of every dword changed places. */
INLINE halves pick(const halves *v, int run, int i, int exchanged) {
    if (run == 1) return v[0];
#define BYTES(lane) (uint16_t)(0x100 + 0x202 * ((run * (lane) + i) ^ exchanged))
    const halves at = {BYTES(0), BYTES(1), BYTES(2), BYTES(3), BYTES(4), BYTES(5), BYTES(6), BYTES(7)};
#undef BYTES
    uint8x16_t index = vreinterpretq_u8_u16(at), rest = vsubq_u8(index, vdupq_n_u8(64)), b[7];
    UNROLL(8) for (int k = 0; k < run; k++) b[k] = vreinterpretq_u8_u16(v[k]);
    if (run == 3) return vreinterpretq_u16_u8(vqtbl3q_u8((uint8x16x3_t){{b[0], b[1], b[2]}}, index));
    uint8x16_t found = vqtbl4q_u8((uint8x16x4_t){{b[0], b[1], b[2], b[3]}}, index); /* 0 for an index beyond, kept by tbx */
    if (run == 5) return vreinterpretq_u16_u8(vqtbx1q_u8(found, b[4], rest));
    return vreinterpretq_u16_u8(vqtbx3q_u8(found, (uint8x16x3_t){{b[4], b[5], b[6]}}, rest));
}

/* v [count], runs of `run` registers: of each run the even halfwords, then the odd. */
INLINE void unzip(halves *v, int count, int run) {
    halves old[16];
    UNROLL(16) for (int i = 0; i < count; i++) old[i] = v[i];
    UNROLL(8) for (int i = 0; i < count; i += 2) {
        int to = i / run * run + i % run / 2;
        v[to] = vuzp1q_u16(old[i], old[i + 1]);
        v[to + run / 2] = vuzp2q_u16(old[i], old[i + 1]);
    }
}

INLINE void halves_of_tiles(halves *h, int rate2, const uint8_t *tile) {
    halves v[16];
    int run = rate2;
    UNROLL(16) for (int i = 0; i < rate2; i++) v[i] = vreinterpretq_u16_u8(vld1q_u8(tile + 16 * i));
    if (run % 2 == 0) unzip(v, rate2, run), run /= 2;
    if (run % 2 == 0) unzip(v, rate2, run), run /= 2;
    if (run % 2 == 0) unzip(v, rate2, run), run /= 2;
    if (run % 2 == 0) unzip(v, rate2, run), run /= 2;
    UNROLL(16) for (int i = 0; i < rate2; i++) {
        int at = rate2 % 2 ? i : i ^ 1, runs = rate2 / run, from = 0; /* a run has equal at % runs, whose bits came lowest first */
        if (runs > 1) from += run * runs / 2 * (at & 1);
        if (runs > 2) from += run * runs / 4 * (at >> 1 & 1);
        if (runs > 4) from += run * runs / 8 * (at >> 2 & 1);
        if (runs > 8) from += run * (at >> 3 & 1);
        h[1 + i] = pick(v + from, run, at / runs, rate2 % 2);
    }
    h[0] = vextq_u16(h[rate2], h[rate2], 7); /* the lane before; a tile is circular */
}
