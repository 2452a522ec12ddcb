/* When a command buffer was scheduled and completed: Metal's handlers, and a wait that can give up.
 * A completion is counted: its command buffer's owner holds it, and so does every copy that Metal makes of a handler. Whoever
 * stops waiting may let go; a handler that comes later still finds its memory. */
#ifndef MM_METAL_COMPLETION_H
#define MM_METAL_COMPLETION_H

#include "metal_queue/runtime.h"

/* Command buffers of a queue that are made and neither completed nor dropped. Plain memory, counted: the last handler may
 * outlive the queue. */
struct mm_metal_in_flight;
struct mm_metal_in_flight *mm_metal_in_flight_new(int limit);
void mm_metal_in_flight_drop(struct mm_metal_in_flight *in_flight);
/* Takes a place; false: none is free. */
bool mm_metal_in_flight_enter(struct mm_metal_in_flight *in_flight);
void mm_metal_in_flight_leave(struct mm_metal_in_flight *in_flight);

struct mm_metal_completion;
struct mm_metal_completion *mm_metal_completion_new(struct mm_metal_in_flight *in_flight);
void mm_metal_completion_drop(struct mm_metal_completion *completion);
/* Adds the handlers; before the command buffer is committed. When it has completed, its place in flight is given back. */
void mm_metal_completion_attach(struct mm_metal_completion *completion, mm_id command_buffer);
/* False: not completed by then, on mm_metal_clock. Any number of threads may wait. */
bool mm_metal_completion_wait(struct mm_metal_completion *completion, uint64_t deadline_ns);
/* On mm_metal_clock, when each handler was entered; 0: not yet. */
void mm_metal_completion_times(struct mm_metal_completion *completion, uint64_t *scheduled_ns, uint64_t *completed_ns);

#endif
