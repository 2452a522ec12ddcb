/* Finds PyTorch's C ABI in the running process. See torch_shim.h. */
#include "torch_shim.h"

#include <dlfcn.h>
#include <string.h>

struct mm_torch_table mm_torch;

/* A symbol as a function pointer: ISO C has no cast from void * to a function, POSIX promises the same bits. */
static void *find(void *library, const char *name) {
    void *symbol = library ? dlsym(library, name) : NULL;
    return symbol ? symbol : dlsym(RTLD_DEFAULT, name);
}

const char *mm_torch_load(const char *path, const char **version) {
    /* RTLD_NOLOAD: only the copy that the interpreter already runs may answer. */
    void *library = path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    struct mm_torch_table table;
    void *symbol;
#define X(type, name, arguments, first_version)     \
    symbol = find(library, #name);                  \
    if (!symbol) {                                  \
        *version = first_version;                   \
        return #name;                               \
    }                                               \
    memcpy(&table.name, &symbol, sizeof symbol);
    MM_TORCH_SYMBOLS(X)
#undef X
    mm_torch = table;
    return NULL;
}

struct mm_mps_table mm_mps;
static int32_t mps_device_type = -1;

/* The emulator reports calls of what `guard` wraps inside a command block: on a Mac they would wait for the very stream that
 * runs the block. Wrapped once for the process, since the emulator's room for them is limited. */
static struct mm_torch_table unguarded, guarded;

static void guard_torch(void *(*guard)(const char *name, void *function)) {
    if (!guarded.aoti_torch_get_sizes) {
        void *symbol;
        unguarded = mm_torch;
#define X(type, name, arguments, first_version)            \
    memcpy(&symbol, &unguarded.name, sizeof symbol);       \
    symbol = guard(#name, symbol);                         \
    memcpy(&guarded.name, &symbol, sizeof symbol);
        MM_TORCH_SYMBOLS(X)
#undef X
    }
    mm_torch = guarded;
}

const char *mm_mps_load(const char *path, const char *emulator) {
    void *library = emulator ? dlopen(emulator, RTLD_NOW | RTLD_LOCAL) : path ? dlopen(path, RTLD_NOW | RTLD_NOLOAD) : NULL;
    if (emulator && !library) return dlerror();
    struct mm_mps_table table;
    void *symbol;
#define X(type, name, arguments, first_version) \
    symbol = find(library, #name);              \
    if (!symbol) return #name;                  \
    memcpy(&table.name, &symbol, sizeof symbol);
    MM_MPS_SYMBOLS(X)
#undef X
#define X(type, name, arguments, first_version) \
    symbol = find(library, #name);              \
    memcpy(&table.name, &symbol, sizeof symbol);
    MM_MPS_OPTIONAL_SYMBOLS(X)
#undef X
    mm_mps = table;
    symbol = emulator ? dlsym(library, "emu_guard") : NULL;
    if (symbol) {
        void *(*guard)(const char *, void *);
        memcpy(&guard, &symbol, sizeof guard);
        guard_torch(guard);
    }
    mps_device_type = emulator ? mm_torch.aoti_torch_device_type_cpu() : mm_torch.aoti_torch_device_type_mps();
    return NULL;
}

int32_t mm_mps_device_type(void) { return mps_device_type; }

void mm_mps_unload(void) {
    mps_device_type = -1;
    if (unguarded.aoti_torch_get_sizes) mm_torch = unguarded;
}
