/* Checks the CPU backend's SIMD levels without Python and torch, so that it runs wherever a C compiler or an emulator
 * does: every level that the machine has against the scalar one, and all of them against float64.
 *   cc -std=c11 -O2 -Icsrc tests/levels.c csrc/cpu/[a-z]*.c -lm -o levels && ./levels
 * Decoding and conversions are compared bit for bit, with flush-to-zero off and on. Sums are compared under bounds: u is
 * float's unit roundoff, and a sum in which each term passes through m roundings is within m u sum |terms|, to first
 * order in u; 1 % on top covers the rest. Prints what it did, and a hash of each codebook's 65,536 values for
 * test_levels.py to compare with the oracle's. Exit status 1 if anything differed. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* MAP_ANON under -std=c11 */
#endif
#include <float.h>
#include <math.h>
#include <stdalign.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cpu/cpu.h"
#include "cpu/half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define U (1.01 * 0x1p-24)
#define BLOCK MM_HADAMARD

static const struct mm_kernels *levels[MM_MAX_CPU_LEVELS];
static int level_count;
static long checks, failures;

/* Levels of one file share functions; what is checked for one need not be for another. */
#define FIRST_WITH(function)                                            \
    static bool first_with_##function(int l) {                          \
        for (int before = 0; before < l; before++)                      \
            if (levels[before]->function == levels[l]->function) return false; \
        return true;                                                    \
    }
FIRST_WITH(load)
FIRST_WITH(store)
FIRST_WITH(dequantize)
FIRST_WITH(multiply_transposed)

static const char *const codebook_names[] = {
#define X(id, name, multiplier, addend, half_rates) name,
    MM_CODEBOOKS(X)
#undef X
};
static const bool has_half_rates[] = {
#define X(id, name, multiplier, addend, half_rates) half_rates,
    MM_CODEBOOKS(X)
#undef X
};

static bool rate_exists(int codebook, int rate2) {
    return rate2 % 2 == 0 || (has_half_rates[codebook] && rate2 <= MM_MAX_HALF_RATE2);
}

__attribute__((format(printf, 2, 3))) static void check(bool good, const char *format, ...) {
    checks++;
    if (good || ++failures > 20) return; /* one cause fails many times */
    va_list arguments;
    va_start(arguments, format);
    printf("FAILED: ");
    vprintf(format, arguments);
    printf("\n");
    va_end(arguments);
}

/* ---- numbers, memory, modes ---- */

static uint32_t random_bits(void) { /* xorshift64*, one fixed seed: every machine checks the same numbers */
    static uint64_t state = 88172645463325252u;
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)(state * 2685821657736338717u >> 32);
}

static float random_float(float scale) { return ((float)(random_bits() >> 8) * 0x1p-23f - 1.0f) * scale; }

/* Ends where an unmapped page begins: reading past it ends the program. Never freed. */
static void *guarded(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
    char *memory = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + whole, page, PROT_NONE)) {
        perror("mmap");
        exit(2);
    }
    return memory + whole - bytes;
}

static void *zeros(size_t bytes) {
    void *memory = mm_alloc(bytes);
    if (!memory) exit(2);
    return memset(memory, 0, bytes);
}

static float *random_floats(int64_t count, float scale) {
    float *values = zeros((size_t)count * sizeof *values);
    for (int64_t i = 0; i < count; i++) values[i] = random_float(scale);
    return values;
}

static float *random_fixed(int32_t *fixed, int64_t count) { /* multiples of 2^-20 below 2 in size, and the same as integers */
    float *values = zeros((size_t)count * sizeof *values);
    for (int64_t i = 0; i < count; i++) {
        fixed[i] = (int32_t)(random_bits() >> 10) - (1 << 21);
        values[i] = (float)fixed[i] * 0x1p-20f;
    }
    return values;
}

static uint16_t *random_halves(int64_t count) {
    uint16_t *values = zeros((size_t)count * sizeof *values);
    for (int64_t i = 0; i < count; i++) values[i] = mm_half_of_float(random_float(2));
    return values;
}

/* The floating-point modes that a process may have set: torch.set_flush_denormal sets the first of each. */
struct mode {
    const char *name;
    uint64_t bits;
    bool flushes_float;
};
#if defined(__x86_64__)
#define MODE_BITS 0x8040u
static const struct mode modes[] = {{"FTZ, DAZ", MODE_BITS, true}, {"default mode", 0, false}};
static void set_mode(const struct mode *mode) { _mm_setcsr((_mm_getcsr() & ~MODE_BITS) | (unsigned)mode->bits); }
#elif defined(__aarch64__)
#define FZ (UINT64_C(1) << 24)
#define FZ16 (UINT64_C(1) << 19) /* reads as zero before Armv8.2's half precision */
static const struct mode modes[] = {
    {"FZ", FZ, true}, {"FZ16", FZ16, false}, {"FZ, FZ16", FZ | FZ16, true}, {"default mode", 0, false}};
static void set_mode(const struct mode *mode) {
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr)::"memory");
    fpcr = (fpcr & ~(FZ | FZ16)) | mode->bits;
    __asm__ volatile("msr fpcr, %0" ::"r"(fpcr) : "memory");
}
#else
static const struct mode modes[] = {{"default mode", 0, false}};
static void set_mode(const struct mode *mode) { (void)mode; }
#endif
#define MODES ((int)(sizeof modes / sizeof *modes)) /* the default comes last, and stays */

static void check_mode(const struct mode *mode) {
    volatile float small = FLT_MIN;
    check((small * 0.5f == 0) == mode->flushes_float, "%s did not take effect", mode->name);
}

/* ---- decoding, bit for bit ---- */

static uint32_t stream_bit(const uint8_t *tile, int p) { /* bit 31 - p % 32 of little-endian word p / 32 */
    return (uint32_t)tile[(p / 8) ^ 3] >> (7 - p % 8) & 1u;
}

static void set_stream_bit(uint8_t *tile, int p, uint32_t bit) {
    uint32_t *byte = &(uint32_t){tile[(p / 8) ^ 3]};
    *byte = (*byte & ~(1u << (7 - p % 8))) | bit << (7 - p % 8);
    tile[(p / 8) ^ 3] = (uint8_t)*byte;
}

static uint32_t state_at(const uint8_t *tile, int rate2, int t) {
    int bits = MM_TILE_BYTES(rate2) * 8, end = (t + 1) * rate2 >> 1;
    uint32_t state = 0;
    for (int p = end - MM_WINDOW_BITS; p < end; p++) state = state << 1 | stream_bit(tile, (p + bits) % bits);
    return state;
}

/* Tiles in which every state occurs: windows that do not overlap are given the next states in turn, starting at another
 * position in every tile; a whole number of blocks. */
