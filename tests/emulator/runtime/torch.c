/* What is asked of torch, and what torch must not be asked inside a command block.
 * Nothing here links to torch: its C ABI is found in the process. Two things are watched while a thread is inside a block,
 * where a real Mac would deadlock or interleave: functions wrapped by emu_guard, and every allocation of tensor memory on
 * the CPU, by way of the posix_memalign that libc10 imports. There, new memory can also be filled, so that uninitialised
 * scratch shows in results. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "runtime.h"

/* ---- tensors ---- */

struct emu_held_tensor {
    atomic_int references;
    void *handle;
    struct emu_held_tensor *next;
};

/* X(name, arguments): torch/csrc/inductor/aoti_torch/c/shim.h */
#define FUNCTIONS(X)                                          \
    X(aoti_torch_new_tensor_handle, (void *, void **))        \
    X(aoti_torch_delete_tensor_object, (void *))              \
    X(aoti_torch_get_data_ptr, (void *, void **))             \
    X(aoti_torch_get_dim, (void *, int64_t *))                \
    X(aoti_torch_get_sizes, (void *, int64_t **))             \
    X(aoti_torch_get_strides, (void *, int64_t **))           \
    X(aoti_torch_get_dtype, (void *, int32_t *))              \
    X(aoti_torch_get_device_type, (void *, int32_t *))
static struct {
#define X(name, arguments) int32_t(*name) arguments;
    FUNCTIONS(X)
#undef X
    size_t (*element_size)(int32_t);
} torch;
static const char *missing;

/* Python loads torch with local symbols: they are found in the library itself. */
void *emu_torch_find(const char *name) {
    static void *library;
    if (!library) library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    void *symbol = library ? dlsym(library, name) : NULL;
    return symbol ? symbol : dlsym(RTLD_DEFAULT, name);
}

static void *find(const char *name) {
    void *symbol = emu_torch_find(name);
    if (!symbol) missing = name;
    return symbol;
}

static void find_torch(void) {
    void *symbol;
#define X(name, arguments) symbol = find(#name), memcpy(&torch.name, &symbol, sizeof symbol);
    FUNCTIONS(X)
#undef X
    symbol = find("aoti_torch_dtype_element_size");
    memcpy(&torch.element_size, &symbol, sizeof symbol);
}

const char *emu_tensor_read(void *handle, struct emu_bound *bound) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_torch);
    if (missing) return "torch is not loaded, or too old";
    if (!handle) return "the tensor handle is null";
    void *data = NULL, *own = NULL;
    int64_t *sizes = NULL, *strides = NULL, span = 1;
    int32_t device = -1;
    if (torch.aoti_torch_get_device_type(handle, &device) || device != 0)
        return "the tensor is not on the CPU, where tensors stand for those of MPS";
    if (torch.aoti_torch_get_data_ptr(handle, &data) || torch.aoti_torch_get_dim(handle, &bound->dims) ||
        torch.aoti_torch_get_sizes(handle, &sizes) || torch.aoti_torch_get_strides(handle, &strides) ||
        torch.aoti_torch_get_dtype(handle, &bound->dtype) || torch.aoti_torch_new_tensor_handle(handle, &own))
        return "the tensor has no strided memory";
    bound->numel = 1;
    for (int64_t i = 0; i < bound->dims; i++) {
        bound->numel *= (uint64_t)sizes[i];
        span += (sizes[i] - 1) * strides[i];
    }
    bound->set = bound->is_tensor = true;
    bound->data = data;
    bound->size = bound->numel ? (uint64_t)span * torch.element_size(bound->dtype) : 0;
    bound->tensor = calloc(1, sizeof *bound->tensor);
    if (!bound->tensor) abort();
    atomic_store(&bound->tensor->references, 1);
    bound->tensor->handle = own;
    return NULL;
}

struct emu_held_tensor *emu_tensor_share(struct emu_held_tensor *tensor) {
    if (tensor) atomic_fetch_add(&tensor->references, 1);
    return tensor;
}

static struct emu_held_tensor *buried;
static pthread_mutex_t grave_lock = PTHREAD_MUTEX_INITIALIZER;

/* Deleting a handle may run Python code. On the queue's thread that could wait for a thread that waits for the queue. */
void emu_tensor_release(struct emu_held_tensor *tensor) {
    if (atomic_fetch_sub(&tensor->references, 1) != 1) return;
    pthread_mutex_lock(&grave_lock);
    tensor->next = buried;
    buried = tensor;
    pthread_mutex_unlock(&grave_lock);
}

void emu_tensors_bury(void) {
    pthread_mutex_lock(&grave_lock);
    struct emu_held_tensor *tensor = buried;
    buried = NULL;
    pthread_mutex_unlock(&grave_lock);
    while (tensor) {
        struct emu_held_tensor *next = tensor->next;
        torch.aoti_torch_delete_tensor_object(tensor->handle);
        free(tensor);
        tensor = next;
    }
}

/* ---- Python's lock ---- */

void *emu_gil_release(void) {
    int (*check)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
    void *(*save)(void) = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    return check && save && check() ? save() : NULL;
}

void emu_gil_take(void *released) {
    void (*restore)(void *) = (void (*)(void *))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    if (released && restore) restore(released);
}

/* ---- functions that must not be called inside a block ---- */

enum { MOST_GUARDS = 256 };
struct guard {
    void *function;
    const char *name;
};
__attribute__((visibility("hidden"))) struct guard emu_guards[MOST_GUARDS];
static atomic_int guard_count;

