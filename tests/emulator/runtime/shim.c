/* PyTorch's C shim for MPS, on the emulator: the functions of torch/csrc/inductor/aoti_torch/c/shim_mps.h that a Mac's torch
 * has (and torch_mps_set_arg_bytes of torch 2.14), with CPU tensors standing for those of MPS. Owns shader libraries and
 * what may be called when; every mistake returns 1, as torch's own functions do, and is reported for synchronize(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime.h"
#include "shim.h"

struct AOTIMetalShaderLibraryOpaque {
    char *source;
    struct emu_object *objects[2]; /* plain, checked */
    struct AOTIMetalKernelFunctionOpaque *functions;
};
struct AOTIMetalKernelFunctionOpaque {
    struct AOTIMetalKernelFunctionOpaque *next;
    struct AOTIMetalShaderLibraryOpaque *library;
    char *name;
};

static int32_t fail(const char *kind, const char *format, ...) EMU_PRINTF(2, 3);
static int32_t fail(const char *kind, const char *format, ...) {
    char text[8192];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    emu_report(true, kind, 0, "%s", text);
    return 1;
}

/* ---- the stream: one block at a time, in the thread that runs it ---- */

static struct {
    pthread_mutex_t lock;
    struct AOTIMetalKernelFunctionOpaque *function; /* what start_encoding named last in this block */
    struct emu_object *object;
    bool check;
    struct emu_bound bound[EMU_BUFFERS];
    int uncommitted;
} stream = {.lock = PTHREAD_MUTEX_INITIALIZER};
static _Thread_local bool in_block;

bool emu_in_block(void) { return in_block; }

static void forget_arguments(void) {
    for (int i = 0; i < EMU_BUFFERS; i++) {
        free(stream.bound[i].bytes);
        if (stream.bound[i].tensor) emu_tensor_release(stream.bound[i].tensor);
        stream.bound[i] = (struct emu_bound){.set = false};
    }
    stream.function = NULL;
}

EMU_EXPORT int32_t aoti_torch_mps_run_command_block(AOTIMetalKernelFunctionHandle function,
                                                    aoti_torch_mps_command_block_callback_t callback, void *user_data) {
    if (in_block) return fail("command block", "run_command_block inside a command block: on a Mac it waits for itself");
    if (!function || !callback) return fail("command block", "run_command_block without a kernel function or a callback");
    if (pthread_mutex_trylock(&stream.lock)) {
        void *released = emu_gil_release(); /* the thread inside may need it */
        pthread_mutex_lock(&stream.lock);
        emu_gil_take(released);
    }
    in_block = true;
    callback(function, user_data);
    in_block = false;
    forget_arguments();
    pthread_mutex_unlock(&stream.lock);
    return 0;
}

/* ---- shader libraries ---- */

static int (*compile)(const char *source, int check, char *path, char *message, size_t room);

/* `function` compiles MSL to a shared object: writes its path and returns 0, or writes the compiler's message. */
EMU_EXPORT void emu_set_compiler(int (*function)(const char *, int, char *, char *, size_t)) {
    compile = function;
    emu_torch_hooks();
}

struct span {
    uintptr_t base;
    char *low, *high;
};

static int find_span(struct dl_phdr_info *info, size_t size, void *data) {
    struct span *span = data;
    (void)size;
    if (info->dlpi_addr != span->base) return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
        char *low = (char *)info->dlpi_addr + info->dlpi_phdr[i].p_vaddr, *high = low + info->dlpi_phdr[i].p_memsz;
        if (!span->low || low < span->low) span->low = low;
        if (high > span->high) span->high = high;
    }
    return 1;
}

static struct emu_object *load_object(const char *path) {
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!handle) return fail("compile", "%s", dlerror()), NULL;
    struct emu_object *object = calloc(1, sizeof *object);
    struct link_map *map = NULL;
    if (!object) abort();
    dlinfo(handle, RTLD_DI_LINKMAP, &map);
    struct span span = {map->l_addr, NULL, NULL};
    dl_iterate_phdr(find_span, &span);
    *object = (struct emu_object){handle, dlsym(handle, "emu_kernels"), *(int *)dlsym(handle, "emu_kernel_count"), span.low,
                                  span.high, strdup(path)};
    return object;
}

