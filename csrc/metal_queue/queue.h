/* Work on Metal queues of our own, next to PyTorch's stream: kernels, shared buffers, command buffers, events.
 * Knows no Python. Objects are independent: Metal itself keeps what a committed command buffer uses. Functions that can fail
 * write the problem and return NULL or false. Not for two threads at a time on one command buffer, but for waiting. */
#ifndef MM_METAL_QUEUE_H
#define MM_METAL_QUEUE_H

#include <stdatomic.h>

#include "metal_queue/completion.h"
#include "metal_queue/runtime.h"

#define MM_METAL_SLOTS 31         /* buffer(0) to buffer(30) */
#define MM_METAL_MAX_BYTES 4096   /* of setBytes */
#define MM_METAL_MAX_IN_FLIGHT 64 /* command buffers of a queue, by default; Metal's own default too */

struct mm_metal_device_facts {
    char name[128];
    bool unified_memory;
    uint64_t working_set_bytes, max_buffer_bytes;
};
void mm_metal_device_describe(mm_id device, struct mm_metal_device_facts *facts);

struct mm_metal_pipeline {
    mm_id pipeline;
    uint64_t max_threads, simd_width;
};
/* Compiles `source` and makes a pipeline of its kernel `name`. */
struct mm_metal_pipeline *mm_metal_pipeline_new(mm_id device, const char *source, const char *name,
                                                struct mm_metal_problem *problem);
void mm_metal_pipeline_free(struct mm_metal_pipeline *pipeline);

struct mm_metal_buffer {
    mm_id buffer;
    void *contents; /* the same memory for CPU and GPU; zero at first */
    uint64_t bytes;
};
struct mm_metal_buffer *mm_metal_buffer_new(mm_id device, uint64_t bytes, struct mm_metal_problem *problem);
void mm_metal_buffer_free(struct mm_metal_buffer *buffer);

/* An MTLSharedEvent, retained. */
mm_id mm_metal_event_new(mm_id device, struct mm_metal_problem *problem);
uint64_t mm_metal_event_value(mm_id event);
void mm_metal_event_set(mm_id event, uint64_t value);
enum mm_metal_waited { MM_METAL_REACHED, MM_METAL_NOT_YET, MM_METAL_CANNOT_WAIT };
enum mm_metal_waited mm_metal_event_wait(mm_id event, uint64_t value, uint64_t milliseconds);

struct mm_metal_queue {
    mm_id queue;
    int limit;
    struct mm_metal_in_flight *in_flight;
};
struct mm_metal_queue *mm_metal_queue_new(mm_id device, int limit, struct mm_metal_problem *problem);
void mm_metal_queue_free(struct mm_metal_queue *queue);

enum { MM_METAL_ENCODING, MM_METAL_COMMITTING, MM_METAL_COMMITTED };
struct mm_metal_commands {
    mm_id buffer, encoder; /* encoder: the open one, or NULL */
    atomic_int phase;
    uint64_t committing_ns, committed_ns; /* before and after the call of commit */
    struct mm_metal_completion *completion;
    struct mm_metal_in_flight *in_flight;
};
/* Fails rather than waits when the queue's command buffers are all in use. */
struct mm_metal_commands *mm_metal_commands_new(struct mm_metal_queue *queue, struct mm_metal_problem *problem);
/* In any state; what was committed runs to its end. */
void mm_metal_commands_free(struct mm_metal_commands *commands);

struct mm_metal_argument {
    mm_id buffer;      /* or, when NULL: */
    const void *bytes; /* copied; NULL too: this slot is not set */
    uint64_t length;
};
bool mm_metal_commands_begin(struct mm_metal_commands *commands, struct mm_metal_problem *problem);
/* Binds arguments to slots 0, 1, ... and encodes `count` dispatches of `grid` threads. The caller has checked sizes. */
bool mm_metal_commands_dispatch(struct mm_metal_commands *commands, const struct mm_metal_pipeline *pipeline,
                                const struct mm_metal_argument *arguments, int argument_count, struct mm_metal_size grid,
                                struct mm_metal_size group, int64_t count, struct mm_metal_problem *problem);
bool mm_metal_commands_end(struct mm_metal_commands *commands, struct mm_metal_problem *problem);
bool mm_metal_commands_signal(struct mm_metal_commands *commands, mm_id event, uint64_t value,
                              struct mm_metal_problem *problem);
bool mm_metal_commands_wait_for(struct mm_metal_commands *commands, mm_id event, uint64_t value,
                                struct mm_metal_problem *problem);

/* False: may not be committed now. Else nobody else may commit it or encode into it, and mm_metal_commands_commit has to
 * follow: so that the claim can be made under a lock, and the commit outside of it. */
bool mm_metal_commands_claim(struct mm_metal_commands *commands, struct mm_metal_problem *problem);
void mm_metal_commands_commit(struct mm_metal_commands *commands);
/* Metal's own waitUntilCompleted: as long as it takes. Committed command buffers only, as for what follows. */
void mm_metal_commands_block(struct mm_metal_commands *commands);
/* False: it ended in an error, which the problem tells. */
bool mm_metal_commands_succeeded(struct mm_metal_commands *commands, struct mm_metal_problem *problem);
const char *mm_metal_commands_status(struct mm_metal_commands *commands);

/* Nanoseconds on mm_metal_clock; 0: not there. X(name): `kernel`: when the system's driver handled it on the CPU. */
#define MM_METAL_TIMES(X)                                                                                                  \
    X(committing_ns) X(committed_ns) X(scheduled_ns) X(kernel_start_ns) X(kernel_end_ns) X(gpu_start_ns) X(gpu_end_ns) \
    X(completed_ns)
struct mm_metal_times {
#define X(name) uint64_t name;
    MM_METAL_TIMES(X)
#undef X
};
void mm_metal_commands_times(struct mm_metal_commands *commands, struct mm_metal_times *times);

#endif
