/* One threadgroup: its lanes' scheduling, simdgroup operations, barriers and threadgroup variables.
 * The lanes of a simdgroup run one after another until each waits at a simdgroup operation or a barrier; the last to
 * arrive performs the operation for all. Call sites (file, line) tell operations apart, so that code which the compiler
 * duplicated does not look like divergence. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

_Thread_local struct emu_worker *emu_worker;

static uint32_t lowest(uint32_t mask) { return (uint32_t)__builtin_ctz(mask); }
static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
static const char *kernel_name(void) { return emu_worker->dispatch->kernel->name; }

struct emu_text emu_who(const struct emu_lane *lane) {
    struct emu_worker *worker = emu_worker;
    struct emu_text who;
    snprintf(who.text, sizeof who.text, "threadgroup (%u, %u, %u) thread %u (simdgroup %u, lane %u)", worker->position[0],
             worker->position[1], worker->position[2], lane->thread, lane->simdgroup, lane->lane);
    return who;
}

static struct emu_text where(const char *file, int line) {
    struct emu_text place;
    snprintf(place.text, sizeof place.text, "%s:%d", file ? file : "?", line);
    return place;
}

/* lanes as ranges: 0-3,7 */
static struct emu_text lane_list(uint32_t mask) {
    struct emu_text list = {""};
    size_t length = 0;
    for (int first = 0; first < 32 && length < sizeof list.text - 8; first++) {
        if (!(mask >> first & 1)) continue;
        int last = first;
        while (last < 31 && (mask >> (last + 1) & 1)) last++;
        length += (size_t)snprintf(list.text + length, sizeof list.text - length, last > first ? "%s%d-%d" : "%s%d",
                                   length ? "," : "", first, last);
        first = last;
    }
    return list;
}

/* The lanes that the simdgroup began with: fewer than 32 at the end of a threadgroup. */
static uint32_t lanes_of(uint32_t simdgroup) {
    uint32_t lanes = smaller(32, emu_worker->threads - simdgroup * 32);
    return lanes == 32 ? ~0u : (1u << lanes) - 1;
}

static void abort_group(void) {
    emu_worker->abort = true;
    atomic_store(&emu_worker->dispatch->failed, true);
}

/* ---- switching between lanes ---- */

static uint32_t draw(void) {
    emu_worker->random = emu_worker->random * 1664525u + 1013904223u;
    return emu_worker->random >> 16;
}

static struct emu_lane *pick(uint32_t simdgroup, int after) {
    uint32_t runnable = emu_worker->simdgroups[simdgroup].runnable, lane;
    if (emu_settings.order == 0) {
        uint32_t higher = after < 31 ? runnable & (~0u << (after + 1)) : 0;
        lane = lowest(higher ? higher : runnable);
    } else if (emu_settings.order == 1) {
        lane = 31 - (uint32_t)__builtin_clz(runnable);
    } else {
        for (uint32_t skip = draw() % (uint32_t)__builtin_popcount(runnable); skip; skip--) runnable &= runnable - 1;
        lane = lowest(runnable);
    }
    return emu_worker->lanes[simdgroup * 32 + lane];
}

/* Gives the processor to another lane of the simdgroup, or to the scheduler. */
static void leave(struct emu_lane *lane) {
    bool others = emu_worker->simdgroups[lane->simdgroup].runnable != 0;
    emu_switch(&lane->stack_pointer,
               others ? pick(lane->simdgroup, (int)lane->lane)->stack_pointer : emu_worker->scheduler);
}

/* simdgroup_load and simdgroup_store are one operation of all 32 lanes. They do not wait here; each lane keeps a hash of
 * its calls, which is compared at the next operation on matrices and at the end. */
static void compare_matrix_calls(const struct emu_lane *a, const struct emu_lane *b) {
    if (a->matrix_hash == b->matrix_hash && a->matrix_calls == b->matrix_calls) return;
    const struct emu_lane *later = a->matrix_calls > b->matrix_calls || !b->matrix_file ? a : b;
    emu_report(true, "matrix", emu_site(later->matrix_file, later->matrix_line, NULL),
               "%s: lanes %u and %u of simdgroup %u differ in their simdgroup_load and simdgroup_store calls up to %s "
               "(%u and %u calls): all 32 lanes must make the same ones with the same pointers",
               kernel_name(), a->lane, b->lane, a->simdgroup, where(later->matrix_file, later->matrix_line).text,
               a->matrix_calls, b->matrix_calls);
    abort_group();
}