/* Compiling needs Python's lock, so no lock of ours is held while it runs; a library that two threads compile at once is
 * loaded twice, and one copy stays unused. */
struct emu_object *emu_object_compile(const char *source, bool check, char *message, size_t room) {
    char path[4096] = "";
    emu_faults_catch();
    if (!compile) {
        snprintf(message, room, "no compiler is set; load the emulator through its Python package");
        return NULL;
    }
    atomic_fetch_add(&emu_statistics.compilations, 1);
    return compile(source, check, path, message, room) ? NULL : load_object(path);
}

static struct emu_object *object_of(struct AOTIMetalShaderLibraryOpaque *library, bool check) {
    char message[7600] = "";
    if (library->objects[check]) return library->objects[check];
    library->objects[check] = emu_object_compile(library->source, check, message, sizeof message);
    if (!library->objects[check]) fail("compile", "create_shader_library: the shader does not compile:\n%s", message);
    return library->objects[check];
}

const struct emu_kernel *emu_object_kernel(const struct emu_object *object, const char *name) {
    for (int i = 0; i < object->count; i++)
        if (!strcmp(object->kernels[i].name, name)) return &object->kernels[i];
    return NULL;
}

EMU_EXPORT int32_t aoti_torch_mps_create_shader_library(const char *source, AOTIMetalShaderLibraryHandle *result) {
    int line = 1;
    for (const char *c = source; *c; c++) {
        if ((unsigned char)*c > 127)
            return fail("ascii", "create_shader_library: line %d of the shader has the byte 0x%02X; PyTorch hands the text over as "
                        "ASCII",
                        line, (unsigned char)*c);
        line += *c == '\n';
    }
    struct AOTIMetalShaderLibraryOpaque *library = calloc(1, sizeof *library);
    if (!library) abort();
    library->source = strdup(source);
    if (!object_of(library, emu_settings.check != 0)) {
        free(library->source);
        free(library);
        return 1;
    }
    *result = library;
    return 0;
}

EMU_EXPORT int32_t aoti_torch_mps_delete_shader_library(AOTIMetalShaderLibraryHandle library) {
    if (!library) return fail("library", "delete_shader_library: the library is null");
    if (in_block) return fail("command block", "delete_shader_library is called inside a command block");
    if (!emu_queue_wait(600)) return fail("timeout", "delete_shader_library: the library's kernels still run after 600 s");
    while (library->functions) {
        struct AOTIMetalKernelFunctionOpaque *function = library->functions;
        library->functions = function->next;
        free(function->name);
        free(function);
    }
    free(library->source); /* the objects stay loaded: reports may still name places in them */
    free(library);
    return 0;
}

EMU_EXPORT int32_t aoti_torch_mps_get_kernel_function(AOTIMetalShaderLibraryHandle library, const char *name,
                                                      AOTIMetalKernelFunctionHandle *result) {
    char names[1024] = "";
    size_t length = 0;
    if (!library) return fail("library", "get_kernel_function: the library is null");
    for (struct AOTIMetalKernelFunctionOpaque *function = library->functions; function; function = function->next)
        if (!strcmp(function->name, name)) return *result = function, 0;
    struct emu_object *object = object_of(library, emu_settings.check != 0);
    if (!object) return 1;
    if (!emu_object_kernel(object, name)) {
        for (int i = 0; i < object->count && length < sizeof names - 100; i++)
            length += (size_t)snprintf(names + length, sizeof names - length, " %s", object->kernels[i].name);
        return fail("library", "get_kernel_function: no kernel is named '%s'; the library has:%s", name, names);
    }
    struct AOTIMetalKernelFunctionOpaque *function = calloc(1, sizeof *function);
    if (!function) abort();
    *function = (struct AOTIMetalKernelFunctionOpaque){library->functions, library, strdup(name)};
    library->functions = function;
    *result = function;
    return 0;
}

/* ---- encoding ---- */

EMU_EXPORT int32_t aoti_torch_mps_start_encoding(AOTIMetalKernelFunctionHandle function) {
    if (!function) return fail("command block", "start_encoding: the kernel function is null");
    if (!in_block) return fail("command block", "%s: start_encoding outside of run_command_block", function->name);
    emu_tensors_bury();
    forget_arguments();
    stream.check = emu_settings.check != 0;
    stream.object = object_of(function->library, stream.check);
    if (!stream.object) return 1;
    stream.function = function;
    return 0;
}

