/* values_of_products (panel.h) in floats, for levels without arithmetic on binary16. The two binary16 numbers of 3inst and mcg have
 * exponents 12 .. 15: a shift turns them into the halves of a float, and floats into sums; two fused multiply-adds round those to
 * binary16. A level defines before, besides panel.h's names:
 *   interleave(out, low, high)     out [2] = words low + 65536 * high: the first 4 and the last 4 of every 8 halfwords */

/* The rounding is four of 27 instructions for 16 weights: levels that round mul1's inputs leave it out of products. */
#define UNROUNDED_PAIRS

/* Where interleave puts what (panel.h). */
#define LANE_TILE(vector, lane) ((lane) / 8)
#define LANE_COLUMN(vector, lane) (8 * ((vector) / 2) + 2 * ((vector) & 1) + 4 * ((lane) / 4 & 1) + ((lane) / 2 & 1))

/* To binary16 and back, for what the codebooks' sums can be: 8193 v keeps 11 bits more than 8192 v has, and ties go to even as they
 * should. That no other float ever comes is what makes it right; tests/levels.c goes through every state. */
INLINE floats round_to_half(floats v) { return (v * 8192.0f + v) - v * 8192.0f; }

/* out [2]: a binary16 number with an exponent of 12 .. 15, which only its sign and lowest 12 bits tell from others, after an
 * exclusive or with `flip`; as a float, lanes as interleave says. */
INLINE void floats_of_halves(floats *out, halves x, uint16_t flip) {
    const uint16_t kept = (MM_PAIR_AND & 0x8000u) | (MM_PAIR_AND & 0x0FFFu) >> 3;
    const uint16_t bits = (uint16_t)((flip & 0x8000u) | (((flip & 0x7FFFu) >> 3) + ((127 - 15) << 7)));
    _Static_assert((MM_PAIR_XOR & 7u) == 0 && (MM_PAIR_AND & 0xFFFFu) == 0x8FFFu, "the lowest bits pass unchanged");
    interleave(out, x << 13, ((halves)((shorts)x >> 3) & kept) ^ bits);
}

/* The two vectors in step, which keeps the units a little busier. */
INLINE void values_of_products(floats (*out)[2], halves *low, halves *high, uint32_t addend, int codebook, bool rounded) {
    const halves zero = {0};
    for (int i = 0; i < 2; i++) {
        floats a[2], b[2];
        if (codebook == MM_CODEBOOK_MUL1) {
            halves sum = sums_of_bytes(low[i], high[i]); /* at most 1020: it becomes the float 1024 + sum */
            interleave(a, sum << 13, (sum >> 3) + (uint16_t)0x4480);
            for (int e = 0; e < 2; e++) out[i][e] = a[e] * MM_MUL1_SCALE + MM_MUL1_BIAS;
            continue;
        }
        uint16_t flip = (uint16_t)MM_PAIR_XOR;
        if (addend) { /* its carry asks for an unsigned comparison: a signed one of flipped top bits */
            const shorts first = (shorts)zero + (int16_t)((int)(addend & 0xFFFFu) - 0x8000);
            low[i] += (halves)first;
            high[i] += (uint16_t)(addend >> 16);
            high[i] -= (halves)((shorts)low[i] < first);
            flip ^= 0x8000u;
        }
        floats_of_halves(a, low[i], flip);
        floats_of_halves(b, high[i], (uint16_t)(MM_PAIR_XOR >> 16));
        for (int e = 0; e < 2; e++) out[i][e] = a[e] + b[e]; /* exact: 15 bits */
    }
    for (int i = 0; i < 2 && rounded; i++)
        for (int e = 0; e < 2; e++) out[i][e] = round_to_half(out[i][e]);
}