static void lane_entry(void) {
    struct emu_lane *lane = emu_this_lane();
    struct emu_simdgroup *simdgroup = &emu_worker->simdgroups[lane->simdgroup];
    emu_worker->dispatch->kernel->run(lane);
    if (!simdgroup->finished)
        simdgroup->finished = lane;
    else if (simdgroup->finished->matrix_calls || lane->matrix_calls)
        compare_matrix_calls(simdgroup->finished, lane);
    lane->state = EMU_DONE;
    simdgroup->live &= ~(1u << lane->lane);
    simdgroup->runnable &= ~(1u << lane->lane);
    leave(lane);
    __builtin_trap();
}

/* ---- simdgroup operations ---- */

static void perform(uint32_t index, uint32_t mask) {
    struct emu_worker *worker = emu_worker;
    struct emu_simdgroup *simdgroup = &worker->simdgroups[index];
    void *payloads[32] = {NULL};
    struct emu_lane *first = worker->lanes[index * 32 + lowest(mask)];
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
        struct emu_lane *lane = worker->lanes[index * 32 + lowest(rest)];
        payloads[lane->lane] = lane->payload;
        lane->state = EMU_RUNNING;
    }
    if (first->wait_full)
        for (uint32_t i = 1; i < 32; i++) compare_matrix_calls(first, worker->lanes[index * 32 + i]);
    if (first->wait_run) {
        first->wait_run(payloads, mask);
    } else {
        simdgroup->epoch_threadgroup += (first->wait_flags & EMU_FLAG_THREADGROUP) != 0;
        simdgroup->epoch_device += (first->wait_flags & EMU_FLAG_DEVICE) != 0;
        uint32_t returned = lanes_of(index) & ~simdgroup->live;
        if (returned) {
            emu_report(emu_settings.strict, "barrier", emu_site(first->wait_file, first->wait_line, "returned"),
                       "%s: simdgroup_barrier at %s is not reached by lanes %s of simdgroup %u in threadgroup (%u, %u, %u): "
                       "they have returned",
                       kernel_name(), where(first->wait_file, first->wait_line).text, lane_list(returned).text, index,
                       worker->position[0], worker->position[1], worker->position[2]);
            if (emu_settings.strict) abort_group();
        }
    }
    simdgroup->runnable |= mask;
    simdgroup->waiting = 0;
    simdgroup->mixed = false;
    atomic_fetch_add_explicit(&emu_statistics.simd_operations, 1, memory_order_relaxed);
}

static void arrive(struct emu_simdgroup *simdgroup, const struct emu_lane *lane) {
    if (simdgroup->waiting++ == 0) {
        simdgroup->run = lane->wait_run;
        simdgroup->file = lane->wait_file;
        simdgroup->line = lane->wait_line;
    } else if (simdgroup->run != lane->wait_run || simdgroup->line != lane->wait_line || simdgroup->file != lane->wait_file) {
        simdgroup->mixed = true;
    }
}

static void wait_for_simdgroup(struct emu_lane *lane, void (*run)(void **, unsigned), void *payload, const char *name,
                               const char *file, int line, int full) {
    struct emu_simdgroup *simdgroup = &emu_worker->simdgroups[lane->simdgroup];
    lane->wait_run = run;
    lane->payload = payload;
    lane->wait_name = name;
    lane->wait_file = file;
    lane->wait_line = line;
    lane->wait_full = full;
    lane->state = EMU_AT_SIMD;
    simdgroup->runnable &= ~(1u << lane->lane);
    arrive(simdgroup, lane);
    if (!simdgroup->runnable && !simdgroup->mixed && simdgroup->waiting == (uint32_t)__builtin_popcount(simdgroup->live)) {
        perform(lane->simdgroup, simdgroup->live);
        if (!emu_worker->abort) return;
        emu_lane_abandon();
    }
    leave(lane);
}

EMU_EXPORT void emu_simd(void (*run)(void **, unsigned), void *payload, const char *name, const char *file, int line) {
    wait_for_simdgroup(emu_this_lane(), run, payload, name, file, line, 0);
}

