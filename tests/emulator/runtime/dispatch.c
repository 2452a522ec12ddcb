/* A dispatch: the memory its kernel sees, and the worker threads that run its threadgroups.
 * A checked or guarded kernel runs on copies: each bound tensor is mapped alone, between 64 MiB that nobody may touch, so
 * that running out of one view never lands in another. Views that overlap share a memory file and see each other's writes. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <xmmintrin.h>

#include "runtime.h"

enum { PAGE = 4096 };
static const uint64_t GUARD = 64ul << 20;

/* ---- making one ---- */

void emu_bound_bytes(struct emu_bound *bound, const void *data, size_t size) {
    bound->bytes = malloc(size < 16 ? 16 : size);
    if (!bound->bytes) abort();
    memset(bound->bytes, EMU_POISON, size < 16 ? 16 : size);
    memcpy(bound->bytes, data, size);
    bound->set = true;
    bound->data = (char *)bound->bytes;
    bound->size = size;
}

static bool fill_grid(struct emu_dispatch *made, const uint64_t *grid, const uint64_t *group) {
    uint64_t total = 1;
    for (int i = 0; i < 3; i++) {
        if (grid[i] > UINT32_MAX || group[i] > UINT32_MAX) {
            emu_report(true, "group size", 0, "%s: a grid of %lu threads in dimension %d", made->kernel->name, grid[i], i);
            return false;
        }
        made->grid[i] = (uint32_t)grid[i];
        made->group[i] = (uint32_t)group[i];
        made->groups[i] = group[i] ? (uint32_t)((grid[i] + group[i] - 1) / group[i]) : 0;
        total *= made->groups[i];
        if (total > UINT32_MAX) {
            emu_report(true, "group size", 0, "%s: the grid has more than %u threadgroups, too many to emulate",
                       made->kernel->name, UINT32_MAX);
            return false;
        }
    }
    return true;
}

struct emu_dispatch *emu_dispatch_new(struct emu_object *object, const struct emu_kernel *kernel, bool check,
                                      const struct emu_bound *bound, const uint64_t *grid, const uint64_t *group) {
    struct emu_dispatch *made = calloc(1, sizeof *made);
    if (!made) abort();
    made->object = object;
    made->kernel = kernel;
    made->argument_count = kernel->describe(made->arguments);
    made->check = check;
    for (int i = 0; i < EMU_BUFFERS; i++) { /* bindings stay set for another dispatch of the encoding, so these are copies */
        made->bound[i] = bound[i];
        emu_tensor_share(bound[i].tensor);
        if (bound[i].bytes) emu_bound_bytes(&made->bound[i], bound[i].bytes, bound[i].size);
    }
    bool countable = fill_grid(made, grid, group);
    bool fits = countable && emu_group_size_fits(made);
    if (!emu_arguments_fit(made) || !fits) {
        emu_dispatch_free(made);
        return NULL;
    }
    for (int i = 0; i < EMU_BUFFERS; i++)
        if (made->bound[i].bytes) made->bound[i].is_tensor = false; /* a copied scalar: nothing to map */
    return made;
}

/* ---- memory ---- */

static const struct emu_argument *argument_of(const struct emu_dispatch *dispatch, int index) {
    for (int i = 0; i < dispatch->argument_count; i++)
        if (dispatch->arguments[i].kind == EMU_BUFFER && dispatch->arguments[i].index == index) return &dispatch->arguments[i];
    return NULL;
}

static int by_address(const void *a, const void *b) {
    const struct emu_binding *x = a, *y = b;
    return x->base < y->base ? -1 : x->base > y->base;
}

/* Bindings that overlap share a region. An empty one has a region of its own. */
static void find_regions(struct emu_dispatch *dispatch) {
    for (int i = 0; i < EMU_BUFFERS; i++) {
        const struct emu_bound *bound = &dispatch->bound[i];
        const struct emu_argument *argument = argument_of(dispatch, i);
        if (!bound->set || !bound->is_tensor || !argument) continue;
        dispatch->bindings[dispatch->binding_count++] =
            (struct emu_binding){.index = i, .base = bound->data, .size = bound->size, .writable = !argument->is_const};
    }
    qsort(dispatch->bindings, (size_t)dispatch->binding_count, sizeof *dispatch->bindings, by_address);
    struct emu_region *last = NULL;
    for (int i = 0; i < dispatch->binding_count; i++) {
        struct emu_binding *binding = &dispatch->bindings[i];
        struct emu_region *region = last;
        if (!last || !binding->size || binding->base >= last->host + last->size) {
            region = &dispatch->regions[dispatch->region_count++];
            *region = (struct emu_region){.host = binding->base, .file = -1};
            if (binding->size) last = region;
        }
        uint64_t end = (uint64_t)(binding->base - region->host) + binding->size;
        if (end > region->size) region->size = end;
        region->writable |= binding->writable;
        binding->offset = (uint64_t)(binding->base - region->host);
        binding->region = region;
    }
}