static struct mm_weight all_states(int rate2) {
    int step = (2 * MM_WINDOW_BITS + rate2 - 1) / rate2, per_tile = MM_TILE_WEIGHTS / step;
    int64_t tiles = ((1 << MM_WINDOW_BITS) + per_tile - 1) / per_tile, tile_bytes = MM_TILE_BYTES(rate2);
    tiles = (tiles + 63) / 64 * 64;
    uint8_t *data = guarded((size_t)(tiles * tile_bytes));
    for (int64_t i = 0; i < tiles * tile_bytes; i++) data[i] = (uint8_t)random_bits();
    uint32_t state = 0;
    for (int64_t tile = 0; tile < tiles; tile++)
        for (int i = 0; i < per_tile; i++, state++) {
            int t = (int)((tile * 7 + i * step) % MM_TILE_WEIGHTS), bits = (int)tile_bytes * 8;
            int start = ((t + 1) * rate2 >> 1) - MM_WINDOW_BITS + bits;
            for (int b = 0; b < MM_WINDOW_BITS; b++)
                set_stream_bit(data + tile * tile_bytes, (start + b) % bits, state >> (15 - b) & 1u);
        }
    return (struct mm_weight){.tiles = data, .k = tiles / 64 * BLOCK, .n = BLOCK, .rate2 = rate2};
}

/* Every weight of `weight` in [tile, position] order, as one level decodes it. */
static void decode(float *out, const struct mm_kernels *level, const struct mm_weight *weight) {
    static alignas(64) float block[BLOCK * BLOCK]; /* as mm_alloc gives it to the drivers */
    for (int64_t k = 0; k < weight->k / BLOCK; k++) {
        level->dequantize(block, weight, k, 0, true);
        for (int tile = 0; tile < 64; tile++)
            for (int t = 0; t < MM_TILE_WEIGHTS; t++)
                *out++ = block[(tile / 8 * 16 + MM_TILE_ROW(t)) * BLOCK + tile % 8 * 16 + MM_TILE_COLUMN(t)];
    }
}

static void check_decode_rate(int rate2, float values[MM_CODEBOOK_COUNT][1 << MM_WINDOW_BITS]) {
    struct mm_weight weight = all_states(rate2);
    int64_t count = weight.k * weight.n, visited = 0;
    uint32_t *states = zeros((size_t)count * sizeof *states);
    float *want = zeros((size_t)count * sizeof *want), *got = zeros((size_t)count * sizeof *got);
    bool *seen = zeros(1 << MM_WINDOW_BITS);
    for (int64_t i = 0; i < count; i++) {
        states[i] = state_at(weight.tiles + i / 256 * MM_TILE_BYTES(rate2), rate2, (int)(i % 256));
        visited += !seen[states[i]];
        seen[states[i]] = true;
    }
    check(visited == 1 << MM_WINDOW_BITS, "rate2 %d: the tiles hold %lld states", rate2, (long long)visited);
    for (weight.codebook = 0; weight.codebook < MM_CODEBOOK_COUNT; weight.codebook++) {
        if (!rate_exists(weight.codebook, rate2)) continue;
        for (int m = 0; m < MODES; m++) {
            set_mode(&modes[m]);
            for (int l = 0; l < level_count; l++) {
                if (!first_with_dequantize(l)) continue;
                decode(l ? got : want, levels[l], &weight);
                const char *names[] = {levels[l]->name, modes[m].name, codebook_names[weight.codebook]};
                float *value = values[weight.codebook], *out = l ? got : want;
                int64_t i = 0;
                if (m == 0 && l == 0) /* whatever rate and position a state has, its value is the same */
                    for (int64_t j = 0; j < count; j++)
                        if (isnan(value[states[j]])) value[states[j]] = out[j];
                while (i < count && mm_bits_of_float(out[i]) == mm_bits_of_float(value[states[i]])) i++;
                check(i == count, "%s, %s: %s, rate2 %d, tile %lld, position %lld: %a, expected %a", names[0], names[1],
                      names[2], rate2, (long long)(i / 256), (long long)(i % 256), (double)out[i % count],
                      (double)value[states[i % count]]);
            }
        }
    }
    mm_free(states), mm_free(want), mm_free(got), mm_free(seen);
}

static void check_decode(void) {
    static float values[MM_CODEBOOK_COUNT][1 << MM_WINDOW_BITS];
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++)
        for (int state = 0; state < 1 << MM_WINDOW_BITS; state++) values[codebook][state] = NAN;
    for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++)
        if (rate_exists(MM_CODEBOOK_MUL1, rate2)) check_decode_rate(rate2, values);
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++) {
        uint32_t hash = 2166136261u; /* FNV-1a over the values' binary16 bytes, in the order of the states */
        for (int state = 0; state < 1 << MM_WINDOW_BITS; state++) {
            uint16_t half = mm_half_of_float(values[codebook][state]);
            check(mm_float_of_half(half) == values[codebook][state], "%s: state %d is no binary16 number",
                  codebook_names[codebook], state);
            hash = (hash ^ (half & 255u)) * 16777619u;
            hash = (hash ^ half >> 8) * 16777619u;
        }
        printf("codebook %s %08x\n", codebook_names[codebook], hash);
    }
}

/* ---- conversions, bit for bit with cpu/half.h ---- */

static void check_load(const struct mm_kernels *level, const char *mode) {
    enum { COUNT = 1 << 16 };
    static uint16_t strided[3 * COUNT];
    uint16_t *in = guarded(COUNT * sizeof *in);
    static float out[COUNT];
    for (int i = 0; i < COUNT; i++) in[i] = strided[3 * i] = (uint16_t)i;
    for (int type = MM_FLOAT16; type <= MM_BFLOAT16; type++)
        for (int stride = 1; stride <= 3; stride += 2) {
            level->load(out, stride == 1 ? in : strided, (enum mm_float)type, stride, COUNT);
            for (int i = 0; i < COUNT; i++) {
                uint16_t half = (uint16_t)i;
                float want = type == MM_FLOAT16 ? mm_float_of_half(half) : mm_float_of_bfloat16(half);
                check(mm_bits_of_float(out[i]) == mm_bits_of_float(want), "%s, %s: load of 0x%04x, type %d: 0x%08x",
                      level->name, mode, half, type, mm_bits_of_float(out[i]));
            }
        }
    for (int count = 0; count < 20; count++) { /* rows that no vector divides, up to the last byte of the mapping */
        out[count] = 1234;
        level->load(out, in + COUNT - count, MM_FLOAT16, 1, count);
        check(out[count] == 1234, "%s: load of %d wrote beyond its end", level->name, count);
        for (int i = 0; i < count; i++)
            check(mm_bits_of_float(out[i]) == mm_bits_of_float(mm_float_of_half(in[COUNT - count + i])),
                  "%s: load of %d, element %d", level->name, count, i);
    }
}

