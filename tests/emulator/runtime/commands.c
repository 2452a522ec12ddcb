/* Metal's command queues, command buffers and encoders on the emulated GPU. Each queue runs what is committed to it in order, on
 * a thread of its own; queues run side by side and meet in shared events. Handlers run after waitUntilCompleted may have
 * returned, on the queue's thread. Every rule of the order of calls that Metal's validation has is a report here. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "metal.h"

enum { NOT_ENQUEUED, ENQUEUED, COMMITTED, SCHEDULED, COMPLETED, ERROR }; /* MTLCommandBufferStatus */
enum { MOST_HANDLERS = 8 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below; changes are broadcast */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static long unfinished; /* committed command buffers of all queues, up to the release of what they hold */

static void rule(const char *text) { emu_report(true, "metal", 0, "%s", text); }

struct timespec emu_deadline(double seconds) {
    struct timespec until;
    if (seconds > 1e6) seconds = 1e6;
    clock_gettime(CLOCK_REALTIME, &until);
    double nanoseconds = (double)until.tv_nsec + (seconds - (double)(time_t)seconds) * 1e9;
    until.tv_sec += (time_t)seconds + (nanoseconds >= 1e9);
    until.tv_nsec = (long)(nanoseconds >= 1e9 ? nanoseconds - 1e9 : nanoseconds);
    return until;
}

static double host_time(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

void emu_commands_changed(void) {
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* ---- objects ---- */

struct command {
    enum { DISPATCH, SIGNAL, WAIT } kind;
    struct emu_dispatch *dispatch;
    struct emu_event *event;
    uint64_t value;
};

struct buffer { /* MTLCommandBuffer */
    struct emu_objc head;
    struct queue *queue;
    struct buffer *next; /* in its queue's list */
    int status;
    bool encoding; /* an encoder is open */
    struct command *commands;
    size_t command_count, command_room;
    void **held; /* retained until it has completed */
    size_t held_count, held_room;
    struct emu_block *scheduled[MOST_HANDLERS], *completed[MOST_HANDLERS];
    int scheduled_count, completed_count;
    double kernel_start, kernel_end, gpu_start, gpu_end;
    struct emu_error *error;
};

struct stream { /* a queue's thread; outlives the object until the thread has seen that */
    struct buffer *first, **last;
    bool closed;
};

struct queue {
    struct emu_objc head;
    struct emu_objc *device;
    struct stream *stream;
    uint64_t limit, in_use; /* command buffers that have neither completed nor been freed */
};

struct encoder {
    struct emu_objc head;
    struct buffer *buffer;
    struct emu_pipeline *pipeline;
    struct emu_bound bound[EMU_BUFFERS];
    bool ended;
};

static void hold(struct buffer *buffer, void *object) {
    if (buffer->held_count == buffer->held_room) {
        buffer->held_room = buffer->held_room ? 2 * buffer->held_room : 8;
        buffer->held = realloc(buffer->held, buffer->held_room * sizeof *buffer->held);
        if (!buffer->held) abort();
    }
    buffer->held[buffer->held_count++] = emu_objc_retain(object);
}

static void add_command(struct buffer *buffer, struct command command) {
    if (buffer->command_count == buffer->command_room) {
        buffer->command_room = buffer->command_room ? 2 * buffer->command_room : 8;
        buffer->commands = realloc(buffer->commands, buffer->command_room * sizeof *buffer->commands);
        if (!buffer->commands) abort();
    }
    buffer->commands[buffer->command_count++] = command;
}

/* ---- encoders ---- */

static bool may_encode(struct encoder *self, const char *selector) {
    if (!self->ended) return true;
    emu_report(true, "metal", 0, "%s is sent to an encoder after endEncoding", selector);
    return false;
}

static void encoder_pipeline(struct encoder *self, const char *selector, struct emu_pipeline *pipeline) {
    if (!may_encode(self, selector) || !emu_objc_is(pipeline, &emu_MTLComputePipelineState, selector)) return;
    hold(self->buffer, pipeline);
    self->pipeline = pipeline;
}

static struct emu_bound *slot(struct encoder *self, const char *selector, uint64_t index) {
    if (!may_encode(self, selector)) return NULL;
    if (index >= EMU_BUFFERS) return rule("a buffer index above 30"), NULL;
    free(self->bound[index].bytes);
    self->bound[index] = (struct emu_bound){.set = false};
    return &self->bound[index];
}

static void encoder_buffer(struct encoder *self, const char *selector, struct emu_buffer *buffer, uint64_t offset, uint64_t index) {
    struct emu_bound *bound = slot(self, selector, index);
    if (!bound || !emu_objc_is(buffer, &emu_MTLBuffer, selector)) return;
    if (offset >= buffer->bytes) {
        rule("setBuffer:offset: has an offset beyond the buffer's end");
        return;
    }
    hold(self->buffer, buffer);
    /* Bytes, which may be read as anything; one value, where one is expected. */
    *bound = (struct emu_bound){.set = true, .is_tensor = true, .data = buffer->memory + offset, .size = buffer->bytes - offset,
                                .numel = 1, .dims = 1};
}

static void encoder_bytes(struct encoder *self, const char *selector, const void *bytes, uint64_t length, uint64_t index) {
    struct emu_bound *bound = slot(self, selector, index);
    if (!bound) return;
    if (!bytes || !length || length > 4096) {
        rule("setBytes:length: takes 1 to 4096 bytes");
        return;
    }
    emu_bound_bytes(bound, bytes, length);
}

struct size {
    uint64_t extents[3];
};

static void encoder_dispatch(struct encoder *self, const char *selector, struct size grid, struct size group) {
    if (!may_encode(self, selector)) return;
    if (!self->pipeline) {
        rule("dispatchThreads: before setComputePipelineState:");
        return;
    }
    const struct emu_pipeline *pipeline = self->pipeline;
    struct emu_dispatch *made =
        emu_dispatch_new(pipeline->object, pipeline->kernel, pipeline->check, self->bound, grid.extents, group.extents);
    if (made) add_command(self->buffer, (struct command){DISPATCH, made, NULL, 0});
}

static void encoder_end(struct encoder *self, const char *selector) {
    if (!may_encode(self, selector)) return;
    self->ended = true;
    self->buffer->encoding = false;
}

static void encoder_dealloc(void *object) {
    struct encoder *encoder = object;
    if (!encoder->ended) rule("an encoder is freed without endEncoding, which ends the process on a Mac");
    for (int i = 0; i < EMU_BUFFERS; i++) free(encoder->bound[i].bytes);
    emu_objc_release(encoder->buffer);
}

static const struct emu_method encoder_methods[] = {
    EMU_METHOD("setComputePipelineState:", encoder_pipeline),
    EMU_METHOD("setBuffer:offset:atIndex:", encoder_buffer),
    EMU_METHOD("setBytes:length:atIndex:", encoder_bytes),
    EMU_METHOD("dispatchThreads:threadsPerThreadgroup:", encoder_dispatch),
    EMU_METHOD("endEncoding", encoder_end),
    {NULL, NULL}};
static struct emu_class emu_MTLComputeCommandEncoder = {NULL, "MTLComputeCommandEncoder", encoder_methods, encoder_dealloc};

/* ---- running ---- */

static void call_handlers(struct emu_block **handlers, int *count, struct buffer *buffer) {
    for (int i = 0; i < *count; i++) {
        emu_block_call(handlers[i], buffer);
        emu_block_release(handlers[i]);
    }
    *count = 0;
}

static void set_status(struct buffer *buffer, int status) {
    pthread_mutex_lock(&lock);
    buffer->status = status;
    if (status >= COMPLETED) buffer->queue->in_use--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

/* Frees the dispatches that were not run. */
static void drop_commands(struct buffer *buffer) {
    for (size_t i = 0; i < buffer->command_count; i++)
        if (buffer->commands[i].dispatch) emu_dispatch_free(buffer->commands[i].dispatch);
    for (size_t i = 0; i < buffer->held_count; i++) emu_objc_release(buffer->held[i]);
    free(buffer->commands);
    free(buffer->held);
    buffer->commands = NULL;
    buffer->held = NULL;
    buffer->command_count = buffer->held_count = 0;
}

static void run_command(struct command *command) {
    struct emu_dispatch *dispatch = command->dispatch;
    command->dispatch = NULL;
    switch (command->kind) {
        case DISPATCH: emu_dispatch_run(dispatch); break;
        case SIGNAL: emu_event_signal(command->event, command->value); break;
        case WAIT:
            while (!emu_event_await(command->event, command->value, 1000)) continue;
    }
}

static void run_buffer(struct buffer *buffer) {
    void *pool = objc_autoreleasePoolPush();
    buffer->kernel_start = host_time();
    set_status(buffer, SCHEDULED);
    buffer->kernel_end = host_time();
    call_handlers(buffer->scheduled, &buffer->scheduled_count, buffer);
    pthread_mutex_lock(&lock);
    while (atomic_load(&emu_faults.stall)) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    bool fails = atomic_load(&emu_faults.error) != 0;
    buffer->gpu_start = host_time();
    for (size_t i = 0; i < buffer->command_count && !fails; i++) run_command(&buffer->commands[i]);
    buffer->gpu_end = host_time();
    if (fails)
        buffer->error = emu_objc_retain(emu_error_make(
            "MTLCommandBufferErrorDomain", 2, "Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)"));
    set_status(buffer, fails ? ERROR : COMPLETED);
    int delay = atomic_load(&emu_faults.handler_delay_us);
    if (delay > 0) usleep((useconds_t)delay);
    call_handlers(buffer->completed, &buffer->completed_count, buffer);
    drop_commands(buffer);
    emu_objc_release(buffer); /* the queue's reference, since its commit */
    objc_autoreleasePoolPop(pool);
}

static void *run_stream(void *data) {
    struct stream *stream = data;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!stream->first && !stream->closed) pthread_cond_wait(&changed, &lock);
        struct buffer *buffer = stream->first;
        if (!buffer) break;
        stream->first = buffer->next;
        if (!stream->first) stream->last = &stream->first;
        pthread_mutex_unlock(&lock);
        run_buffer(buffer);
        pthread_mutex_lock(&lock);
        unfinished--;
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    free(stream);
    return NULL;
}

/* ---- command buffers ---- */

static bool may_change(struct buffer *self, const char *selector) {
    if (self->status >= COMMITTED) {
        emu_report(true, "metal", 0, "%s is sent to a command buffer that has been committed", selector);
        return false;
    }
    if (self->encoding) emu_report(true, "metal", 0, "%s is sent to a command buffer while an encoder is open", selector);
    return !self->encoding;
}

static void *buffer_encoder(struct buffer *self, const char *selector) {
    if (!may_change(self, selector) || emu_faults.no_encoder) return NULL;
    struct encoder *made = emu_objc_new(&emu_MTLComputeCommandEncoder, sizeof *made);
    made->buffer = emu_objc_retain(self);
    self->encoding = true;
    return emu_objc_autorelease(made);
}

static void add_handler(struct buffer *self, const char *selector, struct emu_block **handlers, int *count, const void *block) {
    if (self->status >= COMMITTED || *count == MOST_HANDLERS) {
        emu_report(true, "metal", 0, "%s after the commit, or too many of them", selector);
        return;
    }
    struct emu_block *copy = emu_block_copy(block);
    if (copy) handlers[(*count)++] = copy;
}
static void buffer_on_scheduled(struct buffer *self, const char *selector, const void *block) {
    add_handler(self, selector, self->scheduled, &self->scheduled_count, block);
}
static void buffer_on_completed(struct buffer *self, const char *selector, const void *block) {
    add_handler(self, selector, self->completed, &self->completed_count, block);
}

static void buffer_signal(struct buffer *self, const char *selector, struct emu_event *event, uint64_t value) {
    if (!may_change(self, selector) || !emu_objc_is(event, &emu_MTLSharedEvent, selector)) return;
    hold(self, event);
    add_command(self, (struct command){SIGNAL, NULL, event, value});
}
static void buffer_wait(struct buffer *self, const char *selector, struct emu_event *event, uint64_t value) {
    if (!may_change(self, selector) || !emu_objc_is(event, &emu_MTLSharedEvent, selector)) return;
    hold(self, event);
    add_command(self, (struct command){WAIT, NULL, event, value});
}

static void buffer_commit(struct buffer *self, const char *selector) {
    if (!may_change(self, selector)) return;
    emu_objc_retain(self);
    pthread_mutex_lock(&lock);
    struct stream *stream = self->queue->stream;
    self->status = COMMITTED;
    *stream->last = self;
    stream->last = &self->next;
    unfinished++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static int status_of(struct buffer *self) {
    pthread_mutex_lock(&lock);
    int status = self->status;
    pthread_mutex_unlock(&lock);
    return status;
}

static void buffer_block(struct buffer *self, const char *selector) {
    if (status_of(self) < COMMITTED) {
        emu_report(true, "metal", 0, "%s before the commit, which ends the process on a Mac", selector);
        return;
    }
    pthread_mutex_lock(&lock);
    while (self->status < COMPLETED) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
}

static uint64_t buffer_status(struct buffer *self) { return (uint64_t)status_of(self); }
static void *buffer_error(struct buffer *self) {
    return status_of(self) == ERROR ? emu_objc_autorelease(emu_objc_retain(self->error)) : NULL;
}
static double buffer_kernel_start(struct buffer *self) { return status_of(self) < COMPLETED ? 0 : self->kernel_start; }
static double buffer_kernel_end(struct buffer *self) { return status_of(self) < COMPLETED ? 0 : self->kernel_end; }
static double buffer_gpu_start(struct buffer *self) { return status_of(self) < COMPLETED ? 0 : self->gpu_start; }
static double buffer_gpu_end(struct buffer *self) { return status_of(self) < COMPLETED ? 0 : self->gpu_end; }

static void buffer_dealloc(void *object) {
    struct buffer *buffer = object;
    pthread_mutex_lock(&lock);
    if (buffer->status < COMPLETED) buffer->queue->in_use--; /* dropped without a commit */
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < buffer->scheduled_count; i++) emu_block_release(buffer->scheduled[i]);
    for (int i = 0; i < buffer->completed_count; i++) emu_block_release(buffer->completed[i]);
    drop_commands(buffer);
    emu_objc_release(buffer->error);
    emu_objc_release(buffer->queue);
}

static const struct emu_method buffer_methods[] = {
    EMU_METHOD("computeCommandEncoder", buffer_encoder),
    EMU_METHOD("addScheduledHandler:", buffer_on_scheduled),
    EMU_METHOD("addCompletedHandler:", buffer_on_completed),
    EMU_METHOD("encodeSignalEvent:value:", buffer_signal),
    EMU_METHOD("encodeWaitForEvent:value:", buffer_wait),
    EMU_METHOD("commit", buffer_commit),
    EMU_METHOD("waitUntilCompleted", buffer_block),
    EMU_METHOD("status", buffer_status),
    EMU_METHOD("error", buffer_error),
    EMU_METHOD("kernelStartTime", buffer_kernel_start),
    EMU_METHOD("kernelEndTime", buffer_kernel_end),
    EMU_METHOD("GPUStartTime", buffer_gpu_start),
    EMU_METHOD("GPUEndTime", buffer_gpu_end),
    {NULL, NULL}};
static struct emu_class emu_MTLCommandBuffer = {NULL, "MTLCommandBuffer", buffer_methods, buffer_dealloc};

/* ---- queues ---- */

static void *queue_buffer(struct queue *self) {
    if (emu_faults.no_commands) return NULL;
    pthread_mutex_lock(&lock);
    bool full = self->in_use == self->limit;
    self->in_use += !full;
    pthread_mutex_unlock(&lock);
    if (full) return rule("commandBuffer while all of the queue's are in use: it waits, if none is committed for ever"), NULL;
    struct buffer *made = emu_objc_new(&emu_MTLCommandBuffer, sizeof *made);
    made->queue = emu_objc_retain(self);
    return emu_objc_autorelease(made);
}

static void queue_dealloc(void *object) {
    struct queue *queue = object;
    pthread_mutex_lock(&lock);
    queue->stream->closed = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    emu_objc_release(queue->device);
}

static const struct emu_method queue_methods[] = {EMU_METHOD("commandBuffer", queue_buffer), {NULL, NULL}};
static struct emu_class emu_MTLCommandQueue = {NULL, "MTLCommandQueue", queue_methods, queue_dealloc};

void *emu_queue_make(struct emu_objc *device, const char *selector, uint64_t limit) {
    pthread_t thread;
    (void)selector;
    if (!limit) return rule("newCommandQueueWithMaxCommandBufferCount: 0"), NULL;
    if (emu_faults.no_queue) return NULL;
    struct queue *made = emu_objc_new(&emu_MTLCommandQueue, sizeof *made);
    made->device = emu_objc_retain(device);
    made->limit = limit;
    made->stream = calloc(1, sizeof *made->stream);
    if (!made->stream) abort();
    made->stream->last = &made->stream->first;
    if (pthread_create(&thread, NULL, run_stream, made->stream)) abort();
    pthread_detach(thread);
    return made;
}

/* For Python: 0 when everything that was committed has completed and let go of what it held; 1 after `seconds`. */
EMU_EXPORT int emu_commands_settle(double seconds) {
    struct timespec until = emu_deadline(seconds);
    int late = 0;
    pthread_mutex_lock(&lock);
    while (unfinished && !late) late = pthread_cond_timedwait(&changed, &lock, &until);
    bool busy = unfinished != 0;
    pthread_mutex_unlock(&lock);
    return busy;
}
