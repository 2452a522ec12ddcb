/* Every load and store of a checked kernel. The compiler inserts these calls (ThreadSanitizer's instrumentation, without
 * ThreadSanitizer): bounds, constness, uninitialised threadgroup memory, races, and traffic per buffer come from one place.
 *
 * Races: each granule of memory remembers its last write, its reads since, and its last atomic write. Two accesses by
 * different threads, one of them a write, not both atomic, must be ordered by a barrier with the memory's flag between
 * them: threadgroup_barrier for one threadgroup, simdgroup_barrier within a simdgroup. Threadgroups of one dispatch are
 * never ordered. The same source compiled for undefined behaviour (misaligned vectors, array indices, shifts) reports
 * here as well. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"

enum access { READ, WRITE, ATOMIC_LOAD, ATOMIC_UPDATE, ATOMIC_STORE };
enum { SCOPE_THREAD, SCOPE_SIMDGROUP, SCOPE_THREADGROUP, SCOPE_GRID, SCOPE_SHIFT = 12, THREAD_MASK = 0xFFF };

static bool is_atomic(enum access access) { return access >= ATOMIC_LOAD; }
static bool reads(enum access access) { return access != WRITE && access != ATOMIC_STORE; }
static bool writes(enum access access) { return access != READ && access != ATOMIC_LOAD; }

/* ---- shadow memory ---- */

void emu_shadow_new(struct emu_shadow *shadow, uint64_t bytes, int shift) {
    *shadow = (struct emu_shadow){calloc((bytes >> shift) + 1, sizeof(struct emu_cell)), bytes, bytes, shift};
    if (!shadow->cells) abort();
}

void emu_shadow_free(struct emu_shadow *shadow) {
    free(shadow->cells);
    *shadow = (struct emu_shadow){NULL, 0, 0, 0};
}

/* A first access finer than the granule: every cell becomes several. */
static void split(struct emu_shadow *shadow, int shift) {
    struct emu_shadow finer;
    emu_shadow_new(&finer, shadow->bytes, shift);
    finer.used = shadow->used;
    for (uint64_t i = 0; i <= shadow->used >> shift; i++) {
        const struct emu_cell *cell = &shadow->cells[i >> (shadow->shift - shift)];
        if (cell->write.group || cell->read.group || cell->atomic.group) finer.cells[i] = *cell;
    }
    emu_shadow_free(shadow);
    *shadow = finer;
}

static struct emu_cell *cells_at(struct emu_shadow *shadow, uint64_t offset, uint64_t size) {
    uint64_t fine = (offset | size) & ((1u << shadow->shift) - 1);
    if (fine) split(shadow, __builtin_ctzl(fine));
    return &shadow->cells[offset >> shadow->shift];
}

/* ---- what is wrong with an access ---- */

static const char *kernel_name(void) { return emu_worker->dispatch->kernel->name; }
static uint64_t site_of(const void *pc) { return emu_site(NULL, 0, pc); }

struct emu_text emu_nearest(const struct emu_dispatch *dispatch, const char *address) {
    struct emu_text text = {"no buffer is near"};
    const struct emu_binding *nearest = NULL;
    int64_t least = 0;
    if ((uint64_t)(uintptr_t)address < 65536) {
        snprintf(text.text, sizeof text.text, "address %#lx: a pointer that was never set, or a buffer that is not bound",
                 (unsigned long)(uintptr_t)address);
        return text;
    }
    for (int i = 0; i < EMU_BUFFERS; i++) {
        const struct emu_bound *bound = &dispatch->bound[i];
        int64_t offset = address - (const char *)bound->bytes;
        if (!bound->bytes || offset < -256 || offset > (int64_t)bound->size + 256) continue;
        snprintf(text.text, sizeof text.text, "byte %ld of the value bound to buffer(%d), which has %lu bytes", (long)offset, i,
                 bound->size);
        return text;
    }
    for (int i = 0; i < dispatch->binding_count; i++) {
        const struct emu_binding *binding = &dispatch->bindings[i];
        int64_t below = binding->base - address, above = address - (binding->base + binding->size) + 1;
        int64_t distance = below > 0 ? below : above > 0 ? above : 0;
        if (nearest && distance >= least) continue;
        nearest = binding;
        least = distance;
    }
    if (nearest)
        snprintf(text.text, sizeof text.text, "byte %ld of buffer(%d), which has %lu bytes", (long)(address - nearest->base),
                 nearest->index, nearest->size);
    return text;
}

