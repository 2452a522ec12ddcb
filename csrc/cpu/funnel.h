/* A window of the stream, two neighbouring halfwords shifted by a constant, and which one a position has. A level defines before: halves, a vector of halfwords, and
 * FUNNEL(before, after, shift), the upper halves of (before, after) << shift; shift is a literal from 1 to 15. */
#ifndef MM_CPU_FUNNEL_H
#define MM_CPU_FUNNEL_H

INLINE halves funnel(halves before, halves after, int shift) {
    switch (shift) {
#define CASE(literal) \
    case literal: return FUNNEL(before, after, literal);
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15)
#undef CASE
    default: return after; /* 16 */
    }
}

/* The state of a lane's position from its halfwords h (int16.h); position and rate2 are constants when inlined. */
INLINE halves window(const halves *h, int position, int rate2) {
    int end = (position + 1) * rate2 >> 1, i = (end + 15) / 16;
    return funnel(h[i - 1], h[i], end - 16 * (i - 1));
}

#endif
