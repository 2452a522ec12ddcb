/* halves_of_tiles for AVX-512 (see int16.h): two tiles that lie side by side, 32 groups of 16 positions, a lane a group. A register
 * loads as many whole groups as it can; one byte permute (VBMI) brings a halfword of all of them into their lanes, and a mask keeps
 * those of the loads before. A memory dword is the stream's 4 bytes in reverse. */

#define PER_LOAD(rate2) ((rate2) % 2 ? 64 / (rate2) / 4 * 4 : 64 / (rate2)) /* groups; loads begin with a dword */
#define LOADS(rate2) ((32 + PER_LOAD(rate2) - 1) / PER_LOAD(rate2))

/* index[i]: for each lane's two bytes where they lie in that lane's load; i = 0 for a group's last 16 bits, i for H_i */
struct wide_plan {
    alignas(64) uint8_t index[9][64];
};
static struct wide_plan wide_plans[MM_MAX_RATE2 + 1];

INLINE int load_start(int rate2, int load) { /* the last one must not read past the tiles */
    int start = load * PER_LOAD(rate2) * rate2, last = 2 * MM_TILE_BYTES(rate2) - 64;
    return start < last ? start : last;
}

static void prepare(void) {
    for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++)
        for (int i = 0; i <= (rate2 + 1) / 2; i++)
            for (int lane = 0; lane < 32; lane++)
                for (int upper = 0; upper < 2; upper++) {
                    int byte = lane * rate2 + (i ? 2 * i : rate2) - 1 - upper; /* a halfword's first is its upper one */
                    int at = (byte ^ 3) - load_start(rate2, lane / PER_LOAD(rate2));
                    wide_plans[rate2].index[i][2 * lane + upper] = (uint8_t)at;
                }
}

INLINE halves gather_half(const __m512i *loads, int rate2, int i) {
    __m512i index = _mm512_load_si512((const void *)wide_plans[rate2].index[i]);
    __m512i half = _mm512_permutexvar_epi8(index, loads[0]);
    for (int load = 1; load < LOADS(rate2); load++)
        half = _mm512_mask_permutexvar_epi8(half, ~UINT64_C(0) << 2 * PER_LOAD(rate2) * load, index, loads[load]);
    return (halves)half;
}

INLINE void halves_of_tiles(halves *h, int rate2, const uint8_t *tile) {
    static const alignas(64) uint16_t before[32] = { /* the lane before in its tile, which is circular */
        15, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 31, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30};
    __m512i loads[8];
    for (int load = 0; load < LOADS(rate2); load++)
        loads[load] = _mm512_loadu_si512((const void *)(tile + load_start(rate2, load)));
    for (int i = 1; i <= (rate2 + 1) / 2; i++) h[i] = gather_half(loads, rate2, i);
    halves last = rate2 % 2 ? gather_half(loads, rate2, 0) : h[rate2 / 2];
    h[0] = (halves)_mm512_permutexvar_epi16(_mm512_load_si512((const void *)before), (__m512i)last);
}
