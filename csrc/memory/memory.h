/* Weights in files: a checkpoint's files mapped side by side (map.c), and a bounded cache that reads parts of them (cache.c).
 * Knows no torch and, but for python.c, no Python. Everything here may be called from any thread. */
#ifndef MM_MEMORY_H
#define MM_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

struct mm_memory_problem {
    char text[512];
    bool timeout, interrupted; /* of mm_cache_acquire: time ran out, or the caller's patience, rather than that something failed */
};
bool mm_memory_fail(struct mm_memory_problem *problem, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- one file: open, and told from what it was when it was opened ---- */

struct mm_file {
    int descriptor;
    char *path;
    struct stat found; /* when it was opened */
};
bool mm_file_open(struct mm_file *file, const char *path, struct mm_memory_problem *problem);
/* False if the open file has another size or modification time: its bytes may be others, and a mapping's end may be gone. */
bool mm_file_same(const struct mm_file *file, struct mm_memory_problem *problem);
void mm_file_close(struct mm_file *file);

/* ---- map.c ---- */

struct mm_map;
/* Maps files one behind the other, each from a page's start; begins [count] receives where. Pages are the page cache's own until
 * somebody writes (private: files never change). NULL: *problem says why. */
struct mm_map *mm_map_open(const char *const *paths, int count, size_t *begins, struct mm_memory_problem *problem);
void mm_map_close(struct mm_map *map);
void *mm_map_base(const struct mm_map *map);
size_t mm_map_bytes(const struct mm_map *map);
/* Whether all files are as they were. A file that is cut short while somebody reads it does not end the process (SIGBUS): what is missing
 * reads as zeros, and from then on this says so, even if the file is whole again (guard.c). To be asked before and after a use. */
bool mm_map_same(const struct mm_map *map, struct mm_memory_problem *problem);
/* The same for whoever has addresses rather than mappings. mm_maps_watch before the memory is read; mm_maps_same afterwards, which looks
 * at the files that the spans lie in, and does nothing for those that lie in no mapping. Neither costs anything while nothing is mapped. */
struct mm_span {
    const void *begin;
    size_t bytes;
};
void mm_maps_watch(void);
bool mm_maps_same(const struct mm_span *spans, int count, struct mm_memory_problem *problem);
/* Reads a range into memory in large pieces, so that its first use is no page fault each. */
bool mm_map_populate(const struct mm_map *map, size_t begin, size_t bytes, struct mm_memory_problem *problem);
/* The file at a byte of the mapping, and where in the mapping its bytes begin and end. False: none is there. */
struct mm_part {
    int descriptor;
    const char *path;
    size_t begin, end;
};
bool mm_map_part(const struct mm_map *map, size_t place, struct mm_part *part);

/* ---- window.c: some pages of one mapped file, mapped once more, shared and read only: what a GPU is to see ---- */

struct mm_window {
    void *base;
    size_t bytes; /* whole pages */
    size_t place; /* of the first byte, in the mapping that it is a window of */
};
/* Of the pages that hold bytes [begin, end) of the mapping. It stands by itself: the mapping may be closed before it. */
bool mm_window_open(const struct mm_map *map, size_t begin, size_t end, struct mm_window *window, struct mm_memory_problem *problem);
void mm_window_close(const struct mm_window *window);

/* ---- cache.c: groups of bytes of files ("items", an expert's matrices) in a bounded number of equal slots of memory ---- */

struct mm_piece { /* of an item, read to `at` in its slot */
    int64_t item, file, begin, bytes, at;
};
struct mm_cache_options {
    const char *const *paths;
    int files;
    const struct mm_piece *pieces; /* sorted by item */
    int64_t piece_count, items, slots, slot_bytes;
    int readers;
    double half_life;        /* acquired items, after which a use counts half for eviction */
    double bytes_per_second; /* a simulated disk of this speed; 0: as fast as it reads */
};
struct mm_cache_statistics {
    int64_t hits, misses, late;    /* items acquired: there, not there, on the way (prefetched, not yet read) */
    int64_t prefetched, useful;    /* items read ahead; those of them that were then acquired */
    int64_t evictions, reads, bytes, failures;
    int64_t stalls, stall_ns;      /* calls of acquire that waited, and for how long */
};
struct mm_cache;
struct mm_cache *mm_cache_open(const struct mm_cache_options *options, struct mm_memory_problem *problem);
/* The last reference: ends the readers, waiting a second for one that a read holds up (then it frees what is left). In a process that was
 * forked since mm_cache_open there are no readers: this frees its memory, mm_cache_acquire fails, and the others do nothing. */
void mm_cache_close(struct mm_cache *cache);
void *mm_cache_base(const struct mm_cache *cache);
/* How long mm_cache_acquire may wait. interrupted (may be NULL) is asked every 50 ms, without locks: true ends the wait. */
struct mm_patience {
    double seconds;
    bool (*interrupted)(void *context);
    void *context;
};
/* Pins distinct items and waits until all are in memory; found [count] receives their slots. Never waits while it holds pins that
 * another thread's acquire could need to get on. False: nothing is pinned. count must not exceed the slots. */
bool mm_cache_acquire(struct mm_cache *cache, const int64_t *items, int64_t count, int64_t *found, const struct mm_patience *patience,
                      struct mm_memory_problem *problem);
/* Unpins distinct items. False: one of them isn't pinned; then none is unpinned. */
bool mm_cache_release(struct mm_cache *cache, const int64_t *items, int64_t count, struct mm_memory_problem *problem);
/* Asks for items ahead of their use: those that are neither there nor asked for, the first ones first. Returns how many were taken. */
int64_t mm_cache_prefetch(struct mm_cache *cache, const int64_t *items, int64_t count);
struct mm_cache_statistics mm_cache_statistics(struct mm_cache *cache, bool reset);
/* Slots by what is in them: [0] nothing, [1] asked for, [2] being read, [3] there; [4] those of them that are pinned. */
void mm_cache_slots(struct mm_cache *cache, int64_t counts[5]);

#endif