EMU_EXPORT void emu_simdgroup_barrier(unsigned flags, const char *file, int line) {
    struct emu_lane *lane = emu_this_lane();
    lane->wait_flags = flags;
    wait_for_simdgroup(lane, NULL, NULL, "simdgroup_barrier", file, line, 0);
}

/* All lanes' operands make two 8 x 8 matrices; sums are float32, in the order of the inner dimension. */
static void multiply_matrices(void **payloads, unsigned mask) {
    float a[8][8], b[8][8], d[8][8];
    (void)mask;
    for (int lane = 0; lane < 32; lane++) {
        const struct emu_product *product = payloads[lane];
        int row = emu_matrix_row(lane), column = emu_matrix_column(lane);
        for (int i = 0; i < 2; i++) {
            a[row][column + i] = product->a[i];
            b[row][column + i] = product->b[i];
            d[row][column + i] = product->c[i];
        }
    }
    for (int i = 0; i < 8; i++)
        for (int k = 0; k < 8; k++)
            for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++) {
        struct emu_product *product = payloads[lane];
        for (int i = 0; i < 2; i++) product->d[i] = d[emu_matrix_row(lane)][emu_matrix_column(lane) + i];
    }
}

static void need_all_lanes(const struct emu_lane *lane, uint32_t live, const char *name, const char *file, int line) {
    if (live == ~0u) return;
    emu_report(true, "matrix", emu_site(file, line, NULL), "%s: %s at %s needs all 32 lanes of simdgroup %u; only lanes %s run",
               kernel_name(), name, where(file, line).text, lane->simdgroup, lane_list(live).text);
    emu_lane_abandon();
}

EMU_EXPORT void emu_matrix_product(struct emu_product *product, const char *name, const char *file, int line) {
    struct emu_lane *lane = emu_this_lane();
    need_all_lanes(lane, emu_worker->simdgroups[lane->simdgroup].live, name, file, line);
    wait_for_simdgroup(lane, multiply_matrices, product, name, file, line, 1);
}

EMU_EXPORT void emu_matrix_memory(const void *pointer, const char *name, const char *file, int line) {
    struct emu_lane *lane = emu_this_lane();
    need_all_lanes(lane, lanes_of(lane->simdgroup), name, file, line);
    lane->matrix_calls++;
    lane->matrix_file = file;
    lane->matrix_line = line;
    lane->matrix_hash = (lane->matrix_hash ^ (uintptr_t)pointer ^ (uint64_t)line << 48) * 0x9E3779B97F4A7C15ul;
}

EMU_EXPORT void emu_inactive_lane_read(void) {
    struct emu_lane *lane = emu_this_lane();
    emu_report(true, "divergence", emu_site(lane->wait_file, lane->wait_line, "inactive"),
               "%s: %s at %s reads a lane that does not take part, which MSL leaves undefined (%s)", kernel_name(),
               lane->wait_name, where(lane->wait_file, lane->wait_line).text, emu_who(lane).text);
}

EMU_EXPORT void emu_operands_differ(void) {
    struct emu_lane *lane = emu_this_lane();
    emu_report(true, "divergence", emu_site(lane->wait_file, lane->wait_line, "operand"),
               "%s: %s at %s has different operands in the lanes of simdgroup %u, where MSL wants the same in all (%s)",
               kernel_name(), lane->wait_name, where(lane->wait_file, lane->wait_line).text, lane->simdgroup,
               emu_who(lane).text);
}

/* Nobody of the simdgroup can run, and not all wait at one place: the lanes that wait at the earliest line go first, as if
 * they were alone in their branch. */