__attribute__((visibility("hidden"))) void *emu_guarded_call(uint32_t index);
void *emu_guarded_call(uint32_t index) {
    if (emu_in_block())
        emu_report(true, "command block", 0, "%s is called inside a command block: on a Mac it would wait for the stream that runs "
                   "the block",
                   emu_guards[index].name);
    return emu_guards[index].function;
}

/* 256 entries of 16 bytes: number in r11, then on. Arguments are kept in their registers and the stack is as the caller
 * left it when the real function is entered, so it may throw through here. */
__asm__(
    ".text\n"
    ".p2align 4\n"
    ".hidden emu_guard_entries\n"
    "emu_guard_entries:\n"
    ".set number, 0\n"
    ".rept 256\n"
    ".p2align 4\n"
    "  movl $number, %r11d\n"
    "  jmp emu_guard_enter\n"
    ".set number, number + 1\n"
    ".endr\n"
    ".p2align 4\n"
    "emu_guard_enter:\n"
    "  pushq %rdi\n"
    "  pushq %rsi\n"
    "  pushq %rdx\n"
    "  pushq %rcx\n"
    "  pushq %r8\n"
    "  pushq %r9\n"
    "  pushq %rax\n"
    "  subq $128, %rsp\n"
    "  movups %xmm0, (%rsp)\n"
    "  movups %xmm1, 16(%rsp)\n"
    "  movups %xmm2, 32(%rsp)\n"
    "  movups %xmm3, 48(%rsp)\n"
    "  movups %xmm4, 64(%rsp)\n"
    "  movups %xmm5, 80(%rsp)\n"
    "  movups %xmm6, 96(%rsp)\n"
    "  movups %xmm7, 112(%rsp)\n"
    "  movl %r11d, %edi\n"
    "  call emu_guarded_call\n"
    "  movq %rax, %r11\n"
    "  movups (%rsp), %xmm0\n"
    "  movups 16(%rsp), %xmm1\n"
    "  movups 32(%rsp), %xmm2\n"
    "  movups 48(%rsp), %xmm3\n"
    "  movups 64(%rsp), %xmm4\n"
    "  movups 80(%rsp), %xmm5\n"
    "  movups 96(%rsp), %xmm6\n"
    "  movups 112(%rsp), %xmm7\n"
    "  addq $128, %rsp\n"
    "  popq %rax\n"
    "  popq %r9\n"
    "  popq %r8\n"
    "  popq %rcx\n"
    "  popq %rdx\n"
    "  popq %rsi\n"
    "  popq %rdi\n"
    "  jmp *%r11\n");
extern char emu_guard_entries[];

/* A function that does what `function` does, and reports when it is called inside a command block. */
EMU_EXPORT void *emu_guard(const char *name, void *function) {
    int index = atomic_fetch_add(&guard_count, 1);
    if (index >= MOST_GUARDS) return function;
    emu_guards[index] = (struct guard){function, strdup(name)};
    return emu_guard_entries + 16 * index;
}

/* ---- allocations ---- */

static int watched_memalign(void **memory, size_t alignment, size_t size) {
    if (emu_in_block())
        emu_report(true, "command block", 0, "a tensor is allocated (%zu bytes) inside a command block: encode only, and allocate "
                   "before run_command_block",
                   size);
    int result = posix_memalign(memory, alignment, size);
    if (!result && emu_settings.poison) memset(*memory, EMU_POISON, size);
    return result;
}

/* Points the import of posix_memalign in one loaded library at ours. */
static int watch_library(struct dl_phdr_info *info, size_t size, void *unused) {
    (void)size, (void)unused;
    const char *slash = strrchr(info->dlpi_name, '/');
    if (!slash || strncmp(slash + 1, "libc10.so", 9)) return 0;
    const ElfW(Dyn) *dynamic = NULL;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_DYNAMIC) dynamic = (const void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    const ElfW(Rela) *tables[2] = {NULL, NULL};
    uint64_t bytes[2] = {0, 0};
    const ElfW(Sym) *symbols = NULL;
    const char *strings = NULL;
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        const void *address = (const void *)dynamic->d_un.d_ptr;
        if (dynamic->d_tag == DT_JMPREL) tables[0] = address;
        if (dynamic->d_tag == DT_PLTRELSZ) bytes[0] = dynamic->d_un.d_val;
        if (dynamic->d_tag == DT_RELA) tables[1] = address;
        if (dynamic->d_tag == DT_RELASZ) bytes[1] = dynamic->d_un.d_val;
        if (dynamic->d_tag == DT_SYMTAB) symbols = address;
        if (dynamic->d_tag == DT_STRTAB) strings = address;
    }
    for (int table = 0; table < 2; table++)
        for (uint64_t i = 0; symbols && strings && i < bytes[table] / sizeof(ElfW(Rela)); i++) {
            const ElfW(Rela) *entry = &tables[table][i];
            if (strcmp(strings + symbols[ELF64_R_SYM(entry->r_info)].st_name, "posix_memalign")) continue;
            uintptr_t slot = info->dlpi_addr + entry->r_offset, page = slot & ~4095ul;
            int (*ours)(void **, size_t, size_t) = watched_memalign;
            if (mprotect((void *)page, 4096, PROT_READ | PROT_WRITE)) return 0;
            memcpy((void *)slot, &ours, sizeof ours);
            mprotect((void *)page, 4096, PROT_READ); /* as the loader left it: it binds everything at once */
        }
    return 1;
}

void emu_torch_hooks(void) { dl_iterate_phdr(watch_library, NULL); }