/* Each binary16 number, its neighbours in float, the middle between it and the next, and that one's neighbours; around
 * every power of two of float; random floats. */
static int64_t store_inputs(float **inputs) {
    int64_t count = 0, size = 6 * 65536 + 3 * 65536 + (1 << 20);
    float *in = zeros((size_t)size * sizeof *in);
    for (uint32_t half = 0; half < 65536; half++) {
        uint32_t bits = mm_bits_of_float(mm_float_of_half((uint16_t)half));
        uint32_t middle = ((half & 0x7FFFu) < 0x400u ? mm_bits_of_float(mm_float_of_half((uint16_t)half) + /* even below */
                                                                        (half & 0x8000u ? -0x1p-25f : 0x1p-25f))
                                                     : bits + 0x1000u);
        for (int step = -1; step <= 1; step++) {
            in[count++] = mm_float_of_bits(bits + (uint32_t)step);
            in[count++] = mm_float_of_bits(middle + (uint32_t)step);
        }
    }
    for (uint32_t high = 0; high < 65536; high++) /* every sign, exponent and 7 bits; float subnormals and NaNs too */
        for (int step = -1; step <= 1; step++) in[count++] = mm_float_of_bits((high << 16) + (uint32_t)step);
    while (count < size) in[count++] = mm_float_of_bits(random_bits());
    *inputs = in;
    return count;
}

static void check_store(const struct mm_kernels *level, const char *mode, const float *in, int64_t count) {
    uint16_t *out = zeros((size_t)count * sizeof *out);
    for (int type = MM_FLOAT16; type <= MM_BFLOAT16; type++) {
        level->store(out, in, (enum mm_float)type, count);
        for (int64_t i = 0; i < count; i++) {
            uint16_t want = type == MM_FLOAT16 ? mm_half_of_float(in[i]) : mm_bfloat16_of_float(in[i]);
            check(out[i] == want, "%s, %s: store of 0x%08x, type %d: 0x%04x, expected 0x%04x", level->name, mode,
                  mm_bits_of_float(in[i]), type, out[i], want);
        }
    }
    mm_free(out);
    for (int tail = 0; tail < 20; tail++) {
        uint16_t *row = (uint16_t *)guarded(64) + 32 - tail;
        level->store(row, in, MM_FLOAT16, tail);
        for (int i = 0; i < tail; i++)
            check(row[i] == mm_half_of_float(in[i]), "%s: store of %d, element %d", level->name, tail, i);
    }
}

static void check_conversions(void) {
    float *in;
    int64_t count = store_inputs(&in);
    for (int m = 0; m < MODES; m++) {
        set_mode(&modes[m]);
        for (int l = 0; l < level_count; l++)
            if (first_with_load(l)) check_load(levels[l], modes[m].name);
        for (int l = 0; l < level_count; l++)
            if (first_with_store(l)) check_store(levels[l], modes[m].name, in, count);
    }
    mm_free(in);
}

/* ---- sums, against float64 ---- */

static void check_close(const char *level, const char *what, int64_t index, double got, double want, double bound) {
    check(fabs(got - want) <= bound, "%s: %s, element %lld: %.9g, expected %.9g +- %.3g", level, what, (long long)index,
          got, want, bound);
}

static bool odd_bits(int bits) { /* of at most 8: whether an odd number of them is set */
    bits ^= bits >> 4, bits ^= bits >> 2, bits ^= bits >> 1;
    return bits & 1;
}

/* sum[i] = H in over sqrt(128), absolute[i] = the same with every term's absolute value: what bounds are made of */
static void hadamard(double *sum, double *absolute, const double *in) {
    double total = 0;
    for (int j = 0; j < BLOCK; j++) total += fabs(in[j]);
    for (int i = 0; i < BLOCK; i++) {
        sum[i] = 0;
        for (int j = 0; j < BLOCK; j++) {
            sum[i] += odd_bits(i & j) ? -in[j] : in[j];
        }
        sum[i] *= (double)MM_HADAMARD_SCALE;
        absolute[i] = total * (double)MM_HADAMARD_SCALE;
    }
}
#define HADAMARD_ROUNDINGS 8 /* the scale, 7 butterflies (kernels.h, hadamard128) */

/* How a level lays out rotated rows and spread gradients (cpu.h): tiled, paired in vectors of 8 lanes, of 16 for two tiles, or
 * of 16 that were converted together, or stepped. */
enum form { TILED, PAIRED, PAIRED_TWO, PAIRED_CONVERTED, STEPPED, FORMS };

static enum form form_of(const struct mm_kernels *level) {
    if (!level->input_limits[MM_CODEBOOK_3INST] && level->row_floats(MM_CODEBOOK_3INST) != BLOCK) return TILED;
    if (!strncmp(level->name, "neon", 4)) return STEPPED;
    if (!strncmp(level->name, "avx512-fp16", 11) || !strncmp(level->name, "amx", 3)) return PAIRED_CONVERTED;
    return strncmp(level->name, "avx512", 6) ? PAIRED : PAIRED_TWO;
}

static int row_places(enum form form) { return form == TILED ? 2 * 16 : 16; }    /* of a tile */
static int spread_places(enum form form) { return form == TILED ? 4 * 16 : form == STEPPED ? 16 : 2 * 16; }

/* Which row stands at a place of a rotated row. */
static int row_of_place(enum form form, int place) {
    int tile = place / row_places(form), at = place % row_places(form), pair = at / 2;
    if (form == STEPPED) return 16 * tile + MM_TILE_ROW(at / 4 * 8 + at % 4);
    return 16 * tile + (form == TILED ? MM_TILE_ROW(at) : 2 * (pair / 4) + (pair & 1) + 8 * (pair / 2 & 1) + 4 * (at & 1));
}

/* Which column stands at a place of a spread gradient. */
static int column_of_place(enum form form, int place) {
    int lanes = form <= PAIRED ? 8 : 16, vector = place / lanes % 4, lane = place % lanes;
    switch (form) {
    case TILED:
        return 16 * (place / 64) + MM_TILE_COLUMN(place % 64 / 8 * 32 + place % 8);
    case STEPPED:
        return place;
    case PAIRED_CONVERTED:
        return 32 * (place / 64) + 16 * (vector & 1) + 8 * (vector / 2) + lane / 2;
    default: /* a vector's halves are one tile each */
        return 2 * lanes * (place / (4 * lanes)) + 16 * (lane / 8) + 8 * (vector / 2) + 2 * (vector & 1) + 4 * (lane / 4 & 1) +
               (lane / 2 & 1);
    }
}

