/* Completion handlers as blocks built by hand, and waiting for them. See metal_queue/completion.h.
 * Handlers run on threads of Metal's: they note the time, wake waiters and leave. No Python, no Objective-C in them. */
#define _GNU_SOURCE /* clock_gettime, under -std=c11 */
#include "metal_queue/completion.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

/* ---- places in flight ---- */

struct mm_metal_in_flight {
    atomic_int references, taken;
    int limit;
};

struct mm_metal_in_flight *mm_metal_in_flight_new(int limit) {
    struct mm_metal_in_flight *in_flight = malloc(sizeof *in_flight);
    if (!in_flight) return NULL;
    atomic_init(&in_flight->references, 1);
    atomic_init(&in_flight->taken, 0);
    in_flight->limit = limit;
    mm_metal_count(1);
    return in_flight;
}

void mm_metal_in_flight_drop(struct mm_metal_in_flight *in_flight) {
    if (!in_flight || atomic_fetch_sub(&in_flight->references, 1) != 1) return;
    free(in_flight);
    mm_metal_count(-1);
}

bool mm_metal_in_flight_enter(struct mm_metal_in_flight *in_flight) {
    if (atomic_fetch_add(&in_flight->taken, 1) < in_flight->limit) return true;
    atomic_fetch_sub(&in_flight->taken, 1);
    return false;
}

void mm_metal_in_flight_leave(struct mm_metal_in_flight *in_flight) { atomic_fetch_sub(&in_flight->taken, 1); }

/* ---- completions ---- */

struct mm_metal_completion {
    atomic_int references;
    pthread_mutex_t lock;
    pthread_cond_t completed;
    uint64_t scheduled_ns, completed_ns; /* 0: not yet */
    struct mm_metal_in_flight *in_flight;
};

struct mm_metal_completion *mm_metal_completion_new(struct mm_metal_in_flight *in_flight) {
    struct mm_metal_completion *completion = calloc(1, sizeof *completion);
    if (!completion) return NULL;
    atomic_init(&completion->references, 1);
    pthread_mutex_init(&completion->lock, NULL);
    pthread_cond_init(&completion->completed, NULL);
    atomic_fetch_add(&in_flight->references, 1);
    completion->in_flight = in_flight;
    mm_metal_count(1);
    return completion;
}

void mm_metal_completion_drop(struct mm_metal_completion *completion) {
    if (!completion || atomic_fetch_sub(&completion->references, 1) != 1) return;
    mm_metal_in_flight_drop(completion->in_flight);
    pthread_cond_destroy(&completion->completed);
    pthread_mutex_destroy(&completion->lock);
    free(completion);
    mm_metal_count(-1);
}

/* The pthread clock that every system has is the calendar's. Whoever steps it can lengthen one of these waits, so they are
 * short, and time that has passed is taken from a clock that nobody steps. */
static void wait_a_little(struct mm_metal_completion *completion, uint64_t nanoseconds) {
    const uint64_t most = 50000000;
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    uint64_t after = (uint64_t)until.tv_nsec + (nanoseconds < most ? nanoseconds : most);
    until.tv_sec += (time_t)(after / 1000000000u);
    until.tv_nsec = (long)(after % 1000000000u);
    pthread_cond_timedwait(&completion->completed, &completion->lock, &until);
}

bool mm_metal_completion_wait(struct mm_metal_completion *completion, uint64_t deadline_ns) {
    pthread_mutex_lock(&completion->lock);
    for (uint64_t now; !completion->completed_ns && (now = mm_metal_clock()) < deadline_ns;)
        wait_a_little(completion, deadline_ns - now);
    bool done = completion->completed_ns != 0;
    pthread_mutex_unlock(&completion->lock);
    return done;
}

void mm_metal_completion_times(struct mm_metal_completion *completion, uint64_t *scheduled_ns, uint64_t *completed_ns) {
    pthread_mutex_lock(&completion->lock);
    *scheduled_ns = completion->scheduled_ns;
    *completed_ns = completion->completed_ns;
    pthread_mutex_unlock(&completion->lock);
}

/* ---- blocks (clang's "Block Implementation Specification") ----
 * What a compiler makes of ^(id buffer) { ... completion ... }: a struct on the stack whose first word says so. Metal keeps it
 * by _Block_copy, which copies `size` bytes to the heap and calls `copy`; when it lets go, the runtime calls `dispose`. */

enum { HAS_COPY_DISPOSE = 1 << 25, HAS_SIGNATURE = 1 << 30 };

struct block {
    void *isa;
    int flags, reserved;
    void (*invoke)(struct block *block, mm_id command_buffer);
    const struct descriptor *descriptor;
    struct mm_metal_completion *completion;
};

struct descriptor {
    unsigned long reserved, size;
    void (*copy)(struct block *to, const struct block *from);
    void (*dispose)(struct block *block);
    const char *signature;
};

static void copy_block(struct block *to, const struct block *from) {
    to->completion = from->completion;
    atomic_fetch_add(&to->completion->references, 1);
}

static void dispose_block(struct block *block) { mm_metal_completion_drop(block->completion); }

/* Encoded type: void, 16 bytes of arguments: the block at 0, an object at 8. */
static const struct descriptor descriptor = {0, sizeof(struct block), copy_block, dispose_block, "v16@?0@8"};

static void on_scheduled(struct block *block, mm_id command_buffer) {
    uint64_t now = mm_metal_clock();
    struct mm_metal_completion *completion = block->completion;
    (void)command_buffer;
    pthread_mutex_lock(&completion->lock);
    completion->scheduled_ns = now;
    pthread_mutex_unlock(&completion->lock);
}

static void on_completed(struct block *block, mm_id command_buffer) {
    uint64_t now = mm_metal_clock();
    struct mm_metal_completion *completion = block->completion;
    (void)command_buffer;
    mm_metal_in_flight_leave(completion->in_flight);
    pthread_mutex_lock(&completion->lock);
    completion->completed_ns = now;
    pthread_cond_broadcast(&completion->completed);
    pthread_mutex_unlock(&completion->lock);
}

void mm_metal_completion_attach(struct mm_metal_completion *completion, mm_id command_buffer) {
    const int flags = HAS_COPY_DISPOSE | HAS_SIGNATURE;
    struct block block = {mm_metal._NSConcreteStackBlock, flags, 0, on_scheduled, &descriptor, completion};
    MM_SEND(add_scheduled, command_buffer, &block);
    block.invoke = on_completed;
    MM_SEND(add_completed, command_buffer, &block);
}
