/* The quantizer's trellis search as a C program of its own: every SIMD level that this machine has against plain loops and against each
 * other, bit for bit; the result against the optimum; speed.
 *   search_levels              all checks, then the speed of every level on one thread
 *   search_levels quick        fewer rates, no speed: for emulators and sanitizers
 *   search_levels optimum N    how far from the optimum N Gaussian tiles end, beside two searches from the middle, as exllamav3 does them
 * Build: gcc -std=c11 -O3 -ffp-contract=fast -fno-math-errno -Wno-psabi -UNDEBUG -Icsrc tests/search_levels.c csrc/cpu/[star].c
 * csrc/quantize/[star].c -lm, with * for [star]. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* clock_gettime under -std=c11 */
#endif
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "cpu/half.h"
#include "quantize/search.h"

#define STATES 65536
#define PLACE(t) (MM_TILE_ROW(t) * MM_TILE + MM_TILE_COLUMN(t))

static const struct mm_kernels *kernels[MM_MAX_CPU_LEVELS];
static const struct mm_search_level *levels[MM_MAX_CPU_LEVELS];
static int level_count; /* of different searches; kernels[l] runs levels[l] */
static long checks, failures;

static void check(int passed, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void check(int passed, const char *format, ...) {
    va_list arguments;
    checks++;
    if (passed || ++failures > 20) return;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\n");
}

static uint64_t seed = 88172645463325252u;
static uint32_t random_bits(void) { /* Marsaglia's xorshift */
    seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
    return (uint32_t)(seed >> 32);
}
static double uniform(void) { return (random_bits() + 0.5) / 4294967296.0; }
static float gaussian(void) { return (float)(sqrt(-2 * log(uniform())) * cos(6.283185307179586 * uniform())); }

static void *room(size_t bytes) {
    void *memory = mm_alloc(bytes);
    if (!memory) exit((printf("out of memory\n"), 2));
    return memory;
}

/* ---- the format, once more, from docs/format.md ---- */

static float value_of(int codebook, uint32_t state) {
    if (codebook == MM_CODEBOOK_MUL1) {
        uint32_t word = state * 0x83DCD12Du, sum = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24);
        return mm_float_of_half(mm_half_of_float((float)((1024 + sum) * 0.00676727294921875 - 10.3828125)));
    }
    uint32_t word = codebook == MM_CODEBOOK_MCG ? state * 0xCBAC1FEDu : state * 89226354u + 64248484u;
    word = (word & 0x8FFF8FFFu) ^ 0x3B603B60u;
    return mm_float_of_half(mm_half_of_float(mm_float_of_half((uint16_t)word) + mm_float_of_half((uint16_t)(word >> 16))));
}

static int last_bit(int rate2, int t) { return (t + 1) * rate2 / 2; }
static int bits_of(int rate2, int t) { return last_bit(rate2, t % 256 + 256) - last_bit(rate2, t % 256 + 255); }

static uint32_t state_of(const uint8_t *stream, int rate2, int t) {
    uint32_t state = 0, total = 128u * (uint32_t)rate2;
    for (int b = 0; b < 16; b++) {
        uint32_t p = ((uint32_t)last_bit(rate2, t) - 16 + (uint32_t)b + total) % total;
        state = state << 1 | (stream[(p / 8) ^ 3] >> (7 - p % 8) & 1u);
    }
    return state;
}

static int rate_exists(int codebook, int rate2) {
    return rate2 % 2 == 0 || (codebook == MM_CODEBOOK_MUL1 && rate2 <= MM_MAX_HALF_RATE2);
}

/* ---- parts of a level against plain loops: the same bits ---- */

