/* torch_from_blob as a Mac's torch (2.11) has it for MPS: `data` is an id<MTLBuffer>, and the tensor keeps calling `deleter` for it.
 * The tensor that comes out is one of the CPU, as all that stand for those of MPS, on the buffer's memory. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "metal.h"

#ifndef EMU_WITHOUT_SET_BYTES /* with it, this is torch 2.10 */

void *emu_torch_find(const char *name);

struct blob {
    void *buffer, *context;
    void (*deleter)(void *data, void *context);
};

static void drop(void *memory, void *context) {
    struct blob blob = *(struct blob *)context;
    (void)memory;
    free(context);
    if (blob.deleter) blob.deleter(blob.buffer, blob.context);
}

static int32_t fail(const char *text) {
    emu_report(true, "argument", 0, "torch_from_blob: %s", text);
    return 1;
}

EMU_EXPORT int32_t torch_from_blob(void *data, int64_t dim, const int64_t *sizes, const int64_t *strides, int64_t offset, int32_t dtype,
                                   int32_t device_type, int32_t device_index, void **result, int32_t layout, const uint8_t *metadata,
                                   int64_t metadata_bytes, void (*deleter)(void *, void *), void *context) {
    int32_t (*real)(void *, int64_t, const int64_t *, const int64_t *, int64_t, int32_t, int32_t, int32_t, void **, int32_t,
                    const uint8_t *, int64_t, void (*)(void *, void *), void *);
    size_t (*element_size)(int32_t);
    void *symbol = emu_torch_find("torch_from_blob"), *size_of = emu_torch_find("aoti_torch_dtype_element_size");
    if (!symbol || !size_of) return fail("this torch is older than 2.11, and the emulator has none of its own");
    memcpy(&real, &symbol, sizeof symbol);
    memcpy(&element_size, &size_of, sizeof size_of);
    if (emu_in_block()) return fail("it is called inside a command block");
    if (device_type != 0) return fail("the device is not the CPU, where tensors stand for those of MPS");
    if (device_index > 0) return fail("the device's index is not that of the only GPU");
    if (!emu_objc_is(data, &emu_MTLBuffer, "torch_from_blob")) return 1;
    struct emu_buffer *buffer = data;
    if (emu_faults.no_tensor > 1 && deleter) deleter(data, context); /* as if it failed after the storage was made */
    if (emu_faults.no_tensor) return 1;
    int64_t span = 1 + offset;
    for (int64_t i = 0; i < dim; i++) span += (sizes[i] - 1) * strides[i];
    if ((uint64_t)span * element_size(dtype) > buffer->bytes) return fail("the tensor is larger than the buffer");
    struct blob *blob = malloc(sizeof *blob);
    if (!blob) abort();
    *blob = (struct blob){data, context, deleter};
    int32_t failed = real(buffer->memory, dim, sizes, strides, offset, dtype, 0, -1, result, layout, metadata, metadata_bytes, drop, blob);
    if (failed) free(blob);
    return failed;
}

#endif
