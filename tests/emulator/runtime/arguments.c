/* Bound arguments against the kernel's declaration: set at all, the right kind, element type, size, alignment; and the
 * threadgroup's size against the pipeline's limit. What Metal silently reinterprets is an error here. */
#include <stdio.h>
#include <string.h>

#include "runtime.h"

/* X(torch's number, name, element, bytes): c10::ScalarType, whose numbers are part of torch's C ABI */
#define DTYPES(X)                                                                                                  \
    X(0, "uint8", EMU_INT8, 1) X(1, "int8", EMU_INT8, 1) X(2, "int16", EMU_INT16, 2) X(3, "int32", EMU_INT32, 4)   \
    X(4, "int64", EMU_INT64, 8) X(5, "float16", EMU_HALF, 2) X(6, "float32", EMU_FLOAT, 4)                         \
    X(7, "float64", EMU_OTHER, 8) X(11, "bool", EMU_BOOL, 1) X(15, "bfloat16", EMU_BFLOAT, 2)                      \
    X(27, "uint16", EMU_INT16, 2) X(28, "uint32", EMU_INT32, 4) X(29, "uint64", EMU_INT64, 8)

static const struct dtype {
    int32_t number;
    const char *name;
    int element, bytes;
} dtypes[] = {
#define X(number, name, element, bytes) {number, name, element, bytes},
    DTYPES(X)
#undef X
};

static const struct dtype *find_dtype(int32_t number) {
    static const struct dtype unknown = {-1, "another dtype", EMU_OTHER, 0};
    for (size_t i = 0; i < sizeof dtypes / sizeof *dtypes; i++)
        if (dtypes[i].number == number) return &dtypes[i];
    return &unknown;
}

static bool is_integer(int element) { return element >= EMU_BOOL && element <= EMU_INT64; }
static int integer_bytes(int element) { return element <= EMU_INT8 ? 1 : 1 << (element - EMU_INT8); }

/* Whether memory of this dtype may be read through a pointer to `element`. Bytes and int16 are how torch holds packed words,
 * so they may be read as wider integers; bytes may be anything (a scratch buffer). */
static bool element_fits(const struct dtype *dtype, int element) {
    if (!emu_settings.types || element == EMU_OTHER || element == EMU_VOID || element == dtype->element) return true;
    if (dtype->element == EMU_INT8) return true;
    if (dtype->element == EMU_BOOL) return element == EMU_INT8;
    if (is_integer(dtype->element) && is_integer(element)) return dtype->bytes == 2 && integer_bytes(element) > 2;
    return false;
}

static const char *element_name(int element) {
    static const char *const names[] = {"any", "any", "bool", "8 bit integer", "16 bit integer", "32 bit integer",
                                        "64 bit integer", "float16", "bfloat16", "float32"};
    return names[element];
}

static bool complain(const struct emu_dispatch *dispatch, const struct emu_argument *argument, const char *problem) {
    emu_report(true, "argument", 0, "%s: buffer(%d), declared `%s`: %s", dispatch->kernel->name, argument->index,
               argument->text, problem);
    return false;
}

static bool integer_fits(const struct emu_argument *argument, int64_t value) {
    if (argument->element == EMU_BOOL) return value == 0 || value == 1;
    if (argument->size >= 8) return true;
    int64_t range = (int64_t)1 << (8 * argument->size);
    return value >= -range / 2 && value < range;
}

/* Before torch 2.14 a float travels as an integer's low bytes. An integer that was meant as a number shows: as a float, its
 * bits are a subnormal. */
static bool is_float_bits(int64_t value) {
    uint32_t exponent = (uint32_t)value >> 23 & 0xFF;
    return value >= INT32_MIN && value <= (int64_t)UINT32_MAX && (exponent || !((uint32_t)value << 1));
}

static bool check_integer(const struct emu_dispatch *dispatch, const struct emu_argument *argument,
                          const struct emu_bound *bound) {
    char problem[200];
    if (!argument->is_reference) return complain(dispatch, argument, "an integer is bound where a buffer is expected");
    if (argument->element == EMU_FLOAT && argument->size == 4) {
        if (is_float_bits(bound->integer)) return true;
        snprintf(problem, sizeof problem, "the integer %ld is bound, whose bits are no ordinary float", (long)bound->integer);
        return complain(dispatch, argument, problem);
    }
    if (!is_integer(argument->element) || argument->size != (unsigned)integer_bytes(argument->element))
        return complain(dispatch, argument, "set_arg_int bound an integer of 8 bytes to an argument that is none");
    if (integer_fits(argument, bound->integer)) return true;
    snprintf(problem, sizeof problem, "the value %ld does not fit its %u bytes", (long)bound->integer, argument->size);
    return complain(dispatch, argument, problem);
}

