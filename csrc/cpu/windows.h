/* How to cut the 16-bit windows of 8 trellis positions out of a tile with one byte shuffle and one shift: a byte shuffle
 * brings each position's 3 stream bytes into its 32-bit lane, a per-lane shift leaves the window. That works for every
 * rate, half rates included, so rates differ by tables only. Made for NEON: its tbl writes 0 for an index beyond the table, its
 * shift by lane goes right by a negative number. Included once, by neon.c, after vector.h. */
#include <assert.h>
#include <stdalign.h>

#include "cpu/cpu.h"

/* One rate. The 16 loaded bytes start at offset[group], or for the first groups at byte -4 of the circular stream. */
struct window_plan {
    alignas(32) uint8_t shuffle[32][32]; /* [group]: indices into the 16 bytes */
    alignas(32) int32_t shift[2][8];     /* [group parity] */
    uint8_t offset[32];
    int wrapped_groups; /* leading groups whose windows reach back over the tile's start: 1, or 2 at low rates */
};

static struct window_plan plans[MM_MAX_RATE2 + 1];

static void plan_rate(struct window_plan *plan, int rate2) {
    int bytes = MM_TILE_BYTES(rate2);
    plan->wrapped_groups = 0;
    for (int group = 0; group < 32; group++) {
        int first_start = ((8 * group + 1) * rate2 >> 1) - MM_WINDOW_BITS;
        bool wrapped = first_start < 0;
        int base = wrapped ? -4 : (first_start / 8) & ~3;
        if (base > bytes - 16) base = bytes - 16; /* never read past the tile */
        plan->wrapped_groups += wrapped;
        plan->offset[group] = (uint8_t)(wrapped ? 0 : base);
        for (int lane = 0; lane < 8; lane++) {
            int position = 8 * group + lane;
            int start = ((position + 1) * rate2 >> 1) - MM_WINDOW_BITS;
            int byte = (start + 64) / 8 - 8, bit = (start + 64) % 8; /* rounds down, start >= -15 */
            plan->shift[group & 1][lane] = bit - 8;
            for (int i = 0; i < 4; i++) {
                /* Little-endian lane: byte 2 is the window's first, byte 0 its third, needed unless aligned. */
                bool used = i < 3 && !(i == 0 && bit == 0);
                int source = ((byte + 2 - i + 4) ^ 3) - 4 - base; /* + 4 - 4 keeps the xor on whole words */
                assert(!used || (source >= 0 && source < 16));
                plan->shuffle[group][lane * 4 + i] = (uint8_t)(used ? source : 0x80);
            }
        }
    }
}

static void prepare(void) {
    for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++) plan_rate(&plans[rate2], rate2);
}
