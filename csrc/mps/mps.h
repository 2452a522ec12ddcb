/* The MPS backend's own header: what an encoder says (kernel, bindings, grid), and the drivers that ops.c calls.
 * Sees tensors only as handles: memory of a GPU tensor is never touched here. Every driver encodes onto PyTorch's current MPS
 * stream and returns; nothing commits, waits or reads back. Compiles everywhere; where torch has no MPS shim it is not called. */
#ifndef MM_MPS_H
#define MM_MPS_H

#include <stdbool.h>
#include <stdint.h>

#include "shared/activation.h"
#include "shared/format.h"
#include "shared/kernels.h"
#include "shared/router.h"
#include "torch_shim.h"

#define MM_MAX_BINDINGS 31 /* Metal's buffer slots */
#define MM_MAX_DISPATCHES 8

struct mm_binding {
    int slot;
    mm_tensor_handle tensor; /* NULL: bind `integer`, 8 bytes */
    int64_t integer;
    bool is_float; /* the low 4 bytes of `integer` are a float's */
};

/* One kernel launch. Grid lengths are threads. */
struct mm_dispatch {
    mm_metal_function kernel;
    struct mm_binding bindings[MM_MAX_BINDINGS];
    int binding_count;
    uint64_t grid[3], group[3];
};

/* pipeline.c: the compiled kernel `name` of the embedded text `source` after `prefix` (lines of #define that make the variant).
 * Compiled at first use, kept for the life of the process. NULL: *message says why. */
#define MM_METAL_SOURCES(X) X(linear) X(moe_decode) X(moe_prefill) X(router) X(dequantize) /* metal/NAME.metal */
enum mm_metal_source {
#define X(name) MM_METAL_##name,
    MM_METAL_SOURCES(X)
#undef X
};
mm_metal_function mm_mps_kernel(enum mm_metal_source source, const char *prefix, const char *name, const char **message);
/* The same for a text of the caller's own. */
mm_metal_function mm_mps_kernel_of(const char *text, const char *name, const char **message);

/* encode.c */
void mm_bind_tensor(struct mm_dispatch *dispatch, int slot, mm_tensor_handle tensor);
void mm_bind_int(struct mm_dispatch *dispatch, int slot, int64_t value);
void mm_bind_float(struct mm_dispatch *dispatch, int slot, float value); /* kernels declare it as `constant float &` */
void mm_grid(struct mm_dispatch *dispatch, int64_t groups_x, int64_t groups_y, int64_t threads_a_group);
/* Encodes all dispatches, in order, in one command block. NULL on success, else what failed. */
const char *mm_mps_run(struct mm_dispatch *dispatches, int count);
/* Hands what was encoded so far to the GPU and does not wait; PyTorch does so by itself when it sees fit. For measuring. NULL on
 * success, else what failed: this torch may have no commit. */
const char *mm_mps_commit(void);
/* A scratch tensor on the stream's device; the caller deletes the handle after encoding, the stream keeps the memory until
 * the work that uses it is done. */
mm_tensor_handle mm_mps_scratch(int64_t count, int32_t dtype, int32_t device_type, int32_t device_index);

/* The drivers. Shapes as in cpu/cpu.h; all tensors contiguous. Each returns NULL or what failed. */
struct mm_mps_device {
    int32_t type, index;
};

struct mm_mps_linear {
    mm_tensor_handle x, trellis, suh, svh, bias, y; /* bias NULL: none */
    int32_t dtype;
    int64_t rows, in_features, out_features;
    int rate2, codebook;
};
const char *mm_mps_linear(const struct mm_mps_linear *linear);

struct mm_mps_dequantize {
    mm_tensor_handle trellis, suh, svh, out; /* suh NULL: the rotated domain */
    struct mm_mps_device device;
    int64_t k, n, in_features, out_features;
    int rate2, codebook;
};
const char *mm_mps_dequantize(const struct mm_mps_dequantize *dequantize);

struct mm_mps_stack {
    mm_tensor_handle trellis, table, suh, svh, bias; /* bias NULL: none */
};

struct mm_mps_moe {
    mm_tensor_handle x, weights, ids, y;
    int32_t x_dtype, weights_dtype;
    bool wide_ids;
    struct mm_mps_device device;
    struct mm_mps_stack gate, up, down;
    int64_t tokens, top_k, hidden, intermediate, experts;
    int64_t formats; /* bit 16 * codebook + rate2 - 1: the pairs that occur */
    enum mm_activation activation;
    float alpha, limit;
};
const char *mm_mps_moe(const struct mm_mps_moe *moe);

struct mm_mps_router {
    mm_tensor_handle x, gate, correction, weights, ids, logits; /* correction NULL: none */
    int32_t x_dtype, gate_dtype, correction_dtype;
    int64_t tokens, hidden, experts, top_k, n_group, topk_group;
    enum mm_router_kind kind;
    bool renormalize;
    float scale;
};
const char *mm_mps_router(const struct mm_mps_router *router);

/* Metal's name of a dtype's type; NULL where it is none of the ops'. */
const char *mm_metal_type(int32_t dtype);
bool mm_format_in(int64_t formats, int codebook, int rate2);

#endif
