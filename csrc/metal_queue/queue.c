/* Kernels, shared buffers, events, queues and command buffers over Metal. See metal_queue/queue.h.
 * Every function that sends messages opens a pool; every object that is kept is counted by mm_metal_own or mm_metal_retain. */
#include "metal_queue/queue.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void mm_metal_device_describe(mm_id device, struct mm_metal_device_facts *facts) {
    void *pool = mm_metal_pool_open();
    const char *name = MM_ASK(utf8, MM_ASK(name, device));
    snprintf(facts->name, sizeof facts->name, "%s", name ? name : "unnamed");
    facts->unified_memory = MM_ASK(unified_memory, device);
    facts->working_set_bytes = MM_ASK(working_set, device);
    facts->max_buffer_bytes = MM_ASK(max_buffer, device);
    mm_metal_pool_close(pool);
}

/* ---- kernels ---- */

static mm_id compile(mm_id device, const char *source, struct mm_metal_problem *problem) {
    mm_id error = NULL, text = mm_metal_string(source);
    if (!text) return mm_metal_fail(problem, "source is not UTF-8 text"), NULL;
    mm_id library = mm_metal_own(MM_SEND(new_library, device, text, NULL, &error));
    mm_metal_release(text);
    if (!library) {
        mm_metal_fail(problem, "the Metal compiler refused the source: ");
        mm_metal_explain(problem, error);
    }
    return library; /* an error beside a library is a warning */
}

static mm_id find_function(mm_id library, const char *name, struct mm_metal_problem *problem) {
    mm_id text = mm_metal_string(name);
    mm_id function = text ? mm_metal_own(MM_SEND(new_function, library, text)) : NULL;
    mm_metal_release(text);
    if (!function) mm_metal_fail(problem, "name is '%s'; expected a kernel of the source", name);
    return function;
}

struct mm_metal_pipeline *mm_metal_pipeline_new(mm_id device, const char *source, const char *name,
                                                struct mm_metal_problem *problem) {
    void *pool = mm_metal_pool_open();
    struct mm_metal_pipeline *made = NULL;
    mm_id error = NULL, state = NULL, library = compile(device, source, problem);
    mm_id function = library ? find_function(library, name, problem) : NULL;
    if (function) {
        state = mm_metal_own(MM_SEND(new_pipeline, device, function, &error));
        if (!state) {
            mm_metal_fail(problem, "no pipeline could be made of the kernel '%.200s': ", name);
            mm_metal_explain(problem, error);
        }
    }
    mm_metal_release(function);
    mm_metal_release(library);
    if (state) {
        made = malloc(sizeof *made);
        if (made) {
            *made = (struct mm_metal_pipeline){state, MM_ASK(max_threads, state), MM_ASK(simd_width, state)};
        } else {
            mm_metal_release(state);
            mm_metal_fail(problem, "out of memory for a pipeline");
        }
    }
    mm_metal_pool_close(pool);
    return made;
}

void mm_metal_pipeline_free(struct mm_metal_pipeline *pipeline) {
    if (pipeline) mm_metal_release(pipeline->pipeline);
    free(pipeline);
}

/* ---- buffers ---- */

struct mm_metal_buffer *mm_metal_buffer_new(mm_id device, uint64_t bytes, struct mm_metal_problem *problem) {
    const mm_uinteger shared = 0; /* MTLResourceStorageModeShared, default cache mode, hazards tracked */
    void *pool = mm_metal_pool_open();
    struct mm_metal_buffer *made = malloc(sizeof *made);
    mm_id buffer = made ? mm_metal_own(MM_SEND(new_buffer, device, bytes, shared)) : NULL;
    void *contents = MM_ASK(contents, buffer);
    if (made && contents) {
        memset(contents, 0, bytes); /* newBufferWithLength promises zeros only in words */
        *made = (struct mm_metal_buffer){buffer, contents, bytes};
    } else {
        mm_metal_fail(problem, "Metal has no buffer of %llu bytes; it may be out of memory", (unsigned long long)bytes);
        mm_metal_release(buffer);
        free(made);
        made = NULL;
    }
    mm_metal_pool_close(pool);
    return made;
}

void mm_metal_buffer_free(struct mm_metal_buffer *buffer) {
    if (buffer) mm_metal_release(buffer->buffer);
    free(buffer);
}

/* ---- events ---- */

mm_id mm_metal_event_new(mm_id device, struct mm_metal_problem *problem) {
    void *pool = mm_metal_pool_open();
    mm_id event = mm_metal_own(MM_ASK(new_event, device));
    mm_metal_pool_close(pool);
    if (!event) mm_metal_fail(problem, "Metal made no shared event");
    return event;
}

uint64_t mm_metal_event_value(mm_id event) {
    void *pool = mm_metal_pool_open();
    uint64_t value = MM_ASK(signaled, event);
    mm_metal_pool_close(pool);
    return value;
}

void mm_metal_event_set(mm_id event, uint64_t value) {
    void *pool = mm_metal_pool_open();
    MM_SEND(set_signaled, event, value);
    mm_metal_pool_close(pool);
}

