/* Threads, scratch memory and strided rows for the CPU drivers. Owns how items are handed to threads: they are pulled
 * one by one, so experts with many tokens do not hold up the rest, and each item's result is the same whoever runs it. Phases
 * that need each other's results share one parallel region: waking a pool's sleeping threads costs more than a small layer. */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* sched_yield under -std=c11 */
#endif
#include <assert.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "cpu/cpu.h"

struct mm_threads mm_threads;

#define MM_ALIGNMENT ((size_t)64)

/* ---- memory ---- */

/* Large blocks that were freed are kept for the next call: from the system they would come as pages to be faulted in and zeroed, every
 * time, which for a prompt costs as much as a tenth of the layer. A slot is emptied or filled by one atomic step, so threads never wait
 * for each other, nor does a forked child for its parent's. */
struct block {
    _Alignas(64) size_t bytes; /* of what follows */
};
#define KEPT_BLOCKS 8
#define LEAST_KEPT_BYTES ((size_t)64 << 10)
#define MOST_KEPT_BYTES ((size_t)256 << 20) /* together: a chunk of pairs, a prompt's sums, and the like of other callers */

static _Atomic(struct block *) kept[KEPT_BLOCKS];
static atomic_size_t kept_bytes;

static void release(struct block *block) {
    if (!block) return;
    atomic_fetch_sub(&kept_bytes, block->bytes);
    free(block);
}

static struct block *take_kept(size_t bytes) {
    for (int i = 0; i < KEPT_BLOCKS; i++) {
        struct block *block = atomic_exchange(&kept[i], NULL), *none = NULL;
        if (!block) continue;
        if (block->bytes >= bytes && block->bytes / 4 <= bytes) {
            atomic_fetch_sub(&kept_bytes, block->bytes);
            return block;
        }
        if (!atomic_compare_exchange_strong(&kept[i], &none, block)) release(block); /* the slot was filled meanwhile */
    }
    return NULL;
}

static bool keep(struct block *block) {
#ifdef __SANITIZE_ADDRESS__ /* which would not see an access beyond what was asked for */
    return false;
#endif
    static atomic_uint turn;
    if (block->bytes < LEAST_KEPT_BYTES) return false;
    if (atomic_fetch_add(&kept_bytes, block->bytes) + block->bytes > MOST_KEPT_BYTES) {
        atomic_fetch_sub(&kept_bytes, block->bytes);
        return false;
    }
    for (int i = 0; i < KEPT_BLOCKS; i++) {
        struct block *none = NULL;
        if (atomic_compare_exchange_strong(&kept[i], &none, block)) return true;
    }
    release(atomic_exchange(&kept[atomic_fetch_add(&turn, 1) % KEPT_BLOCKS], block)); /* sizes that nobody asks for make room */
    return true;
}

void *mm_alloc(size_t bytes) {
    if (bytes > SIZE_MAX - 2 * MM_ALIGNMENT) return NULL;
    bytes = (bytes + MM_ALIGNMENT) / MM_ALIGNMENT * MM_ALIGNMENT;
    struct block *block = bytes < LEAST_KEPT_BYTES ? NULL : take_kept(bytes);
    if (!block) {
        block = aligned_alloc(MM_ALIGNMENT, sizeof *block + bytes);
        if (!block) return NULL;
        block->bytes = bytes;
    }
    return block + 1;
}

void mm_free(void *memory) {
    if (!memory) return;
    struct block *block = (struct block *)memory - 1;
    if (!keep(block)) free(block);
}

/* ---- threads ---- */

#define MOST_PHASES 8

/* How far a phase is; on a cache line of its own, since every thread writes to it. */
struct progress {
    _Alignas(64) atomic_int_fast64_t next, done;
};

struct pull {
    struct progress progress[MOST_PHASES];
    const struct mm_phase *phases;
    int phase_count;
    atomic_int_fast64_t next_worker;
    size_t scratch_bytes;
    char *scratch;
    void *context;
};

static void pause_a_little(int64_t turn) {
    if (turn >= 4096) {
        sched_yield(); /* more threads than processors: let the one that works go on */
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void work(int64_t begin, int64_t end, void *context) {
    struct pull *pull = context;
    (void)begin, (void)end; /* one index is one worker, however the pool cut the range */
    int64_t worker = (int64_t)atomic_fetch_add(&pull->next_worker, 1);
    char *scratch = pull->scratch + (size_t)worker * pull->scratch_bytes;
    for (int p = 0; p < pull->phase_count; p++) {
        struct progress *progress = &pull->progress[p];
        const struct mm_phase *phase = &pull->phases[p];
        for (;;) {
            int64_t item = (int64_t)atomic_fetch_add(&progress->next, 1);
            if (item >= phase->count) break;
            phase->body(item, scratch, pull->context);
            atomic_fetch_add(&progress->done, 1);
        }
        /* Only for items that running threads are at: a thread that the pool starts late, or never, holds nobody up. After the last
         * phase too: else the pool might put the thread to sleep for the moment that the others still need. */
        for (int64_t turn = 0; atomic_load(&progress->done) < phase->count; turn++) pause_a_little(turn);
    }
}

bool mm_parallel(const struct mm_phase *phases, int count, void *context) {
    struct pull pull = {.phases = phases, .phase_count = count, .context = context};
    int64_t workers = mm_threads.count(), most = 0;
    assert(count <= MOST_PHASES);
    for (int p = 0; p < count; p++) {
        if (phases[p].count > most) most = phases[p].count;
        if (phases[p].scratch_bytes > pull.scratch_bytes) pull.scratch_bytes = phases[p].scratch_bytes;
    }
    if (most <= 0) return true;
    if (workers > most) workers = most;
    if (workers < 1) workers = 1;
    /* A whole number of cache lines, so that two threads never write to one. */
    pull.scratch_bytes = (pull.scratch_bytes + MM_ALIGNMENT - 1) / MM_ALIGNMENT * MM_ALIGNMENT;
    pull.scratch = mm_alloc((size_t)workers * pull.scratch_bytes);
    if (!pull.scratch) return false;
    if (workers == 1)
        work(0, 1, &pull);
    else
        mm_threads.run(0, workers, 1, work, &pull);
    mm_free(pull.scratch);
    return true;
}

const void *mm_rows_at(const struct mm_rows *rows, int64_t row) {
    int64_t offset = 0;
    for (int d = rows->lead_dims - 1; d >= 0; d--) {
        offset += row % rows->sizes[d] * rows->strides[d];
        row /= rows->sizes[d];
    }
    return (const char *)rows->data + offset * (int64_t)mm_float_bytes(rows->type);
}

struct mm_weight mm_stack_weight(const struct mm_stack *stack, int64_t expert) {
    const int64_t *row = stack->table + 3 * expert;
    struct mm_weight weight = {
        .tiles = stack->tiles + 2 * row[0],
        .suh = stack->suh + expert * stack->k,
        .svh = stack->svh + expert * stack->n,
        .bias = stack->bias ? stack->bias + expert * stack->n : NULL,
        .k = stack->k,
        .n = stack->n,
        .rate2 = (int)row[1],
        .codebook = (int)row[2],
    };
    return weight;
}