static void out_of_bounds(const struct emu_lane *lane, const char *address, uint64_t size, enum access access, const void *pc) {
    const struct emu_worker *worker = emu_worker;
    struct emu_text text = emu_nearest(worker->dispatch, address);
    if ((uint64_t)(address - worker->arena) < EMU_ARENA_BYTES) {
        const struct emu_variable *nearest = NULL;
        for (int i = 0; i < worker->variable_count; i++)
            if (address >= worker->arena + worker->variables[i].offset) nearest = &worker->variables[i];
        if (nearest)
            snprintf(text.text, sizeof text.text, "byte %ld of threadgroup variable '%s', which has %lu bytes",
                     (long)(address - worker->arena - (long)nearest->offset), nearest->name, nearest->size);
    }
    emu_report(true, "bounds", site_of(pc), "%s: out-of-bounds %s of %lu bytes at %s by %s: %s", kernel_name(),
               writes(access) ? "write" : "read", size, emu_place(pc).text, emu_who(lane).text, text.text);
    emu_lane_abandon();
}

struct conflict {
    const struct emu_record *other; /* NULL: none */
    const char *other_name;
};

static void race(const struct emu_lane *lane, enum access access, struct conflict conflict, const char *memory,
                 const char *detail, const void *pc) {
    static const char *const names[] = {"read", "write", "atomic load", "atomic update", "atomic store"};
    const struct emu_record *other = conflict.other;
    const struct emu_dispatch *dispatch = emu_worker->dispatch;
    uint32_t index = other->group - dispatch->first_serial;
    uint32_t total = dispatch->groups[0] * dispatch->groups[1] * dispatch->groups[2];
    if (emu_settings.order == 1) index = total - 1 - index;
    char who[120];
    if (other->group != emu_worker->serial || other->who >> SCOPE_SHIFT == SCOPE_GRID)
        snprintf(who, sizeof who, "by threadgroup (%u, %u, %u), and threadgroups are not ordered", index % dispatch->groups[0],
                 index / dispatch->groups[0] % dispatch->groups[1], index / dispatch->groups[0] / dispatch->groups[1]);
    else
        snprintf(who, sizeof who, "by thread %u of the same threadgroup with no barrier for this memory between",
                 other->who & THREAD_MASK);
    struct emu_text there = emu_place(dispatch->object->low + other->place);
    emu_report(true, "race", site_of(pc), "%s: race on %s memory: %s at %s by %s; %s at %s %s (%s)", kernel_name(), memory,
               names[access], emu_place(pc).text, emu_who(lane).text, conflict.other_name, there.text, who, detail);
}

/* ---- the race check ---- */

struct now {
    struct emu_record record;
    const struct emu_lane *lane;
};

static bool same_simdgroup(const struct emu_record *record, const struct now *now) {
    return (record->who & THREAD_MASK) / 32u == now->lane->simdgroup;
}

static bool ordered(const struct emu_record *record, const struct now *now) {
    int scope = record->who >> SCOPE_SHIFT;
    if (!record->group) return true;
    if (record->group != now->record.group || scope == SCOPE_GRID) return false;
    if (record->epoch != now->record.epoch) return true;
    if (scope <= SCOPE_SIMDGROUP && same_simdgroup(record, now) && record->simd_epoch != now->record.simd_epoch) return true;
    return scope == SCOPE_THREAD && (record->who & THREAD_MASK) == now->lane->thread;
}

/* Adds an access to those remembered since the last one that a barrier separates them from. */
static void merge(struct emu_record *record, const struct now *now) {
    if (record->group && record->group != now->record.group) {
        record->who |= SCOPE_GRID << SCOPE_SHIFT;
        return;
    }
    int scope = record->who >> SCOPE_SHIFT;
    if (scope == SCOPE_GRID && record->group) return;
    if (!record->group || (ordered(record, now) && (scope != SCOPE_THREADGROUP || record->epoch != now->record.epoch))) {
        *record = now->record;
        return;
    }
    if (!same_simdgroup(record, now)) scope = SCOPE_THREADGROUP;
    if (scope == SCOPE_THREAD) scope = SCOPE_SIMDGROUP;
    record->who = (uint16_t)((record->who & THREAD_MASK) | scope << SCOPE_SHIFT);
}

