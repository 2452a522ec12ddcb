/* The stand-in for Objective-C's runtime: messages, reference counts, pools, blocks, strings and errors. See objc.h. */
#define _GNU_SOURCE
#include "objc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct emu_objc *objects; /* all that ever were, since the last emu_objc_forget */
static atomic_long live_blocks, open_pools;

/* ---- objects ---- */

enum { MAGIC = 0x0B1EC7 };

void *emu_objc_new(struct emu_class *class, size_t bytes) {
    struct emu_objc *object = calloc(1, bytes);
    if (!object) abort();
    object->isa = class;
    object->magic = MAGIC;
    atomic_init(&object->references, 1);
    pthread_mutex_lock(&lock);
    object->next = objects;
    objects = object;
    pthread_mutex_unlock(&lock);
    return object;
}

void *emu_objc_retain(void *object) {
    if (object) atomic_fetch_add(&((struct emu_objc *)object)->references, 1);
    return object;
}

void emu_objc_release(void *object) {
    struct emu_objc *head = object;
    if (head && atomic_fetch_sub(&head->references, 1) == 1 && head->isa->dealloc) head->isa->dealloc(object);
}

static bool known(const struct emu_objc *object) { return object->magic == MAGIC; }

bool emu_objc_is(const void *object, const struct emu_class *class, const char *where) {
    const struct emu_objc *head = object;
    if (head && known(head) && head->isa == class && atomic_load(&head->references) > 0) return true;
    emu_report(true, "objc", 0, "%s: %s was passed; expected a live %s", where,
               !head ? "nil" : !known(head) ? "something that is no object" : head->isa != class ? head->isa->name : "a freed object",
               class->name);
    return false;
}

static struct emu_objc *objc_retain(struct emu_objc *self) { return emu_objc_retain(self); }
static void objc_release(struct emu_objc *self) { emu_objc_release(self); }
static void objc_dealloc(struct emu_objc *self) {
    emu_report(true, "objc", 0, "dealloc is sent to a %s; only release may do that", self->isa->name);
}

static const struct emu_method *find_method(const struct emu_class *class, const char *selector);
static bool responds(struct emu_objc *self, const char *selector, const char *asked) {
    (void)selector;
    return !emu_metal_lacks(asked) && find_method(self->isa, asked);
}

static const struct emu_method object_methods[] = {
    EMU_METHOD("retain", objc_retain), EMU_METHOD("release", objc_release), EMU_METHOD("dealloc", objc_dealloc),
    EMU_METHOD("respondsToSelector:", responds), {NULL, NULL}};

/* ---- messages ---- */

static const struct emu_method *find_method(const struct emu_class *class, const char *selector) {
    for (const struct emu_method *method = class->methods; method && method->selector; method++)
        if (!strcmp(method->selector, selector)) return method;
    for (const struct emu_method *method = object_methods; method->selector; method++)
        if (!strcmp(method->selector, selector)) return method;
    return NULL;
}

void emu_objc_nothing(void); /* returns 0 in every register that returns something */

static struct emu_class *const classes[] = {&emu_NSString};

__attribute__((used)) static void (*find_implementation(struct emu_objc *self, const char *selector))(void) {
    if (!self) return emu_objc_nothing;
    bool is_class = false;
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) is_class |= (void *)self == (void *)classes[i];
    if (!is_class && (!known(self) || atomic_load(&self->references) <= 0)) {
        emu_report(true, "objc", 0, "%s is sent to %s%s", selector, known(self) ? "a freed " : "something that is no object",
                   known(self) ? self->isa->name : "");
        return emu_objc_nothing;
    }
    const struct emu_method *method = find_method(self->isa, selector);
    if (method) return method->implementation;
    emu_report(true, "objc", 0, "%s does not know the message %s", self->isa->name, selector);
    return emu_objc_nothing;
}

