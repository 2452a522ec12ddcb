/* The trellis search: of all bit streams of a tile, the one whose 256 values are closest to the tile's in the sum of squares.
 *
 * A state is a 16-bit window of the stream (docs/format.md); position t shifts b(t) bits in. What later positions need of a state is its
 * low 16 - b(t + 1) bits: the "node" before position t + 1. So 2^b(t+1) states lead into one node and only the cheapest of them can be
 * on the best path (Viterbi 1967):
 *
 *     cost(0, node) = 0
 *     cost(t + 1, node) = min over states s that end in node of  cost(t, s >> b(t)) + (x(t) - value(s))^2
 *
 * That is 65,536 sums a position at every rate, three instructions for a vector of them: subtract, multiply-add, minimum. Which state was
 * the cheapest is not recorded, it would nearly double the work. Instead the costs of every few positions are kept, and the way back
 * recomputes the few costs that lead to the node in question, from the kept ones before: the same operations, so the same bits.
 *
 * The stream is a ring, so a path must end in the node that it began with. As exllamav3 does, a first search with free ends runs over the
 * seam, from SEAM positions before it to SEAM positions after, and its best path says the node there; the second search is around the ring
 * from this node to itself, exactly. (exllamav3 takes half a ring on either side and picks the wrong end; SEAM says what fewer cost.)
 *
 * Costs are float32, the same operations at every level, and equal costs go to the lower state, so that streams are the same bits at every
 * level and for any number of threads. */
#include "quantize/search.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

#include "quantize/fused.h"

#define SEAM 128
#define MOST_STEPS (2 * SEAM > MM_TILE_WEIGHTS ? 2 * SEAM : MM_TILE_WEIGHTS)
#define CONE_BITS 9 /* costs are kept so often that 2^CONE_BITS of them, if bits allow, lead to a node on the way back */

struct search {
    const struct mm_search_level *level;
    const float *tiles, *values; /* values by state */
    const float *ordered[2];     /* for even and for odd positions */
    int64_t count;
    int rate2, group; /* tiles an item */
    int kept;         /* costs are kept before every kept-th position */
    uint8_t *stream;
    float *decoded;
};

/* Bits that position t brings; t may lie before or after the ring's 256. */
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

/* A path over positions begin .. begin + steps - 1 (mod 256) for each of `tiles` tiles. Node and cost indices count from begin. */
struct lap {
    const struct search *search;
    const float *x; /* [tiles, 256], in trellis order */
    int tiles, begin, steps;
    int back_to;  /* the way back ends here: costs before are not kept */
    float *kept;  /* [slots, tiles, nodes] */
    float *spare; /* two of these */
};

static size_t slot_floats(const struct search *search) { return (size_t)search->group * (size_t)nodes_at(search->rate2, 0); }

static bool is_kept(const struct lap *lap, int step) { return step >= lap->back_to && (step - lap->back_to) % lap->search->kept == 0; }

static float *costs_at(const struct lap *lap, int step) {
    size_t floats = slot_floats(lap->search);
    return is_kept(lap, step) ? lap->kept + (size_t)((step - lap->back_to) / lap->search->kept) * floats
                              : lap->spare + (size_t)(step & 1) * floats;
}

/* From the costs before step 0, which the caller has set, to those after the last step. */
static void go_forward(const struct lap *lap) {
    const struct search *search = lap->search;
    for (int step = 0; step < lap->steps; step++) {
        int t = lap->begin + step;
        float x[MM_SEARCH_TILES];
        for (int tile = 0; tile < lap->tiles; tile++) x[tile] = lap->x[tile * MM_TILE_WEIGHTS + t % MM_TILE_WEIGHTS];
        search->level->step(costs_at(lap, step + 1), costs_at(lap, step), search->ordered[t & 1], x, lap->tiles,
                            bits_at(search->rate2, t), bits_at(search->rate2, t + 1));
    }
}

/* The cheapest state into `node` before position t + 1, its ways' costs given: costs[way * stride]. The lowest of equals. */
static uint32_t cheapest(const struct search *search, float x, int t, uint32_t node, const float *costs, uint32_t stride, float *least) {
    uint32_t nodes = (uint32_t)nodes_at(search->rate2, t + 1), best_state = node;
    float best = INFINITY;
    for (uint32_t state = node; state < MM_STATES; state += nodes, costs += stride) {
        float cost = mm_fused_square(x - search->values[state], *costs);
        if (cost < best) best = cost, best_state = state;
    }
    if (least) *least = best;
    return best_state;
}

/* Writes the states of steps back_to .. steps - 1 of the best path that ends in `node`; returns the node that it passes at back_to.
 *
 * Between two kept steps: before step i, those nodes can lead to `node` before step `end` which share its upper bits as their low ones;
 * ways(i) bits above are free. cone[i][way] is the cost of one of them. */