/* The first earlier access that `now` races with; records `now` where there is none. */
static struct conflict find_race(struct emu_cell *cell, uint64_t count, enum access access, const struct now *now) {
    for (; count; count--, cell++) {
        if (!ordered(&cell->write, now)) return (struct conflict){&cell->write, "write"};
        if (!is_atomic(access) && !ordered(&cell->atomic, now)) return (struct conflict){&cell->atomic, "atomic write"};
        if (writes(access) && !ordered(&cell->read, now)) return (struct conflict){&cell->read, "read"};
        if (access == WRITE) {
            cell->write = now->record;
            cell->read.group = cell->atomic.group = 0; /* what is ordered after this write is ordered after them */
        } else if (access == READ) {
            merge(&cell->read, now);
        } else if (writes(access)) {
            merge(&cell->atomic, now);
        }
    }
    return (struct conflict){NULL, NULL};
}

static struct now now_of(const struct emu_lane *lane, bool device, const void *pc) {
    const struct emu_worker *worker = emu_worker;
    const struct emu_simdgroup *simdgroup = &worker->simdgroups[lane->simdgroup];
    struct now now = {{worker->serial, device ? worker->epoch_device : worker->epoch_threadgroup,
                       (uint32_t)((const char *)pc - worker->dispatch->object->low),
                       device ? simdgroup->epoch_device : simdgroup->epoch_threadgroup, (uint16_t)lane->thread},
                      lane};
    return now;
}

/* ---- one access ---- */

static void touch_threadgroup(const struct emu_lane *lane, char *address, uint64_t size, enum access access, const void *pc) {
    struct emu_worker *worker = emu_worker;
    const struct emu_variable *variable = NULL;
    uint64_t offset = (uint64_t)(address - worker->arena);
    for (int i = 0; i < worker->variable_count && !variable; i++)
        if (offset >= worker->variables[i].offset && offset + size <= worker->variables[i].offset + worker->variables[i].size)
            variable = &worker->variables[i];
    if (!variable) out_of_bounds(lane, address, size, access, pc);
    struct emu_cell *cell = cells_at(&worker->arena_shadow, offset, size);
    uint64_t count = size >> worker->arena_shadow.shift;
    for (uint64_t i = 0; i < count; i++) { /* another threadgroup's traces mean nothing here */
        if (cell[i].write.group != worker->serial) cell[i].write.group = 0;
        if (cell[i].read.group != worker->serial) cell[i].read.group = 0;
        if (cell[i].atomic.group != worker->serial) cell[i].atomic.group = 0;
    }
    for (uint64_t i = 0; i < count && reads(access); i++) {
        if (cell[i].write.group || cell[i].atomic.group) continue;
        emu_report(true, "uninitialised", site_of(pc),
                   "%s: uninitialised threadgroup memory is read at %s by %s: byte %lu of '%s', which no thread of the "
                   "threadgroup has written",
                   kernel_name(), emu_place(pc).text, emu_who(lane).text,
                   offset - variable->offset + (i << worker->arena_shadow.shift), variable->name);
        break;
    }
    if (!emu_settings.races) {
        if (writes(access))
            for (uint64_t i = 0; i < count; i++) cell[i].write.group = worker->serial;
        return;
    }
    struct now now = now_of(lane, false, pc);
    struct conflict conflict = find_race(cell, count, access, &now);
    if (!conflict.other) return;
    char detail[160];
    snprintf(detail, sizeof detail, "byte %lu of '%s'", offset - variable->offset, variable->name);
    race(lane, access, conflict, "threadgroup", detail, pc);
}

static void set_bits(uint64_t *bits, uint64_t first, uint64_t count) {
    if (count <= 64 - first % 64 && count < 64) {
        bits[first / 64] |= ((1ul << count) - 1) << (first % 64);
        return;
    }
    for (uint64_t i = first; i < first + count; i++) bits[i / 64] |= 1ul << (i % 64);
}

/* What a threadgroup loads for the first time: traffic as it is when a threadgroup's loads stay in its cache. */
static void count_group_loads(struct emu_binding *binding, uint64_t offset, uint64_t size) {
    for (uint64_t at = offset; at < offset + size; at += 2 - at % 2) {
        if (binding->loaded_in[at / 2] == emu_worker->serial) continue;
        binding->loaded_in[at / 2] = emu_worker->serial;
        binding->loaded_by_groups += binding->size - (at & ~1ul) < 2 ? 1 : 2;
    }
}

