/* Threads, scratch memory and strided rows for the CPU drivers. Owns how items are handed to threads: they are pulled
 * one by one, so experts with many tokens do not hold up the rest, and each item's result is the same whoever runs it. */
#include <stdatomic.h>
#include <stdlib.h>

#include "cpu/cpu.h"

struct mm_threads mm_threads;

#define MM_ALIGNMENT ((size_t)64)

void *mm_alloc(size_t bytes) {
    if (bytes > SIZE_MAX - MM_ALIGNMENT) return NULL;
    return aligned_alloc(MM_ALIGNMENT, (bytes + MM_ALIGNMENT) / MM_ALIGNMENT * MM_ALIGNMENT);
}

void mm_free(void *memory) { free(memory); }

struct pull {
    atomic_int_fast64_t next_item, next_worker;
    int64_t count;
    size_t scratch_bytes;
    char *scratch;
    mm_item body;
    void *context;
};

static void work(int64_t begin, int64_t end, void *context) {
    struct pull *pull = context;
    (void)begin, (void)end; /* one index is one worker, however the pool cut the range */
    int64_t worker = (int64_t)atomic_fetch_add(&pull->next_worker, 1);
    char *scratch = pull->scratch + (size_t)worker * pull->scratch_bytes;
    for (;;) {
        int64_t item = (int64_t)atomic_fetch_add(&pull->next_item, 1);
        if (item >= pull->count) return;
        pull->body(item, scratch, pull->context);
    }
}

bool mm_parallel(int64_t count, size_t scratch_bytes, mm_item body, void *context) {
    if (count <= 0) return true;
    int64_t workers = mm_threads.count();
    if (workers > count) workers = count;
    if (workers < 1) workers = 1;
    /* A whole number of cache lines, so that two threads never write to one. */
    scratch_bytes = (scratch_bytes + MM_ALIGNMENT - 1) / MM_ALIGNMENT * MM_ALIGNMENT;
    char *scratch = mm_alloc((size_t)workers * scratch_bytes);
    if (!scratch) return false;
    struct pull pull = {0, 0, count, scratch_bytes, scratch, body, context};
    if (workers == 1)
        work(0, 1, &pull);
    else
        mm_threads.run(0, workers, 1, work, &pull);
    mm_free(scratch);
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