/* An encoder's pipeline is the one that start_encoding set last: anything else would go to another kernel. */
static int32_t encoding(AOTIMetalKernelFunctionHandle function, const char *what) {
    if (!function) return fail("command block", "%s: the kernel function is null", what);
    if (!in_block) return fail("command block", "%s: %s outside of run_command_block", function->name, what);
    if (!stream.function) return fail("command block", "%s: %s before start_encoding", function->name, what);
    if (stream.function != function)
        return fail("command block", "%s: %s while %s is being encoded; call start_encoding first", function->name, what,
                    stream.function->name);
    return 0;
}

static int32_t slot(AOTIMetalKernelFunctionHandle function, const char *what, unsigned index, struct emu_bound **bound) {
    if (encoding(function, what)) return 1;
    if (index >= EMU_BUFFERS)
        return fail("argument", "%s: %s with buffer index %u; Metal has 31 buffers, 0 to 30", function->name, what, index);
    *bound = &stream.bound[index];
    free((*bound)->bytes);
    if ((*bound)->tensor) emu_tensor_release((*bound)->tensor);
    **bound = (struct emu_bound){.set = false};
    return 0;
}

static const struct emu_argument *declared(unsigned index, struct emu_argument *arguments) {
    const struct emu_kernel *kernel = emu_object_kernel(stream.object, stream.function->name);
    for (int i = 0, count = kernel->describe(arguments); i < count; i++)
        if (arguments[i].kind == EMU_BUFFER && arguments[i].index == (int)index) return &arguments[i];
    return NULL;
}

EMU_EXPORT int32_t aoti_torch_mps_set_arg_tensor(AOTIMetalKernelFunctionHandle function, unsigned index, AtenTensorHandle tensor) {
    struct emu_bound *bound;
    struct emu_argument arguments[EMU_MAX_ARGUMENTS];
    if (slot(function, "set_arg_tensor", index, &bound)) return 1;
    const char *problem = emu_tensor_read(tensor, bound);
    if (problem) return fail("argument", "%s: set_arg_tensor(%u): %s", function->name, index, problem);
    /* torch copies a 0-dimensional CPU tensor when it is bound, and makes a float of a double. */
    const struct emu_argument *argument = declared(index, arguments);
    if (bound->dims == 0 && argument && argument->is_reference && bound->size <= 16) {
        unsigned char value[16];
        size_t size = bound->size;
        memcpy(value, bound->data, size);
        if (bound->dtype == 7) {
            double wide;
            memcpy(&wide, value, sizeof wide);
            float narrow = (float)wide;
            memcpy(value, &narrow, sizeof narrow);
            size = sizeof narrow;
            bound->dtype = 6;
        }
        emu_tensor_release(bound->tensor);
        bound->tensor = NULL;
        emu_bound_bytes(bound, value, size);
    }
    return 0;
}

EMU_EXPORT int32_t aoti_torch_mps_set_arg_int(AOTIMetalKernelFunctionHandle function, unsigned index, int64_t value) {
    struct emu_bound *bound;
    if (slot(function, "set_arg_int", index, &bound)) return 1;
    emu_bound_bytes(bound, &value, sizeof value);
    bound->is_int = true;
    bound->integer = value;
    return 0;
}

#ifndef EMU_WITHOUT_SET_BYTES
EMU_EXPORT int32_t torch_mps_set_arg_bytes(AOTIMetalKernelFunctionHandle function, unsigned index, const void *data,
                                           uint64_t size) {
    struct emu_bound *bound;
    if (slot(function, "set_arg_bytes", index, &bound)) return 1;
    if (!data || !size || size > 4096)
        return fail("argument", "%s: set_arg_bytes(%u): %lu bytes%s; Metal takes 1 to 4096", function->name, index, size,
                    data ? "" : " at a null pointer");
    emu_bound_bytes(bound, data, size);
    return 0;
}
#endif

