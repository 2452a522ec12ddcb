/* Metal's classes on the emulated GPU: devices, libraries, buffers and events. Queues and command buffers are commands.c.
 * Argument mistakes that Metal's validation would end the process for are reports here. Faults can be asked for by name. */
#define _GNU_SOURCE
#include "metal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct emu_faults emu_faults;

static void report(const char *text) { emu_report(true, "metal", 0, "%s", text); }

/* ---- pipelines and libraries ---- */

static uint64_t pipeline_max_threads(struct emu_pipeline *self) { return (uint64_t)emu_thread_limit(self->kernel); }
static uint64_t pipeline_simd_width(struct emu_pipeline *self) { return (void)self, 32; }
static const struct emu_method pipeline_methods[] = {
    EMU_METHOD("maxTotalThreadsPerThreadgroup", pipeline_max_threads), EMU_METHOD("threadExecutionWidth", pipeline_simd_width),
    {NULL, NULL}};
struct emu_class emu_MTLComputePipelineState = {NULL, "MTLComputePipelineState", pipeline_methods, NULL};

struct function {
    struct emu_objc head;
    struct emu_object *object;
    const struct emu_kernel *kernel;
    bool check;
};
static const struct emu_method no_methods[] = {{NULL, NULL}};
static struct emu_class emu_MTLFunction = {NULL, "MTLFunction", no_methods, NULL};

struct library {
    struct emu_objc head;
    struct emu_object *object; /* stays loaded: reports name places in it */
    bool check;
};
static void *library_function(struct library *self, const char *selector, struct emu_string *name) {
    if (!emu_objc_is(name, &emu_NSString, selector)) return NULL;
    const struct emu_kernel *kernel = emu_object_kernel(self->object, name->text);
    if (!kernel) return NULL;
    struct function *made = emu_objc_new(&emu_MTLFunction, sizeof *made);
    made->object = self->object;
    made->kernel = kernel;
    made->check = self->check;
    return made;
}
static const struct emu_method library_methods[] = {EMU_METHOD("newFunctionWithName:", library_function), {NULL, NULL}};
static struct emu_class emu_MTLLibrary = {NULL, "MTLLibrary", library_methods, NULL};

/* ---- buffers ---- */

static void buffer_dealloc(void *object) {
    struct emu_buffer *buffer = object;
    if (buffer->foreign) {
        if (buffer->deallocator) {
            emu_block_call_deallocator(buffer->deallocator, buffer->memory, buffer->bytes);
            emu_block_release(buffer->deallocator);
        }
        return;
    }
    memset(buffer->memory, EMU_POISON, buffer->bytes); /* whoever still looks sees it */
    free(buffer->memory);
}
static void *buffer_contents(struct emu_buffer *self) { return self->memory; }
static uint64_t buffer_length(struct emu_buffer *self) { return self->bytes; }
static const struct emu_method buffer_methods[] = {EMU_METHOD("contents", buffer_contents), EMU_METHOD("length", buffer_length),
                                                   {NULL, NULL}};
struct emu_class emu_MTLBuffer = {NULL, "MTLBuffer", buffer_methods, buffer_dealloc};

/* ---- events ---- */

static pthread_mutex_t event_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t event_changed = PTHREAD_COND_INITIALIZER;

void emu_event_signal(struct emu_event *event, uint64_t value) {
    pthread_mutex_lock(&event_lock);
    if (value > event->value) event->value = value;
    pthread_cond_broadcast(&event_changed);
    pthread_mutex_unlock(&event_lock);
}

bool emu_event_await(struct emu_event *event, uint64_t value, uint64_t milliseconds) {
    struct timespec until = emu_deadline((double)milliseconds / 1e3);
    int late = 0;
    pthread_mutex_lock(&event_lock);
    while (event->value < value && !late) late = pthread_cond_timedwait(&event_changed, &event_lock, &until);
    bool reached = event->value >= value;
    pthread_mutex_unlock(&event_lock);
    return reached;
}

