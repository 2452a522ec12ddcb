/* A checkpoint's files as one range of memory. See memory.h. */
#ifdef __linux__
#define _GNU_SOURCE /* MAP_ANONYMOUS, madvise */
#endif
#include "memory/memory.h"

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

struct mm_map {
    char *base;
    size_t bytes;
    int count;
    struct mm_file *files;
};

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

static size_t whole_pages(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return (bytes + page - 1) / page * page;
}

/* No swap is set aside for copies that nobody makes: a model may be larger than what is free. */
#define PRIVATE (MAP_PRIVATE | MAP_NORESERVE)

static bool map_files(struct mm_map *map, const char *const *paths, int count, size_t *begins, struct mm_memory_problem *problem) {
    map->files = calloc((size_t)(count > 0 ? count : 1), sizeof *map->files);
    if (!map->files) return mm_memory_fail(problem, "out of memory");
    for (; map->count < count; map->count++) {
        if (!mm_file_open(&map->files[map->count], paths[map->count], problem)) return false;
        begins[map->count] = map->bytes;
        map->bytes += whole_pages((size_t)map->files[map->count].found.st_size);
    }
    if (!map->bytes) return true;
    void *range = mmap(NULL, map->bytes, PROT_NONE, PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (range == MAP_FAILED) return mm_memory_fail(problem, "%zu bytes of address space: %s", map->bytes, strerror(errno));
    map->base = range;
    for (int i = 0; i < count; i++) {
        const struct mm_file *file = &map->files[i];
        if (!file->found.st_size) continue;
        if (mmap(map->base + begins[i], (size_t)file->found.st_size, PROT_READ | PROT_WRITE, PRIVATE | MAP_FIXED, file->descriptor, 0) ==
            MAP_FAILED)
            return mm_memory_fail(problem, "%s can't be mapped: %s", file->path, strerror(errno));
    }
    return true;
}

struct mm_map *mm_map_open(const char *const *paths, int count, size_t *begins, struct mm_memory_problem *problem) {
    struct mm_map *map = calloc(1, sizeof *map);
    if (!map) return mm_memory_fail(problem, "out of memory"), NULL;
    if (map_files(map, paths, count, begins, problem)) return map;
    mm_map_close(map);
    return NULL;
}

void mm_map_close(struct mm_map *map) {
    if (map->base) munmap(map->base, map->bytes);
    for (int i = 0; i < map->count; i++) mm_file_close(&map->files[i]);
    free(map->files);
    free(map);
}

void *mm_map_base(const struct mm_map *map) { return map->base; }
size_t mm_map_bytes(const struct mm_map *map) { return map->bytes; }

bool mm_map_same(const struct mm_map *map, struct mm_memory_problem *problem) {
    for (int i = 0; i < map->count; i++)
        if (!mm_file_same(&map->files[i], problem)) return false;
    return true;
}

static bool touch(const char *begin, size_t bytes, struct mm_memory_problem *problem) {
#ifdef POPULATE_READ
    if (!madvise((void *)(uintptr_t)begin, bytes, POPULATE_READ)) return true;
    if (errno != EINVAL) return mm_memory_fail(problem, "reading a mapped file: %s", strerror(errno));
#else
    (void)problem;
#endif
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    for (size_t i = 0; i < bytes; i += page) (void)*(const volatile char *)(begin + i);
    return true;
}

bool mm_map_populate(const struct mm_map *map, size_t begin, size_t bytes, struct mm_memory_problem *problem) {
    if (begin > map->bytes || bytes > map->bytes - begin)
        return mm_memory_fail(problem, "bytes %zu to %zu of a mapping of %zu", begin, begin + bytes, map->bytes);
    size_t page = (size_t)sysconf(_SC_PAGESIZE), end = whole_pages(begin + bytes), asked = begin / page * page;
    if (!mm_map_same(map, problem)) return false;
    for (size_t at = asked; at < end; at += STEP) {
        size_t want = at + AHEAD < end ? at + AHEAD : end, step = end - at < STEP ? end - at : STEP;
        if (asked < want) { /* the disk works ahead of the page tables */
            madvise(map->base + asked, want - asked, MADV_WILLNEED);
            asked = want;
        }
        if (!touch(map->base + at, step, problem)) return false;
    }
    return true;
}

bool mm_map_part(const struct mm_map *map, size_t place, struct mm_part *part) {
    size_t begin = 0;
    for (int i = 0; i < map->count; i++) {
        const struct mm_file *file = &map->files[i];
        size_t bytes = (size_t)file->found.st_size;
        if (place >= begin && place < begin + bytes) {
            *part = (struct mm_part){file->descriptor, file->path, begin, begin + bytes};
            return true;
        }
        begin += whole_pages(bytes);
    }
    return false;
}
