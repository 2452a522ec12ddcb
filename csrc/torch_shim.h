/* Every PyTorch C symbol that this library uses, once: type, arguments, and the first torch that has it.
 * Owns finding them in the running process; the table `mm_torch` is also where tests plug in an emulator.
 * PyTorch's own headers are C++ and are not included: its C ABI (aoti_torch/c/shim.h, stable/c/shim.h) is
 * declared here, so the extension links to no torch library and one binary serves every torch >= 2.10. */
#ifndef MM_TORCH_SHIM_H
#define MM_TORCH_SHIM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct AtenTensorOpaque *mm_tensor_handle;
typedef struct TorchLibraryOpaque *mm_library_handle;
typedef struct StringOpaque *mm_string_handle;
typedef struct StableListOpaque *mm_list_handle;
typedef struct AOTIMetalShaderLibraryOpaque *mm_metal_library;
typedef struct AOTIMetalKernelFunctionOpaque *mm_metal_function;
typedef void (*mm_command_block)(mm_metal_function function, void *context);
typedef uint64_t mm_stable_ivalue;
typedef int32_t mm_torch_error; /* 0 is success */
typedef void (*mm_boxed_kernel)(mm_stable_ivalue *stack, uint64_t n_in, uint64_t n_out);
typedef void (*mm_parallel_body)(int64_t begin, int64_t end, void *context);

#define MM_TORCH_MIN_VERSION "2.10"
/* What the dispatcher is told we were built against: major << 56 | minor << 48. */
#define MM_TORCH_ABI_VERSION (((uint64_t)2 << 56) | ((uint64_t)10 << 48))

/* X(return type, name, (arguments), first torch version) */
#define MM_TORCH_SYMBOLS(X)                                                                                            \
    X(int32_t, aoti_torch_device_type_cpu, (void), "2.7")                                                              \
    X(int32_t, aoti_torch_dtype_float64, (void), "2.7")                                                                  \
    X(int32_t, aoti_torch_dtype_float32, (void), "2.7")                                                                  \
    X(int32_t, aoti_torch_dtype_float16, (void), "2.7")                                                                  \
    X(int32_t, aoti_torch_dtype_bfloat16, (void), "2.7")                                                                 \
    X(int32_t, aoti_torch_dtype_int64, (void), "2.7")                                                                    \
    X(int32_t, aoti_torch_dtype_int32, (void), "2.7")                                                                    \
    X(int32_t, aoti_torch_dtype_int16, (void), "2.7")                                                                    \
    X(int32_t, aoti_torch_dtype_int8, (void), "2.7")                                                                     \
    X(int32_t, aoti_torch_dtype_uint8, (void), "2.7")                                                                    \
    X(int32_t, aoti_torch_dtype_bool, (void), "2.7")                                                                     \
    X(mm_torch_error, aoti_torch_get_data_ptr, (mm_tensor_handle tensor, void **data), "2.7")                          \
    X(mm_torch_error, aoti_torch_get_dim, (mm_tensor_handle tensor, int64_t * dim), "2.7")                             \
    X(mm_torch_error, aoti_torch_get_sizes, (mm_tensor_handle tensor, int64_t * *sizes), "2.7")                        \
    X(mm_torch_error, aoti_torch_get_strides, (mm_tensor_handle tensor, int64_t * *strides), "2.7")                    \
    X(mm_torch_error, aoti_torch_get_dtype, (mm_tensor_handle tensor, int32_t * dtype), "2.7")                         \
    X(mm_torch_error, aoti_torch_get_device_type, (mm_tensor_handle tensor, int32_t * type), "2.7")                    \
    X(mm_torch_error, aoti_torch_get_device_index, (mm_tensor_handle tensor, int32_t * index), "2.7")                  \
    X(mm_torch_error, aoti_torch_empty_strided,                                                                        \
      (int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device_type,                  \
       int32_t device_index, mm_tensor_handle *result),                                                                \
      "2.7")                                                                                                           \
    X(mm_torch_error, aoti_torch_delete_tensor_object, (mm_tensor_handle tensor), "2.7")                               \
    X(void, aoti_torch_check, (bool condition, const char *func, const char *file, uint32_t line, const char *message), \
      "2.7")                                                                                                           \
    X(mm_torch_error, aoti_torch_library_init_def,                                                                     \
      (const char *ns, const char *file, uint32_t line, mm_library_handle *library), "2.7")                            \
    X(mm_torch_error, aoti_torch_library_init_impl,                                                                    \
      (const char *ns, const char *key, const char *file, uint32_t line, mm_library_handle *library), "2.7")           \
    X(mm_torch_error, aoti_torch_library_def, (mm_library_handle library, const char *schema), "2.7")                  \
    X(mm_torch_error, torch_library_impl,                                                                              \
      (mm_library_handle library, const char *name, mm_boxed_kernel kernel, uint64_t abi_version), "2.10")             \
    X(mm_torch_error, torch_parallel_for,                                                                              \
      (int64_t begin, int64_t end, int64_t grain, mm_parallel_body body, void *context), "2.10")                       \
    X(mm_torch_error, torch_get_num_threads, (uint32_t *threads), "2.10")                                              \
    X(mm_torch_error, torch_string_length, (mm_string_handle string, size_t *length), "2.10")                          \
    X(mm_torch_error, torch_string_c_str, (mm_string_handle string, const char **data), "2.10")                        \
    X(mm_torch_error, torch_delete_string, (mm_string_handle string), "2.10")                                          \
    X(mm_torch_error, torch_list_size, (mm_list_handle list, size_t * size), "2.10")                                   \
    X(mm_torch_error, torch_list_get_item, (mm_list_handle list, size_t index, mm_stable_ivalue * item), "2.10")       \
    X(mm_torch_error, torch_delete_list, (mm_list_handle list), "2.10")                                                \
    X(int32_t, aoti_torch_memory_format_contiguous_format, (void), "2.7")                                              \
    X(mm_torch_error, torch_call_dispatcher,                                                                           \
      (const char *op, const char *overload, mm_stable_ivalue *stack, uint64_t abi_version), "2.10")                   \
    X(int32_t, aoti_torch_device_type_mps, (void), "2.7")