static void check_rotations(void) {
    enum { WIDTH = 3 * BLOCK, USED = WIDTH - 37, ROWS = 3 };
    float *x = random_floats(WIDTH, 5), *y = random_floats(ROWS * BLOCK, 5), *out = zeros(4 * WIDTH * sizeof *out);
    uint16_t *scale = random_halves(WIDTH), *bias = random_halves(BLOCK);
    for (int i = USED; i < WIDTH; i++) x[i] = NAN, scale[i] = 0x7C00; /* padding, whatever it holds */
    for (int l = 0; l < level_count; l++) {
        const struct mm_kernels *level = levels[l];
        for (int spread = 0; spread < 2; spread++) {
            if (!spread && level->input_limits[MM_CODEBOOK_3INST]) continue; /* check_integer_products */
            if (spread)
                level->rotate_grad(out, x, scale, WIDTH, USED);
            else
                level->rotate_in(out, x, scale, WIDTH, USED, MM_CODEBOOK_3INST, 1);
            enum form form = form_of(level);
            int places = spread ? spread_places(form) : row_places(form);
            for (int first = 0; first < WIDTH; first += BLOCK) {
                double in[BLOCK], sum[BLOCK], absolute[BLOCK];
                for (int i = 0; i < BLOCK; i++)
                    in[i] = first + i < USED ? (double)x[first + i] * (double)mm_float_of_half(scale[first + i]) : 0;
                hadamard(sum, absolute, in);
                for (int t = 0; t < BLOCK / 16 * places; t++) {
                    int i = spread ? column_of_place(form, t) : row_of_place(form, t);
                    check_close(level->name, spread ? "rotate_grad" : "rotate_in", first + i,
                                (double)out[first / 16 * places + t], sum[i], (HADAMARD_ROUNDINGS + 1) * U * absolute[i]);
                }
            }
        }
        for (int biased = 0; biased < 2; biased++) {
            memcpy(out, y, ROWS * BLOCK * sizeof *out);
            level->rotate_out(out, ROWS, scale, biased ? bias : NULL);
            for (int r = 0; r < ROWS; r++) {
                double in[BLOCK], sum[BLOCK], absolute[BLOCK];
                for (int i = 0; i < BLOCK; i++) in[i] = (double)y[r * BLOCK + i];
                hadamard(sum, absolute, in);
                for (int i = 0; i < BLOCK; i++) {
                    double s = (double)mm_float_of_half(scale[i]), b = biased ? (double)mm_float_of_half(bias[i]) : 0;
                    check_close(level->name, "rotate_out", r * BLOCK + i, (double)out[r * BLOCK + i], sum[i] * s + b,
                                (HADAMARD_ROUNDINGS + 2) * U * (absolute[i] * fabs(s) + fabs(b)));
                }
            }
        }
    }
    mm_free(x), mm_free(y), mm_free(out), mm_free(scale), mm_free(bias);
}

static struct mm_weight random_weight(int codebook, int rate2, int64_t k, int64_t n) {
    size_t bytes = (size_t)(k * n * rate2 / 16);
    uint8_t *tiles = guarded(bytes);
    for (size_t i = 0; i < bytes; i++) tiles[i] = (uint8_t)random_bits();
    return (struct mm_weight){.tiles = tiles, .k = k, .n = n, .rate2 = rate2, .codebook = codebook,
                              .suh = random_halves(k), .svh = random_halves(n), .bias = random_halves(n)};
}

/* out [k, n]: the codebook's values, as the scalar level decodes them */
static float *dense(const struct mm_weight *weight) {
    static alignas(64) float block[BLOCK * BLOCK];
    float *out = zeros((size_t)(weight->k * weight->n) * sizeof *out);
    for (int64_t k = 0; k < weight->k; k += BLOCK)
        for (int64_t n = 0; n < weight->n; n += BLOCK) {
            levels[0]->dequantize(block, weight, k / BLOCK, n / BLOCK, true);
            for (int64_t i = 0; i < BLOCK; i++)
                memcpy(out + (k + i) * weight->n + n, block + i * BLOCK, BLOCK * sizeof *out);
        }
    return out;
}

static double half_number(uint32_t bits) { return (double)mm_float_of_half((uint16_t)bits); }

/* out [k, n]: 3inst's and mcg's sums before their rounding to binary16 */
static double *unrounded_sums(const struct mm_weight *weight) {
    double *out = zeros((size_t)(weight->k * weight->n) * sizeof *out);
    for (int64_t tile = 0; tile < weight->k / 16 * (weight->n / 16); tile++)
        for (int t = 0; t < MM_TILE_WEIGHTS; t++) {
            uint32_t state = state_at(weight->tiles + tile * MM_TILE_BYTES(weight->rate2), weight->rate2, t);
            uint32_t x = weight->codebook == MM_CODEBOOK_MCG ? state * 0xCBAC1FEDu : state * 89226354u + 64248484u;
            x = (x & 0x8FFF8FFFu) ^ 0x3B603B60u;
            int64_t row = tile / (weight->n / 16) * 16 + MM_TILE_ROW(t), column = tile % (weight->n / 16) * 16 + MM_TILE_COLUMN(t);
            out[row * weight->n + column] = half_number(x & 0xFFFF) + half_number(x >> 16);
        }
    return out;
}

/* Levels that multiply a codebook in integers: inputs rounded, mul1's weights without their rounding to binary16 (int16.h), the others'
 * rounded to multiples of 2^-12 (pairs.h). */
static bool in_integers(const struct mm_kernels *level, int codebook) {
    return level->input_limits[codebook] && level->input_limits[codebook] != MM_FLOAT_INPUTS;
}

/* Of a block's largest input: half a unit, and what the unit's own rounding adds. */
static double half_step(const struct mm_kernels *level, int codebook) { return 0.51 / level->input_limits[codebook]; }

static double as_integers(double value, int codebook) {
    if (codebook != MM_CODEBOOK_MUL1) return nearbyint(value * 4096) / 4096; /* in the middle to even, as the instruction does */
    /* the rounding moved no value by half a step of the byte sum */
    double scale = (double)MM_MUL1_SCALE, bias = (double)MM_MUL1_BIAS;
    return round((value - bias) / scale) * scale + bias;
}

static double largest(const double *values, int count) {
    double most = 0;
    for (int i = 0; i < count; i++) most = fmax(most, fabs(values[i]));
    return most;
}