static bool check_bytes(const struct emu_dispatch *dispatch, const struct emu_argument *argument,
                        const struct emu_bound *bound) {
    char problem[200];
    bool constant = strstr(argument->text, "constant") != NULL;
    if (argument->is_reference ? bound->size == argument->size : constant && bound->size % argument->size == 0) return true;
    snprintf(problem, sizeof problem, "%lu bytes are bound where %s%u bytes are expected", bound->size,
             argument->is_reference ? "" : "a constant pointer to elements of ", argument->size);
    return complain(dispatch, argument, problem);
}

static bool check_tensor(const struct emu_dispatch *dispatch, const struct emu_argument *argument,
                         const struct emu_bound *bound) {
    char problem[240];
    const struct dtype *dtype = find_dtype(bound->dtype);
    if (argument->is_reference && bound->numel != 1 && argument->element != EMU_OTHER && emu_settings.types) {
        snprintf(problem, sizeof problem, "a tensor of %lu elements is bound where one value is expected", bound->numel);
        return complain(dispatch, argument, problem);
    }
    if (bound->size == 0 && !argument->is_reference) return true; /* empty: any access will be out of its bounds */
    if (!element_fits(dtype, argument->element)) {
        snprintf(problem, sizeof problem, "a tensor of dtype %s is bound; %s is expected", dtype->name,
                 element_name(argument->element));
        return complain(dispatch, argument, problem);
    }
    if (argument->is_reference && bound->size < argument->size) {
        snprintf(problem, sizeof problem, "the tensor bound there has %lu bytes; %u are expected", bound->size, argument->size);
        return complain(dispatch, argument, problem);
    }
    if (argument->align && (uintptr_t)bound->data % argument->align) {
        snprintf(problem, sizeof problem, "the tensor's memory begins at an address that is not a multiple of %u",
                 argument->align);
        return complain(dispatch, argument, problem);
    }
    return true;
}

bool emu_arguments_fit(struct emu_dispatch *dispatch) {
    bool fit = true;
    for (int i = 0; i < dispatch->argument_count; i++) {
        const struct emu_argument *argument = &dispatch->arguments[i];
        if (argument->kind != EMU_BUFFER) continue;
        const struct emu_bound *bound = &dispatch->bound[argument->index];
        if (!bound->set)
            fit = complain(dispatch, argument, "nothing is bound");
        else if (bound->is_tensor)
            fit = check_tensor(dispatch, argument, bound) && fit;
        else if (bound->is_int)
            fit = check_integer(dispatch, argument, bound) && fit;
        else
            fit = check_bytes(dispatch, argument, bound) && fit;
    }
    return fit;
}

int emu_thread_limit(const struct emu_kernel *kernel) {
    int limit = emu_settings.max_threads < 1024 ? emu_settings.max_threads : 1024;
    return kernel->max_threads && kernel->max_threads < limit ? kernel->max_threads : limit;
}

bool emu_group_size_fits(struct emu_dispatch *dispatch) {
    const char *name = dispatch->kernel->name;
    const uint32_t *grid = dispatch->grid, *group = dispatch->group;
    uint64_t threads = (uint64_t)group[0] * group[1] * group[2];
    for (int axis = 0; axis < 3; axis++)
        if (!grid[axis] || !group[axis]) {
            emu_report(true, "group size", 0, "%s: grid (%u, %u, %u) with threadgroups of (%u, %u, %u) is empty", name, grid[0],
                       grid[1], grid[2], group[0], group[1], group[2]);
            return false;
        }
    int limit = emu_thread_limit(dispatch->kernel);
    if (threads <= (uint64_t)limit) return true;
    emu_report(true, "group size", 0,
               "%s: a threadgroup of (%u, %u, %u) is %lu threads; the pipeline's limit is %d (1024, or less where the kernel "
               "declares max_total_threads_per_threadgroup)",
               name, group[0], group[1], group[2], threads, limit);
    return false;
}