static void check_parts(void) {
    const size_t bytes = (STATES + 16) * sizeof(float);
    float *costs = room(bytes), *values = room(bytes), *ordered = room(bytes), *want = room(bytes), *got = room(bytes);
    for (int pair = 0; pair < 27; pair++) { /* the same rate twice, or half a bit up or down */
        int bits = pair < 9 ? pair : pair % 9, next_bits = bits + (pair >= 18) - (pair >= 9 && pair < 18);
        if (bits < 1 || bits > 8 || next_bits < 1 || (bits != next_bits && bits + next_bits > 7)) continue;
        int nodes = STATES >> next_bits;
        float x = 3 * gaussian();
        for (int i = 0; i < STATES; i++) values[i] = gaussian();
        for (int i = 0; i < STATES >> bits; i++) costs[i] = random_bits() % 16 ? (float)(60 * uniform()) : INFINITY;
        for (int node = 0; node < nodes; node++) {
            want[node] = INFINITY;
            for (int state = node; state < STATES; state += nodes)
                want[node] = fminf(want[node], fmaf(x - values[state], x - values[state], costs[state >> bits]));
        }
        for (int l = 0; l < level_count; l++) {
            levels[l]->order(ordered, values, bits, next_bits);
            memset(got, 0xFF, bytes);
            levels[l]->step(got, costs, ordered, x, bits, next_bits);
            check(!memcmp(got, want, (size_t)nodes * 4), "%s: step from %d to %d bits differs from plain loops", levels[l]->name, bits, next_bits);
            check(isnan(got[nodes]), "%s: step from %d to %d bits writes too far", levels[l]->name, bits, next_bits);
        }
        for (int i = 0; i < STATES; i++) costs[i] = values[i] = (float)(random_bits() % 4); /* equals are likely */
        int stride = 1 + (int)(random_bits() % 9), count = 1 + (int)(random_bits() % (uint32_t)stride), spread = (int)(random_bits() % 3);
        for (int l = 0; l < level_count; l++) {
            float least[9];
            int choice = 0, chosen = levels[l]->narrow(least, count, costs, stride, values, spread, 1 << next_bits, nodes, x);
            for (int i = 0; i < count; i++) {
                float best = INFINITY;
                for (int way = 0; way < 1 << next_bits; way++) {
                    int at = i * spread + way * nodes;
                    float d = x - values[at], cost = fmaf(d, d, costs[way * stride + i]);
                    if (cost < best) best = cost, choice = way;
                }
                check(best == least[i], "%s: narrow gives %g instead of %g", levels[l]->name, (double)least[i], (double)best);
            }
            check(chosen == choice, "%s: narrow chooses %d instead of %d", levels[l]->name, chosen, choice);
        }
    }
    mm_free(costs), mm_free(values), mm_free(ordered), mm_free(want), mm_free(got);
}

/* ---- searches that share nothing with csrc/quantize/ ---- */

struct trellis {
    float values[STATES], costs[2][STATES];
    uint8_t ways[256][STATES];
    int rate2;
};

static void set_trellis(struct trellis *trellis, int codebook, int rate2) {
    trellis->rate2 = rate2;
    for (uint32_t s = 0; s < STATES; s++) trellis->values[s] = value_of(codebook, s);
}

/* Costs after 256 positions from `begin`, from all nodes or from one; `ways` are those chosen. */
static const float *forward(struct trellis *trellis, const float *x, int begin, int from, int record) {
    float *costs = trellis->costs[0], *next = trellis->costs[1];
    for (int node = 0; node < STATES >> bits_of(trellis->rate2, begin); node++) costs[node] = from < 0 ? 0 : INFINITY;
    if (from >= 0) costs[from] = 0;
    for (int i = 0; i < 256; i++) {
        int t = (begin + i) % 256, bits = bits_of(trellis->rate2, t), next_bits = bits_of(trellis->rate2, t + 1), nodes = STATES >> next_bits;
        float target = x[PLACE(t)];
        for (int way = 0; way < 1 << next_bits; way++)
            for (int node = 0; node < nodes; node++) {
                float d = target - trellis->values[way * nodes + node], cost = costs[(way * nodes + node) >> bits] + d * d;
                if (record && (!way || cost < next[node])) trellis->ways[i][node] = (uint8_t)way;
                next[node] = !way || cost < next[node] ? cost : next[node];
            }
        float *swap = costs;
        costs = next, next = swap;
    }
    return costs;
}

/* The least cost from each node, before position 0, to anywhere after position 255. */
static const float *backward(struct trellis *trellis, const float *x) {
    float *costs = trellis->costs[0], *next = trellis->costs[1];
    memset(costs, 0, STATES * sizeof *costs);
    for (int t = 255; t >= 0; t--) {
        int bits = bits_of(trellis->rate2, t), mask = (STATES >> bits_of(trellis->rate2, t + 1)) - 1;
        for (int node = 0; node < STATES >> bits; node++) {
            next[node] = INFINITY;
            for (int state = node << bits; state < (node + 1) << bits; state++) {
                float d = x[PLACE(t)] - trellis->values[state], cost = costs[state & mask] + d * d;
                next[node] = cost < next[node] ? cost : next[node];
            }
        }
        float *swap = costs;
        costs = next, next = swap;
    }
    return costs;
}

static const float *sort_key;
static int by_key(const void *a, const void *b) {
    float left = sort_key[*(const int *)a], right = sort_key[*(const int *)b];
    return (left > right) - (left < right);
}