/* `multiply` of such a level: rows [ROWS] whose rotation is x, to rounding, times block 1. w [k, n]: the weights as above. */
static void check_integer_products(const struct mm_kernels *level, const struct mm_weight *weight, const double *w) {
    enum { ROWS = 9 };
    const int64_t k = weight->k, ld = k / BLOCK * MM_MAX_ROW_FLOATS;
    double *h = zeros((size_t)(ROWS * k) * sizeof *h), *error = zeros((size_t)(ROWS * k / BLOCK) * sizeof *error);
    float *rows = zeros((size_t)(ROWS * ld) * sizeof *rows), *scratch = zeros(MM_MULTIPLY_SCRATCH * sizeof *scratch);
    float *y = zeros(2 * ROWS * BLOCK * sizeof *y), *x = random_floats(ROWS * k, 3);
    uint16_t *ones = zeros((size_t)k * sizeof *ones);
    for (int64_t i = 0; i < k; i++) ones[i] = 0x3C00;
    for (int64_t i = 0; i < BLOCK; i++) x[i] = i == 5 ? 100.0f : 0.0f; /* one spike: all of a rotated block as large */
    for (int64_t r = 0; r < ROWS; r++) {
        for (int64_t b = 0; b < k / BLOCK; b++) {
            double in[BLOCK], absolute[BLOCK];
            for (int i = 0; i < BLOCK; i++) in[i] = (double)x[r * k + b * BLOCK + i];
            hadamard(h + r * k + b * BLOCK, absolute, in);
            error[r * (k / BLOCK) + b] = (HADAMARD_ROUNDINGS + 1) * U * absolute[0] +
                                         half_step(level, weight->codebook) * largest(h + r * k + b * BLOCK, BLOCK);
        }
    }
    static double want[ROWS * BLOCK], bound[ROWS * BLOCK];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < BLOCK; i++) {
            double sum = 0, most = 0;
            for (int64_t j = 0; j < k; j++) {
                double value = w[j * weight->n + BLOCK + i];
                sum += value * h[r * k + j];
                most += fabs(value) * (error[r * (k / BLOCK) + j / BLOCK] + 12 * U * fabs(h[r * k + j]));
            }
            want[r * BLOCK + i] = sum, bound[r * BLOCK + i] = most;
        }
    for (int count = 1; count <= ROWS; count++) {
        float *before = y + (count - 1) % 2 * ROWS * BLOCK, *now = y + count % 2 * ROWS * BLOCK;
        memset(now, 0xFF, ROWS * BLOCK * sizeof *now);
        for (int64_t r = 0; r < count; r++) level->rotate_in(rows + r * ld, x + r * k, ones, k, k, weight->codebook, count);
        level->multiply(now, weight, 1, rows, ld, count, scratch);
        for (int i = 0; i < count * BLOCK; i++) {
            check_close(level->name, "multiply", i, (double)now[i], want[i], bound[i]);
            check(i / BLOCK == count - 1 || mm_bits_of_float(now[i]) == mm_bits_of_float(before[i]),
                  "%s: multiply, element %d of %d rows: %a, of fewer rows %a", level->name, i, count, (double)now[i], (double)before[i]);
        }
    }
    mm_free(h), mm_free(error), mm_free(rows), mm_free(scratch), mm_free(y), mm_free(x), mm_free(ones);
}

/* One rotated input at a time, so that y is a single weight: it must be nearer to the right one than to an integer beside it. */
static void check_integer_states(const struct mm_kernels *level, const struct mm_weight *weight, const double *w) {
    const int64_t k = weight->k, ld = k / BLOCK * MM_MAX_ROW_FLOATS;
    float *rows = zeros((size_t)(MM_ROW_BLOCK * ld) * sizeof *rows), *y = zeros(MM_ROW_BLOCK * BLOCK * sizeof *y);
    float *scratch = zeros(MM_MULTIPLY_SCRATCH * sizeof *scratch), *x = zeros((size_t)k * sizeof *x);
    uint16_t *ones = zeros((size_t)k * sizeof *ones);
    for (int64_t i = 0; i < k; i++) ones[i] = 0x3C00;
    double least_step = weight->codebook == MM_CODEBOOK_MUL1 ? (double)MM_MUL1_SCALE : 0x1p-12;
    for (int64_t first = 0; first < k; first += MM_ROW_BLOCK) {
        for (int64_t r = 0; r < MM_ROW_BLOCK; r++) {
            for (int64_t i = 0; i < k; i++)
                x[i] = i / BLOCK != (first + r) / BLOCK               ? 0.0f
                       : odd_bits((int)i & (int)(first + r) % BLOCK) ? -MM_HADAMARD_SCALE
                                                                     : MM_HADAMARD_SCALE;
            level->rotate_in(rows + r * ld, x, ones, k, k, weight->codebook, MM_ROW_BLOCK);
        }
        for (int64_t block = 0; block < weight->n / BLOCK; block++) {
            level->multiply(y, weight, block, rows, ld, MM_ROW_BLOCK, scratch);
            for (int64_t i = 0; i < MM_ROW_BLOCK * BLOCK; i++) {
                double want = w[(first + i / BLOCK) * weight->n + block * BLOCK + i % BLOCK];
                check_close(level->name, "one weight", i, (double)y[i], want, 0.01 * least_step);
            }
        }
    }
    mm_free(rows), mm_free(y), mm_free(scratch), mm_free(x), mm_free(ones);
}

/* Their integer sums are exact and their few float operations the same, so such levels agree bit for bit. */
static void check_integer_agreement(const struct mm_weight *weight, int input_limit) {
    enum { ROWS = MM_ROW_BLOCK };
    static const int counts[] = {1, 2, 15, 16, 17, 32, 33, ROWS}; /* products of several rows at once, and of the rest */
    static float y[2][ROWS * BLOCK];
    const int64_t k = weight->k, ld = k / BLOCK * MM_MAX_ROW_FLOATS;
    float *rows = zeros((size_t)(ROWS * ld) * sizeof *rows), *scratch = zeros(MM_MULTIPLY_SCRATCH * sizeof *scratch);
    float *x = random_floats(ROWS * k, 3);
    const struct mm_kernels *first = NULL;
    for (int l = 0; l < level_count; l++) {
        if (levels[l]->input_limits[weight->codebook] != input_limit) continue;
        if (!first) first = levels[l];
        for (int c = 0; c < (int)(sizeof counts / sizeof *counts); c++) {
            const struct mm_kernels *pair[] = {first, levels[l]};
            memset(y, 0xFF, sizeof y);
            for (int side = 0; side < 2; side++) {
                for (int64_t r = 0; r < counts[c]; r++)
                    pair[side]->rotate_in(rows + r * ld, x + r * k, weight->suh, k, k, weight->codebook, counts[c]);
                pair[side]->multiply(y[side], weight, 1, rows, ld, counts[c], scratch);
            }
            for (int i = 0; i < ROWS * BLOCK; i++)
                check(mm_bits_of_float(y[0][i]) == mm_bits_of_float(y[1][i]), "%s: multiply, %d rows, element %d: %a, but %a from %s",
                      levels[l]->name, counts[c], i, (double)y[1][i], (double)y[0][i], first->name);
        }
    }
    mm_free(rows), mm_free(scratch), mm_free(x);
}

