/* PyTorch's MPS shim as a recorder, for metal.py: writes every Metal text that it is given to a file of its own in the
 * folder $METAL_TEXTS, and runs nothing. Loaded by _C.use_mps_emulator. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))
#define SHIM(name, ...) \
    EXPORT int32_t name(__VA_ARGS__); \
    int32_t name(__VA_ARGS__)

static int count;

SHIM(aoti_torch_mps_create_shader_library, const char *source, void **library) {
    char path[4096];
    const char *folder = getenv("METAL_TEXTS");
    snprintf(path, sizeof path, "%s/%04d.metal", folder ? folder : ".", count++);
    FILE *file = fopen(path, "w");
    if (!file) return 1;
    int failed = fputs(source, file) < 0;
    failed |= fclose(file) != 0;
    *library = &count;
    return failed;
}

SHIM(aoti_torch_mps_get_kernel_function, void *library, const char *name, void **function) {
    (void)name;
    *function = library;
    return 0;
}

SHIM(aoti_torch_mps_run_command_block, void *function, void (*callback)(void *, void *), void *context) {
    (void)function, (void)callback, (void)context; /* so that nothing is encoded, and the functions below are not called */
    return 0;
}

SHIM(aoti_torch_mps_start_encoding, void *function) { return function == NULL; }
SHIM(aoti_torch_mps_set_arg_tensor, void *function) { return function == NULL; }
SHIM(aoti_torch_mps_set_arg_int, void *function) { return function == NULL; }
SHIM(aoti_torch_mps_dispatch_array_with_group_size, void *function) { return function == NULL; }
