/* Windows of mapped files for Python: _C.map_window and what tells about it. The tensor itself comes out of the op mapped_window,
 * since PyTorch's C ABI hands tensors to Python through its dispatcher. */
#include "mps/python.h"

#include "memory/python.h"
#include <stdint.h>
#include <unistd.h>

#include "mps/window.h"

static PyObject *map_window(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *capsule;
    Py_ssize_t begin, end;
    if (!PyArg_ParseTuple(arguments, "Onn:map_window", &capsule, &begin, &end)) return NULL;
    const struct mm_map *map = PyCapsule_GetPointer(capsule, MM_MAP_CAPSULE);
    if (!map) return NULL;
    if (begin < 0 || end <= begin) return PyErr_Format(PyExc_ValueError, "begin is %zd, end is %zd; expected 0 <= begin < end", begin, end);
    struct mm_window window;
    struct mm_window_problem problem;
    int64_t number = mm_mps_window_open(map, (size_t)begin, (size_t)end, &window, &problem);
    if (!number) {
        PyErr_SetString(problem.file ? PyExc_OSError : PyExc_RuntimeError, problem.text);
        return NULL;
    }
    return Py_BuildValue("Lnn", (long long)number, (Py_ssize_t)window.place, (Py_ssize_t)window.bytes);
}

static PyObject *map_window_problem(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    const char *missing = mm_mps_window_missing();
    if (missing) return PyUnicode_FromString(missing);
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *map_window_bytes(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLongLong(mm_mps_window_bytes());
}

static PyObject *map_window_holds(PyObject *self, PyObject *pointer) {
    (void)self;
    void *address = PyLong_AsVoidPtr(pointer);
    if (!address && PyErr_Occurred()) return NULL;
    return PyBool_FromLong(mm_mps_window_holds(address));
}

static PyObject *page_bytes(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyLong_FromLong(sysconf(_SC_PAGESIZE));
}

static PyObject *mps_device(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    int32_t type = mm_mps_device_type();
    if (type >= 0) return PyUnicode_FromString(type == mm_torch.aoti_torch_device_type_cpu() ? "cpu" : "mps");
    Py_INCREF(Py_None);
    return Py_None;
}

PyMethodDef mm_mps_methods[] = {
    {"mps_device", mps_device, METH_NOARGS,
     "mps_device() -> str | None: the type of device whose tensors the MPS backend takes, \"mps\" but in an emulator; None while it is off."},
    {"page_bytes", page_bytes, METH_NOARGS, "page_bytes() -> int: of the system's memory."},
    {"map_window_holds", map_window_holds, METH_O,
     "map_window_holds(pointer) -> bool: whether a storage's data_ptr() is that of a window, which nobody may write to."},
    {"map_window", map_window, METH_VARARGS,
     "map_window(map, begin, end) -> (number, place, nbytes): maps the pages of these bytes of one mapped file for the GPU. "
     "torch.ops.metal_marlin.mapped_window(like, number) makes the tensor, int16, whose first byte is the mapping's byte `place`. "
     "OSError: the file has changed, or can't be mapped. RuntimeError: Metal or torch can't."},
    {"map_window_problem", map_window_problem, METH_NOARGS,
     "map_window_problem() -> str | None: why no window can be made in this process, None if one can."},
    {"map_window_bytes", map_window_bytes, METH_NOARGS, "map_window_bytes() -> int: bytes that are mapped for the GPU now."},
    {NULL, NULL, 0, NULL},
};