static bool resolve_divergence(uint32_t index) {
    struct emu_worker *worker = emu_worker;
    struct emu_simdgroup *simdgroup = &worker->simdgroups[index];
    struct emu_lane *first = NULL;
    uint32_t mask = 0;
    for (uint32_t rest = simdgroup->live; rest; rest &= rest - 1) {
        struct emu_lane *lane = worker->lanes[index * 32 + lowest(rest)];
        if (lane->state == EMU_AT_SIMD && (!first || lane->wait_line < first->wait_line)) first = lane;
    }
    if (!first) return false;
    for (uint32_t rest = simdgroup->live; rest; rest &= rest - 1) {
        struct emu_lane *lane = worker->lanes[index * 32 + lowest(rest)];
        if (lane->state == EMU_AT_SIMD && lane->wait_run == first->wait_run && lane->wait_line == first->wait_line &&
            lane->wait_file == first->wait_file)
            mask |= 1u << lane->lane;
    }
    if (mask != simdgroup->live) {
        bool barrier = !first->wait_run, fatal = emu_settings.strict || barrier || first->wait_full;
        emu_report(fatal, barrier ? "barrier" : "divergence", emu_site(first->wait_file, first->wait_line, NULL),
                   "%s: %s at %s is reached by lanes %s of simdgroup %u in threadgroup (%u, %u, %u), while lanes %s are elsewhere",
                   kernel_name(), first->wait_name, where(first->wait_file, first->wait_line).text, lane_list(mask).text,
                   index, worker->position[0], worker->position[1], worker->position[2],
                   lane_list(simdgroup->live & ~mask).text);
        if (fatal) {
            abort_group();
            return false;
        }
    }
    perform(index, mask);
    for (uint32_t rest = simdgroup->live & ~mask; rest; rest &= rest - 1) {
        struct emu_lane *lane = worker->lanes[index * 32 + lowest(rest)];
        if (lane->state == EMU_AT_SIMD) arrive(simdgroup, lane);
    }
    return true;
}

/* ---- threadgroup barriers ---- */

EMU_EXPORT void emu_threadgroup_barrier(unsigned flags, const char *file, int line) {
    struct emu_lane *lane = emu_this_lane();
    lane->wait_flags = flags;
    lane->wait_name = "threadgroup_barrier";
    lane->wait_file = file;
    lane->wait_line = line;
    lane->state = EMU_AT_BARRIER;
    emu_worker->simdgroups[lane->simdgroup].runnable &= ~(1u << lane->lane);
    leave(lane);
}

/* All lanes wait at a barrier or have returned. False: the group is over. */
static bool release_barrier(void) {
    struct emu_worker *worker = emu_worker;
    struct emu_lane *first = NULL, *gone = NULL;
    uint32_t waiting = 0;
    for (uint32_t i = 0; i < worker->threads; i++) {
        struct emu_lane *lane = worker->lanes[i];
        if (lane->state != EMU_AT_BARRIER) {
            gone = lane;
            continue;
        }
        waiting++;
        if (!first) first = lane;
        if (first->wait_line == lane->wait_line && first->wait_file == lane->wait_file && first->wait_flags == lane->wait_flags)
            continue;
        emu_report(true, "barrier", emu_site(first->wait_file, first->wait_line, NULL),
                   "%s: threads of threadgroup (%u, %u, %u) wait at different barriers: thread %u at %s, thread %u at %s",
                   kernel_name(), worker->position[0], worker->position[1], worker->position[2], first->thread,
                   where(first->wait_file, first->wait_line).text, lane->thread, where(lane->wait_file, lane->wait_line).text);
        abort_group();
        return false;
    }
    if (!waiting) return false;
    if (gone) {
        emu_report(emu_settings.strict, "barrier", emu_site(first->wait_file, first->wait_line, NULL),
                   "%s: threadgroup_barrier at %s is reached by %u of the %u threads of threadgroup (%u, %u, %u); thread %u, "
                   "for one, has returned",
                   kernel_name(), where(first->wait_file, first->wait_line).text, waiting, worker->threads,
                   worker->position[0], worker->position[1], worker->position[2], gone->thread);
        if (emu_settings.strict) {
            abort_group();
            return false;
        }
    }
    worker->epoch_threadgroup += (first->wait_flags & EMU_FLAG_THREADGROUP) != 0;
    worker->epoch_device += (first->wait_flags & EMU_FLAG_DEVICE) != 0;
    for (uint32_t i = 0; i < worker->threads; i++) {
        if (worker->lanes[i]->state != EMU_AT_BARRIER) continue;
        worker->lanes[i]->state = EMU_RUNNING;
        worker->simdgroups[i / 32].runnable |= 1u << (i % 32);
    }
    atomic_fetch_add_explicit(&emu_statistics.barriers, 1, memory_order_relaxed);
    return true;
}

