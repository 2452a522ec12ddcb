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
