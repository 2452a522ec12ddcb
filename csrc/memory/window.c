/* Pages of a file as a GPU is to see them. See memory.h.
 * Not the mapping that the CPU's tensors are views of: that one is private and writable, and macOS may answer the first access to a
 * page of such a mapping with a copy of the page. This one is shared and read only, as llama.cpp maps what its Metal backend
 * wraps. Pages of both are the page cache's, so that mapping twice costs addresses only. */
#include "memory/memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

bool mm_window_open(const struct mm_map *map, size_t begin, size_t end, struct mm_window *window, struct mm_memory_problem *problem) {
    struct mm_part part;
    if (!mm_map_part(map, begin, &part) || end <= begin || end > part.end)
        return mm_memory_fail(problem, "bytes %zu to %zu of a mapping of %zu; expected 1 or more, of one file", begin, end, mm_map_bytes(map));
    if (!mm_map_same(map, problem)) return false;
    size_t page = (size_t)sysconf(_SC_PAGESIZE), first = (begin - part.begin) / page * page;
    size_t bytes = (end - part.begin - first + page - 1) / page * page; /* the rest of a file's last page reads as zeros */
    void *base = mmap(NULL, bytes, PROT_READ, MAP_SHARED, part.descriptor, (off_t)first);
    if (base == MAP_FAILED) return mm_memory_fail(problem, "%s can't be mapped for a GPU: %s", part.path, strerror(errno));
    *window = (struct mm_window){base, bytes, part.begin + first};
    return true;
}

void mm_window_close(const struct mm_window *window) { munmap(window->base, window->bytes); }
