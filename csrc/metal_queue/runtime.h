/* Metal from C, through the Objective-C runtime: no Objective-C compiler, no framework to link with.
 * Owns the lists of every symbol, class and message in use, finding them at run time, reference counts, pools, strings and
 * errors. Queues and buffers are metal_queue/queue.h. Compiles everywhere; where there is no Metal, loading says so. Tests load a
 * library that has the same functions over an emulated GPU. */
#ifndef MM_METAL_RUNTIME_H
#define MM_METAL_RUNTIME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct mm_objc_object *mm_id; /* Objective-C's id and Class */
typedef struct mm_objc_selector *mm_sel;
typedef unsigned long mm_uinteger; /* NSUInteger */

struct mm_metal_size { /* MTLSize; 24 bytes, so arm64 passes it by reference, which the prototypes below make the compiler do */
    mm_uinteger width, height, depth;
};

/* X(name, path): libraries that hold the symbols. CoreGraphics and Foundation are loaded for what they do: without the first a
 * program that links to no graphics gets no default device, and the second has NSString. */
#define MM_METAL_LIBRARIES(X)                                                    \
    X(objc, "/usr/lib/libobjc.A.dylib")                                          \
    X(system, "/usr/lib/libSystem.B.dylib")                                      \
    X(foundation, "/System/Library/Frameworks/Foundation.framework/Foundation")  \
    X(graphics, "/System/Library/Frameworks/CoreGraphics.framework/CoreGraphics") \
    X(metal, "/System/Library/Frameworks/Metal.framework/Metal")

/* X(library, return type, name, (arguments)). objc_msgSend has no type of its own here: see the messages. */
#define MM_METAL_FUNCTIONS(X)                                          \
    X(objc, mm_id, objc_getClass, (const char *name))                  \
    X(objc, mm_sel, sel_registerName, (const char *name))              \
    X(objc, void, objc_msgSend, (void))                                \
    X(objc, void *, objc_autoreleasePoolPush, (void))                  \
    X(objc, void, objc_autoreleasePoolPop, (void *pool))               \
    X(metal, mm_id, MTLCreateSystemDefaultDevice, (void))

/* X(library, name): variables, of which the address is wanted. */
#define MM_METAL_VARIABLES(X) X(system, _NSConcreteStackBlock)

/* X(return type, name, selector, (self, selector, arguments)): objc_msgSend has to be called as a function of exactly the
 * method's type: arguments travel differently to variadic functions on arm64. So each message has its own prototype. */
#define MM_METAL_MESSAGES(X)                                                                                               \
    /* NSObject */                                                                                                         \
    X(mm_id, alloc, "alloc", (mm_id, mm_sel))                                                                              \
    X(mm_id, retain, "retain", (mm_id, mm_sel))                                                                            \
    X(void, release, "release", (mm_id, mm_sel))                                                                           \
    X(bool, responds, "respondsToSelector:", (mm_id, mm_sel, mm_sel selector))                                             \
    /* NSString, NSError */                                                                                                \
    X(mm_id, init_utf8, "initWithUTF8String:", (mm_id, mm_sel, const char *text))                                          \
    X(const char *, utf8, "UTF8String", (mm_id, mm_sel))                                                                   \
    X(mm_id, description, "localizedDescription", (mm_id, mm_sel))                                                         \
    X(mm_id, domain, "domain", (mm_id, mm_sel))                                                                            \
    X(long, code, "code", (mm_id, mm_sel))                                                                                 \
    /* MTLDevice */                                                                                                        \
    X(mm_id, name, "name", (mm_id, mm_sel))                                                                                \
    X(bool, unified_memory, "hasUnifiedMemory", (mm_id, mm_sel))                                                           \
    X(uint64_t, working_set, "recommendedMaxWorkingSetSize", (mm_id, mm_sel))                                              \
    X(mm_uinteger, max_buffer, "maxBufferLength", (mm_id, mm_sel))                                                         \
    X(mm_id, new_library, "newLibraryWithSource:options:error:",                                                           \
      (mm_id, mm_sel, mm_id source, mm_id options, mm_id * error))                                                         \
    X(mm_id, new_pipeline, "newComputePipelineStateWithFunction:error:", (mm_id, mm_sel, mm_id function, mm_id * error))   \
    X(mm_id, new_buffer, "newBufferWithLength:options:", (mm_id, mm_sel, mm_uinteger bytes, mm_uinteger options))          \
    X(mm_id, new_buffer_over, "newBufferWithBytesNoCopy:length:options:deallocator:",                                      \
      (mm_id, mm_sel, void *bytes, mm_uinteger length, mm_uinteger options, void *block))                                  \
    X(mm_id, new_queue, "newCommandQueueWithMaxCommandBufferCount:", (mm_id, mm_sel, mm_uinteger count))                   \
    X(mm_id, new_event, "newSharedEvent", (mm_id, mm_sel))                                                                 \
    /* MTLLibrary, MTLComputePipelineState, MTLBuffer */                                                                   \
    X(mm_id, new_function, "newFunctionWithName:", (mm_id, mm_sel, mm_id name))                                            \
    X(mm_uinteger, max_threads, "maxTotalThreadsPerThreadgroup", (mm_id, mm_sel))                                          \
    X(mm_uinteger, simd_width, "threadExecutionWidth", (mm_id, mm_sel))                                                    \
    X(void *, contents, "contents", (mm_id, mm_sel))                                                                       \
    /* MTLCommandQueue, MTLCommandBuffer */                                                                                \
    X(mm_id, command_buffer, "commandBuffer", (mm_id, mm_sel))                                                             \
    X(mm_id, compute_encoder, "computeCommandEncoder", (mm_id, mm_sel))                                                    \
    X(void, add_scheduled, "addScheduledHandler:", (mm_id, mm_sel, void *block))                                           \
    X(void, add_completed, "addCompletedHandler:", (mm_id, mm_sel, void *block))                                           \
    X(void, encode_signal, "encodeSignalEvent:value:", (mm_id, mm_sel, mm_id event, uint64_t value))                       \
    X(void, encode_wait, "encodeWaitForEvent:value:", (mm_id, mm_sel, mm_id event, uint64_t value))                        \
    X(void, commit, "commit", (mm_id, mm_sel))                                                                             \
    X(void, wait_completed, "waitUntilCompleted", (mm_id, mm_sel))                                                         \
    X(mm_uinteger, status, "status", (mm_id, mm_sel))                                                                      \
    X(mm_id, error, "error", (mm_id, mm_sel))                                                                              \
    X(double, kernel_start, "kernelStartTime", (mm_id, mm_sel))                                                            \
    X(double, kernel_end, "kernelEndTime", (mm_id, mm_sel))                                                                \
    X(double, gpu_start, "GPUStartTime", (mm_id, mm_sel))                                                                  \
    X(double, gpu_end, "GPUEndTime", (mm_id, mm_sel))                                                                      \
    /* MTLComputeCommandEncoder */                                                                                         \
    X(void, set_pipeline, "setComputePipelineState:", (mm_id, mm_sel, mm_id pipeline))                                     \
    X(void, set_buffer, "setBuffer:offset:atIndex:",                                                                       \
      (mm_id, mm_sel, mm_id buffer, mm_uinteger offset, mm_uinteger index))                                                \
    X(void, set_bytes, "setBytes:length:atIndex:",                                                                         \
      (mm_id, mm_sel, const void *bytes, mm_uinteger length, mm_uinteger index))                                           \
    X(void, dispatch_threads, "dispatchThreads:threadsPerThreadgroup:",                                                    \
      (mm_id, mm_sel, struct mm_metal_size grid, struct mm_metal_size group))                                              \
    X(void, end_encoding, "endEncoding", (mm_id, mm_sel))                                                                  \
    /* MTLSharedEvent */                                                                                                   \
    X(uint64_t, signaled, "signaledValue", (mm_id, mm_sel))                                                                \
    X(void, set_signaled, "setSignaledValue:", (mm_id, mm_sel, uint64_t value))                                            \
    X(bool, wait_signaled, "waitUntilSignaledValue:timeoutMS:", (mm_id, mm_sel, uint64_t value, uint64_t milliseconds))

