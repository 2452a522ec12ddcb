/* Instances, exceptions and arguments of the Python types over Metal. See metal_queue/python.h. */
#include "metal_queue/python.h"

#include <math.h>
#include <string.h>

struct mm_metal_state *mm_python_state(PyObject *self) { return PyModule_GetState(PyType_GetModule(Py_TYPE(self))); }
void *mm_python_own(PyObject *self) { return ((struct mm_python_object *)self)->own; }

PyObject *mm_python_raise(PyObject *type, const struct mm_metal_problem *problem) {
    /* Metal's texts are UTF-8, but one may have been cut within a character. */
    PyObject *text = PyUnicode_DecodeUTF8(problem->text, (Py_ssize_t)strlen(problem->text), "replace");
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

PyObject *mm_python_none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

PyObject *mm_python_done(bool done, const struct mm_metal_problem *problem) {
    return done ? mm_python_none() : mm_python_raise(PyExc_RuntimeError, problem);
}

PyObject *mm_python_wrap(struct mm_metal_state *state, enum mm_metal_type type, void *made) {
    PyTypeObject *class = (PyTypeObject *)state->types[type];
    struct mm_python_object *object = made ? (struct mm_python_object *)PyType_GenericAlloc(class, 0) : NULL;
    if (object) object->own = made;
    return (PyObject *)object;
}

void mm_python_destroy(PyObject *self, void (*release)(void *)) {
    PyTypeObject *class = Py_TYPE(self);
    if (mm_python_own(self)) release(mm_python_own(self));
    freefunc release_memory;
    void *slot = PyType_GetSlot(class, Py_tp_free);
    memcpy(&release_memory, &slot, sizeof slot);
    release_memory(self);
    Py_DECREF(class);
}

/* ---- arguments ---- */

bool mm_python_is(PyObject *self, PyObject *value, enum mm_metal_type type) {
    return (PyObject *)Py_TYPE(value) == mm_python_state(self)->types[type];
}

bool mm_python_integer(PyObject *value, const char *name, uint64_t low, uint64_t high, uint64_t *result) {
    PyObject *index = PyNumber_Index(value);
    if (!index) return false;
    *result = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    bool outside = PyErr_Occurred() != NULL;
    if (outside && !PyErr_ExceptionMatches(PyExc_OverflowError)) return false;
    if (!outside && *result >= low && *result <= high) return true;
    PyErr_Format(PyExc_ValueError, "%s is %R; expected %llu to %llu", name, value, (unsigned long long)low,
                 (unsigned long long)high);
    return false;
}

bool mm_python_size(PyObject *value, const char *name, struct mm_metal_size *size) {
    uint64_t extents[3] = {1, 1, 1};
    if (PyLong_Check(value)) {
        if (!mm_python_integer(value, name, 1, UINT32_MAX, &extents[0])) return false;
    } else {
        Py_ssize_t count = PyTuple_Check(value) ? PyTuple_Size(value) : 0;
        if (count < 1 || count > 3)
            return PyErr_Format(PyExc_TypeError, "%s is %R; expected an int or a tuple of 1 to 3 ints", name, value), false;
        for (Py_ssize_t i = 0; i < count; i++)
            if (!mm_python_integer(PyTuple_GetItem(value, i), name, 1, UINT32_MAX, &extents[i])) return false;
    }
    *size = (struct mm_metal_size){extents[0], extents[1], extents[2]};
    return true;
}

bool mm_python_deadline(PyObject *timeout, uint64_t *deadline) {
    *deadline = UINT64_MAX;
    if (!timeout || timeout == Py_None) return true;
    double seconds = PyFloat_AsDouble(timeout);
    if (PyErr_Occurred()) return false;
    if (!(seconds >= 0) || isinf(seconds))
        return PyErr_Format(PyExc_ValueError, "timeout is %R; expected seconds, 0 or more, or None", timeout), false;
    if (seconds < 1e9) *deadline = mm_metal_clock() + (uint64_t)(seconds * 1e9);
    return true;
}

uint64_t mm_python_slice(uint64_t deadline) {
    uint64_t end = mm_metal_clock() + 100000000u;
    return deadline < end ? deadline : end;
}
