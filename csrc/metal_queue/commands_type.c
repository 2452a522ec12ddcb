/* MetalCommands: a command buffer for Python. The GIL keeps two threads from encoding at once; it is released around commit and
 * while waiting, so the commit is claimed before. */
#include "metal_queue/python.h"

static void free_commands(void *made) { mm_metal_commands_free(made); }
void mm_python_commands_dealloc(PyObject *self) { mm_python_destroy(self, free_commands); }

static PyObject *commands_begin(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    return mm_python_done(mm_metal_commands_begin(mm_python_own(self), &problem), &problem);
}

static PyObject *commands_end(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    return mm_python_done(mm_metal_commands_end(mm_python_own(self), &problem), &problem);
}

static bool argument_of(PyObject *self, PyObject *value, Py_ssize_t index, struct mm_metal_argument *argument) {
    *argument = (struct mm_metal_argument){NULL, NULL, 0};
    if (value == Py_None) return true;
    if (mm_python_is(self, value, MM_METAL_TYPE_BUFFER)) {
        argument->buffer = ((struct mm_metal_buffer *)mm_python_own(value))->buffer;
        return true;
    }
    Py_ssize_t size = PyBytes_Check(value) ? PyBytes_Size(value) : 0;
    if (size >= 1 && size <= MM_METAL_MAX_BYTES) {
        *argument = (struct mm_metal_argument){NULL, PyBytes_AsString(value), (uint64_t)size};
        return true;
    }
    PyErr_Format(PyExc_TypeError, "arguments[%zd] is %R; expected a MetalBuffer, 1 to %d bytes, or None", index, value,
                 MM_METAL_MAX_BYTES);
    return false;
}

static PyObject *commands_dispatch(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"pipeline", "arguments", "grid", "group", "count", NULL};
    PyObject *pipeline, *values, *grid_value, *group_value, *count_value = NULL;
    struct mm_metal_argument arguments[MM_METAL_SLOTS];
    struct mm_metal_size grid, group;
    struct mm_metal_problem problem;
    uint64_t count = 1;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOO|O:dispatch", names, &pipeline, &values, &grid_value, &group_value,
                                     &count_value))
        return NULL;
    if (!mm_python_is(self, pipeline, MM_METAL_TYPE_PIPELINE))
        return PyErr_Format(PyExc_TypeError, "pipeline is %R; expected a MetalPipeline", pipeline), NULL;
    Py_ssize_t size = PyTuple_Check(values) ? PyTuple_Size(values) : -1;
    if (size < 0 || size > MM_METAL_SLOTS)
        return PyErr_Format(PyExc_TypeError, "arguments is %R; expected a tuple of at most %d", values, MM_METAL_SLOTS), NULL;
    for (Py_ssize_t i = 0; i < size; i++)
        if (!argument_of(self, PyTuple_GetItem(values, i), i, &arguments[i])) return NULL;
    if (!mm_python_size(grid_value, "grid", &grid) || !mm_python_size(group_value, "group", &group)) return NULL;
    if (count_value && !mm_python_integer(count_value, "count", 1, 1000000, &count)) return NULL;
    const struct mm_metal_pipeline *kernel = mm_python_own(pipeline);
    double threads = (double)group.width * (double)group.height * (double)group.depth;
    if (threads > (double)kernel->max_threads)
        return PyErr_Format(PyExc_ValueError, "group is %R; expected at most %llu threads, this kernel's limit", group_value,
                            (unsigned long long)kernel->max_threads),
               NULL;
    bool done = mm_metal_commands_dispatch(mm_python_own(self), kernel, arguments, (int)size, grid, group, (int64_t)count,
                                           &problem);
    return mm_python_done(done, &problem);
}

static PyObject *with_event(PyObject *self, PyObject *args, const char *format,
                            bool (*encode)(struct mm_metal_commands *, mm_id, uint64_t, struct mm_metal_problem *)) {
    PyObject *event, *value;
    struct mm_metal_problem problem;
    uint64_t number;
    if (!PyArg_ParseTuple(args, format, &event, &value)) return NULL;
    if (!mm_python_is(self, event, MM_METAL_TYPE_EVENT))
        return PyErr_Format(PyExc_TypeError, "event is %R; expected a MetalEvent", event), NULL;
    if (!mm_python_integer(value, "value", 1, UINT64_MAX, &number)) return NULL;
    return mm_python_done(encode(mm_python_own(self), mm_python_own(event), number, &problem), &problem);
}

static PyObject *commands_signal(PyObject *self, PyObject *args) {
    return with_event(self, args, "OO:signal", mm_metal_commands_signal);
}

static PyObject *commands_wait_for(PyObject *self, PyObject *args) {
    return with_event(self, args, "OO:wait_for", mm_metal_commands_wait_for);
}

