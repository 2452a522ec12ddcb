/* Finds Objective-C's runtime and Metal in the system; reference counts, pools, strings, errors. See metal_queue/runtime.h. */
#define _GNU_SOURCE /* clock_gettime, under -std=c11 */
#include "metal_queue/runtime.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

struct mm_metal_table mm_metal;
struct mm_metal_messages mm_metal_message;
struct mm_metal_selectors mm_metal_selector;

static enum { UNLOADED, SYSTEM, FAKE } loaded;
static mm_id string_class;
static atomic_long owned;

bool mm_metal_fail(struct mm_metal_problem *problem, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(problem->text, sizeof problem->text, format, arguments);
    va_end(arguments);
    return false;
}

/* ---- loading ---- */

enum library {
#define X(name, path) LIBRARY_##name,
    MM_METAL_LIBRARIES(X)
#undef X
    LIBRARY_COUNT
};

/* Libraries of the system have no file since macOS 11: only dlopen knows whether they are there. */
static bool open_libraries(const char *fake, void **libraries, const char **paths, struct mm_metal_problem *problem) {
    static const char *const system_paths[] = {
#define X(name, path) path,
        MM_METAL_LIBRARIES(X)
#undef X
    };
    for (int i = 0; i < LIBRARY_COUNT; i++) {
        paths[i] = fake ? fake : system_paths[i];
        libraries[i] = dlopen(paths[i], RTLD_NOW | RTLD_LOCAL);
        if (!libraries[i]) {
            const char *reason = dlerror();
            return mm_metal_fail(problem, "no Metal device: %s", reason ? reason : paths[i]);
        }
    }
    return true;
}

static void find_selectors(void) {
    void (*send)(void) = mm_metal.objc_msgSend;
    /* ISO C lets one function pointer type be cast to another; copying the bits keeps compilers from warning about it. */
#define X(type, name, selector, arguments)                            \
    mm_metal_selector.name = mm_metal.sel_registerName(selector);     \
    memcpy(&mm_metal_message.name, &send, sizeof send);
    MM_METAL_MESSAGES(X)
#undef X
}

bool mm_metal_load(const char *fake, struct mm_metal_problem *problem) {
    void *libraries[LIBRARY_COUNT], *symbol;
    const char *paths[LIBRARY_COUNT];
    struct mm_metal_table table;
    if (loaded != UNLOADED) return true;
    if (!open_libraries(fake, libraries, paths, problem)) return false;
    /* Not the function's own name in messages: the symbol. ISO C has no cast from void * to a function; POSIX promises the same
     * bits. */
#define FIND(library, name)                                                                                \
    symbol = dlsym(libraries[LIBRARY_##library], #name);                                                   \
    if (!symbol) return mm_metal_fail(problem, "no Metal device: %s lacks the symbol %s", paths[LIBRARY_##library], #name); \
    memcpy(&table.name, &symbol, sizeof symbol);
#define X(library, type, name, arguments) FIND(library, name)
    MM_METAL_FUNCTIONS(X)
#undef X
#define X(library, name) FIND(library, name)
    MM_METAL_VARIABLES(X)
#undef X
#undef FIND
    mm_metal = table;
    string_class = mm_metal.objc_getClass("NSString");
    if (!string_class) return mm_metal_fail(problem, "no Metal device: Objective-C has no class NSString");
    find_selectors();
    loaded = fake ? FAKE : SYSTEM;
    return true;
}

bool mm_metal_unload(struct mm_metal_problem *problem) {
    long alive = mm_metal_owned();
    if (alive)
        return mm_metal_fail(problem, "%ld Metal objects are alive; expected none when another library takes over", alive);
    loaded = UNLOADED;
    return true;
}

bool mm_metal_is_fake(void) { return loaded == FAKE; }

/* ---- objects ---- */

void *mm_metal_pool_open(void) { return mm_metal.objc_autoreleasePoolPush(); }
void mm_metal_pool_close(void *pool) { mm_metal.objc_autoreleasePoolPop(pool); }

mm_id mm_metal_own(mm_id object) {
    if (object) atomic_fetch_add(&owned, 1);
    return object;
}

mm_id mm_metal_retain(mm_id object) { return object ? mm_metal_own(MM_ASK(retain, object)) : NULL; }

void mm_metal_release(mm_id object) {
    if (!object) return;
    MM_ASK(release, object);
    atomic_fetch_sub(&owned, 1);
}

long mm_metal_owned(void) { return atomic_load(&owned); }
void mm_metal_count(int change) { atomic_fetch_add(&owned, change); }

mm_id mm_metal_string(const char *text) {
    return mm_metal_own(MM_SEND(init_utf8, MM_ASK(alloc, string_class), text));
}

static const char *text_of(mm_id string) {
    const char *text = MM_ASK(utf8, string);
    return text ? text : "";
}

void mm_metal_explain(struct mm_metal_problem *problem, mm_id error) {
    size_t used = strlen(problem->text);
    if (!error) {
        snprintf(problem->text + used, sizeof problem->text - used, "no reason was given");
        return;
    }
    /* The short part goes last but must not be cut: compilers write more than there is room for. */
    char origin[160];
    int length = snprintf(origin, sizeof origin, " (%s, code %ld)", text_of(MM_ASK(domain, error)), MM_ASK(code, error));
    size_t room = sizeof problem->text - used - (size_t)(length < (int)sizeof origin ? length : (int)sizeof origin - 1);
    snprintf(problem->text + used, room, "%s", text_of(MM_ASK(description, error)));
    used = strlen(problem->text);
    snprintf(problem->text + used, sizeof problem->text - used, "%s", origin);
}

mm_id mm_metal_device(struct mm_metal_problem *problem) {
    if (!mm_metal_load(NULL, problem)) return NULL;
    void *pool = mm_metal_pool_open();
    mm_id device = mm_metal_own(mm_metal.MTLCreateSystemDefaultDevice());
    mm_metal_pool_close(pool);
    if (!device)
        mm_metal_fail(problem, "no Metal device: MTLCreateSystemDefaultDevice() is nil, as in virtual machines without a GPU");
    return device;
}

uint64_t mm_metal_clock(void) {
    struct timespec now;
#ifdef CLOCK_UPTIME_RAW /* macOS: mach_absolute_time, on which GPUStartTime is; its CLOCK_MONOTONIC counts sleep */
    clock_gettime(CLOCK_UPTIME_RAW, &now);
#else
    clock_gettime(CLOCK_MONOTONIC, &now);
#endif
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}