/* ---- threadgroup variables ---- */

/* Each variable, and each template's own copy of it, has a place in the arena with room around it; `key` tells them apart. */
EMU_EXPORT void *emu_threadgroup_variable(const void *key, unsigned long size, unsigned long align, const char *name) {
    struct emu_worker *worker = emu_worker;
    for (int i = 0; i < worker->variable_count; i++)
        if (worker->variables[i].key == key) return worker->arena + worker->variables[i].offset;
    uint64_t step = align > 16 ? align : 16, offset = (worker->arena_used + step - 1) & ~(step - 1);
    worker->variable_bytes += (size + 15) & ~15ul;
    if (worker->variable_bytes > EMU_THREADGROUP_LIMIT || worker->variable_count == 64) {
        emu_report(true, "threadgroup memory", emu_site(NULL, 0, key),
                   "%s: threadgroup variable '%s' of %lu bytes brings the kernel's threadgroup memory to %lu bytes; the limit "
                   "is %d",
                   kernel_name(), name, size, worker->variable_bytes, EMU_THREADGROUP_LIMIT);
        emu_lane_abandon();
    }
    worker->variables[worker->variable_count++] = (struct emu_variable){key, offset, size, name};
    worker->arena_used = offset + size + EMU_REDZONE;
    worker->arena_shadow.used = worker->arena_used;
    unsigned long most = atomic_load(&emu_statistics.max_threadgroup_bytes);
    if (worker->variable_bytes > most) atomic_store(&emu_statistics.max_threadgroup_bytes, worker->variable_bytes);
    return worker->arena + offset;
}

static void check_redzones(void) {
    struct emu_worker *worker = emu_worker;
    for (int i = 0; i < worker->variable_count; i++) {
        const struct emu_variable *variable = &worker->variables[i];
        for (int k = 0; k < EMU_REDZONE; k++) {
            if ((unsigned char)worker->arena[variable->offset + variable->size + (uint64_t)k] == EMU_POISON) continue;
            emu_report(true, "bounds", emu_site(NULL, 0, variable->key),
                       "%s: a write past the end of threadgroup variable '%s' (%lu bytes) at byte %lu, in threadgroup "
                       "(%u, %u, %u); check=True names the line",
                       kernel_name(), variable->name, variable->size, variable->size + (uint64_t)k, worker->position[0],
                       worker->position[1], worker->position[2]);
            break;
        }
    }
}

/* ---- a whole threadgroup ---- */

