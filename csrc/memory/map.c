/* A checkpoint's files as one range of memory. See memory.h. */
#ifdef __linux__
#define _GNU_SOURCE /* MAP_ANONYMOUS, madvise */
#endif
#include "memory/guard.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef __linux__
#define POPULATE_READ 22 /* MADV_POPULATE_READ, Linux 5.14: maps pages, and says EFAULT where an access would be a SIGBUS */
#endif
#define AHEAD ((size_t)64 << 20)
#define STEP ((size_t)8 << 20)

bool mm_memory_fail(struct mm_memory_problem *problem, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem->text, sizeof problem->text, format, arguments);
    va_end(arguments);
    return false;
}

/* ---- files ---- */

static struct timespec changed(const struct stat *found) {
#ifdef __APPLE__
    return found->st_mtimespec;
#else
    return found->st_mtim;
#endif
}

bool mm_file_open(struct mm_file *file, const char *path, struct mm_memory_problem *problem) {
    *file = (struct mm_file){.descriptor = -1};
    size_t length = strlen(path) + 1;
    file->path = malloc(length);
    if (!file->path) return mm_memory_fail(problem, "out of memory");
    memcpy(file->path, path, length);
    file->descriptor = open(path, O_RDONLY | O_CLOEXEC);
    if (file->descriptor < 0 || fstat(file->descriptor, &file->found)) {
        mm_memory_fail(problem, "%s: %s", path, strerror(errno));
        mm_file_close(file);
        return false;
    }
    return true;
}

bool mm_file_same(const struct mm_file *file, struct mm_memory_problem *problem) {
    struct stat now;
    if (fstat(file->descriptor, &now)) return mm_memory_fail(problem, "%s: %s", file->path, strerror(errno));
    struct timespec before = changed(&file->found), after = changed(&now);
    if (now.st_size != file->found.st_size)
        return mm_memory_fail(problem, "%s has changed while it was in use: %lld bytes, expected %lld; load the model again", file->path,
                              (long long)now.st_size, (long long)file->found.st_size);
    if (before.tv_sec != after.tv_sec || before.tv_nsec != after.tv_nsec)
        return mm_memory_fail(problem, "%s has been written to while it was in use; load the model again", file->path);
    return true;
}

void mm_file_close(struct mm_file *file) {
    if (file->descriptor >= 0) close(file->descriptor);
    free(file->path);
    *file = (struct mm_file){.descriptor = -1};
}

/* ---- the mapping ---- */

size_t mm_map_whole_pages(const struct mm_map *map, size_t bytes) { return (bytes + map->page - 1) / map->page * map->page; }

