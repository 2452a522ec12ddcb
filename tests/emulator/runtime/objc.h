/* A stand-in for Objective-C's runtime, as far as C code that only sends messages can see it: classes, selectors, counted
 * objects, autorelease pools, blocks, strings, errors. objc.c has it; metal.c makes Metal's classes of it.
 * Mistakes are reported as the rest of the emulator does (kinds "objc" and "metal"), never by ending the process. */
#ifndef EMU_OBJC_H
#define EMU_OBJC_H

#include "runtime.h"

struct emu_class;

struct emu_objc { /* the head of every object */
    struct emu_class *isa;
    int magic;
    atomic_int references; /* 0: freed. Its memory stays, so that a message to it is noticed */
    struct emu_objc *next;
};

struct emu_method {
    const char *selector;
    void (*implementation)(void);
};
/* A method's entry: what is called has a type of its own, as objc_msgSend's callers know. */
#define EMU_METHOD(selector, function) {selector, (void (*)(void))(function)}

struct emu_class {
    struct emu_class *isa; /* whose methods are the class methods */
    const char *name;
    const struct emu_method *methods; /* besides those of NSObject; ended by {NULL, NULL} */
    void (*dealloc)(void *object);
};

/* A new object with one reference. `bytes` include the head; the rest is zero. */
void *emu_objc_new(struct emu_class *class, size_t bytes);
void *emu_objc_retain(void *object); /* nil is passed through */
void emu_objc_release(void *object);
/* Gives the caller's reference to the thread's pool. */
void *emu_objc_autorelease(void *object);
/* Whether `object` is a live object of the class; reports who expected it, if not. */
bool emu_objc_is(const void *object, const struct emu_class *class, const char *where);

void *objc_autoreleasePoolPush(void);
void objc_autoreleasePoolPop(void *pool);
bool emu_metal_lacks(const char *selector); /* metal.c: whether this system is too old for the message */

struct emu_string {
    struct emu_objc head;
    char *text;
};
struct emu_error {
    struct emu_objc head;
    struct emu_string *description, *domain;
    long code;
};
extern struct emu_class emu_NSString, emu_NSError;
struct emu_string *emu_string_new(const char *text);
/* Autoreleased, as errors are. */
struct emu_error *emu_error_make(const char *domain, long code, const char *description);

/* Blocks: kept as _Block_copy does, called with one object, let go as _Block_release does. */
struct emu_block;
struct emu_block *emu_block_copy(const void *block);
struct emu_block *emu_block_copy_as(const void *block, const char *signature);
void emu_block_call(struct emu_block *block, void *object);
void emu_block_call_deallocator(struct emu_block *block, void *pointer, uint64_t length);
void emu_block_release(struct emu_block *block);

#endif