static void check_products(int codebook, int rate2) {
    enum { K = 384, N = 256, ROWS = MM_ROW_BLOCK };
    const int most = rate2 == 4 ? ROWS : 23; /* what is done with decoded weights does not depend on the rate */
    const int counts[] = {1, 2, 3, 4, 5, 6, 7, most};
    static double want[ROWS * BLOCK], absolute[ROWS * BLOCK];
    struct mm_weight weight = random_weight(codebook, rate2, K, N);
    float *w = dense(&weight), *scratch = zeros(MM_MULTIPLY_SCRATCH * sizeof *scratch);
    int32_t *fixed_w = zeros(K * N * sizeof *fixed_w), *fixed_x = zeros(ROWS * K * sizeof *fixed_x);
    int32_t *fixed_grad = zeros(ROWS * N * sizeof *fixed_grad);
    float *x = random_fixed(fixed_x, ROWS * K), *grad = random_fixed(fixed_grad, ROWS * N), *y = zeros(ROWS * BLOCK * sizeof *y);
    for (int i = 0; i < K * N; i++) fixed_w[i] = (int32_t)(w[i] * 0x1p24f); /* exact: binary16 numbers below 4 */
    float *rows[FORMS], *spread[FORMS];
    for (enum form form = 0; form < FORMS; form++) {
        int length = K / 16 * row_places(form);
        rows[form] = zeros((size_t)(ROWS * length) * sizeof(float)), spread[form] = zeros(4 * ROWS * N * sizeof(float));
        for (int r = 0; r < ROWS; r++) {
            for (int i = 0; i < length; i++) rows[form][r * length + i] = x[r * K + row_of_place(form, i)];
            for (int i = 0; i < N / 16 * spread_places(form); i++)
                spread[form][r * 4 * N + i] = grad[r * N + column_of_place(form, i)];
        }
    }
    double *exact = zeros(K * N * sizeof *exact);
    for (int i = 0; i < K * N; i++) exact[i] = as_integers((double)w[i], codebook);
    for (int l = 0; l < level_count; l++)
        if (in_integers(levels[l], codebook)) {
            check_integer_products(levels[l], &weight, exact);
            check_integer_states(levels[l], &weight, exact);
            check_integer_agreement(&weight, levels[l]->input_limits[codebook]);
        }
    double *sums = codebook == MM_CODEBOOK_MUL1 ? NULL : unrounded_sums(&weight);
    int32_t *fixed_sums = zeros(K * N * sizeof *fixed_sums);
    for (int i = 0; sums && i < K * N; i++) fixed_sums[i] = (int32_t)(sums[i] * 0x1p24); /* exact: multiples of 2^-13 below 4 */
    for (int pass = 0; pass < (sums ? 3 : 2); pass++) { /* forward, transposed, forward without the weights' rounding */
        const bool transposed = pass == 1;
        const int32_t *used = pass == 2 ? fixed_sums : fixed_w;
        int block = transposed ? 2 : 1, terms = transposed ? N : K;
        for (int r = 0; r < most; r++)
            for (int i = 0; i < BLOCK; i++) {
                int64_t sum = 0, total = 0; /* exact: 26 bits, 22 bits, 9 bits' worth of terms */
                for (int j = 0; j < terms; j++) {
                    int64_t term = transposed ? (int64_t)used[(block * BLOCK + i) * N + j] * fixed_grad[r * N + j]
                                              : (int64_t)used[j * N + block * BLOCK + i] * fixed_x[r * K + j];
                    sum += term, total += term < 0 ? -term : term;
                }
                want[r * BLOCK + i] = (double)sum * 0x1p-44, absolute[r * BLOCK + i] = (double)total * 0x1p-44;
            }
        for (int l = 0; l < level_count; l++) {
            /* Of the product, of a sum, of joining the sums that run side by side: tiled, 4 over the inputs, 2 over the outputs;
             * paired, 2 over each block of the inputs, 4 over the outputs; stepped, none and 4. */
            enum form form = form_of(levels[l]);
            int roundings = form == TILED     ? (transposed ? N / 2 + 2 : K / 4 + 3)
                            : form == STEPPED ? (transposed ? N / 4 + 3 : BLOCK + K / BLOCK + 1)
                                              : (transposed ? N / 4 + 3 : BLOCK / 2 + K / BLOCK + 2);
            for (int c = 0; c < (int)(sizeof counts / sizeof *counts); c++) {
                if (transposed ? !first_with_multiply_transposed(l) : levels[l]->input_limits[codebook] != (pass == 2 ? MM_FLOAT_INPUTS : 0)) continue;
                memset(y, 0xFF, ROWS * BLOCK * sizeof *y);
                if (transposed)
                    levels[l]->multiply_transposed(y, &weight, block, spread[form], counts[c], scratch);
                else
                    levels[l]->multiply(y, &weight, block, rows[form], K / 16 * row_places(form), counts[c], scratch);
                for (int i = 0; i < counts[c] * BLOCK; i++)
                    check_close(levels[l]->name, transposed ? "multiply_transposed" : "multiply", i, (double)y[i],
                                want[i], roundings * U * absolute[i]);
            }
        }
    }
    for (enum form form = 0; form < FORMS; form++) mm_free(rows[form]), mm_free(spread[form]);
    mm_free(w), mm_free(scratch), mm_free(x), mm_free(grad), mm_free(y);
    mm_free(exact), mm_free(fixed_w), mm_free(fixed_x), mm_free(fixed_grad), mm_free(sums), mm_free(fixed_sums);
}

/* W of one block = diag(suh) H What H diag(svh); rows are transformed first, as in kernels.h */
static void check_dequantize(int codebook, int rate2) {
    static double half_way[BLOCK][BLOCK], absolute[BLOCK];
    static alignas(64) float out[BLOCK * BLOCK];
    struct mm_weight weight = random_weight(codebook, rate2, BLOCK, BLOCK);
    float *w = dense(&weight);
    double total = 0;
    for (int i = 0; i < BLOCK; i++) {
        double row[BLOCK];
        for (int j = 0; j < BLOCK; j++) row[j] = (double)w[i * BLOCK + j], total += fabs(row[j]);
        hadamard(half_way[i], absolute, row);
    }
    total *= (double)MM_HADAMARD_SCALE * (double)MM_HADAMARD_SCALE;
    for (int l = 0; l < level_count; l++) {
        levels[l]->dequantize(out, &weight, 0, 0, false);
        for (int j = 0; j < BLOCK; j++) {
            double column[BLOCK], want[BLOCK];
            for (int i = 0; i < BLOCK; i++) column[i] = half_way[i][j];
            hadamard(want, absolute, column);
            for (int i = 0; i < BLOCK; i++) {
                double scale = (double)mm_float_of_half(weight.suh[i]) * (double)mm_float_of_half(weight.svh[j]);
                check_close(levels[l]->name, "dequantize", i * BLOCK + j, (double)out[i * BLOCK + j], want[i] * scale,
                            (HADAMARD_ROUNDINGS + 7 + 3) * U * total * fabs(scale)); /* 7 butterflies, 3 products */
            }
        }
    }
    mm_free(w);
}

