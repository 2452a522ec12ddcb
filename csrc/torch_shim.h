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
    X(mm_torch_error, torch_delete_string, (mm_string_handle string), "2.10")

struct mm_torch_table {
#define X(type, name, arguments, version) type(*name) arguments;
    MM_TORCH_SYMBOLS(X)
#undef X
};

extern struct mm_torch_table mm_torch;

/* Fills mm_torch from the torch library at `path` (already loaded by `import torch`; NULL: search the process).
 * Returns NULL, or the first symbol that is missing, with the torch version that brought it in *version. */
const char *mm_torch_load(const char *path, const char **version);

#endif
