/* What the Python types over Metal share: instances, exceptions, and arguments with errors that name them. */
#ifndef MM_METAL_PYTHON_H
#define MM_METAL_PYTHON_H

#include "metal_queue/types.h"

#include "metal_queue/queue.h"

struct mm_python_object { /* of any of the types */
    PyObject_HEAD
    void *own; /* what its maker said: an mm_id, or a struct of metal_queue/queue.h */
};

struct mm_metal_state *mm_python_state(PyObject *self);
void *mm_python_own(PyObject *self);
/* Raises `type` with the problem's text; NULL. */
PyObject *mm_python_raise(PyObject *type, const struct mm_metal_problem *problem);
PyObject *mm_python_none(void);
/* None, or the problem raised as a RuntimeError. */
PyObject *mm_python_done(bool done, const struct mm_metal_problem *problem);
/* An instance that takes over `made`. NULL, with an exception: `made` is still the caller's. */
PyObject *mm_python_wrap(struct mm_metal_state *state, enum mm_metal_type type, void *made);
/* A tp_dealloc: releases what the instance owns, then the instance. */
void mm_python_destroy(PyObject *self, void (*release)(void *));

/* Whether `value` is of the type; `self` is of any. */
bool mm_python_is(PyObject *self, PyObject *value, enum mm_metal_type type);
/* An integer within [low, high]; `name` is the argument's. */
bool mm_python_integer(PyObject *value, const char *name, uint64_t low, uint64_t high, uint64_t *result);
/* 1 to 3 positive integers, or one. */
bool mm_python_size(PyObject *value, const char *name, struct mm_metal_size *size);
/* The deadline on Metal's clock; None is the end of time. */
bool mm_python_deadline(PyObject *timeout, uint64_t *deadline);
/* How long to wait before a look at Python's signals (Ctrl-C). */
uint64_t mm_python_slice(uint64_t deadline);

void mm_python_commands_dealloc(PyObject *self);
extern PyMethodDef mm_python_commands_methods[];
extern PyGetSetDef mm_python_commands_fields[];

#endif
