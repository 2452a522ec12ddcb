/* The trellis search: of all bit streams of a tile, the one whose 256 values are closest to the tile's in the sum of squares.
 *
 * A state is a 16-bit window of the stream (docs/format.md); position t shifts b(t) bits in. What later positions need of a state is its
 * low 16 - b(t + 1) bits: the "node" before position t + 1. So 2^b(t+1) states lead into one node, and only the cheapest of them can be
 * on the best path (Viterbi, 1967):
 *
 *     cost(0, node) = 0
 *     cost(t + 1, node) = min over the states s that end in node of  cost(t, s >> b(t)) + (x(t) - value(s))^2
 *
 * That is 65,536 sums a position at every rate, and three instructions for a vector of them: subtract, multiply-add, minimum (step.h).
 * Which state was the cheapest is not recorded, that would be two more. Instead the costs of every few positions are kept, and the way
 * back computes the few costs again that lead to the node in question, from the kept ones before: the same operations, so the same bits.
 *
 * The stream is a ring: a path must end in the node that it began with. The optimum would take a search from every node. Instead, one
 * search with free ends runs over the seam, REACH positions on either side, so that its path overlaps itself on the far side of the ring.
 * Its end and its beginning are each a best path, from the seam's node to anywhere and from anywhere to the seam's node. Where they meet in
 * a node, the ring is cut and joined: a closed path, found without a second search. Where they do not, a second search goes around the ring
 * from the seam's node to itself.
 *
 * exllamav3 reaches 128 positions to either side and always does the second search: 512 positions, as against 450 to 640 here. On 60 Gaussian
 * tiles of 1 to 3 bits its way, done without mistakes, ended 0.3 to 0.7 % above the least error of any stream, this one 0.03 to 0.15 %, and
 * on more than three quarters of the tiles at it; less at higher rates (tests/search_levels.c measures both).
 *
 * Costs are float32, the same operations at every level, and equal costs go to the lower state, so that streams are the same bits at every
 * level and for any number of threads. */
#include "quantize/search.h"

#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <string.h>

#define REACH 224
#define BACK 96 /* ends the way back: what overlaps is then 96 positions, and earlier costs need not be kept */
#define MOST_STEPS (2 * REACH)
#define CONE_BITS 9 /* costs are kept so often that about 2^CONE_BITS of them lead to a node on the way back */

struct search {
    const struct mm_search_level *level;
    const float *tiles, *values; /* values by state */
    const float *ordered[2];     /* for even and for odd positions */
    int rate2, kept;             /* costs are kept before every kept-th position */
    uint8_t *stream;
    float *decoded;
};

/* Bits that position t brings; t may lie beyond the ring's 256. */
static int bits_at(int rate2, int t) { return (rate2 + (t & 1)) >> 1; }

static int nodes_at(int rate2, int t) { return MM_STATES >> bits_at(rate2, t); }

/* ---- the codebook by state ---- */

/* Built by the ops' own decoder, which has the format's formulas, from 8-bit tiles: there a state is two neighbouring bytes, so bytes
 * a, 0, a, 1, a, 2, ... make the states 256 a + c at odd positions. Two tiles for each a: 8 x 64 of them. */
static float *build_values(int codebook) {
    enum { TILE_BYTES = MM_TILE_BYTES(MM_MAX_RATE2), ACROSS = 64 };
    uint8_t *tiles = mm_alloc(512 * TILE_BYTES);
    float *block = mm_alloc(MM_HADAMARD * MM_HADAMARD * sizeof *block), *values = mm_alloc(MM_STATES * sizeof *values);
    if (tiles && block && values) {
        for (int i = 0; i < 512 * TILE_BYTES; i++) /* stream byte i lies at i ^ 3 */
            tiles[i ^ 3] = (uint8_t)(i & 1 ? i % 512 / 2 : i / 512);
        struct mm_weight weight = {
            .tiles = tiles, .k = 8 * MM_TILE, .n = ACROSS * MM_TILE, .rate2 = MM_MAX_RATE2, .codebook = codebook};
        for (int column = 0; column < ACROSS / 8; column++) {
            mm_cpu->dequantize(block, &weight, 0, column, true);
            for (int i = 0; i < 64; i++) {
                int tile = i / 8 * ACROSS + column * 8 + i % 8; /* bytes 256 tile .. of the stream */
                const float *corner = block + i / 8 * MM_TILE * MM_HADAMARD + i % 8 * MM_TILE;
                for (int t = 1; t < MM_TILE_WEIGHTS; t += 2)
                    values[tile / 2 * 256 + tile % 2 * 128 + t / 2] = corner[MM_TILE_ROW(t) * MM_HADAMARD + MM_TILE_COLUMN(t)];
            }
        }
    }
    if (!block) mm_free(values), values = NULL;
    if (!tiles) mm_free(values), values = NULL;
    mm_free(tiles), mm_free(block);
    return values;
}

