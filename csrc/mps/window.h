/* Weights of a mapped file as MPS tensors, without a copy: pages of the file (memory/window.c) -> an MTLBuffer over them -> a tensor
 * whose storage is that buffer.
 * Who keeps whom: the tensor's storage holds one reference to the buffer, command buffers that use it hold more; the buffer's
 * deallocator unmaps the pages. So they are there until the last tensor is gone and the GPU is done, in whatever order. */
#ifndef MM_MPS_WINDOW_H
#define MM_MPS_WINDOW_H

#include "memory/memory.h"
#include "torch_shim.h"

struct mm_window_problem {
    char text[640];
    bool file; /* it is the file's: an OSError */
};

/* NULL, or why this process can't make such tensors: no MPS backend, or a torch before 2.11. */
const char *mm_mps_window_missing(void);
/* Makes a buffer over the pages of bytes [begin, end) of the mapping. Its number, which mm_mps_window_tensor takes once; 0: *problem
 * says why not. window receives where the pages lie. */
int64_t mm_mps_window_open(const struct mm_map *map, size_t begin, size_t end, struct mm_window *window, struct mm_window_problem *problem);
/* The buffer as a tensor, int16 [bytes / 2] on the MPS device of this index. NULL: *message says why; the buffer is released. */
mm_tensor_handle mm_mps_window_tensor(int64_t number, int32_t device_index, const char **message);
/* Whether a storage's data pointer is that of such a tensor: the pages behind it can't be written to. */
bool mm_mps_window_holds(const void *data);
/* Bytes that are mapped for the GPU now, whole pages. */
int64_t mm_mps_window_bytes(void);

#endif