/* act = g s(z) u', s the logistic function, z and u' with relative errors of z_error and 1 u: s(z) is off by
 * (1 - s) (|z| z_error + 4) u for the exponential's 2 ulp, and 3 more roundings follow. Below 1e-35, exp has over- or
 * underflowed. gelu's erf is the C library's: 1 + erf is off by less than 4 u, however small it is. */
static void check_activations(void) {
    enum { COUNT = 4096 };
    static float g[COUNT], up[COUNT], act[COUNT];
    const float alpha = 1.702f, limit = 7.0f;
    static const float special[] = {0.0f, -0.0f, 1e-30f, -1e-30f, 87.4f, -87.4f, 88.5f, -88.5f, 1e4f, -1e4f, 7.0f, -7.0f};
    for (int i = 0; i < COUNT; i++) {
        g[i] = i < 12 ? special[i] : random_float(i % 2 ? 8 : 100);
        up[i] = random_float(i % 3 ? 9 : 0.01f);
    }
    for (int l = 0; l < level_count; l++)
        for (int kind = 0; kind < MM_ACTIVATION_COUNT; kind++) {
            levels[l]->activate(act, g, up, COUNT, (enum mm_activation)kind, alpha, limit);
            for (int i = 0; i < COUNT; i++) {
                double gi = (double)g[i], ui = (double)up[i], z = gi, z_error = 0;
                if (kind == MM_ACTIVATION_GELU) {
                    double phi = 0.5 * (1 + erf(gi * sqrt(0.5)));
                    check_close(levels[l]->name, "activate, gelu", i, (double)act[i], gi * phi * ui,
                                U * fabs(gi * ui) * (4 + 4 * phi));
                    continue;
                }
                if (kind == MM_ACTIVATION_GELU_TANH) z = 1.5957691216057308 * (gi + 0.044715 * gi * gi * gi), z_error = 8;
                if (kind == MM_ACTIVATION_SWIGLU_OAI) {
                    gi = fmin(gi, (double)limit), ui = fmin(fmax(ui, -(double)limit), (double)limit) + 1;
                    z = (double)alpha * gi, z_error = 1;
                }
                double s = 1 / (1 + exp(-z)), want = gi * s * ui;
                double u_error = kind == MM_ACTIVATION_SWIGLU_OAI; /* u + 1 is rounded once */
                check_close(levels[l]->name, "activate", i, (double)act[i], want,
                            U * fabs(want) * ((1 - s) * (fabs(z) * z_error + 4) + 3 + u_error) + 1e-35 * (1 + fabs(ui)));
            }
            float nan8[8], one8[8], out8[8];
            for (int i = 0; i < 8; i++) nan8[i] = i == 3 ? NAN : 1.0f, one8[i] = 1.0f;
            levels[l]->activate(out8, nan8, one8, 8, (enum mm_activation)kind, alpha, limit);
            for (int i = 0; i < 8; i++)
                check(isnan(out8[i]) == (i == 3), "%s: activation %d, a NaN in element 3, element %d is %g",
                      levels[l]->name, kind, i, (double)out8[i]);
        }
}

static void check_dot(void) {
    enum { MOST = 200 };
    for (int count = 0; count <= MOST; count++) {
        float *a = guarded((size_t)count * sizeof *a), *b = guarded((size_t)count * sizeof *b);
        double want = 0, absolute = 0;
        for (int i = 0; i < count; i++) {
            a[i] = random_float(2), b[i] = random_float(2);
            want += (double)a[i] * (double)b[i], absolute += fabs((double)a[i] * (double)b[i]);
        }
        for (int l = 0; l < level_count; l++) /* count / 32 or 31 additions in a row, 6 to join them, the product */
            check_close(levels[l]->name, "dot", count, (double)levels[l]->dot(a, b, count), want,
                        (count / 32 + 31 + 7) * U * absolute);
    }
}

/* ---- the drivers: rows cut into blocks, padding ---- */

static int serial_count(void) { return 1; }

static void serial_run(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context) {
    (void)grain;
    body(begin, end, context);
}

static void check_linear(int codebook, int rate2) {
    enum { K = 256, N = 256, IN = 200, OUT = 180, ROWS = MM_ROW_BLOCK + 6 };
    struct mm_weight weight = random_weight(codebook, rate2, K, N);
    double *sums = codebook == MM_CODEBOOK_MUL1 ? NULL : unrounded_sums(&weight);
    float *w = dense(&weight), *x = random_floats(ROWS * IN, 1), *y = zeros(ROWS * OUT * sizeof *y);
    const int64_t sizes[] = {ROWS}, strides[] = {IN};
    struct mm_rows rows = {x, MM_FLOAT32, ROWS, IN, 1, 1, sizes, strides};
    for (int l = 0; l < level_count; l++) {
        mm_cpu = levels[l];
        check(mm_cpu_linear(&rows, &weight, OUT, y), "%s: mm_cpu_linear ran out of memory", mm_cpu->name);
        for (int r = 0; r < ROWS; r += 23) {
            double h[K], h_error[K];
            for (int k = 0; k < K; k += BLOCK) {
                double in[BLOCK], absolute[BLOCK];
                for (int i = 0; i < BLOCK; i++)
                    in[i] = k + i < IN ? (double)x[r * IN + k + i] * (double)mm_float_of_half(weight.suh[k + i]) : 0;
                hadamard(h + k, absolute, in);
                double step = in_integers(mm_cpu, codebook) ? half_step(mm_cpu, codebook) * largest(h + k, BLOCK) : 0;
                for (int i = 0; i < BLOCK; i++) h_error[k + i] = (HADAMARD_ROUNDINGS + 1) * U * absolute[i] + step;
            }
            for (int n = 0; n < N; n += BLOCK) {
                double p[BLOCK], sum[BLOCK], absolute[BLOCK], p_error = 0;
                for (int i = 0; i < BLOCK; i++) {
                    double error = p[i] = 0;
                    for (int k = 0; k < K; k++) {
                        double value = (double)w[k * N + n + i];
                        if (mm_cpu->input_limits[codebook] == MM_FLOAT_INPUTS) value = sums[k * N + n + i];
                        if (in_integers(mm_cpu, codebook)) value = as_integers(value, codebook);
                        p[i] += value * h[k];
                        error += fabs(value) * (h_error[k] + ((form_of(mm_cpu) == STEPPED ? BLOCK : BLOCK / 2) + K / BLOCK + 2) * U * fabs(h[k]));
                    }
                    p_error += error * (double)MM_HADAMARD_SCALE;
                }
                hadamard(sum, absolute, p);
                for (int i = 0; i < BLOCK && n + i < OUT; i++) {
                    double scale = (double)mm_float_of_half(weight.svh[n + i]);
                    double bias = (double)mm_float_of_half(weight.bias[n + i]);
                    double bound = p_error + (HADAMARD_ROUNDINGS + 2) * U * (absolute[i] + p_error);
                    check_close(mm_cpu->name, "mm_cpu_linear", r * OUT + n + i, (double)y[r * OUT + n + i],
                                sum[i] * scale + bias, bound * fabs(scale) + 2 * U * fabs(bias));
                }
            }
        }
    }
    mm_free(w), mm_free(x), mm_free(y), mm_free(sums);
}

