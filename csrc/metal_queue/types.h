/* The Python types over metal_queue/queue.h, for module.c to add to its module: MetalDevice and what it makes. */
#ifndef MM_METAL_TYPES_H
#define MM_METAL_TYPES_H

#include <Python.h>

#include <stdbool.h>

/* X(id, name in Python) */
#define MM_METAL_TYPES(X) \
    X(DEVICE, Device) X(PIPELINE, Pipeline) X(BUFFER, Buffer) X(QUEUE, Queue) X(COMMANDS, Commands) X(EVENT, Event)
enum mm_metal_type {
#define X(id, name) MM_METAL_TYPE_##id,
    MM_METAL_TYPES(X)
#undef X
    MM_METAL_TYPE_COUNT
};

/* The module's state: strong references. */
struct mm_metal_state {
    PyObject *types[MM_METAL_TYPE_COUNT], *times;
};

bool mm_metal_add_types(PyObject *module, struct mm_metal_state *state);
int mm_metal_visit_types(struct mm_metal_state *state, visitproc visit, void *arg);
void mm_metal_clear_types(struct mm_metal_state *state);

/* metal_device(), metal_objects(), use_metal_fake(path) */
extern PyMethodDef mm_metal_methods[];

#endif
