/* What keeps a mapped file that is cut short from ending the process. Between map.c and guard.c alone; memory.h has the promise. */
#ifndef MM_MEMORY_GUARD_H
#define MM_MEMORY_GUARD_H

#include "memory/memory.h"

struct mm_map {
    char *base;
    size_t bytes, page;
    int count;
    size_t *begins; /* [count] of the files, from base */
    struct mm_file *files;
    struct mm_guard *guard;
};

/* From now until mm_guard_remove, a page of the mapping that its file doesn't have any more is read as zeros, and remembered. The map
 * must not change meanwhile. False: out of memory. */
bool mm_guard_add(struct mm_map *map);
void mm_guard_remove(struct mm_map *map);
/* Whether such a page was read; *at receives where the first one begins, from base. */
bool mm_guard_gone(const struct mm_map *map, size_t *at);
/* The guarded mapping that an address lies in; NULL: none. It is there as long as whoever asks keeps it from being closed. */
const struct mm_map *mm_guard_find(const void *address);
bool mm_guard_any(void);
/* Puts the handler back on top, if somebody has put theirs over it. A system call, nothing more, if nobody has. */
void mm_guard_renew(void);
/* Which file of the mapping lies at an offset from its base. */
int mm_map_file_at(const struct mm_map *map, size_t at);
size_t mm_map_whole_pages(const struct mm_map *map, size_t bytes);

#endif