static int32_t dispatch(AOTIMetalKernelFunctionHandle function, const uint64_t *length, size_t dims, const uint64_t *group,
                        size_t group_dims) {
    if (encoding(function, "dispatch")) return 1;
    if (dims < 1 || dims > 3 || (group && group_dims != dims))
        return fail("group size", "%s: dispatch of %zu dimensions with threadgroups of %zu; 1 to 3, the same for both, are expected",
                    function->name, dims, group ? group_dims : dims);
    const struct emu_kernel *kernel = emu_object_kernel(stream.object, function->name);
    uint64_t limit = (uint64_t)emu_thread_limit(kernel), grid[3], threads[3];
    for (size_t i = 0; i < 3; i++) {
        grid[i] = i < dims ? length[i] : 1;
        threads[i] = i >= dims ? 1 : group ? group[i] : i == 0 ? limit : 1;
    }
    struct emu_dispatch *made = emu_dispatch_new(stream.object, kernel, stream.check, stream.bound, grid, threads);
    if (!made) return 1;
    emu_queue_encode(emu_dispatch_run, made);
    if (emu_settings.commit_every > 0 && ++stream.uncommitted >= emu_settings.commit_every) {
        stream.uncommitted = 0;
        emu_queue_commit();
    }
    return 0;
}

EMU_EXPORT int32_t aoti_torch_mps_dispatch_single(AOTIMetalKernelFunctionHandle function, uint64_t length) {
    if (encoding(function, "dispatch")) return 1;
    uint64_t limit = (uint64_t)emu_thread_limit(emu_object_kernel(stream.object, function->name));
    uint64_t group = length < limit ? length : limit;
    return dispatch(function, &length, 1, &group, 1);
}
EMU_EXPORT int32_t aoti_torch_mps_dispatch_single_with_group_size(AOTIMetalKernelFunctionHandle function, uint64_t length,
                                                                  uint64_t group) {
    return dispatch(function, &length, 1, &group, 1);
}
EMU_EXPORT int32_t aoti_torch_mps_dispatch_array(AOTIMetalKernelFunctionHandle function, const uint64_t *length, size_t dims) {
    return dispatch(function, length, dims, NULL, 0);
}
EMU_EXPORT int32_t aoti_torch_mps_dispatch_array_with_group_size(AOTIMetalKernelFunctionHandle function, const uint64_t *length,
                                                                 size_t dims, const uint64_t *group, size_t group_dims) {
    return dispatch(function, length, dims, group, group_dims);
}

/* ---- memory, as AOTInductor's wrappers use it ---- */

EMU_EXPORT int32_t aoti_torch_mps_malloc(void **buffer, size_t bytes) { return bytes && !(*buffer = malloc(bytes)); }
EMU_EXPORT int32_t aoti_torch_mps_free(void *buffer) {
    if (!emu_queue_wait(600)) return fail("timeout", "aoti_torch_mps_free: the queue still runs after 600 s");
    free(buffer);
    return 0;
}
EMU_EXPORT int32_t aoti_torch_mps_memcpy(void *buffer, size_t offset, size_t from, size_t bytes, uint8_t *source) {
    memcpy((char *)buffer + offset, source + from, bytes);
    return 0;
}

struct copy {
    const char *from;
    char *to;
    size_t bytes;
};
static void run_copy(void *data) {
    struct copy *copy = data;
    memmove(copy->to, copy->from, copy->bytes);
    free(copy);
}
EMU_EXPORT int32_t aoti_torch_mps_copy_buffer(void *from, void *to, size_t bytes, size_t from_offset, size_t to_offset) {
    struct copy *copy = malloc(sizeof *copy);
    if (!copy) abort();
    *copy = (struct copy){(const char *)from + from_offset, (char *)to + to_offset, bytes};
    emu_queue_encode(run_copy, copy);
    return 0;
}

/* ---- commit and wait ---- */

/* torch::mps::commit() and synchronize(), under the names that a Mac's libtorch exports them by. */
EMU_EXPORT void _ZN5torch3mps6commitEv(void) {
    if (in_block)
        emu_queue_commit();
    else
        fail("command block", "torch::mps::commit() outside of a command block aborts on a Mac");
}
EMU_EXPORT void _ZN5torch3mps11synchronizeEv(void) {
    if (in_block)
        fail("command block", "torch::mps::synchronize() inside a command block waits for itself on a Mac");
    else
        emu_queue_wait(600);
}

/* For Python: 0, or 1 when commands still run after `seconds`. */
EMU_EXPORT int emu_synchronize(double seconds) {
    if (in_block) return (int)fail("command block", "synchronize() inside a command block waits for itself");
    bool finished = emu_queue_wait(seconds);
    emu_tensors_bury();
    return !finished;
}