/* Finds the method and jumps to it with every argument where it was: in registers and on the stack. */
__asm__(
    ".text\n"
    ".globl objc_msgSend\n"
    ".type objc_msgSend, @function\n"
    "objc_msgSend:\n"
    "  pushq %rbp\n"
    "  movq %rsp, %rbp\n"
    "  subq $176, %rsp\n"
    "  movq %rdi, 0(%rsp)\n  movq %rsi, 8(%rsp)\n  movq %rdx, 16(%rsp)\n"
    "  movq %rcx, 24(%rsp)\n  movq %r8, 32(%rsp)\n  movq %r9, 40(%rsp)\n"
    "  movups %xmm0, 48(%rsp)\n  movups %xmm1, 64(%rsp)\n  movups %xmm2, 80(%rsp)\n  movups %xmm3, 96(%rsp)\n"
    "  movups %xmm4, 112(%rsp)\n  movups %xmm5, 128(%rsp)\n  movups %xmm6, 144(%rsp)\n  movups %xmm7, 160(%rsp)\n"
    "  call find_implementation\n"
    "  movq %rax, %r11\n"
    "  movq 0(%rsp), %rdi\n  movq 8(%rsp), %rsi\n  movq 16(%rsp), %rdx\n"
    "  movq 24(%rsp), %rcx\n  movq 32(%rsp), %r8\n  movq 40(%rsp), %r9\n"
    "  movups 48(%rsp), %xmm0\n  movups 64(%rsp), %xmm1\n  movups 80(%rsp), %xmm2\n  movups 96(%rsp), %xmm3\n"
    "  movups 112(%rsp), %xmm4\n  movups 128(%rsp), %xmm5\n  movups 144(%rsp), %xmm6\n  movups 160(%rsp), %xmm7\n"
    "  leave\n"
    "  jmpq *%r11\n"
    ".size objc_msgSend, . - objc_msgSend\n"
    ".type emu_objc_nothing, @function\n"
    "emu_objc_nothing:\n"
    "  xorl %eax, %eax\n"
    "  xorl %edx, %edx\n"
    "  xorps %xmm0, %xmm0\n"
    "  ret\n"
    ".size emu_objc_nothing, . - emu_objc_nothing\n");

EMU_EXPORT void *objc_getClass(const char *name) {
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++)
        if (!strcmp(classes[i]->name, name)) return classes[i];
    return NULL;
}

/* A selector is its name, once for each. */
EMU_EXPORT const char *sel_registerName(const char *name) {
    static struct selector {
        struct selector *next;
        char *name;
    } *selectors;
    pthread_mutex_lock(&lock);
    struct selector *found = selectors;
    while (found && strcmp(found->name, name)) found = found->next;
    if (!found) {
        found = malloc(sizeof *found);
        if (!found) abort();
        *found = (struct selector){selectors, strdup(name)};
        selectors = found;
    }
    pthread_mutex_unlock(&lock);
    return found->name;
}

/* ---- pools ---- */

struct pool {
    struct pool *outer;
    void **objects;
    size_t count, room;
};
static _Thread_local struct pool *pool;

EMU_EXPORT void *objc_autoreleasePoolPush(void) {
    struct pool *made = calloc(1, sizeof *made);
    if (!made) abort();
    made->outer = pool;
    atomic_fetch_add(&open_pools, 1);
    return pool = made;
}

EMU_EXPORT void objc_autoreleasePoolPop(void *token) {
    struct pool *wanted = pool;
    while (wanted && wanted != token) wanted = wanted->outer;
    if (!wanted) {
        emu_report(true, "objc", 0, "a pool is closed that is not open on this thread");
        return;
    }
    for (bool last = false; !last;) {
        struct pool *closed = pool;
        last = closed == wanted;
        if (!last) emu_report(true, "objc", 0, "a pool is closed while one that was opened after it is not");
        for (size_t i = 0; i < closed->count; i++) emu_objc_release(closed->objects[i]);
        pool = closed->outer;
        free(closed->objects);
        free(closed);
        atomic_fetch_sub(&open_pools, 1);
    }
}