static void count_traffic(struct emu_binding *binding, uint64_t offset, uint64_t size, enum access access) {
    if (reads(access)) {
        binding->loaded += size;
        set_bits(binding->loaded_bits, offset, size);
        count_group_loads(binding, offset, size);
    }
    if (writes(access)) binding->stored += size, set_bits(binding->stored_bits, offset, size);
}

static void touch_device(const struct emu_lane *lane, struct emu_binding *binding, char *address, uint64_t size,
                         enum access access, const void *pc) {
    uint64_t offset = (uint64_t)(address - binding->base);
    if (writes(access) && !binding->writable) {
        emu_report(true, "constness", site_of(pc), "%s: write to buffer(%d), whose argument is const, at %s by %s",
                   kernel_name(), binding->index, emu_place(pc).text, emu_who(lane).text);
        emu_lane_abandon(); /* the memory is mapped read-only */
    }
    count_traffic(binding, offset, size, access);
    struct emu_shadow *shadow = &binding->region->shadow;
    if (!shadow->cells || !emu_settings.races) return;
    struct emu_cell *cell = cells_at(shadow, binding->offset + offset, size);
    struct now now = now_of(lane, true, pc);
    struct conflict conflict = find_race(cell, size >> shadow->shift, access, &now);
    if (!conflict.other) return;
    char detail[80];
    snprintf(detail, sizeof detail, "byte %lu of buffer(%d)", offset, binding->index);
    race(lane, access, conflict, "device", detail, pc);
}

static bool inside(const char *address, uint64_t size, const char *base, uint64_t bytes) {
    return address >= base && (uint64_t)(address - base) + size <= bytes;
}

static void check_access(char *address, uint64_t size, enum access access, const void *pc) {
    struct emu_worker *worker = emu_worker;
    if (!worker || !worker->dispatch || !size) return;
    if ((uint64_t)(address - worker->stacks) < worker->stack_bytes) return; /* thread memory */
    if ((uint64_t)(address - (char *)worker) < sizeof *worker) return;      /* the table of buffers */
    struct emu_lane *lane = emu_this_lane();
    if ((uint64_t)((char *)lane - worker->stacks) >= worker->stack_bytes) return; /* not a lane: a static initialiser */
    struct emu_dispatch *dispatch = worker->dispatch;
    /* not one atomic step: checked kernels run on one worker */
    atomic_store_explicit(&emu_statistics.accesses,
                          atomic_load_explicit(&emu_statistics.accesses, memory_order_relaxed) + 1, memory_order_relaxed);
    if ((uint64_t)(address - worker->arena) < EMU_ARENA_BYTES) {
        touch_threadgroup(lane, address, size, access, pc);
        return;
    }
    for (int i = 0; i < dispatch->binding_count; i++) {
        int which = i == 0 ? worker->last_binding : i <= worker->last_binding ? i - 1 : i;
        if (!inside(address, size, dispatch->bindings[which].base, dispatch->bindings[which].size)) continue;
        worker->last_binding = which;
        touch_device(lane, &dispatch->bindings[which], address, size, access, pc);
        return;
    }
    for (int i = 0; i < EMU_BUFFERS; i++)
        if (dispatch->bound[i].bytes && inside(address, size, (char *)dispatch->bound[i].bytes, dispatch->bound[i].size)) return;
    if (address >= dispatch->object->low && address < dispatch->object->high) return; /* a table in constant memory */
    out_of_bounds(lane, address, size, access, pc);
}

EMU_EXPORT void emu_atomic_access(const void *pointer, unsigned size, int how) {
    struct emu_worker *worker = emu_worker;
    if (worker && worker->dispatch && worker->dispatch->check)
        check_access((char *)pointer, size, ATOMIC_LOAD + (enum access)how, __builtin_return_address(0));
}

/* ---- the compiler's calls for loads and stores ---- */