static int sharers(const struct emu_dispatch *dispatch, const struct emu_region *region) {
    int count = 0;
    for (int i = 0; i < dispatch->binding_count; i++) count += dispatch->bindings[i].region == region;
    return count;
}

/* The copy is aligned as the tensor is, to 16 bytes and no better, and ends as near to the guard as that allows, so that the
 * processor itself catches most overruns. Shared memory keeps its place within a page, in every view of it. */
static void map_binding(struct emu_dispatch *dispatch, struct emu_binding *binding) {
    struct emu_region *region = binding->region;
    bool shared = sharers(dispatch, region) > 1;
    uint64_t phase = (uint64_t)(uintptr_t)region->host % PAGE;
    uint64_t body = region->size ? (region->size + (shared ? phase : 16) + PAGE - 1) / PAGE * PAGE : 0;
    binding->map_bytes = body + 2 * GUARD;
    binding->map = mmap(NULL, binding->map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (binding->map == MAP_FAILED) abort();
    char *memory = binding->map + GUARD, *start = memory + phase;
    bool fill = !region->first && region->size;
    if (shared && region->size) {
        if (region->file < 0) {
            region->file = memfd_create("buffer", MFD_CLOEXEC);
            if (region->file < 0 || ftruncate(region->file, (off_t)body)) abort();
        }
        if (mmap(memory, body, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, region->file, 0) == MAP_FAILED) abort();
    } else if (region->size) {
        uint64_t room = body - region->size, lead = (room & ~15ul) + phase % 16;
        mprotect(memory, body, PROT_READ | PROT_WRITE);
        start = memory + (lead > room ? lead - 16 : lead);
    }
    if (fill) {
        memset(start + region->size, EMU_POISON, (size_t)(memory + body - start) - region->size);
        memcpy(start, region->host, region->size);
        region->first = start;
    }
    if (!binding->writable && body) mprotect(memory, body, PROT_READ);
    binding->base = start + binding->offset;
}

/* Granules as fine as the finest element that is bound there. */
static int granule_shift(const struct emu_dispatch *dispatch, const struct emu_region *region) {
    int shift = 2;
    for (int i = 0; i < dispatch->binding_count; i++) {
        const struct emu_argument *argument = argument_of(dispatch, dispatch->bindings[i].index);
        if (dispatch->bindings[i].region != region) continue;
        if (argument->element == EMU_HALF || argument->element == EMU_BFLOAT || argument->element == EMU_INT16)
            shift = shift < 1 ? shift : 1;
        else if (argument->element != EMU_FLOAT && argument->element != EMU_INT32 && argument->element != EMU_INT64)
            shift = 0;
    }
    return shift;
}

static void map_memory(struct emu_dispatch *dispatch) {
    find_regions(dispatch);
    for (int i = 0; i < dispatch->binding_count; i++) {
        struct emu_binding *binding = &dispatch->bindings[i];
        map_binding(dispatch, binding);
        if (!dispatch->check) continue;
        binding->loaded_bits = calloc(binding->size / 64 + 1, 8);
        binding->stored_bits = calloc(binding->size / 64 + 1, 8);
        binding->loaded_in = calloc(binding->size / 2 + 1, sizeof *binding->loaded_in);
    }
    for (int i = 0; i < dispatch->region_count && dispatch->check; i++) {
        struct emu_region *region = &dispatch->regions[i];
        if (region->writable && region->size && emu_settings.races)
            emu_shadow_new(&region->shadow, region->size, granule_shift(dispatch, region));
    }
}

static void unmap_memory(struct emu_dispatch *dispatch) {
    for (int i = 0; i < dispatch->region_count; i++) {
        struct emu_region *region = &dispatch->regions[i];
        if (region->writable && region->size) memcpy(region->host, region->first, region->size);
        if (region->file >= 0) close(region->file);
        emu_shadow_free(&region->shadow);
    }
    for (int i = 0; i < dispatch->binding_count; i++) {
        munmap(dispatch->bindings[i].map, dispatch->bindings[i].map_bytes);
        free(dispatch->bindings[i].loaded_bits);
        free(dispatch->bindings[i].stored_bits);
        free(dispatch->bindings[i].loaded_in);
    }
    dispatch->binding_count = dispatch->region_count = 0;
}

/* ---- traffic ---- */

struct traffic {
    uint64_t dispatch;
    char kernel[96];
    int32_t buffer;
    uint32_t reserved;
    uint64_t bytes, loaded, loaded_distinct, stored, stored_distinct, loaded_by_groups;
};
static struct traffic *traffic;
static size_t traffic_count, traffic_room;
static pthread_mutex_t traffic_lock = PTHREAD_MUTEX_INITIALIZER;

static uint64_t count_bits(const uint64_t *bits, uint64_t bytes) {
    uint64_t count = 0;
    for (uint64_t i = 0; i <= bytes / 64; i++) count += (uint64_t)__builtin_popcountl(bits[i]);
    return count;
}

void emu_traffic_record(const struct emu_dispatch *dispatch) {
    pthread_mutex_lock(&traffic_lock);
    for (int index = 0; index < EMU_BUFFERS; index++)
        for (int i = 0; i < dispatch->binding_count; i++) {
            const struct emu_binding *binding = &dispatch->bindings[i];
            if (binding->index != index) continue;
            if (traffic_count == traffic_room) {
                traffic_room = traffic_room ? 2 * traffic_room : 256;
                traffic = realloc(traffic, traffic_room * sizeof *traffic);
                if (!traffic) abort();
            }
            struct traffic *record = &traffic[traffic_count++];
            *record = (struct traffic){.dispatch = atomic_load(&emu_statistics.dispatches), .buffer = index,
                                       .bytes = binding->size, .loaded = binding->loaded, .stored = binding->stored,
                                       .loaded_by_groups = binding->loaded_by_groups};
            strncpy(record->kernel, dispatch->kernel->name, sizeof record->kernel - 1);
            record->loaded_distinct = count_bits(binding->loaded_bits, binding->size);
            record->stored_distinct = count_bits(binding->stored_bits, binding->size);
        }
    pthread_mutex_unlock(&traffic_lock);
}

/* Copies at most `room` records; returns how many there are. */
EMU_EXPORT size_t emu_read_traffic(struct traffic *records, size_t room) {
    pthread_mutex_lock(&traffic_lock);
    size_t count = traffic_count;
    if (count) memcpy(records, traffic, (count < room ? count : room) * sizeof *records);
    pthread_mutex_unlock(&traffic_lock);
    return count;
}

EMU_EXPORT void emu_reset_traffic(void) {
    pthread_mutex_lock(&traffic_lock);
    traffic_count = 0;
    pthread_mutex_unlock(&traffic_lock);
}

/* ---- workers ---- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t work, done;
    int threads, wanted, busy;
    uint64_t generation;
    struct emu_dispatch *dispatch;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .work = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static void run_groups(struct emu_dispatch *dispatch) {
    uint32_t total = dispatch->groups[0] * dispatch->groups[1] * dispatch->groups[2];
    bool fresh = true;
    _mm_setcsr(emu_settings.ftz ? 0x9FC0 : 0x1F80); /* nothing inherited: subnormals kept, or flushed on request */
    for (;;) {
        uint32_t next = atomic_fetch_add(&dispatch->next, 1);
        if (next >= total || atomic_load(&dispatch->failed)) break;
        emu_group_run(dispatch, emu_settings.order == 1 ? total - 1 - next : next, fresh);
        fresh = false;
    }
}

