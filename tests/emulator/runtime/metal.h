/* What metal.c and commands.c know of each other: Metal's objects as the emulator keeps them, and the faults on request. */
#ifndef EMU_METAL_H
#define EMU_METAL_H

#include <time.h>

#include "objc.h"

/* X(name): see faults() in metal.py for what each does. */
#define EMU_FAULTS(X) \
    X(no_device) X(no_library) X(no_pipeline) X(no_buffer) X(no_queue) X(no_event) X(no_commands) X(no_encoder) X(old_system) \
    X(error) X(stall) X(handler_delay_us) X(max_buffer) X(no_tensor)
struct emu_faults {
#define X(name) atomic_int name;
    EMU_FAULTS(X)
#undef X
};
extern struct emu_faults emu_faults;

struct emu_pipeline {
    struct emu_objc head;
    struct emu_object *object;
    const struct emu_kernel *kernel;
    bool check;
};
struct emu_buffer {
    struct emu_objc head;
    char *memory;
    uint64_t bytes;
    bool foreign; /* somebody else's memory: the deallocator, if any, is told when nobody needs it any more */
    struct emu_block *deallocator;
};
struct emu_event {
    struct emu_objc head;
    uint64_t value;
};
extern struct emu_class emu_MTLComputePipelineState, emu_MTLBuffer, emu_MTLSharedEvent;

void emu_event_signal(struct emu_event *event, uint64_t value);
bool emu_event_await(struct emu_event *event, uint64_t value, uint64_t milliseconds);

void *emu_queue_make(struct emu_objc *device, const char *selector, uint64_t limit);
/* A fault has changed: whoever waits looks again. */
void emu_commands_changed(void);
/* `seconds` from now, for pthread_cond_timedwait. */
struct timespec emu_deadline(double seconds);

#endif
