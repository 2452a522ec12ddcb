/* MPS tensors over mapped files. See mps/window.h.
 * PyTorch's data pointer of an MPS tensor is its id<MTLBuffer>, and where the tensor begins in it is the storage's offset: so the
 * buffer goes to torch_from_blob as `data`, and views of the tensor are views of the file. The device is the system's
 * default one, the only one of Apple silicon. */
#include "mps/window.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "metal_queue/runtime.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the two lists */

/* ---- the buffer's deallocator: a block, as in metal_queue/completion.c, without copy and dispose: it refers to nothing counted ---- */

enum { HAS_SIGNATURE = 1 << 30 };

/* A window that is mapped. */
struct pages {
    struct pages *next;
    struct mm_window window;
    mm_id buffer; /* over it; not a reference */
    atomic_flag unmapped;
};
static struct pages *mapped;

struct block {
    void *isa;
    int flags, reserved;
    void (*invoke)(struct block *block, void *pointer, mm_uinteger length);
    const struct descriptor *descriptor;
    struct pages *pages;
};

struct descriptor {
    unsigned long reserved, size;
    const char *signature;
};

/* Encoded type: void, 24 bytes of arguments: the block at 0, a pointer at 8, an unsigned long at 16. */
static const struct descriptor descriptor = {0, sizeof(struct block), "v24@?0^v8Q16"};

static bool unmap_once(struct pages *pages) {
    if (atomic_flag_test_and_set(&pages->unmapped)) return false;
    pthread_mutex_lock(&lock);
    struct pages **place = &mapped;
    while (*place != pages) place = &(*place)->next;
    *place = pages->next;
    pthread_mutex_unlock(&lock);
    mm_window_close(&pages->window);
    return true;
}

int64_t mm_mps_window_bytes(void) {
    int64_t bytes = 0;
    pthread_mutex_lock(&lock);
    for (const struct pages *pages = mapped; pages; pages = pages->next) bytes += (int64_t)pages->window.bytes;
    pthread_mutex_unlock(&lock);
    return bytes;
}