static void *work(void *number) {
    stack_t alternate = {.ss_size = 65536, .ss_sp = malloc(65536)}; /* a lane that overflowed has no stack for the handler */
    sigaltstack(&alternate, NULL);
    emu_worker = emu_worker_new((int)(intptr_t)number + emu_settings.order);
    pthread_mutex_lock(&pool.lock);
    for (uint64_t seen = 0;;) {
        while (pool.generation == seen) pthread_cond_wait(&pool.work, &pool.lock);
        seen = pool.generation;
        if ((intptr_t)number >= pool.wanted) continue;
        struct emu_dispatch *dispatch = pool.dispatch;
        pthread_mutex_unlock(&pool.lock);
        run_groups(dispatch);
        pthread_mutex_lock(&pool.lock);
        if (--pool.busy == 0) pthread_cond_signal(&pool.done);
    }
    return NULL;
}

/* On a queue's thread; the workers serve one dispatch at a time, and queues of Metal's own run beside PyTorch's. Checked kernels run on one worker: their memory of accesses belongs to one dispatch. */
void emu_dispatch_run(void *data) {
    static pthread_mutex_t gpu = PTHREAD_MUTEX_INITIALIZER;
    struct emu_dispatch *dispatch = data;
    pthread_mutex_lock(&gpu);
    bool copies = dispatch->check || emu_settings.guard;
    if (copies) map_memory(dispatch);
    atomic_fetch_add(&emu_statistics.dispatches, 1);
    pthread_mutex_lock(&pool.lock);
    pool.wanted = dispatch->check || emu_settings.workers < 1 ? 1 : emu_settings.workers;
    while (pool.threads < pool.wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, (void *)(intptr_t)pool.threads)) break;
        pthread_detach(thread);
        pool.threads++;
    }
    pool.wanted = pool.wanted < pool.threads ? pool.wanted : pool.threads;
    pool.busy = pool.wanted;
    pool.dispatch = dispatch;
    pool.generation++;
    pthread_cond_broadcast(&pool.work);
    while (pool.busy) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    if (dispatch->check) emu_traffic_record(dispatch);
    if (copies) unmap_memory(dispatch);
    pthread_mutex_unlock(&gpu);
    emu_dispatch_free(dispatch);
}

void emu_dispatch_free(struct emu_dispatch *dispatch) {
    for (int i = 0; i < EMU_BUFFERS; i++) {
        free(dispatch->bound[i].bytes);
        if (dispatch->bound[i].tensor) emu_tensor_release(dispatch->bound[i].tensor);
    }
    free(dispatch);
}