/* A message that an object does not know ends the process: this one came with macOS 12. */
enum mm_metal_waited mm_metal_event_wait(mm_id event, uint64_t value, uint64_t milliseconds) {
    void *pool = mm_metal_pool_open();
    enum mm_metal_waited waited = MM_METAL_CANNOT_WAIT;
    if (MM_SEND(responds, event, mm_metal_selector.wait_signaled))
        waited = MM_SEND(wait_signaled, event, value, milliseconds) ? MM_METAL_REACHED : MM_METAL_NOT_YET;
    mm_metal_pool_close(pool);
    return waited;
}

/* ---- queues ---- */

struct mm_metal_queue *mm_metal_queue_new(mm_id device, int limit, struct mm_metal_problem *problem) {
    void *pool = mm_metal_pool_open();
    struct mm_metal_queue *made = malloc(sizeof *made);
    struct mm_metal_in_flight *in_flight = mm_metal_in_flight_new(limit);
    mm_id queue = made && in_flight ? mm_metal_own(MM_SEND(new_queue, device, (mm_uinteger)limit)) : NULL;
    mm_metal_pool_close(pool);
    if (queue) {
        *made = (struct mm_metal_queue){queue, limit, in_flight};
        return made;
    }
    mm_metal_fail(problem, "Metal made no command queue");
    mm_metal_in_flight_drop(in_flight);
    free(made);
    return NULL;
}

void mm_metal_queue_free(struct mm_metal_queue *queue) {
    if (!queue) return;
    mm_metal_release(queue->queue);
    mm_metal_in_flight_drop(queue->in_flight);
    free(queue);
}

/* ---- command buffers ---- */

struct mm_metal_commands *mm_metal_commands_new(struct mm_metal_queue *queue, struct mm_metal_problem *problem) {
    /* [queue commandBuffer] waits while all are in use; if none of them has been committed, for ever. */
    if (!mm_metal_in_flight_enter(queue->in_flight))
        return mm_metal_fail(problem,
                             "the queue has %d command buffers that have not completed; expected fewer than its limit of %d",
                             queue->limit, queue->limit),
               NULL;
    void *pool = mm_metal_pool_open();
    struct mm_metal_commands *made = calloc(1, sizeof *made);
    struct mm_metal_completion *completion = mm_metal_completion_new(queue->in_flight);
    mm_id buffer = made && completion ? mm_metal_retain(MM_ASK(command_buffer, queue->queue)) : NULL;
    if (buffer) {
        mm_metal_completion_attach(completion, buffer);
        made->buffer = buffer;
        made->completion = completion;
        made->in_flight = queue->in_flight; /* alive as long as the completion, which holds it */
        atomic_init(&made->phase, MM_METAL_ENCODING);
    }
    mm_metal_pool_close(pool);
    if (buffer) return made;
    mm_metal_fail(problem, "Metal made no command buffer");
    mm_metal_in_flight_leave(queue->in_flight);
    mm_metal_completion_drop(completion);
    free(made);
    return NULL;
}

static void close_encoder(struct mm_metal_commands *commands) {
    void *pool = mm_metal_pool_open();
    MM_ASK(end_encoding, commands->encoder);
    mm_metal_release(commands->encoder);
    mm_metal_pool_close(pool);
    commands->encoder = NULL;
}

void mm_metal_commands_free(struct mm_metal_commands *commands) {
    if (!commands) return;
    if (commands->encoder) close_encoder(commands); /* Metal ends the process when an open one is released */
    /* Once committed, its handler gives the place back. */
    if (atomic_load(&commands->phase) == MM_METAL_ENCODING) mm_metal_in_flight_leave(commands->in_flight);
    void *pool = mm_metal_pool_open();
    mm_metal_release(commands->buffer);
    mm_metal_pool_close(pool);
    mm_metal_completion_drop(commands->completion);
    free(commands);
}

static bool may(struct mm_metal_commands *commands, bool encoding, const char *what, struct mm_metal_problem *problem) {
    if (atomic_load(&commands->phase) != MM_METAL_ENCODING)
        return mm_metal_fail(problem, "%s: the command buffer has been committed; expected one that has not", what);
    if (encoding && !commands->encoder)
        return mm_metal_fail(problem, "%s: no encoder is open; expected begin() before it", what);
    if (!encoding && commands->encoder) return mm_metal_fail(problem, "%s: an encoder is open; expected end() before it", what);
    return true;
}

bool mm_metal_commands_begin(struct mm_metal_commands *commands, struct mm_metal_problem *problem) {
    if (!may(commands, false, "begin", problem)) return false;
    void *pool = mm_metal_pool_open();
    commands->encoder = mm_metal_retain(MM_ASK(compute_encoder, commands->buffer));
    mm_metal_pool_close(pool);
    return commands->encoder || mm_metal_fail(problem, "Metal made no compute encoder");
}