/* The least error of any stream: closed paths from every node, but for those whose bound (the best open path from there, or to there)
 * is no better than what was found. */
static double optimum(struct trellis *trellis, const float *x) {
    int nodes = STATES >> bits_of(trellis->rate2, 0);
    static float bound[STATES];
    static int order[STATES];
    memcpy(bound, backward(trellis, x), (size_t)nodes * sizeof *bound);
    const float *to = forward(trellis, x, 0, -1, 0);
    for (int node = 0; node < nodes; node++) bound[node] = fmaxf(bound[node], to[node]), order[node] = node;
    sort_key = bound;
    qsort(order, (size_t)nodes, sizeof *order, by_key);
    float best = INFINITY;
    for (int i = 0; i < nodes && bound[order[i]] < best; i++) best = fminf(best, forward(trellis, x, 0, order[i], 0)[order[i]]);
    return (double)best;
}

/* Two searches: from the middle around to the middle with free ends, then from the first one's node at position 0 around to it. */
static double two_searches(struct trellis *trellis, const float *x) {
    const float *costs = forward(trellis, x, 128, -1, 1);
    int node = 0;
    for (int other = 0; other < STATES >> bits_of(trellis->rate2, 128); other++)
        if (costs[other] < costs[node]) node = other;
    for (int i = 255; i >= 128; i--) /* back to position 0 */
        node = (trellis->ways[i][node] << (16 - bits_of(trellis->rate2, i + 129)) | node) >> bits_of(trellis->rate2, i + 128);
    return (double)forward(trellis, x, 0, node, 0)[node];
}

/* ---- the search ---- */

static double error_of(const float *x, const float *values) {
    double error = 0;
    for (int i = 0; i < 256; i++) error += ((double)x[i] - (double)values[i]) * ((double)x[i] - (double)values[i]);
    return error;
}

/* The source's size, in units of the codebook, that a rate codes best. */
static float best_rms(int codebook, int rate2) {
    static const float mul1[] = {1.12f, 1.05f, 0.98f, 0.95f, 0.93f, 0.93f, 0.94f, 0.9f, 0.87f, 0.87f, 0.85f, 0.85f, 0.82f, 0.82f, 0.82f};
    return mul1[rate2 - 2] * (codebook == MM_CODEBOOK_MUL1 ? 1 : 1.25f);
}

static void check_search(struct trellis *trellis, int codebook, int rate2, int with_optimum) {
    enum { TILES = 2 };
    static float x[TILES * 256], values[TILES * 256];
    static uint8_t planted[512], stream[TILES * 512], first[TILES * 512];
    size_t bytes = (size_t)MM_TILE_BYTES(rate2);
    const char *name[] = {"3inst", "mcg", "mul1"};
    set_trellis(trellis, codebook, rate2);
    for (size_t i = 0; i < bytes; i++) planted[i] = (uint8_t)random_bits();
    for (int t = 0; t < 256; t++) x[PLACE(t)] = trellis->values[state_of(planted, rate2, t)], x[256 + t] = best_rms(codebook, rate2) * gaussian();
    double best = with_optimum ? optimum(trellis, x + 256) : 0;
    for (int l = 0; l < level_count; l++) {
        mm_cpu = kernels[l];
        memset(stream, 0, sizeof stream), memset(values, 0xFF, sizeof values);
        check(mm_search(x, TILES, rate2, codebook, stream, values), "%s: out of memory", levels[l]->name);
        if (!l) memcpy(first, stream, sizeof stream);
        check(!memcmp(first, stream, sizeof stream), "%s, %s, %g bits: another stream than %s's", levels[l]->name, name[codebook], rate2 / 2.0,
              levels[0]->name);
        for (int tile = 0; tile < TILES; tile++)
            for (int t = 0; t < 256; t++) {
                float want = trellis->values[state_of(stream + (size_t)tile * bytes, rate2, t)];
                check(values[tile * 256 + PLACE(t)] == want, "%s, %s, %g bits: position %d is %g, its stream says %g", levels[l]->name,
                      name[codebook], rate2 / 2.0, t, (double)values[tile * 256 + PLACE(t)], (double)want);
            }
        check(error_of(x, values) == 0, "%s, %s, %g bits: a tile that the codebook holds has the error %g", levels[l]->name, name[codebook],
              rate2 / 2.0, error_of(x, values));
        double error = error_of(x + 256, values + 256);
        if (with_optimum)
            check(error > best * (1 - 1e-5) && error < best * 1.03, "%s, %s, %g bits: error %g, the optimum is %g", levels[l]->name,
                  name[codebook], rate2 / 2.0, error, best);
    }
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t); /* of the processor: others may use the machine */
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static void print_speed(void) {
    enum { TILES = 16, RUNS = 7 };
    static float x[TILES * 256], values[TILES * 256];
    static uint8_t stream[TILES * 512];
    printf("tiles a second of one thread's processor time, mul1: median (slowest - fastest of %d runs)\n", RUNS);
    for (int l = 0; l < level_count; l++) {
        mm_cpu = kernels[l];
        for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++) {
            if (!rate_exists(MM_CODEBOOK_MUL1, rate2)) continue;
            int tiles = l ? TILES : 1, runs = l ? RUNS : 3;
            double rate[RUNS];
            for (int i = 0; i < tiles * 256; i++) x[i] = best_rms(MM_CODEBOOK_MUL1, rate2) * gaussian();
            for (int run = 0; run < runs; run++) {
                double begin = seconds();
                mm_search(x, tiles, rate2, MM_CODEBOOK_MUL1, stream, values);
                rate[run] = tiles / (seconds() - begin);
            }
            qsort(rate, (size_t)runs, sizeof *rate, by_value);
            printf("%-7s %3g bits %7.1f (%.1f - %.1f)\n", levels[l]->name, rate2 / 2.0, rate[runs / 2], rate[0], rate[runs - 1]);
            fflush(stdout);
        }
    }
}