static uint64_t event_value(struct emu_event *self) {
    pthread_mutex_lock(&event_lock);
    uint64_t value = self->value;
    pthread_mutex_unlock(&event_lock);
    return value;
}
static void event_set(struct emu_event *self, const char *selector, uint64_t value) {
    (void)selector;
    emu_event_signal(self, value);
}
static bool event_wait(struct emu_event *self, const char *selector, uint64_t value, uint64_t milliseconds) {
    (void)selector;
    return emu_event_await(self, value, milliseconds);
}
static const struct emu_method event_methods[] = {
    EMU_METHOD("signaledValue", event_value), EMU_METHOD("setSignaledValue:", event_set),
    EMU_METHOD("waitUntilSignaledValue:timeoutMS:", event_wait), {NULL, NULL}};
struct emu_class emu_MTLSharedEvent = {NULL, "MTLSharedEvent", event_methods, NULL};

/* ---- the device ---- */

enum { LARGEST_BUFFER = 256 << 20, PAGE = 16384 };

static void *device_name(struct emu_objc *self) {
    (void)self;
    return emu_objc_autorelease(emu_string_new("emulated (timings mean nothing)"));
}
static bool device_unified(struct emu_objc *self) { return (void)self, true; }
static uint64_t device_working_set(struct emu_objc *self) { return (void)self, 4ul * LARGEST_BUFFER; }
static uint64_t largest_buffer(void) { return emu_faults.max_buffer ? (uint64_t)emu_faults.max_buffer : LARGEST_BUFFER; }
static uint64_t device_max_buffer(struct emu_objc *self) { return (void)self, largest_buffer(); }

static void *device_library(struct emu_objc *self, const char *selector, struct emu_string *source, void *options,
                            struct emu_error **error) {
    char message[7600] = "a fault was asked for";
    (void)self;
    if (!emu_objc_is(source, &emu_NSString, selector)) return NULL;
    if (options) report("newLibraryWithSource: has options, which the emulator does not know");
    bool check = emu_settings.check != 0;
    struct emu_object *object = emu_faults.no_library ? NULL : emu_object_compile(source->text, check, message, sizeof message);
    if (!object) {
        if (error) *error = emu_error_make("MTLLibraryErrorDomain", 3, message);
        return NULL;
    }
    struct library *made = emu_objc_new(&emu_MTLLibrary, sizeof *made);
    made->object = object;
    made->check = check;
    return made;
}

static void *device_pipeline(struct emu_objc *self, const char *selector, struct function *function, struct emu_error **error) {
    (void)self;
    if (!emu_objc_is(function, &emu_MTLFunction, selector)) return NULL;
    if (emu_faults.no_pipeline) {
        if (error) *error = emu_error_make("AGXMetalG13X", 3, "Compiler encountered an internal error");
        return NULL;
    }
    struct emu_pipeline *made = emu_objc_new(&emu_MTLComputePipelineState, sizeof *made);
    made->object = function->object;
    made->kernel = function->kernel;
    made->check = function->check;
    return made;
}

static void *device_buffer(struct emu_objc *self, const char *selector, uint64_t bytes, uint64_t options) {
    (void)self, (void)selector;
    if (!bytes || bytes > largest_buffer()) return report("newBufferWithLength: is outside of 1 to maxBufferLength"), NULL;
    if (options) report("newBufferWithLength: has options; the emulator knows shared buffers only, 0");
    if (emu_faults.no_buffer) return NULL;
    struct emu_buffer *made = emu_objc_new(&emu_MTLBuffer, sizeof *made);
    made->bytes = bytes;
    made->memory = aligned_alloc(PAGE, (bytes + PAGE - 1) / PAGE * PAGE);
    if (!made->memory) abort();
    memset(made->memory, EMU_POISON, bytes); /* Metal promises nothing of what is in it */
    return made;
}

/* How the system maps [begin, begin + bytes): the permissions of the one region that covers it, "" if none does alone. */
static void region_of(const char *begin, uint64_t bytes, char permissions[5]) {
    FILE *maps = fopen("/proc/self/maps", "r");
    char line[4500];
    permissions[0] = 0;
    while (maps && fgets(line, sizeof line, maps)) {
        unsigned long first, last;
        char found[5];
        if (sscanf(line, "%lx-%lx %4s", &first, &last, found) == 3 && (uintptr_t)begin >= first && (uintptr_t)begin + bytes <= last)
            memcpy(permissions, found, sizeof found);
    }
    if (maps) fclose(maps);
}