struct mm_metal_table {
#define X(library, type, name, arguments) type(*name) arguments;
    MM_METAL_FUNCTIONS(X)
#undef X
#define X(library, name) void *name;
    MM_METAL_VARIABLES(X)
#undef X
};
struct mm_metal_messages { /* objc_msgSend in every field, each of its message's own type */
#define X(type, name, selector, arguments) type(*name) arguments;
    MM_METAL_MESSAGES(X)
#undef X
};
struct mm_metal_selectors {
#define X(type, name, selector, arguments) mm_sel name;
    MM_METAL_MESSAGES(X)
#undef X
};
extern struct mm_metal_table mm_metal;
extern struct mm_metal_messages mm_metal_message;
extern struct mm_metal_selectors mm_metal_selector;

/* [object name] and [object name: ...]. Objects may be nil: the answer is 0. Within a pool only. */
#define MM_ASK(name, object) (mm_metal_message.name((object), mm_metal_selector.name))
#define MM_SEND(name, object, ...) (mm_metal_message.name((object), mm_metal_selector.name, __VA_ARGS__))

/* What went wrong, for whoever raises it. Compilers' messages are cut to fit. */
struct mm_metal_problem {
    char text[4096];
};
/* Writes the problem; returns false, so that a caller can return it. */
bool mm_metal_fail(struct mm_metal_problem *problem, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Finds everything, at first use. `fake`: the path of a library that stands in for all of the above, NULL for the system's. */
bool mm_metal_load(const char *fake, struct mm_metal_problem *problem);
/* Forgets what was found. False while objects of ours are alive, which belong to it. */
bool mm_metal_unload(struct mm_metal_problem *problem);
bool mm_metal_is_fake(void);

/* Objects that autoreleased within a pool are freed with it. Python's threads have no pool of their own, so every function that
 * sends messages opens one. */
void *mm_metal_pool_open(void);
void mm_metal_pool_close(void *pool);

/* Counts an object that is ours already (from new..., alloc, MTLCreate...); nil stays nil. */
mm_id mm_metal_own(mm_id object);
/* Retains an object that is not, such as an autoreleased one. */
mm_id mm_metal_retain(mm_id object);
void mm_metal_release(mm_id object);
/* Objects owned now, and what mm_metal_count was told of; 0 when everything has been released. */
long mm_metal_owned(void);
/* Counts plain memory in, +1 or -1, that Metal may hold on to. */
void mm_metal_count(int change);

/* A new NSString; release it. NULL if `text` is not UTF-8. */
mm_id mm_metal_string(const char *text);
/* Appends what an NSError says of itself to the problem's text. */
void mm_metal_explain(struct mm_metal_problem *problem, mm_id error);

/* The system's default device, owned. NULL: there is none, or no Metal at all. */
mm_id mm_metal_device(struct mm_metal_problem *problem);

/* Nanoseconds on the clock that Metal reports GPU times on: host time, which stands still while the machine sleeps. */
uint64_t mm_metal_clock(void);

#endif