/* What the MPS backend needs besides; only torch for macOS has these. */
#define MM_MPS_SYMBOLS(X)                                                                                              \
    X(mm_torch_error, aoti_torch_mps_create_shader_library, (const char *source, mm_metal_library *library), "2.10")   \
    X(mm_torch_error, aoti_torch_mps_get_kernel_function,                                                              \
      (mm_metal_library library, const char *name, mm_metal_function *function), "2.10")                               \
    X(mm_torch_error, aoti_torch_mps_run_command_block,                                                                \
      (mm_metal_function function, mm_command_block callback, void *context), "2.10")                                  \
    X(mm_torch_error, aoti_torch_mps_start_encoding, (mm_metal_function function), "2.10")                             \
    X(mm_torch_error, aoti_torch_mps_set_arg_tensor,                                                                   \
      (mm_metal_function function, unsigned slot, mm_tensor_handle tensor), "2.10")                                    \
    X(mm_torch_error, aoti_torch_mps_set_arg_int, (mm_metal_function function, unsigned slot, int64_t value), "2.10")  \
    X(mm_torch_error, aoti_torch_mps_dispatch_array_with_group_size,                                                   \
      (mm_metal_function function, const uint64_t *length, size_t length_size, const uint64_t *group_size,             \
       size_t group_size_size),                                                                                        \
      "2.10")

/* Used where present, NULL where not. The C ABI has no commit; torch::mps::commit() is C++, exported by every torch from 2.7 to
 * 2.15 under the name that compilers give it, and takes and returns nothing. */
#define MM_MPS_OPTIONAL_SYMBOLS(X)                                                                                     \
    X(void, _ZN5torch3mps6commitEv, (void), "2.7")                                                                     \
    X(mm_torch_error, torch_from_blob,                                                                                 \
      (void *data, int64_t dim, const int64_t *sizes, const int64_t *strides, int64_t storage_offset, int32_t dtype,   \
       int32_t device_type, int32_t device_index, mm_tensor_handle *result, int32_t layout, const uint8_t *metadata,   \
       int64_t metadata_size, void (*deleter)(void *data, void *context), void *context),                              \
      "2.11")                                                                                                          \
    X(mm_torch_error, torch_mps_set_arg_bytes,                                                                         \
      (mm_metal_function function, unsigned slot, const void *bytes, uint64_t size), "2.14")

struct mm_torch_table {
#define X(type, name, arguments, version) type(*name) arguments;
    MM_TORCH_SYMBOLS(X)
#undef X
};

extern struct mm_torch_table mm_torch;

/* Fills mm_torch from the torch library at `path` (already loaded by `import torch`; NULL: search the process).
 * Returns NULL, or the first symbol that is missing, with the torch version that brought it in *version. */
const char *mm_torch_load(const char *path, const char **version);

struct mm_mps_table {
#define X(type, name, arguments, version) type(*name) arguments;
    MM_MPS_SYMBOLS(X)
    MM_MPS_OPTIONAL_SYMBOLS(X)
#undef X
};

extern struct mm_mps_table mm_mps;

/* Fills mm_mps from the torch library at `path`. Returns NULL, or the first symbol that is missing: then there is no MPS
 * backend. `emulator` is the path of a library that has the same functions and runs Metal text on this machine, for tests: CPU
 * tensors are then what the backend works on, and torch's functions in mm_torch report their use inside a command block. Without
 * it, NULL. */
const char *mm_mps_load(const char *path, const char *emulator);
/* The device type whose tensors go to the MPS backend; -1 while there is none. */
int32_t mm_mps_device_type(void);
/* Switches the backend off again (tests). */
void mm_mps_unload(void);

#endif