/* Memory of the caller's own. Apple: page-aligned, whole pages, one VM region. That the region be shared, or not writable, is
 * what keeps macOS from copying a file's pages when they are first touched. */
static void *device_buffer_over(struct emu_objc *self, const char *selector, char *memory, uint64_t bytes, uint64_t options,
                                const void *deallocator) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    char permissions[5];
    (void)self, (void)selector;
    if (!bytes || bytes > largest_buffer()) return report("newBufferWithBytesNoCopy: is outside of 1 to maxBufferLength"), NULL;
    if ((uintptr_t)memory % page || bytes % page) return report("newBufferWithBytesNoCopy: expected whole pages from a page's start"), NULL;
    if (options) report("newBufferWithBytesNoCopy: has options; the emulator knows shared buffers only, 0");
    region_of(memory, bytes, permissions);
    if (!permissions[0]) return report("newBufferWithBytesNoCopy: the memory is not covered by a single VM region"), NULL;
    if (permissions[0] != 'r') report("newBufferWithBytesNoCopy: the memory can't be read");
    if (permissions[1] == 'w' && permissions[3] == 'p')
        report("newBufferWithBytesNoCopy: the memory is private and writable: of a file's pages, macOS would make copies");
    struct emu_block *kept = deallocator ? emu_block_copy_as(deallocator, "v24@?0^v8Q16") : NULL;
    if (deallocator && !kept) return NULL;
    if (emu_faults.no_buffer) {
        if (kept && emu_faults.no_buffer > 1) emu_block_call_deallocator(kept, memory, bytes); /* Apple doesn't say that it won't */
        if (kept) emu_block_release(kept);
        return NULL;
    }
    struct emu_buffer *made = emu_objc_new(&emu_MTLBuffer, sizeof *made);
    made->memory = memory;
    made->bytes = bytes;
    made->foreign = true;
    made->deallocator = kept;
    return made;
}

static void *device_event(struct emu_objc *self) {
    (void)self;
    return emu_faults.no_event ? NULL : emu_objc_new(&emu_MTLSharedEvent, sizeof(struct emu_event));
}

static const struct emu_method device_methods[] = {
    EMU_METHOD("name", device_name),
    EMU_METHOD("hasUnifiedMemory", device_unified),
    EMU_METHOD("recommendedMaxWorkingSetSize", device_working_set),
    EMU_METHOD("maxBufferLength", device_max_buffer),
    EMU_METHOD("newLibraryWithSource:options:error:", device_library),
    EMU_METHOD("newComputePipelineStateWithFunction:error:", device_pipeline),
    EMU_METHOD("newBufferWithLength:options:", device_buffer),
    EMU_METHOD("newBufferWithBytesNoCopy:length:options:deallocator:", device_buffer_over),
    EMU_METHOD("newCommandQueueWithMaxCommandBufferCount:", emu_queue_make),
    EMU_METHOD("newSharedEvent", device_event),
    {NULL, NULL}};
static struct emu_class emu_MTLDevice = {NULL, "MTLDevice", device_methods, NULL};

EMU_EXPORT void *MTLCreateSystemDefaultDevice(void) {
    return emu_faults.no_device ? NULL : emu_objc_new(&emu_MTLDevice, sizeof(struct emu_objc));
}

bool emu_metal_lacks(const char *selector) {
    return emu_faults.old_system && !strcmp(selector, "waitUntilSignaledValue:timeoutMS:");
}

/* ---- for Python ---- */

/* Sets a fault; returns its former value, or -1: no such fault. */
EMU_EXPORT int emu_fault(const char *name, int value) {
#define X(fault)                               \
    if (!strcmp(name, #fault)) {               \
        int before = emu_faults.fault;         \
        emu_faults.fault = value;              \
        emu_commands_changed();                \
        return before;                         \
    }
    EMU_FAULTS(X)
#undef X
    return -1;
}

EMU_EXPORT const char *emu_fault_names(void) {
#define X(fault) #fault " "
    return EMU_FAULTS(X);
#undef X
}