void *emu_objc_autorelease(void *object) {
    if (!object) return NULL;
    if (!pool) {
        emu_report(true, "objc", 0, "a %s is autoreleased without a pool: it leaks", ((struct emu_objc *)object)->isa->name);
        return object;
    }
    if (pool->count == pool->room) {
        pool->room = pool->room ? 2 * pool->room : 8;
        pool->objects = realloc(pool->objects, pool->room * sizeof *pool->objects);
        if (!pool->objects) abort();
    }
    return pool->objects[pool->count++] = object;
}

/* ---- blocks ---- */

EMU_EXPORT void *_NSConcreteStackBlock[32], *_NSConcreteMallocBlock[32], *_NSConcreteGlobalBlock[32];
enum { NEEDS_FREE = 1 << 24, HAS_COPY_DISPOSE = 1 << 25, IS_GLOBAL = 1 << 28, HAS_SIGNATURE = 1 << 30 };

struct emu_block {
    void *isa;
    int flags, reserved;
    void (*invoke)(struct emu_block *block, void *object);
    const struct {
        unsigned long reserved, size;
        void (*copy)(struct emu_block *to, const struct emu_block *from);
        void (*dispose)(struct emu_block *block);
        const char *signature;
    } *descriptor;
};

struct emu_block *emu_block_copy(const void *pointer) { return emu_block_copy_as(pointer, "v16@?0@8"); }

struct emu_block *emu_block_copy_as(const void *pointer, const char *wanted) {
    const struct emu_block *block = pointer;
    if (!block || (block->isa != _NSConcreteStackBlock && block->isa != _NSConcreteGlobalBlock) || !block->invoke ||
        !block->descriptor || block->descriptor->size < sizeof *block) {
        emu_report(true, "objc", 0, "a handler is no block: wrong isa, no function to call, or too small a size");
        return NULL;
    }
    /* Without copy and dispose, the signature is where they would be. */
    const char *signature = block->descriptor->signature;
    if (!(block->flags & HAS_COPY_DISPOSE)) memcpy(&signature, &block->descriptor->copy, sizeof signature);
    if (block->flags & HAS_SIGNATURE && strcmp(signature, wanted))
        emu_report(true, "objc", 0, "a handler's signature is %s; expected %s", signature, wanted);
    bool global = block->isa == _NSConcreteGlobalBlock;
    if (global != ((block->flags & IS_GLOBAL) != 0))
        emu_report(true, "objc", 0, "a block's isa and its flags disagree on whether it is global");
    struct emu_block *copy = malloc(block->descriptor->size);
    if (!copy) abort();
    memcpy(copy, block, block->descriptor->size);
    copy->isa = _NSConcreteMallocBlock;
    copy->flags |= NEEDS_FREE | 2; /* the runtime counts references in the flags, in steps of 2 */
    if (!global && block->flags & HAS_COPY_DISPOSE) block->descriptor->copy(copy, block);
    atomic_fetch_add(&live_blocks, 1);
    return copy;
}

void emu_block_call(struct emu_block *block, void *object) { block->invoke(block, object); }

void emu_block_call_deallocator(struct emu_block *block, void *pointer, uint64_t length) {
    ((void (*)(struct emu_block *, void *, uint64_t))block->invoke)(block, pointer, length);
}

void emu_block_release(struct emu_block *block) {
    if (!(block->flags & IS_GLOBAL) && block->flags & HAS_COPY_DISPOSE) block->descriptor->dispose(block);
    memset(block, EMU_POISON, sizeof *block);
    free(block);
    atomic_fetch_sub(&live_blocks, 1);
}

/* ---- strings and errors ---- */

static void string_dealloc(void *object) { free(((struct emu_string *)object)->text); }

static struct emu_string *string_alloc(struct emu_class *self) { return emu_objc_new(self, sizeof(struct emu_string)); }