/* Experts with as many tokens as take different products: a token's result is the same, bit for bit, as on its own; and that one is near the
 * scalar level's. */
static void check_moe(int codebook, int rate2) {
    enum { HIDDEN = 200, K = 256, INNER = 128, TOKENS = MM_ROW_BLOCK + 3, TOP_K = 2, EXPERTS = 5 };
    static const int second_slots[EXPERTS] = {0, 33, 17, 2, 1}; /* the first slot of every token is expert 0 */
    struct mm_weight matrices[3] = {random_weight(codebook, rate2, K, EXPERTS * INNER), random_weight(codebook, rate2, K, EXPERTS * INNER),
                                    random_weight(codebook, rate2, EXPERTS * INNER, K)};
    int64_t table[3 * EXPERTS];
    for (int e = 0; e < EXPERTS; e++) {
        table[3 * e] = e * (int64_t)K * INNER * rate2 / 32; /* any bits are weights */
        table[3 * e + 1] = rate2, table[3 * e + 2] = codebook;
    }
    struct mm_stack stacks[3];
    uint16_t *scales[6];
    for (int m = 0; m < 3; m++) {
        int64_t k = m < 2 ? K : INNER, n = m < 2 ? INNER : K;
        scales[2 * m] = random_halves(EXPERTS * k), scales[2 * m + 1] = random_halves(EXPERTS * n);
        stacks[m] = (struct mm_stack){matrices[m].tiles, table, scales[2 * m], scales[2 * m + 1], NULL, k, n};
    }
    float *x = random_floats(TOKENS * HIDDEN, 1), *weights = random_floats(TOKENS * TOP_K, 1);
    float *y = zeros(TOKENS * HIDDEN * sizeof *y), *alone = zeros(TOKENS * HIDDEN * sizeof *alone), *scalar = zeros(TOKENS * HIDDEN * sizeof *scalar);
    int32_t ids[TOKENS * TOP_K];
    for (int token = 0, expert = 1, left = second_slots[1]; token < TOKENS; token++) {
        if (expert < EXPERTS && left == 0) left = ++expert < EXPERTS ? second_slots[expert] : 0;
        ids[2 * token] = 0, ids[2 * token + 1] = expert < EXPERTS ? expert : MM_NO_EXPERT;
        left--;
    }
    for (int l = 0; l < level_count; l++) {
        mm_cpu = levels[l];
        for (int token = -1; token < TOKENS; token++) { /* -1: all of them */
            int64_t count = token < 0 ? TOKENS : 1, first = token < 0 ? 0 : token;
            const int64_t sizes[] = {count}, x_stride[] = {HIDDEN}, weight_stride[] = {TOP_K};
            struct mm_moe moe = {.x = {x + first * HIDDEN, MM_FLOAT32, count, HIDDEN, 1, 1, sizes, x_stride},
                                 .weights = {weights + first * TOP_K, MM_FLOAT32, count, TOP_K, 1, 1, sizes, weight_stride},
                                 .ids = ids + first * TOP_K, .gate = stacks[0], .up = stacks[1], .down = stacks[2],
                                 .experts = EXPERTS, .intermediate = INNER, .activation = MM_ACTIVATION_SILU};
            check(mm_cpu_moe(&moe, token < 0 ? y : alone + first * HIDDEN), "%s: mm_cpu_moe ran out of memory", mm_cpu->name);
        }
        if (l == 0) memcpy(scalar, alone, TOKENS * HIDDEN * sizeof *scalar);
        for (int token = 0; token < TOKENS; token++) {
            double most = 0;
            for (int i = 0; i < HIDDEN; i++) most = fmax(most, fabs((double)scalar[token * HIDDEN + i]));
            for (int i = token * HIDDEN; i < (token + 1) * HIDDEN; i++) {
                check(mm_bits_of_float(y[i]) == mm_bits_of_float(alone[i]), "%s: mm_cpu_moe, element %d: %a, but %a for the token alone",
                      mm_cpu->name, i, (double)y[i], (double)alone[i]);
                check_close(mm_cpu->name, "mm_cpu_moe", i, (double)alone[i], (double)scalar[i], 0.05 * most);
            }
        }
    }
    for (int i = 0; i < 6; i++) mm_free(scales[i]);
    mm_free(x), mm_free(weights), mm_free(y), mm_free(alone), mm_free(scalar);
}

static void report(const char *what) {
    static long before;
    printf("%s: %ld checks\n", what, checks - before);
    fflush(stdout);
    before = checks;
}

int main(void) {
    mm_threads = (struct mm_threads){serial_count, serial_run};
    level_count = mm_cpu_levels(levels);
    printf("levels:");
    for (int l = 0; l < level_count; l++) printf(" %s", levels[l]->name);
    printf("\n");
    for (int m = 0; m < MODES; m++) { /* tables must come out the same in every mode; the last one made is used */
        set_mode(&modes[m]);
        check_mode(&modes[m]);
        if (m == 0)
            for (int l = 0; l < level_count; l++) levels[l]->prepare();
    }
    check_decode();
    report("decode, every codebook, rate, state and mode");
    check_conversions();
    report("conversions in every mode");
    check_rotations();
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++)
        for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++)
            if (rate_exists(codebook, rate2)) check_products(codebook, rate2);
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++) check_dequantize(codebook, 6);
    check_activations();
    check_dot();
    report("rotations, products, activations");
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++) check_linear(codebook, 4);
    report("trellis_linear's driver");
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++) check_moe(codebook, 4);
    report("moe_trellis_swiglu's driver");
    printf("%ld checks, %ld failed\n", checks, failures);
    return failures != 0;
}