static void print_optimum(struct trellis *trellis, int tiles) {
    printf("mean error of %d Gaussian tiles above the optimum's, and tiles that reach it, mul1\n", tiles);
    mm_cpu = kernels[level_count - 1];
    for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++) {
        if (!rate_exists(MM_CODEBOOK_MUL1, rate2)) continue;
        double best_sum = 0, found_sum = 0, two_sum = 0, power = 0;
        int found_best = 0, two_best = 0;
        set_trellis(trellis, MM_CODEBOOK_MUL1, rate2);
        for (int tile = 0; tile < tiles; tile++) {
            float x[256], values[256];
            uint8_t stream[512];
            for (int i = 0; i < 256; i++) x[i] = best_rms(MM_CODEBOOK_MUL1, rate2) * gaussian(), power += (double)x[i] * (double)x[i];
            mm_search(x, 1, rate2, MM_CODEBOOK_MUL1, stream, values);
            double best = optimum(trellis, x), found = error_of(x, values), two = two_searches(trellis, x);
            best_sum += best, found_sum += found, two_sum += two;
            found_best += found < best * (1 + 1e-5), two_best += two < best * (1 + 1e-5);
        }
        printf("%3g bits: optimum %.3g of the variance; this search +%.4f %%, %d of %d tiles; two searches +%.4f %%, %d\n", rate2 / 2.0,
               best_sum / power, 100 * (found_sum / best_sum - 1), found_best, tiles, 100 * (two_sum / best_sum - 1), two_best);
        fflush(stdout);
    }
}

static int serial_count(void) { return 1; }
static void serial_run(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context) {
    (void)grain;
    body(begin, end, context);
}

int main(int argc, char **argv) {
    int quick = argc > 1 && !strcmp(argv[1], "quick"), tiles = argc > 2 && !strcmp(argv[1], "optimum") ? atoi(argv[2]) : 0;
    const struct mm_kernels *all[MM_MAX_CPU_LEVELS];
    int count = mm_cpu_levels(all);
    struct trellis *trellis = room(sizeof *trellis);
    mm_threads = (struct mm_threads){serial_count, serial_run};
    printf("levels:");
    for (int i = 0; i < count; i++) {
        all[i]->prepare();
        const struct mm_search_level *level = mm_search_level_of(all[i]);
        if (level_count && levels[level_count - 1] == level) continue;
        kernels[level_count] = all[i], levels[level_count++] = level;
        printf(" %s", level->name);
    }
    printf("\n");
    if (tiles) {
        print_optimum(trellis, tiles);
        return 0;
    }
    check_parts();
    printf("%ld checks of parts\n", checks);
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++)
        for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++)
            if (rate_exists(codebook, rate2) && (!quick || rate2 == 5 + 3 * (MM_CODEBOOK_MUL1 - codebook)))
                check_search(trellis, codebook, rate2, !quick && rate2 >= 6);
    printf("%ld checks, %ld failed\n", checks, failures);
    fflush(stdout);
    if (!quick) print_speed();
    mm_free(trellis);
    return failures != 0;
}
