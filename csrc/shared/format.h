/* The EXL3 weight format, said once: sizes, rates, codebooks. docs/format.md explains it in prose.
 * Compiles as C11 and as Metal Shading Language: integers and macros only, no library call.
 * Leaves binary16 arithmetic to the side that includes it (cpu/half.h, metal/). */
#ifndef MM_SHARED_FORMAT_H
#define MM_SHARED_FORMAT_H

#ifndef __METAL_VERSION__
#include <stdint.h>
#endif

#define MM_TILE 16           /* a tile is 16 input rows x 16 output columns */
#define MM_TILE_WEIGHTS 256  /* trellis positions in a tile */
#define MM_HADAMARD 128      /* block of the incoherence transform; both dims are padded to it */
#define MM_WINDOW_BITS 16    /* a state is a 16-bit window of the tile's circular bit stream */
#define MM_MAX_EXPERTS 512
#define MM_MAX_TOP_K 32
#define MM_NO_EXPERT (-1) /* the id of a slot that chooses nobody, or an expert that another process holds */

/* 1/sqrt(128) as exllamav3's kernels spell it. */
#define MM_HADAMARD_SCALE 0.088388347648f

/* A rate is counted in half bits per weight ("rate2"), so that half rates stay integers. It is also the bytes
 * that 16 positions own. Position t ends at stream bit ((t + 1) * rate2) >> 1, which for odd rate2 gives even
 * positions (rate2 >> 1) new bits and odd positions one more: exllamav3's alternation. */
#define MM_MIN_RATE2 2
#define MM_MAX_RATE2 16
#define MM_MAX_HALF_RATE2 7 /* 1.5, 2.5 and 3.5 bits exist; 4.5 and up do not */

#define MM_MUL1_MULTIPLIER 0x83DCD12Du

/* X(id, name, multiplier, addend, allows half rates). The id is the number in a stack's table. */
#define MM_PAIR_CODEBOOKS(X)                               \
    X(MM_CODEBOOK_3INST, "3inst", 89226354u, 64248484u, 0) \
    X(MM_CODEBOOK_MCG, "mcg", 0xCBAC1FEDu, 0u, 0)
#define MM_CODEBOOKS(X)  \
    MM_PAIR_CODEBOOKS(X) \
    X(MM_CODEBOOK_MUL1, "mul1", MM_MUL1_MULTIPLIER, 0u, 1)

enum mm_codebook {
#define X(id, name, multiplier, addend, half_rates) id,
    MM_CODEBOOKS(X)
#undef X
    MM_CODEBOOK_COUNT
};

/* The rates of a codebook with half rates, for code that is written out for each. */
#define MM_ALL_RATES2(X) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(10) X(12) X(14) X(16)

/* 3inst and mcg: the masked word's two halves are binary16 numbers; the weight is their sum, rounded to binary16. */
#define MM_PAIR_AND 0x8FFF8FFFu
#define MM_PAIR_XOR 0x3B603B60u

/* mul1: S = the sum of the product's bytes; the weight is fma(1024 + S, scale, bias), rounded to binary16 once.
 * scale and bias are binary16 numbers (bits 0x1EEE and 0xC931), written out exactly. */
#define MM_MUL1_SCALE 0.00676727294921875f
#define MM_MUL1_BIAS (-10.3828125f)

/* Bytes of one packed tile, and int16 elements of it. */
#define MM_TILE_BYTES(rate2) (MM_TILE_WEIGHTS * (rate2) / 16)
#define MM_TILE_INT16(rate2) (MM_TILE_BYTES(rate2) / 2)

/* Tiles begin at multiples of so many int16: the smallest tile, of 1 bit, has 16. */
#define MM_TILE_ALIGNMENT 16

/* Row and column, inside a tile, of trellis position t (tensor-core fragment order). */
#define MM_TILE_ROW(t) (2 * (((t) >> 3) & 3) + ((t) & 1) + 8 * (((t) >> 1) & 1))
#define MM_TILE_COLUMN(t) (((t) >> 5) + 8 * (((t) >> 2) & 1))

#define MM_PAD(n) (((n) + MM_HADAMARD - 1) / MM_HADAMARD * MM_HADAMARD)

#endif
