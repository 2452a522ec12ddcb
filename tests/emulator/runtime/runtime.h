/* The emulator's insides: settings, reports, dispatches, threadgroups, and which file owns what.
 *   report.c   settings, reports, counters            fiber.c     lanes' stacks, switching between them, memory faults
 *   group.c    one threadgroup: scheduling, barriers, simdgroup operations, threadgroup variables
 *   access.c   every load and store of a checked kernel: bounds, races, uninitialised memory, traffic
 *   dispatch.c a dispatch's memory and the worker threads      arguments.c  bound arguments against declared ones
 *   queue.c    the asynchronous in-order queue        shim.c      aoti_torch_mps_*         torch.c  what is asked of torch
 *   objc.c     a stand-in for Objective-C's runtime   metal.c     Metal's own classes on it, with queues of their own
 * C11 without a C++ runtime, so that it can live in any Python process; x86-64 Linux. */
#ifndef EMU_RUNTIME_H
#define EMU_RUNTIME_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../include/abi.h"

#define EMU_EXPORT __attribute__((visibility("default")))
#define EMU_PRINTF(text, first) __attribute__((format(printf, text, first)))

/* ---- settings (emu_configure sets them by name) ---- */

/* X(name, default): see configure() in __init__.py for what each means. */
#define EMU_SETTINGS(X) \
    X(check, 0) X(races, 1) X(types, 1) X(strict, 1) X(guard, 0) X(order, 0) X(workers, 2) X(max_threads, 1024) \
    X(commit_every, 4) X(delay_us, 0) X(ftz, 0) X(poison, 0)
struct emu_settings {
#define X(name, value) int name;
    EMU_SETTINGS(X)
#undef X
};
extern struct emu_settings emu_settings;

/* X(name): what emu_statistics returns, in this order. */
#define EMU_STATISTICS(X) \
    X(dispatches) X(threadgroups) X(threads) X(simd_operations) X(barriers) X(accesses) X(max_threadgroup_bytes) X(compilations)
struct emu_statistics {
#define X(name) atomic_ulong name;
    EMU_STATISTICS(X)
#undef X
};
extern struct emu_statistics emu_statistics;

/* ---- reports ---- */

/* One report for each (kind, site): loops and threads repeat the same mistake. A warning does not fail synchronize(). */
void emu_report(bool error, const char *kind, uint64_t site, const char *format, ...) EMU_PRINTF(4, 5);
uint64_t emu_site(const char *file, int line, const void *what);

struct emu_text {
    char text[240];
};
/* A place in a kernel as text that Python turns into file:line when the report is read. */
struct emu_text emu_place(const void *return_address);

/* ---- compiled libraries ---- */

struct emu_object {
    void *handle;
    const struct emu_kernel *kernels;
    int count;
    char *low, *high; /* where it is loaded: constants may be read from there */
    char *path;
};
/* A shader compiled and loaded; NULL: `message` says why not. */
struct emu_object *emu_object_compile(const char *source, bool check, char *message, size_t room);
const struct emu_kernel *emu_object_kernel(const struct emu_object *object, const char *name); /* NULL: no such kernel */

/* ---- a dispatch ---- */

struct emu_held_tensor; /* a counted reference to a tensor handle */
struct emu_held_tensor *emu_tensor_share(struct emu_held_tensor *tensor);
void emu_tensor_release(struct emu_held_tensor *tensor);

struct emu_bound {
    bool set, is_tensor;
    char *data; /* tensor: the view's first element; else `bytes` */
    uint64_t size, numel;
    int32_t dtype;
    int64_t dims;
    bool is_int; /* set_arg_int */
    int64_t integer;
    unsigned char *bytes; /* owned */
    struct emu_held_tensor *tensor;
};

/* A race check's memory of one granule of bytes: who did it, when, from where. */
struct emu_record {
    uint32_t group; /* serial number of the threadgroup's run; 0: never happened */
    uint32_t epoch; /* threadgroup barriers passed before it */
    uint32_t place; /* return address, relative to the object */
    uint16_t simd_epoch;
    uint16_t who; /* thread | scope << 12 */
};
struct emu_cell {
    struct emu_record write, read, atomic;
};
struct emu_shadow {
    struct emu_cell *cells;
    uint64_t bytes, used;
    int shift; /* a cell covers 1 << shift bytes */
};

/* Host memory that one or more overlapping bindings cover. */
struct emu_region {
    char *host;
    uint64_t size;
    bool writable;
    int file;    /* memory file behind several bindings' views, or -1 */
    char *first; /* a mapped copy, or NULL: kernels run on the host memory itself */
    struct emu_shadow shadow;
};