int mm_map_file_at(const struct mm_map *map, size_t at) {
    int low = 0, high = map->count; /* empty files begin where the next one does: the last one that begins at or before */
    while (high - low > 1) {
        int middle = low + (high - low) / 2;
        if (map->begins[middle] <= at)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* No swap is set aside for copies that nobody makes: a model may be larger than what is free. */
#define PRIVATE (MAP_PRIVATE | MAP_NORESERVE)

static bool map_files(struct mm_map *map, const char *const *paths, int count, struct mm_memory_problem *problem) {
    map->page = (size_t)sysconf(_SC_PAGESIZE);
    map->files = calloc((size_t)count + 1, sizeof *map->files);
    map->begins = calloc((size_t)count + 1, sizeof *map->begins);
    if (!map->files || !map->begins) return mm_memory_fail(problem, "out of memory");
    for (; map->count < count; map->count++) {
        if (!mm_file_open(&map->files[map->count], paths[map->count], problem)) return false;
        map->begins[map->count] = map->bytes;
        map->bytes += mm_map_whole_pages(map, (size_t)map->files[map->count].found.st_size);
    }
    if (!map->bytes) return true;
    void *range = mmap(NULL, map->bytes, PROT_NONE, PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (range == MAP_FAILED) return mm_memory_fail(problem, "%zu bytes of address space: %s", map->bytes, strerror(errno));
    map->base = range;
    for (int i = 0; i < count; i++) {
        const struct mm_file *file = &map->files[i];
        if (!file->found.st_size) continue;
        if (mmap(map->base + map->begins[i], (size_t)file->found.st_size, PROT_READ | PROT_WRITE, PRIVATE | MAP_FIXED, file->descriptor, 0) ==
            MAP_FAILED)
            return mm_memory_fail(problem, "%s can't be mapped: %s", file->path, strerror(errno));
    }
    return mm_guard_add(map) || mm_memory_fail(problem, "out of memory");
}

struct mm_map *mm_map_open(const char *const *paths, int count, size_t *begins, struct mm_memory_problem *problem) {
    struct mm_map *map = calloc(1, sizeof *map);
    if (!map) return mm_memory_fail(problem, "out of memory"), NULL;
    if (map_files(map, paths, count, problem)) {
        memcpy(begins, map->begins, (size_t)count * sizeof *begins);
        return map;
    }
    mm_map_close(map);
    return NULL;
}

void mm_map_close(struct mm_map *map) {
    mm_guard_remove(map);
    if (map->base) munmap(map->base, map->bytes);
    for (int i = 0; i < map->count; i++) mm_file_close(&map->files[i]);
    free(map->files);
    free(map->begins);
    free(map);
}

void *mm_map_base(const struct mm_map *map) { return map->base; }
size_t mm_map_bytes(const struct mm_map *map) { return map->bytes; }

/* Zeros were read: nothing in the mapping is to be used from now on, even if the file is whole again. */
static bool fail_gone(const struct mm_map *map, size_t at, struct mm_memory_problem *problem) {
    int f = mm_map_file_at(map, at);
    const struct mm_file *file = &map->files[f];
    long long expected = (long long)file->found.st_size, place = (long long)(at - map->begins[f]);
    struct stat now;
    if (!fstat(file->descriptor, &now) && now.st_size != file->found.st_size)
        return mm_memory_fail(problem, "%s has changed while it was in use: %lld bytes, expected %lld, and byte %lld was read; load the model "
                                       "again, from a file that stays as it is", file->path, (long long)now.st_size, expected, place);
    return mm_memory_fail(problem, "%s has changed while it was in use: byte %lld of %lld could not be read, because it was shorter for a while "
                                   "or its disk has failed; load the model again", file->path, place, expected);
}

bool mm_map_same(const struct mm_map *map, struct mm_memory_problem *problem) {
    size_t at;
    if (map->guard) mm_guard_renew();
    if (mm_guard_gone(map, &at)) return fail_gone(map, at, problem);
    for (int i = 0; i < map->count; i++)
        if (!mm_file_same(&map->files[i], problem)) return false;
    return true;
}

void mm_maps_watch(void) {
    if (mm_guard_any()) mm_guard_renew();
}

bool mm_maps_same(const struct mm_span *spans, int count, struct mm_memory_problem *problem) {
    if (!mm_guard_any()) return true;
    const struct mm_file *last = NULL; /* neighbours mostly lie in one file */
    for (int i = 0; i < count; i++) {
        const struct mm_map *map = spans[i].bytes ? mm_guard_find(spans[i].begin) : NULL;
        if (!map) continue;
        size_t at, begin = (size_t)((const char *)spans[i].begin - map->base), end = begin + spans[i].bytes;
        if (mm_guard_gone(map, &at)) return fail_gone(map, at, problem);
        for (int f = mm_map_file_at(map, begin); f < map->count && map->begins[f] < end; f++) {
            if (&map->files[f] != last && !mm_file_same(&map->files[f], problem)) return false;
            last = &map->files[f];
        }
    }
    return true;
}

static bool touch(const struct mm_map *map, const char *begin, size_t bytes, struct mm_memory_problem *problem) {
#ifdef POPULATE_READ
    if (!madvise((void *)(uintptr_t)begin, bytes, POPULATE_READ)) return true;
    if (errno != EINVAL) {
        int error = errno;
        return mm_map_same(map, problem) && mm_memory_fail(problem, "reading a mapped file: %s", strerror(error));
    }
#endif
    for (size_t i = 0; i < bytes; i += map->page) (void)*(const volatile char *)(begin + i);
    return mm_map_same(map, problem);
}

bool mm_map_populate(const struct mm_map *map, size_t begin, size_t bytes, struct mm_memory_problem *problem) {
    if (begin > map->bytes || bytes > map->bytes - begin)
        return mm_memory_fail(problem, "bytes %zu to %zu of a mapping of %zu", begin, begin + bytes, map->bytes);
    if (!bytes) return mm_map_same(map, problem);
    size_t end = mm_map_whole_pages(map, begin + bytes), asked = begin / map->page * map->page;
    if (!mm_map_same(map, problem)) return false;
    for (size_t at = asked; at < end; at += STEP) {
        size_t want = at + AHEAD < end ? at + AHEAD : end, step = end - at < STEP ? end - at : STEP;
        if (asked < want) { /* the disk works ahead of the page tables */
            madvise(map->base + asked, want - asked, MADV_WILLNEED);
            asked = want;
        }
        if (!touch(map, map->base + at, step, problem)) return false;
    }
    return true;
}

bool mm_map_part(const struct mm_map *map, size_t place, struct mm_part *part) {
    if (place >= map->bytes) return false;
    int number = mm_map_file_at(map, place);
    const struct mm_file *file = &map->files[number];
    size_t begin = map->begins[number], end = begin + (size_t)file->found.st_size;
    *part = (struct mm_part){file->descriptor, file->path, begin, end};
    return place < end;
}