struct emu_worker *emu_worker_new(int seed) {
    struct emu_worker *worker = calloc(1, sizeof *worker);
    if (!worker) abort();
    worker->arena = mmap(NULL, EMU_ARENA_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    worker->random = 12345u + (uint32_t)seed;
    return worker;
}

static void set_builtins(struct emu_lane *lane, const uint32_t size[3]) {
    const struct emu_worker *worker = emu_worker;
    const struct emu_dispatch *dispatch = worker->dispatch;
    const uint32_t *at = worker->position, i = lane->thread;
    const uint32_t inside[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
    for (int axis = 0; axis < 3; axis++) {
        lane->builtin[EMU_THREAD_IN_GRID][axis] = at[axis] * dispatch->group[axis] + inside[axis];
        lane->builtin[EMU_GROUP_IN_GRID][axis] = at[axis];
        lane->builtin[EMU_THREAD_IN_GROUP][axis] = inside[axis];
        lane->builtin[EMU_GROUP_SIZE][axis] = size[axis];
        lane->builtin[EMU_FULL_GROUP_SIZE][axis] = dispatch->group[axis];
        lane->builtin[EMU_GRID_SIZE][axis] = dispatch->grid[axis];
        lane->builtin[EMU_GROUPS][axis] = dispatch->groups[axis];
    }
    lane->builtin[EMU_INDEX_IN_GROUP][0] = i;
    lane->builtin[EMU_LANE_INDEX][0] = i % 32;
    lane->builtin[EMU_SIMDGROUP_INDEX][0] = i / 32;
    lane->builtin[EMU_SIMD_WIDTH][0] = lane->builtin[EMU_EXECUTION_WIDTH][0] = 32;
    lane->builtin[EMU_SIMDGROUPS][0] = worker->simdgroup_count;
    lane->builtin[EMU_QUAD_INDEX][0] = i / 4;
    lane->builtin[EMU_QUAD_LANE][0] = i % 4;
}

/* Threadgroup memory starts as 0xFF bytes: NaN as half, bfloat and float, so that what is used unset shows. */
static void prepare(struct emu_dispatch *dispatch, uint32_t index, bool fresh) {
    struct emu_worker *worker = emu_worker;
    uint32_t size[3];
    worker->dispatch = dispatch;
    worker->abort = false;
    worker->index = index;
    worker->epoch_threadgroup = worker->epoch_device = 0;
    worker->position[0] = index % dispatch->groups[0];
    worker->position[1] = index / dispatch->groups[0] % dispatch->groups[1];
    worker->position[2] = index / dispatch->groups[0] / dispatch->groups[1];
    for (int axis = 0; axis < 3; axis++) /* groups at the edge of the grid may be smaller */
        size[axis] = smaller(dispatch->group[axis], dispatch->grid[axis] - worker->position[axis] * dispatch->group[axis]);
    worker->threads = size[0] * size[1] * size[2];
    worker->simdgroup_count = (worker->threads + 31) / 32;
    emu_stacks_need(worker->threads);
    memset(worker->arena, EMU_POISON, fresh ? EMU_ARENA_BYTES : worker->arena_used);
    worker->serial++;
    if (fresh) {
        worker->variable_count = 0;
        worker->variable_bytes = 0;
        worker->arena_used = EMU_REDZONE;
        worker->last_binding = 0;
        dispatch->first_serial = worker->serial;
        if (dispatch->check && (!worker->arena_shadow.cells || worker->arena_shadow.shift != 2)) {
            emu_shadow_free(&worker->arena_shadow);
            emu_shadow_new(&worker->arena_shadow, EMU_ARENA_BYTES, 2);
        }
    }
    for (int i = 0; i < EMU_BUFFERS; i++) worker->shared.buffer[i] = dispatch->bound[i].set ? dispatch->bound[i].data : NULL;
    for (int i = 0; i < dispatch->binding_count; i++)
        worker->shared.buffer[dispatch->bindings[i].index] = dispatch->bindings[i].base;
    for (uint32_t i = 0; i < worker->threads; i++) {
        uint64_t stack = (uint64_t)(uintptr_t)worker->stacks + i * EMU_STACK_BYTES;
        struct emu_lane *lane = emu_lane_at(stack);
        memset(lane, 0, sizeof *lane);
        worker->lanes[i] = lane;
        lane->group = &worker->shared;
        lane->thread = i;
        lane->lane = i % 32;
        lane->simdgroup = i / 32;
        set_builtins(lane, size);
        emu_lane_start(lane, stack, lane_entry);
    }
    for (uint32_t i = 0; i < worker->simdgroup_count; i++) {
        worker->simdgroups[i] = (struct emu_simdgroup){.live = lanes_of(i), .runnable = lanes_of(i)};
    }
}

static void run_simdgroup(uint32_t index) {
    struct emu_worker *worker = emu_worker;
    do {
        while (worker->simdgroups[index].runnable && !worker->abort)
            emu_switch(&worker->scheduler, pick(index, 31)->stack_pointer);
    } while (!worker->abort && resolve_divergence(index));
}

void emu_group_run(struct emu_dispatch *dispatch, uint32_t index, bool fresh) {
    struct emu_worker *worker = emu_worker;
    prepare(dispatch, index, fresh);
    uint32_t count = worker->simdgroup_count, turn = 0;
    do {
        turn++;
        for (uint32_t i = 0; i < count && !worker->abort; i++) {
            uint32_t which = i;
            if (emu_settings.order == 1) which = count - 1 - i;
            if (emu_settings.order > 1) which = (i + turn * 7 + (uint32_t)emu_settings.order) % count;
            run_simdgroup(which);
        }
    } while (!worker->abort && release_barrier());
    check_redzones();
    atomic_fetch_add_explicit(&emu_statistics.threads, worker->threads, memory_order_relaxed);
    atomic_fetch_add_explicit(&emu_statistics.threadgroups, 1, memory_order_relaxed);
}
