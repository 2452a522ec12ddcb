/* The prototypes of PyTorch's shim_mps.h (2.10 to 2.15) in C, and torch_mps_set_arg_bytes of 2.14. A test compiles this file
 * together with torch's own header, so that a difference does not go unnoticed. */
#ifndef EMU_SHIM_H
#define EMU_SHIM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
typedef struct AtenTensorOpaque *AtenTensorHandle;
typedef struct AOTIMetalShaderLibraryOpaque *AOTIMetalShaderLibraryHandle;
typedef struct AOTIMetalKernelFunctionOpaque *AOTIMetalKernelFunctionHandle;
typedef void (*aoti_torch_mps_command_block_callback_t)(AOTIMetalKernelFunctionHandle function, void *user_data);

int32_t aoti_torch_mps_create_shader_library(const char *, AOTIMetalShaderLibraryHandle *);
int32_t aoti_torch_mps_delete_shader_library(AOTIMetalShaderLibraryHandle);
int32_t aoti_torch_mps_get_kernel_function(AOTIMetalShaderLibraryHandle, const char *, AOTIMetalKernelFunctionHandle *);
int32_t aoti_torch_mps_start_encoding(AOTIMetalKernelFunctionHandle);
int32_t aoti_torch_mps_set_arg_tensor(AOTIMetalKernelFunctionHandle, unsigned, AtenTensorHandle);
int32_t aoti_torch_mps_set_arg_int(AOTIMetalKernelFunctionHandle, unsigned, int64_t);
int32_t aoti_torch_mps_dispatch_single(AOTIMetalKernelFunctionHandle, uint64_t);
int32_t aoti_torch_mps_dispatch_single_with_group_size(AOTIMetalKernelFunctionHandle, uint64_t, uint64_t);
int32_t aoti_torch_mps_dispatch_array(AOTIMetalKernelFunctionHandle, const uint64_t *, size_t);
int32_t aoti_torch_mps_dispatch_array_with_group_size(AOTIMetalKernelFunctionHandle, const uint64_t *, size_t,
                                                      const uint64_t *, size_t);
int32_t aoti_torch_mps_malloc(void **, size_t);
int32_t aoti_torch_mps_free(void *);
int32_t aoti_torch_mps_memcpy(void *, size_t, size_t, size_t, uint8_t *);
int32_t aoti_torch_mps_copy_buffer(void *, void *, size_t, size_t, size_t);
int32_t aoti_torch_mps_run_command_block(AOTIMetalKernelFunctionHandle, aoti_torch_mps_command_block_callback_t, void *);
int32_t torch_mps_set_arg_bytes(AOTIMetalKernelFunctionHandle, unsigned, const void *, uint64_t);
#ifdef __cplusplus
}
#endif

#endif
