/* The box around every op: arguments taken off the dispatcher's stack, checks with messages that name the argument,
 * the expectation and the value, outputs, and the one place that throws (ops.c).
 * A check that fails writes its message into the call and returns false; the message travels up from there. */
#ifndef MM_H
#define MM_H

#include <stdbool.h>
#include <stdint.h>

#include "torch_shim.h"

#define MM_MAX_ARGUMENTS 24
#define MM_MAX_OUTPUTS 3

struct mm_tensor {
    mm_tensor_handle handle;
    const char *name;
    void *data;
    int64_t dim, numel;
    const int64_t *sizes, *strides;
    int32_t dtype, device_type, device_index;
};

struct mm_argument {
    char type; /* 'T'ensor, 'i'nt, 'f'loat, 'b'ool, 's'tr, 'l'ist */
    struct mm_tensor tensor;
    int64_t integer;
    double number;
    bool truth;
    mm_string_handle string_handle;
    const char *string;
    mm_list_handle list_handle;
};

struct mm_call {
    const struct mm_op *op;
    struct mm_argument arguments[MM_MAX_ARGUMENTS];
    mm_tensor_handle outputs[MM_MAX_OUTPUTS];
    bool has_tensor;
    int32_t device_type; /* of the first tensor, and so of all */
    char message[768];
};

struct mm_op {
    const char *schema; /* PyTorch's schema text: the one place that names and types the arguments */
    bool (*run)(struct mm_call *call);
    mm_boxed_kernel boxed;
    int arguments, outputs;
    char names[MM_MAX_ARGUMENTS][24];
    char types[MM_MAX_ARGUMENTS];
};

/* Registers all ops with the dispatcher. False: *message says why. */
bool mm_ops_register(const char **message);

#endif