/* Kept for good, 256 KB a codebook. NULL: out of memory. */
static const float *values_of(int codebook) {
    static _Atomic(float *) built[MM_CODEBOOK_COUNT];
    float *values = atomic_load(&built[codebook]), *none = NULL;
    if (values || !(values = build_values(codebook))) return values;
    if (atomic_compare_exchange_strong(&built[codebook], &none, values)) return values;
    mm_free(values); /* another thread was first */
    return none;
}

/* ---- one search, forward and back ---- */

/* A path over positions begin .. begin + steps - 1 (mod 256). Steps count from begin. */
struct lap {
    const struct search *search;
    const float *x; /* [256], in trellis order */
    int begin, steps, back; /* the way back ends at step `back`: costs before are not kept */
    float *spare, *kept;    /* [2, nodes], [slots, nodes] */
};

static int lap_bits(const struct lap *lap, int step) { return bits_at(lap->search->rate2, lap->begin + step); }

static bool is_kept(const struct lap *lap, int step) { return step >= lap->back && (step - lap->back) % lap->search->kept == 0; }

/* Where the costs before a step lie. */
static float *costs_at(const struct lap *lap, int step) {
    size_t nodes = (size_t)nodes_at(lap->search->rate2, 0);
    return is_kept(lap, step) ? lap->kept + (size_t)((step - lap->back) / lap->search->kept) * nodes : lap->spare + (size_t)(step & 1) * nodes;
}

/* From the costs before step 0, which the caller has set, to those after the last step. */
static void go_forward(const struct lap *lap) {
    const struct search *search = lap->search;
    for (int step = 0; step < lap->steps; step++)
        search->level->step(costs_at(lap, step + 1), costs_at(lap, step), search->ordered[(lap->begin + step) & 1],
                            lap->x[(lap->begin + step) % MM_TILE_WEIGHTS], lap_bits(lap, step), lap_bits(lap, step + 1));
}

/* states [steps] from `back` on: the best path that ends in `node`. Returns the node that it begins with.
 *
 * Between kept steps start and end: of the nodes before step start + i, those can lead to `node` before `end` whose low bits are the upper
 * bits of `node`. The above[i] bits over those tell them apart; cone[at[i] + those] is their cost. */
static int go_back(const struct lap *lap, int node, uint16_t *states) {
    const struct search *search = lap->search;
    float cone[4 << CONE_BITS], least;
    for (int end = lap->steps; end > lap->back;) {
        int start = end - 1;
        while (!is_kept(lap, start)) start--;
        int depth = end - start, way = 0, used = 0, above[CONE_BITS + 1], below[CONE_BITS + 1], at[CONE_BITS + 1];
        above[depth] = below[depth] = 0; /* below: bits that come in between there and the end */
        for (int i = depth - 1; i >= 0; i--) {
            above[i] = above[i + 1] + lap_bits(lap, start + i + 1);
            below[i] = below[i + 1] + lap_bits(lap, start + i);
            at[i] = used, used += 1 << above[i];
        }
        assert((size_t)used <= sizeof cone / sizeof *cone);
        const float *costs = costs_at(lap, start);
        for (int i = 0; i < 1 << above[0]; i++)
            cone[at[0] + i] = costs[i << (MM_WINDOW_BITS - lap_bits(lap, start) - above[0]) | node >> below[0]];
        for (int i = 1; i < depth; i++) {
            int next_bits = lap_bits(lap, start + i);
            search->level->narrow(cone + at[i], 1 << above[i], cone + at[i - 1], 1 << above[i], search->values + (node >> below[i]),
                                  1 << (MM_WINDOW_BITS - next_bits - above[i]), 1 << next_bits, MM_STATES >> next_bits,
                                  lap->x[(lap->begin + start + i - 1) % MM_TILE_WEIGHTS]);
        }
        for (int i = depth - 1; i >= 0; i--) {
            int next_bits = lap_bits(lap, start + i + 1);
            int choice = search->level->narrow(&least, 1, cone + at[i] + way, 1 << above[i + 1], search->values + node, 0, 1 << next_bits,
                                               MM_STATES >> next_bits, lap->x[(lap->begin + start + i) % MM_TILE_WEIGHTS]);
            int state = choice << (MM_WINDOW_BITS - next_bits) | node;
            states[start + i] = (uint16_t)state;
            way |= choice << above[i + 1];
            node = state >> lap_bits(lap, start + i);
        }
        end = start;
    }
    return node;
}