bool mm_metal_commands_dispatch(struct mm_metal_commands *commands, const struct mm_metal_pipeline *pipeline,
                                const struct mm_metal_argument *arguments, int argument_count, struct mm_metal_size grid,
                                struct mm_metal_size group, int64_t count, struct mm_metal_problem *problem) {
    if (!may(commands, true, "dispatch", problem)) return false;
    void *pool = mm_metal_pool_open();
    mm_id encoder = commands->encoder;
    MM_SEND(set_pipeline, encoder, pipeline->pipeline);
    for (int i = 0; i < argument_count; i++) {
        if (arguments[i].buffer)
            MM_SEND(set_buffer, encoder, arguments[i].buffer, 0, (mm_uinteger)i);
        else if (arguments[i].bytes)
            MM_SEND(set_bytes, encoder, arguments[i].bytes, arguments[i].length, (mm_uinteger)i);
    }
    for (int64_t i = 0; i < count; i++) MM_SEND(dispatch_threads, encoder, grid, group);
    mm_metal_pool_close(pool);
    return true;
}

bool mm_metal_commands_end(struct mm_metal_commands *commands, struct mm_metal_problem *problem) {
    if (!may(commands, true, "end", problem)) return false;
    close_encoder(commands);
    return true;
}

bool mm_metal_commands_signal(struct mm_metal_commands *commands, mm_id event, uint64_t value,
                              struct mm_metal_problem *problem) {
    if (!may(commands, false, "signal", problem)) return false;
    void *pool = mm_metal_pool_open();
    MM_SEND(encode_signal, commands->buffer, event, value);
    mm_metal_pool_close(pool);
    return true;
}

bool mm_metal_commands_wait_for(struct mm_metal_commands *commands, mm_id event, uint64_t value,
                                struct mm_metal_problem *problem) {
    if (!may(commands, false, "wait_for", problem)) return false;
    void *pool = mm_metal_pool_open();
    MM_SEND(encode_wait, commands->buffer, event, value);
    mm_metal_pool_close(pool);
    return true;
}

bool mm_metal_commands_claim(struct mm_metal_commands *commands, struct mm_metal_problem *problem) {
    if (!may(commands, false, "commit", problem)) return false;
    atomic_store(&commands->phase, MM_METAL_COMMITTING);
    return true;
}

void mm_metal_commands_commit(struct mm_metal_commands *commands) {
    void *pool = mm_metal_pool_open();
    commands->committing_ns = mm_metal_clock();
    MM_ASK(commit, commands->buffer);
    commands->committed_ns = mm_metal_clock();
    atomic_store(&commands->phase, MM_METAL_COMMITTED);
    mm_metal_pool_close(pool);
}

void mm_metal_commands_block(struct mm_metal_commands *commands) {
    assert(atomic_load(&commands->phase) == MM_METAL_COMMITTED);
    void *pool = mm_metal_pool_open();
    MM_ASK(wait_completed, commands->buffer);
    mm_metal_pool_close(pool);
}

/* X(MTLCommandBufferStatus, name), in its order from 0 */
#define STATUSES(X) \
    X(NOT_ENQUEUED, "not enqueued") X(ENQUEUED, "enqueued") X(COMMITTED, "committed") X(SCHEDULED, "scheduled") \
    X(COMPLETED, "completed") X(ERROR, "error")
enum {
#define X(id, name) STATUS_##id,
    STATUSES(X)
#undef X
    STATUS_COUNT
};

const char *mm_metal_commands_status(struct mm_metal_commands *commands) {
    static const char *const names[] = {
#define X(id, name) name,
        STATUSES(X)
#undef X
    };
    void *pool = mm_metal_pool_open();
    mm_uinteger status = MM_ASK(status, commands->buffer);
    mm_metal_pool_close(pool);
    return status < STATUS_COUNT ? names[status] : "unknown";
}

bool mm_metal_commands_succeeded(struct mm_metal_commands *commands, struct mm_metal_problem *problem) {
    void *pool = mm_metal_pool_open();
    bool failed = MM_ASK(status, commands->buffer) == STATUS_ERROR;
    if (failed) {
        mm_metal_fail(problem, "the command buffer ended in an error: ");
        mm_metal_explain(problem, MM_ASK(error, commands->buffer));
    }
    mm_metal_pool_close(pool);
    return !failed;
}

static uint64_t nanoseconds(double seconds) { return seconds > 0 ? (uint64_t)(seconds * 1e9 + 0.5) : 0; }

void mm_metal_commands_times(struct mm_metal_commands *commands, struct mm_metal_times *times) {
    void *pool = mm_metal_pool_open();
    *times = (struct mm_metal_times){
        .committing_ns = commands->committing_ns,
        .committed_ns = commands->committed_ns,
        .kernel_start_ns = nanoseconds(MM_ASK(kernel_start, commands->buffer)),
        .kernel_end_ns = nanoseconds(MM_ASK(kernel_end, commands->buffer)),
        .gpu_start_ns = nanoseconds(MM_ASK(gpu_start, commands->buffer)),
        .gpu_end_ns = nanoseconds(MM_ASK(gpu_end, commands->buffer)),
    };
    mm_metal_pool_close(pool);
    mm_metal_completion_times(commands->completion, &times->scheduled_ns, &times->completed_ns);
}