/* The pointer is the buffer; in an emulator, where CPU tensors stand for those of MPS, it is the memory. */
bool mm_mps_window_holds(const void *data) {
    uintptr_t at = (uintptr_t)data;
    bool found = false;
    pthread_mutex_lock(&lock);
    for (const struct pages *pages = mapped; pages && !found; pages = pages->next) {
        uintptr_t base = (uintptr_t)pages->window.base;
        found = data && (data == pages->buffer || (at >= base && at < base + pages->window.bytes));
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static void deallocate(struct block *block, void *pointer, mm_uinteger length) {
    (void)pointer, (void)length;
    if (unmap_once(block->pages)) free(block->pages);
}

/* ---- buffers: first in a list, then a tensor's ---- */

struct waiting {
    struct waiting *next;
    int64_t number;
    mm_id buffer;
    int64_t bytes;
    bool making; /* a tensor, of which nothing is known yet */
};
static struct waiting *waiting;
static int64_t last_number;

static int64_t put(struct waiting *made) {
    pthread_mutex_lock(&lock);
    made->number = ++last_number;
    made->next = waiting;
    waiting = made;
    pthread_mutex_unlock(&lock);
    return made->number;
}

static struct waiting *take(int64_t number) {
    pthread_mutex_lock(&lock);
    struct waiting **place = &waiting;
    while (*place && (*place)->number != number) place = &(*place)->next;
    struct waiting *found = *place;
    if (found) *place = found->next;
    pthread_mutex_unlock(&lock);
    return found;
}

const char *mm_mps_window_missing(void) {
    if (mm_mps_device_type() < 0) return "there is no MPS backend in this process";
    if (!mm_mps.torch_from_blob) return "this torch lacks the symbol torch_from_blob, which came with torch 2.11";
    return NULL;
}

static mm_id buffer_over(struct pages *pages, struct mm_window_problem *problem) {
    const mm_uinteger shared = 0; /* MTLResourceStorageModeShared, default cache mode, hazards tracked: as PyTorch's own */
    size_t bytes = pages->window.bytes;
    struct mm_metal_problem metal = {.text = ""};
    mm_id buffer = NULL, device = mm_metal_device(&metal);
    if (!device) {
        snprintf(problem->text, sizeof problem->text, "%s", metal.text);
        return NULL;
    }
    void *pool = mm_metal_pool_open();
    mm_uinteger most = MM_ASK(max_buffer, device);
    if (bytes > most) {
        snprintf(problem->text, sizeof problem->text, "a window of %zu bytes; Metal's buffers have at most %lu here", bytes, most);
    } else {
        struct block block = {mm_metal._NSConcreteStackBlock, HAS_SIGNATURE, 0, deallocate, &descriptor, pages};
        buffer = mm_metal_own(MM_SEND(new_buffer_over, device, pages->window.base, (mm_uinteger)bytes, shared, &block));
        if (!buffer) snprintf(problem->text, sizeof problem->text, "Metal made no buffer over %zu bytes of a mapped file", bytes);
    }
    mm_metal_release(device); /* a buffer keeps its own */
    mm_metal_pool_close(pool);
    return buffer;
}

int64_t mm_mps_window_open(const struct mm_map *map, size_t begin, size_t end, struct mm_window *window, struct mm_window_problem *problem) {
    const char *missing = mm_mps_window_missing();
    struct mm_memory_problem memory = {.timeout = false};
    problem->file = false;
    if (missing) return snprintf(problem->text, sizeof problem->text, "%s", missing), 0;
    struct waiting *made = malloc(sizeof *made);
    struct pages *pages = malloc(sizeof *pages);
    mm_id buffer = NULL;
    if (!made || !pages) {
        snprintf(problem->text, sizeof problem->text, "out of memory");
        free(pages);
    } else if (!mm_window_open(map, begin, end, window, &memory)) {
        problem->file = true;
        snprintf(problem->text, sizeof problem->text, "%s", memory.text);
        free(pages);
    } else {
        pages->window = *window;
        pages->buffer = NULL;
        atomic_flag_clear(&pages->unmapped);
        pthread_mutex_lock(&lock);
        pages->next = mapped;
        mapped = pages;
        pthread_mutex_unlock(&lock);
        buffer = buffer_over(pages, problem);
        /* Apple doesn't say whether a buffer that wasn't made calls its deallocator, now or later: so `pages` stays. */
        if (buffer) pages->buffer = buffer;
        else unmap_once(pages);
    }
    if (!buffer) return free(made), 0;
    *made = (struct waiting){.buffer = buffer, .bytes = (int64_t)window->bytes};
    return put(made);
}

static void release(struct waiting *owned) {
    void *pool = mm_metal_pool_open();
    mm_metal_release(owned->buffer);
    mm_metal_pool_close(pool);
    free(owned);
}

/* The storage's deleter, on whatever thread drops it; no Python in here. A tensor that fails half made may call it or not, so then
 * it does nothing. */
static void drop(void *buffer, void *context) {
    struct waiting *owned = context;
    (void)buffer;
    if (!owned->making) release(owned);
}

mm_tensor_handle mm_mps_window_tensor(int64_t number, int32_t device_index, const char **message) {
    enum { STRIDED = 0 }; /* c10::Layout */
    struct waiting *found = take(number);
    mm_tensor_handle tensor = NULL;
    *message = "window is not a number that map_window has just returned";
    if (!found) return NULL;
    int64_t count = found->bytes / 2, stride = 1;
    found->making = true;
    if (mm_mps.torch_from_blob(found->buffer, 1, &count, &stride, 0, mm_torch.aoti_torch_dtype_int16(), mm_mps_device_type(), device_index,
                               &tensor, STRIDED, NULL, 0, drop, found)) {
        *message = "PyTorch made no tensor of a Metal buffer; see standard error";
        release(found);
        return NULL;
    }
    found->making = false;
    return tensor;
}