struct emu_binding {
    int index;
    char *base; /* what the kernel gets */
    uint64_t size, offset; /* offset in the region */
    bool writable;
    struct emu_region *region;
    char *map;
    uint64_t map_bytes;
    uint64_t loaded, stored, loaded_by_groups;
    uint32_t *loaded_in; /* for each 2 bytes: serial number of the last threadgroup that loaded them */
    uint64_t *loaded_bits, *stored_bits; /* a bit for each byte */
};

struct emu_dispatch {
    struct emu_object *object;
    const struct emu_kernel *kernel;
    struct emu_argument arguments[EMU_MAX_ARGUMENTS];
    int argument_count;
    struct emu_bound bound[EMU_BUFFERS];
    uint32_t grid[3], group[3], groups[3];
    bool check;
    struct emu_region regions[EMU_BUFFERS];
    int region_count;
    struct emu_binding bindings[EMU_BUFFERS];
    int binding_count;
    uint32_t first_serial;
    atomic_uint next;
    atomic_bool failed;
};

/* False: the reports have been made. */
bool emu_arguments_fit(struct emu_dispatch *dispatch);
bool emu_group_size_fits(struct emu_dispatch *dispatch);
/* Binds a copy of bytes. */
void emu_bound_bytes(struct emu_bound *bound, const void *data, size_t size);
/* Checked against the kernel's declaration; takes copies and shares of what is bound. NULL: the reports have been made. */
struct emu_dispatch *emu_dispatch_new(struct emu_object *object, const struct emu_kernel *kernel, bool check,
                                      const struct emu_bound *bound, const uint64_t *grid, const uint64_t *group);
void emu_dispatch_run(void *dispatch); /* one at a time, whatever the queue; frees it */
void emu_dispatch_free(struct emu_dispatch *dispatch);
int emu_thread_limit(const struct emu_kernel *kernel);

/* ---- queue ---- */

void emu_queue_encode(void (*run)(void *), void *data);
void emu_queue_commit(void);
bool emu_queue_wait(double seconds); /* commits; false: still busy */

/* ---- a threadgroup on a worker thread ---- */

enum { EMU_RUNNING, EMU_AT_SIMD, EMU_AT_BARRIER, EMU_DONE };
enum { EMU_ARENA_BYTES = 256 * 1024, EMU_REDZONE = 64, EMU_THREADGROUP_LIMIT = 32768, EMU_POISON = 0xFF };

struct emu_simdgroup {
    uint32_t live, runnable, waiting;
    bool mixed; /* not all wait at the same place */
    void (*run)(void **, unsigned);
    const char *file;
    int line;
    uint16_t epoch_threadgroup, epoch_device; /* simdgroup barriers with each flag */
    struct emu_lane *finished;
};

struct emu_variable {
    const void *key;
    uint64_t offset, size;
    const char *name;
};

struct emu_worker {
    struct emu_group shared; /* what lanes see of their group */
    struct emu_dispatch *dispatch;
    char *stacks;
    uint64_t stack_count, stack_bytes;
    void *scheduler; /* stack pointer of the worker itself while a lane runs */
    struct emu_lane *lanes[1024];
    struct emu_simdgroup simdgroups[32];
    uint32_t threads, simdgroup_count, index, position[3], serial;
    uint32_t epoch_threadgroup, epoch_device;
    bool abort;
    uint32_t random;
    char *arena;
    uint64_t arena_used, variable_bytes;
    struct emu_variable variables[64];
    int variable_count;
    struct emu_shadow arena_shadow;
    int last_binding;
};
extern _Thread_local struct emu_worker *emu_worker __attribute__((tls_model("initial-exec")));

struct emu_worker *emu_worker_new(int seed);
void emu_group_run(struct emu_dispatch *dispatch, uint32_t index, bool fresh);
void emu_stacks_need(uint64_t count);
void emu_lane_start(struct emu_lane *lane, uint64_t stack, void (*entry)(void));
void emu_switch(void **save, void *to);
_Noreturn void emu_lane_abandon(void); /* ends the group from inside a lane */
void emu_faults_catch(void);
struct emu_text emu_who(const struct emu_lane *lane);
struct emu_text emu_nearest(const struct emu_dispatch *dispatch, const char *address);

/* ---- shadow memory ---- */

void emu_shadow_new(struct emu_shadow *shadow, uint64_t bytes, int shift);
void emu_shadow_free(struct emu_shadow *shadow);
void emu_traffic_record(const struct emu_dispatch *dispatch);

/* ---- torch ---- */

bool emu_in_block(void);
void emu_torch_hooks(void);
void *emu_gil_release(void);       /* NULL when this thread does not hold it */
void emu_gil_take(void *released);
/* Fills what a tensor says of itself; NULL, or what is wrong. Keeps a handle of its own in *held. */
const char *emu_tensor_read(void *handle, struct emu_bound *bound);
void emu_tensors_bury(void); /* frees handles that finished commands let go, on a thread that may take the GIL */

#endif