static PyObject *commands_commit(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    if (!mm_metal_commands_claim(mm_python_own(self), &problem)) return mm_python_raise(PyExc_RuntimeError, &problem);
    Py_BEGIN_ALLOW_THREADS
    mm_metal_commands_commit(mm_python_own(self));
    Py_END_ALLOW_THREADS
    return mm_python_none();
}

static bool is_committed(PyObject *self, const char *what) {
    struct mm_metal_commands *commands = mm_python_own(self);
    if (atomic_load(&commands->phase) == MM_METAL_COMMITTED) return true;
    PyErr_Format(PyExc_RuntimeError, "%s: the command buffer has not been committed; expected commit() before it", what);
    return false;
}

static PyObject *finished(PyObject *self) {
    struct mm_metal_problem problem;
    return mm_python_done(mm_metal_commands_succeeded(mm_python_own(self), &problem), &problem);
}

static PyObject *commands_wait(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"timeout", NULL};
    PyObject *timeout = Py_None;
    uint64_t deadline;
    struct mm_metal_commands *commands = mm_python_own(self);
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O:wait", names, &timeout) || !mm_python_deadline(timeout, &deadline) ||
        !is_committed(self, "wait"))
        return NULL;
    for (;;) {
        bool done;
        uint64_t until = mm_python_slice(deadline);
        Py_BEGIN_ALLOW_THREADS
        done = mm_metal_completion_wait(commands->completion, until);
        Py_END_ALLOW_THREADS
        if (done) return finished(self);
        if (PyErr_CheckSignals()) return NULL;
        if (mm_metal_clock() >= deadline)
            return PyErr_Format(PyExc_TimeoutError, "the command buffer is %s after %R s; expected it to be completed",
                                mm_metal_commands_status(commands), timeout);
    }
}

static PyObject *commands_wait_until_completed(PyObject *self, PyObject *unused) {
    (void)unused;
    if (!is_committed(self, "wait_until_completed")) return NULL;
    Py_BEGIN_ALLOW_THREADS
    mm_metal_commands_block(mm_python_own(self));
    Py_END_ALLOW_THREADS
    return finished(self);
}

static PyObject *commands_times(PyObject *self, PyObject *unused) {
    struct mm_metal_times times;
    (void)unused;
    if (!is_committed(self, "times")) return NULL;
    mm_metal_commands_times(mm_python_own(self), &times);
    const uint64_t values[] = {
#define X(name) times.name,
        MM_METAL_TIMES(X)
#undef X
    };
    PyObject *result = PyStructSequence_New((PyTypeObject *)mm_python_state(self)->times);
    for (Py_ssize_t i = 0; result && i < (Py_ssize_t)(sizeof values / sizeof *values); i++) {
        PyObject *value = values[i] ? PyLong_FromUnsignedLongLong(values[i]) : mm_python_none();
        if (value)
            PyStructSequence_SetItem(result, i, value);
        else
            Py_CLEAR(result);
    }
    return result;
}

static PyObject *commands_status(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(mm_metal_commands_status(mm_python_own(self)));
}

PyGetSetDef mm_python_commands_fields[] = {
    {"status", commands_status, NULL, "Metal's word: not enqueued, enqueued, committed, scheduled, completed or error.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
PyMethodDef mm_python_commands_methods[] = {
    {"begin", commands_begin, METH_NOARGS, "begin(): opens a compute encoder, in which dispatches run one after the other."},
    {"dispatch", (PyCFunction)(void (*)(void))commands_dispatch, METH_VARARGS | METH_KEYWORDS,
     "dispatch(pipeline, arguments, grid, group, count=1): encodes `grid` threads in threadgroups of `group`, `count` times. "
     "arguments: a tuple of MetalBuffers, bytes (values) and None (leave what is bound), for buffer(0), buffer(1), ..."},
    {"end", commands_end, METH_NOARGS, "end(): closes the encoder."},
    {"signal", commands_signal, METH_VARARGS,
     "signal(event, value): raises the event to `value` when the work so far is done."},
    {"wait_for", commands_wait_for, METH_VARARGS, "wait_for(event, value): what is encoded next waits for the event."},
    {"commit", commands_commit, METH_NOARGS, "commit(): hands the command buffer to the GPU, and returns."},
    {"wait", (PyCFunction)(void (*)(void))commands_wait, METH_VARARGS | METH_KEYWORDS,
     "wait(timeout=None): until its completion handler has run. RuntimeError with Metal's words if it ended in an error, "
     "TimeoutError after that many seconds; it goes on then, and can be waited for again."},
    {"wait_until_completed", commands_wait_until_completed, METH_NOARGS,
     "wait_until_completed(): Metal's own wait, which neither Ctrl-C nor a timeout ends."},
    {"times", commands_times, METH_NOARGS, "times() -> MetalTimes: what is known by now, None for the rest."},
    {NULL, NULL, 0, NULL},
};