static uint32_t go_back(const struct lap *lap, int tile, uint32_t node, uint16_t *states) {
    const struct search *search = lap->search;
    const float *x = lap->x + tile * MM_TILE_WEIGHTS;
    float cone[2 << CONE_BITS];
    for (int end = lap->steps; end > lap->back_to;) {
        int start = end - 1;
        while (!is_kept(lap, start)) start--;
        int depth = end - start, ways[MM_WINDOW_BITS + 2], later[MM_WINDOW_BITS + 2], at[MM_WINDOW_BITS + 2], used = 0;
        ways[depth] = later[depth] = 0; /* later: bits that come in between there and `end` */
        for (int i = depth - 1; i >= 0; i--) {
            ways[i] = ways[i + 1] + bits_at(search->rate2, lap->begin + start + i + 1);
            later[i] = later[i + 1] + bits_at(search->rate2, lap->begin + start + i);
            at[i] = used, used += 1 << ways[i];
        }
        assert((size_t)used <= sizeof cone / sizeof *cone);
        const float *costs = costs_at(lap, start) + tile * nodes_at(search->rate2, lap->begin + start);
        for (uint32_t way = 0; way < 1u << ways[0]; way++) {
            int low = MM_WINDOW_BITS - bits_at(search->rate2, lap->begin + start) - ways[0];
            cone[at[0] + (int)way] = costs[way << low | node >> later[0]];
        }
        for (int i = 1; i < depth; i++) {
            int t = lap->begin + start + i - 1, low = MM_WINDOW_BITS - bits_at(search->rate2, t + 1) - ways[i];
            for (uint32_t way = 0; way < 1u << ways[i]; way++)
                cheapest(search, x[t % MM_TILE_WEIGHTS], t, way << low | node >> later[i], cone + at[i - 1] + way, 1u << ways[i],
                         &cone[at[i] + (int)way]);
        }
        uint32_t way = 0;
        for (int i = depth - 1; i >= 0; i--) {
            int t = lap->begin + start + i;
            uint32_t state = cheapest(search, x[t % MM_TILE_WEIGHTS], t, node, cone + at[i] + way, 1u << ways[i + 1], NULL);
            states[start + i] = (uint16_t)state;
            way |= state >> (MM_WINDOW_BITS - bits_at(search->rate2, t + 1)) << ways[i + 1];
            node = state >> bits_at(search->rate2, t);
        }
        end = start;
    }
    return node;
}

/* ---- tiles ---- */

static void write_tile(const struct search *search, int64_t tile, const uint16_t *states) {
    uint8_t *stream = search->stream + tile * MM_TILE_BYTES(search->rate2);
    float *decoded = search->decoded + tile * MM_TILE_WEIGHTS;
    uint32_t pending = 0;
    int bits = 0, bytes = 0;
    for (int t = 0; t < MM_TILE_WEIGHTS; t++) {
        int new_bits = bits_at(search->rate2, t);
        pending = pending << new_bits | (states[t] & ((1u << new_bits) - 1));
        for (bits += new_bits; bits >= 8; bits -= 8) stream[bytes++ ^ 3] = (uint8_t)(pending >> (bits - 8));
        decoded[MM_TILE_ROW(t) * MM_TILE + MM_TILE_COLUMN(t)] = search->values[states[t]];
    }
}

static void search_item(int64_t item, void *scratch, void *context) {
    const struct search *search = context;
    int64_t first = item * search->group;
    int tiles = search->count - first < search->group ? (int)(search->count - first) : search->group;
    float x[MM_SEARCH_TILES * MM_TILE_WEIGHTS];
    uint16_t states[MOST_STEPS];
    uint32_t seam[MM_SEARCH_TILES];
    int nodes = nodes_at(search->rate2, 0);
    for (int tile = 0; tile < tiles; tile++)
        for (int t = 0; t < MM_TILE_WEIGHTS; t++)
            x[tile * MM_TILE_WEIGHTS + t] =
                search->tiles[(first + tile) * MM_TILE_WEIGHTS + MM_TILE_ROW(t) * MM_TILE + MM_TILE_COLUMN(t)];

    struct lap lap = {.search = search, .x = x, .tiles = tiles, .spare = scratch};
    lap.kept = lap.spare + 2 * slot_floats(search);
    lap.begin = MM_TILE_WEIGHTS - SEAM, lap.steps = 2 * SEAM, lap.back_to = SEAM;
    memset(costs_at(&lap, 0), 0, (size_t)tiles * (size_t)nodes * sizeof(float));
    go_forward(&lap);
    const float *costs = costs_at(&lap, lap.steps);
    for (int tile = 0; tile < tiles; tile++, costs += nodes) {
        uint32_t best = 0;
        for (int node = 1; node < nodes; node++)
            if (costs[node] < costs[best]) best = (uint32_t)node;
        seam[tile] = go_back(&lap, tile, best, states);
    }

    lap.begin = 0, lap.steps = MM_TILE_WEIGHTS, lap.back_to = 0;
    float *start = costs_at(&lap, 0);
    for (int i = 0; i < tiles * nodes; i++) start[i] = INFINITY;
    for (int tile = 0; tile < tiles; tile++) start[tile * nodes + (int)seam[tile]] = 0;
    go_forward(&lap);
    for (int tile = 0; tile < tiles; tile++) {
        uint32_t reached = go_back(&lap, tile, seam[tile], states);
        assert(reached == seam[tile]);
        (void)reached;
        write_tile(search, first + tile, states);
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
    struct search search = {
        .level = mm_search_level_of(mm_cpu), .tiles = tiles, .count = count, .rate2 = rate2, .group = 1, .stream = stream, .decoded = values};
    int most_bits = bits_at(rate2, 1);
    search.kept = CONE_BITS > most_bits ? CONE_BITS / most_bits : 1;
    search.values = values_of(codebook);
    float *ordered = mm_alloc(2 * MM_STATES * sizeof *ordered);
    bool done = search.values && ordered;
    if (done) {
        for (int odd = 0; odd < 2; odd++) {
            if (!odd || rate2 % 2)
                search.level->order(ordered + odd * MM_STATES, search.values, bits_at(rate2, odd), bits_at(rate2, odd + 1));
            search.ordered[odd] = ordered + (rate2 % 2 ? odd : 0) * MM_STATES;
        }
        size_t slots = (size_t)(MM_TILE_WEIGHTS / search.kept + 2);
        done = MM_PARALLEL(&search, {(count + search.group - 1) / search.group, (slots + 2) * slot_floats(&search) * sizeof(float), search_item});
    }
    mm_free(ordered);
    return done;
}