static bool is_utf8(const unsigned char *text) {
    while (*text) {
        int more = *text < 0x80 ? 0 : *text >> 5 == 6 ? 1 : *text >> 4 == 14 ? 2 : *text >> 3 == 30 ? 3 : -1;
        if (more < 0) return false;
        for (text++; more; more--, text++)
            if (*text >> 6 != 2) return false;
    }
    return true;
}

static struct emu_string *string_init(struct emu_string *self, const char *selector, const char *text) {
    (void)selector;
    if (self->text) emu_report(true, "objc", 0, "an NSString is initialised twice");
    if (!text || !is_utf8((const unsigned char *)text)) return emu_objc_release(self), NULL;
    self->text = strdup(text);
    return self;
}

static const char *string_utf8(struct emu_string *self) {
    if (!self->text) emu_report(true, "objc", 0, "UTF8String is sent to an NSString that was never initialised");
    return self->text;
}

static const struct emu_method string_methods[] = {
    EMU_METHOD("initWithUTF8String:", string_init), EMU_METHOD("UTF8String", string_utf8), {NULL, NULL}};
static const struct emu_method string_class_methods[] = {EMU_METHOD("alloc", string_alloc), {NULL, NULL}};
static struct emu_class string_class = {&string_class, "NSString class", string_class_methods, NULL};
struct emu_class emu_NSString = {&string_class, "NSString", string_methods, string_dealloc};

struct emu_string *emu_string_new(const char *text) {
    struct emu_string *string = emu_objc_new(&emu_NSString, sizeof *string);
    string->text = strdup(text);
    return string;
}

static void error_dealloc(void *object) {
    struct emu_error *error = object;
    emu_objc_release(error->description);
    emu_objc_release(error->domain);
}
static void *error_description(struct emu_error *self) { return emu_objc_autorelease(emu_objc_retain(self->description)); }
static void *error_domain(struct emu_error *self) { return emu_objc_autorelease(emu_objc_retain(self->domain)); }
static long error_code(struct emu_error *self) { return self->code; }
static const struct emu_method error_methods[] = {EMU_METHOD("localizedDescription", error_description),
                                                  EMU_METHOD("domain", error_domain), EMU_METHOD("code", error_code), {NULL, NULL}};
struct emu_class emu_NSError = {NULL, "NSError", error_methods, error_dealloc};

struct emu_error *emu_error_make(const char *domain, long code, const char *description) {
    struct emu_error *error = emu_objc_new(&emu_NSError, sizeof *error);
    error->domain = emu_string_new(domain);
    error->description = emu_string_new(description);
    error->code = code;
    return emu_objc_autorelease(error);
}

/* ---- for Python ---- */

/* How many objects, blocks and pools are alive; `text` names them, with their counts. */
EMU_EXPORT long emu_objc_live(char *text, size_t room) {
    long total = 0;
    size_t used = 0;
    text[0] = 0;
    pthread_mutex_lock(&lock);
    for (struct emu_objc *object = objects; object; object = object->next) {
        int references = atomic_load(&object->references);
        if (references <= 0) continue;
        total++;
        if (used < room - 80) used += (size_t)snprintf(text + used, room - used, "%s (%d) ", object->isa->name, references);
    }
    pthread_mutex_unlock(&lock);
    long blocks = atomic_load(&live_blocks), pools = atomic_load(&open_pools);
    if (blocks) used += (size_t)snprintf(text + used, room - used, "%ld blocks ", blocks);
    if (pools) snprintf(text + used, room - used, "%ld pools", pools);
    return total + blocks + pools;
}

/* Frees the memory of freed objects: from now on, messages to them are not recognized. */
EMU_EXPORT void emu_objc_forget(void) {
    pthread_mutex_lock(&lock);
    for (struct emu_objc **place = &objects; *place;) {
        struct emu_objc *object = *place;
        if (atomic_load(&object->references) > 0) {
            place = &object->next;
            continue;
        }
        *place = object->next;
        free(object);
    }
    pthread_mutex_unlock(&lock);
}