/* ---- tiles ---- */

/* path [256]: the closed path's states */
static void search_ring(const struct search *search, const float *x, float *scratch, uint16_t *path) {
    int rate2 = search->rate2, nodes = nodes_at(rate2, 0), best = 0;
    struct lap lap = {search, x, 2 * MM_TILE_WEIGHTS - REACH, 2 * REACH, BACK, scratch, scratch + 2 * nodes};
    uint16_t states[2 * REACH];
    memset(costs_at(&lap, 0), 0, (size_t)nodes * sizeof(float));
    go_forward(&lap);
    const float *costs = costs_at(&lap, lap.steps);
    for (int node = 1; node < nodes; node++)
        if (costs[node] < costs[best]) best = node;
    go_back(&lap, best, states);

    const uint16_t *ahead = states + REACH; /* by position, 0 to REACH - 1; those up to 255 are `before` of it */
    const int before = REACH - MM_TILE_WEIGHTS;
    for (int t = REACH; t > MM_TILE_WEIGHTS - REACH + BACK; t--)
        if (!((ahead[t - 1] ^ states[before + t - 1]) & (nodes_at(rate2, t) - 1))) { /* the same node before position t */
            memcpy(path, ahead, (size_t)t * sizeof *path);
            memcpy(path + t, states + before + t, (size_t)(MM_TILE_WEIGHTS - t) * sizeof *path);
            return;
        }

    int seam = states[REACH - 1] & (nodes - 1);
    lap.begin = lap.back = 0, lap.steps = MM_TILE_WEIGHTS;
    float *start = costs_at(&lap, 0);
    for (int node = 0; node < nodes; node++) start[node] = INFINITY;
    start[seam] = 0;
    go_forward(&lap);
    int reached = go_back(&lap, seam, path);
    assert(reached == seam);
    (void)reached;
}

static void search_tile(int64_t item, void *scratch, void *context) {
    const struct search *search = context;
    const float *tile = search->tiles + item * MM_TILE_WEIGHTS;
    float x[MM_TILE_WEIGHTS], *decoded = search->decoded + item * MM_TILE_WEIGHTS;
    uint8_t *stream = search->stream + item * MM_TILE_BYTES(search->rate2);
    uint16_t path[MM_TILE_WEIGHTS];
    for (int t = 0; t < MM_TILE_WEIGHTS; t++) x[t] = tile[MM_TILE_ROW(t) * MM_TILE + MM_TILE_COLUMN(t)];
    search_ring(search, x, scratch, path);
    uint32_t pending = 0;
    int bits = 0, bytes = 0;
    for (int t = 0; t < MM_TILE_WEIGHTS; t++) {
        int new_bits = bits_at(search->rate2, t);
        pending = pending << new_bits | (path[t] & ((1u << new_bits) - 1));
        for (bits += new_bits; bits >= 8; bits -= 8) stream[bytes++ ^ 3] = (uint8_t)(pending >> (bits - 8)); /* words are little-endian */
        decoded[MM_TILE_ROW(t) * MM_TILE + MM_TILE_COLUMN(t)] = search->values[path[t]];
    }
}

const struct mm_search_level *mm_search_level_of(const struct mm_kernels *level) {
    const struct mm_search_level *found = mm_search_scalar();
#define X(id)                                                                                                          \
    if (mm_search_##id() && !strncmp(level->name, mm_search_##id()->name, strlen(mm_search_##id()->name))) found = mm_search_##id();
    MM_SEARCH_LEVELS(X)
#undef X
    return found;
}

bool mm_search(const float *tiles, int64_t count, int rate2, int codebook, uint8_t *stream, float *values) {
    struct search search = {.level = mm_search_level_of(mm_cpu), .tiles = tiles, .rate2 = rate2, .stream = stream, .decoded = values};
    search.kept = 2 * CONE_BITS / rate2 > 1 ? 2 * CONE_BITS / rate2 : 1;
    search.values = values_of(codebook);
    float *ordered = mm_alloc(2 * MM_STATES * sizeof *ordered);
    bool done = search.values && ordered;
    if (done) {
        for (int odd = 0; odd <= rate2 % 2; odd++)
            search.level->order(ordered + odd * MM_STATES, search.values, bits_at(rate2, odd), bits_at(rate2, odd + 1));
        search.ordered[0] = ordered, search.ordered[1] = ordered + rate2 % 2 * MM_STATES;
        int slots = 2 + (MOST_STEPS - BACK) / search.kept + 1;
        done = MM_PARALLEL(&search, {count, (size_t)slots * (size_t)nodes_at(rate2, 0) * sizeof(float), search_tile});
    }
    mm_free(ordered);
    return done;
}