#define PC __builtin_return_address(0)
#define CALLS(size)                                                                                              \
    EMU_EXPORT void __tsan_read##size(void *p) { check_access(p, size, READ, PC); }                              \
    EMU_EXPORT void __tsan_write##size(void *p) { check_access(p, size, WRITE, PC); }                            \
    EMU_EXPORT void __tsan_unaligned_read##size(void *p) { check_access(p, size, READ, PC); }                    \
    EMU_EXPORT void __tsan_unaligned_write##size(void *p) { check_access(p, size, WRITE, PC); }                  \
    EMU_EXPORT void __tsan_read_write##size(void *p) {                                                           \
        check_access(p, size, READ, PC);                                                                         \
        check_access(p, size, WRITE, PC);                                                                        \
    }                                                                                                            \
    EMU_EXPORT void __tsan_unaligned_read_write##size(void *p) {                                                 \
        check_access(p, size, READ, PC);                                                                         \
        check_access(p, size, WRITE, PC);                                                                        \
    }
CALLS(1) CALLS(2) CALLS(4) CALLS(8) CALLS(16)

EMU_EXPORT void __tsan_read_range(void *p, unsigned long size) { check_access(p, size, READ, PC); }
EMU_EXPORT void __tsan_write_range(void *p, unsigned long size) { check_access(p, size, WRITE, PC); }
EMU_EXPORT void *__tsan_memcpy(void *to, const void *from, unsigned long size) {
    check_access((char *)from, size, READ, PC);
    check_access(to, size, WRITE, PC);
    return memcpy(to, from, size);
}
EMU_EXPORT void *__tsan_memmove(void *to, const void *from, unsigned long size) {
    check_access((char *)from, size, READ, PC);
    check_access(to, size, WRITE, PC);
    return memmove(to, from, size);
}
EMU_EXPORT void *__tsan_memset(void *to, int value, unsigned long size) {
    check_access(to, size, WRITE, PC);
    return memset(to, value, size);
}
EMU_EXPORT void __tsan_init(void) {}

/* ---- the compiler's calls for undefined behaviour ---- */

struct source {
    const char *file;
    uint32_t line, column;
};
struct type {
    uint16_t kind, info;
    char name[];
};
struct mismatch {
    struct source source;
    const struct type *type;
    unsigned char log_alignment, kind;
};
struct index {
    struct source source;
    const struct type *array, *index;
};
struct shift {
    struct source source;
    const struct type *left, *right;
};
struct division {
    struct source source;
    const struct type *type;
};

/* NULL outside of a kernel. Reports name the return address, not data->source: that may be a line of our headers. */
static const struct emu_lane *kernel_lane(void) {
    struct emu_worker *worker = emu_worker;
    const struct emu_lane *lane = emu_this_lane();
    return worker && worker->dispatch && (uint64_t)((const char *)lane - worker->stacks) < worker->stack_bytes ? lane : NULL;
}

EMU_EXPORT void __ubsan_handle_type_mismatch_v1(const struct mismatch *data, uintptr_t pointer) {
    const struct emu_lane *lane = kernel_lane();
    uintptr_t alignment = 1ul << data->log_alignment;
    if (lane && pointer & (alignment - 1))
        emu_report(true, "alignment", site_of(PC), "%s: access at %s by %s to %s at an address that is not a multiple of %lu: %s",
                   kernel_name(), emu_place(PC).text, emu_who(lane).text, data->type->name, (unsigned long)alignment,
                   emu_nearest(emu_worker->dispatch, (const char *)pointer).text);
}

EMU_EXPORT void __ubsan_handle_out_of_bounds(const struct index *data, uintptr_t index) {
    const struct emu_lane *lane = kernel_lane();
    if (lane)
        emu_report(true, "bounds", site_of(PC), "%s: index %ld is out of bounds for %s at %s by %s", kernel_name(), (long)index,
                   data->array->name, emu_place(PC).text, emu_who(lane).text);
}

EMU_EXPORT void __ubsan_handle_shift_out_of_bounds(const struct shift *data, uintptr_t left, uintptr_t right) {
    const struct emu_lane *lane = kernel_lane();
    (void)left;
    if (lane)
        emu_report(true, "shift", site_of(PC), "%s: %s is shifted by %ld bits at %s by %s", kernel_name(), data->left->name,
                   (long)right, emu_place(PC).text, emu_who(lane).text);
}

EMU_EXPORT void __ubsan_handle_divrem_overflow(const struct division *data, uintptr_t left, uintptr_t right) {
    const struct emu_lane *lane = kernel_lane();
    (void)left;
    if (!lane) return;
    emu_report(true, "arithmetic", site_of(PC), "%s: division of %s by %ld at %s by %s", kernel_name(), data->type->name,
               (long)right, emu_place(PC).text, emu_who(lane).text);
    emu_lane_abandon(); /* the processor would trap */
}
