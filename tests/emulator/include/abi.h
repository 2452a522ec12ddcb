/* What a compiled kernel and the runtime share: the lane, the argument list, and the functions that kernels call.
 * Owns no behaviour. Compiles as C11 (runtime/) and, without any system header, as C++17 (the kernels).
 * A lane is one GPU thread. It runs on a stack of its own that is aligned to its size, so a function finds its lane from
 * the stack pointer, without thread-local storage. */
#ifndef EMU_ABI_H
#define EMU_ABI_H

#define EMU_BUFFERS 31                 /* buffer(0) .. buffer(30) */
#define EMU_MAX_ARGUMENTS 64
#define EMU_STACK_BYTES (128ul * 1024) /* the lane's own data included */

/* X(name, MSL attribute): the values that a kernel may ask for. front.py reads this list. */
#define EMU_BUILTINS(X)                                                \
    X(EMU_THREAD_IN_GRID, thread_position_in_grid)                     \
    X(EMU_GROUP_IN_GRID, threadgroup_position_in_grid)                 \
    X(EMU_THREAD_IN_GROUP, thread_position_in_threadgroup)             \
    X(EMU_INDEX_IN_GROUP, thread_index_in_threadgroup)                 \
    X(EMU_LANE_INDEX, thread_index_in_simdgroup)                       \
    X(EMU_SIMDGROUP_INDEX, simdgroup_index_in_threadgroup)             \
    X(EMU_GROUP_SIZE, threads_per_threadgroup)                         \
    X(EMU_FULL_GROUP_SIZE, dispatch_threads_per_threadgroup)           \
    X(EMU_GRID_SIZE, threads_per_grid)                                 \
    X(EMU_GROUPS, threadgroups_per_grid)                               \
    X(EMU_SIMD_WIDTH, threads_per_simdgroup)                           \
    X(EMU_EXECUTION_WIDTH, thread_execution_width)                     \
    X(EMU_SIMDGROUPS, simdgroups_per_threadgroup)                      \
    X(EMU_QUAD_INDEX, quadgroup_index_in_threadgroup)                  \
    X(EMU_QUAD_LANE, thread_index_in_quadgroup)
enum {
#define X(name, attribute) name,
    EMU_BUILTINS(X)
#undef X
    EMU_BUILTIN_COUNT,
    EMU_BUFFER = 100 /* an argument's kind: one of the above, or a buffer */
};

/* What a pointer points to or a reference refers to, as far as a tensor's dtype can tell. */
enum { EMU_OTHER, EMU_VOID, EMU_BOOL, EMU_INT8, EMU_INT16, EMU_INT32, EMU_INT64, EMU_HALF, EMU_BFLOAT, EMU_FLOAT };

enum { EMU_FLAG_DEVICE = 1, EMU_FLAG_THREADGROUP = 2 }; /* MSL's mem_flags */

struct emu_group {
    void *buffer[EMU_BUFFERS];
};

struct emu_lane {
    void *stack_pointer; /* while another lane runs */
    struct emu_group *group;
    unsigned thread, lane, simdgroup; /* index in the threadgroup, in the simdgroup, of the simdgroup */
    unsigned state, wait_flags;
    int wait_full; /* the operation needs all 32 lanes */
    const char *wait_name, *wait_file;
    int wait_line;
    void (*wait_run)(void **payloads, unsigned mask);
    void *payload;
    unsigned matrix_calls; /* simdgroup_load and simdgroup_store so far, and a hash of their pointers */
    unsigned long matrix_hash;
    const char *matrix_file;
    int matrix_line;
    unsigned builtin[EMU_BUILTIN_COUNT][3];
};

struct emu_argument {
    int kind, index;
    int is_reference, is_const;
    int element;         /* EMU_OTHER .. EMU_FLOAT; a vector's or atomic's is that of its elements */
    unsigned size, align; /* of what is pointed to */
    const char *text;    /* the declaration */
};

struct emu_kernel {
    const char *name;
    void (*run)(const struct emu_lane *lane);
    int (*describe)(struct emu_argument *arguments); /* returns how many */
    int max_threads;                                 /* 0: the kernel does not say */
};

/* One lane's part of an 8 x 8 matrix product d = a b + c: its two elements of each. */
struct emu_product {
    float a[2], b[2], c[2], d[2];
};

#ifdef __cplusplus
extern "C" {
#endif
void emu_threadgroup_barrier(unsigned flags, const char *file, int line);
void emu_simdgroup_barrier(unsigned flags, const char *file, int line);
/* Waits for the simdgroup's running lanes; the last to arrive calls run for all of them. */
void emu_simd(void (*run)(void **payloads, unsigned mask), void *payload, const char *name, const char *file, int line);
void emu_matrix_product(struct emu_product *product, const char *name, const char *file, int line);
void emu_matrix_memory(const void *pointer, const char *name, const char *file, int line);
void *emu_threadgroup_variable(const void *key, unsigned long size, unsigned long align, const char *name);
void emu_inactive_lane_read(void);
void emu_operands_differ(void);
void emu_atomic_access(const void *pointer, unsigned size, int writes); /* 0 load, 1 read and write, 2 store */
#ifdef __cplusplus
}
#endif

/* Where a lane's data lies in its stack. All stacks being aligned alike, their data would compete for the same few cache
 * sets; a "colour" taken from the address spreads them. */
static inline __attribute__((always_inline, nodebug)) struct emu_lane *emu_lane_at(unsigned long stack_pointer) {
    unsigned long base = stack_pointer & ~(EMU_STACK_BYTES - 1);
    return (struct emu_lane *)(base + (base / EMU_STACK_BYTES & 31) * 192);
}
static inline __attribute__((always_inline, nodebug)) struct emu_lane *emu_this_lane(void) {
    return emu_lane_at((unsigned long)__builtin_frame_address(0));
}
/* Layout of an 8 x 8 simdgroup_matrix over the lanes: two neighbours of one row each. Apple does not document it; MLX
 * relies on it for thread_elements(). */
static inline __attribute__((always_inline, nodebug)) int emu_matrix_row(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
static inline __attribute__((always_inline, nodebug)) int emu_matrix_column(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

#endif
