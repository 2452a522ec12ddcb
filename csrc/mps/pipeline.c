/* Compiled kernels: one shader library per variant, made at first use and kept for the life of the process, since the functions
 * that torch hands out belong to it. The key is the text itself: prefix and source. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "mps/mps.h"

/* Made by setup.py from metal/: each file with its includes put in place, ASCII. */
#define X(name) extern const char mm_metal_text_##name[];
MM_METAL_SOURCES(X)
#undef X

static const char *const texts[] = {
#define X(name) mm_metal_text_##name,
    MM_METAL_SOURCES(X)
#undef X
};

struct library {
    struct library *next;
    const char *source; /* NULL: the text is the prefix alone */
    char *prefix;
    mm_metal_library library;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct library *libraries;

static struct library *find(const char *source, const char *prefix) {
    for (struct library *entry = libraries; entry; entry = entry->next)
        if (entry->source == source && !strcmp(entry->prefix, prefix)) return entry;
    return NULL;
}

static struct library *compile(const char *source, const char *prefix, const char **message) {
    size_t prefix_size = strlen(prefix), source_size = source ? strlen(source) : 0;
    struct library *entry = calloc(1, sizeof *entry);
    char *text = malloc(prefix_size + source_size + 1);
    if (entry) entry->prefix = malloc(prefix_size + 1);
    *message = "out of memory for a shader's text";
    if (entry && text && entry->prefix) {
        memcpy(entry->prefix, prefix, prefix_size + 1);
        memcpy(text, prefix, prefix_size + 1);
        if (source) memcpy(text + prefix_size, source, source_size + 1);
        *message = "the Metal compiler refused the shader; its message is on standard error";
        if (!mm_mps.aoti_torch_mps_create_shader_library(text, &entry->library)) {
            entry->source = source;
            entry->next = libraries;
            libraries = entry;
            free(text);
            return entry;
        }
    }
    if (entry) free(entry->prefix);
    free(entry);
    free(text);
    return NULL;
}

static mm_metal_function get(const char *source, const char *prefix, const char *name, const char **message) {
    mm_metal_function function = NULL;
    pthread_mutex_lock(&lock);
    struct library *entry = find(source, prefix);
    if (!entry) entry = compile(source, prefix, message);
    if (entry && mm_mps.aoti_torch_mps_get_kernel_function(entry->library, name, &function)) {
        *message = "the shader has no kernel of this name, or its pipeline could not be made; see standard error";
        function = NULL;
    }
    pthread_mutex_unlock(&lock);
    return function;
}

mm_metal_function mm_mps_kernel(enum mm_metal_source source, const char *prefix, const char *name, const char **message) {
    return get(texts[source], prefix, name, message);
}

mm_metal_function mm_mps_kernel_of(const char *text, const char *name, const char **message) {
    return get(NULL, text, name, message);
}
