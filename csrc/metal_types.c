/* Python's view of metal_queue.h: argument checks, exceptions, and the GIL, which is released wherever Metal may wait.
 * Instances come from a MetalDevice only and own one object each; there is no closing, so nothing can be used after it. */
#define PY_SSIZE_T_CLEAN
#include "metal_types.h"

#include <math.h>
#include <string.h>

#include "metal_queue.h"

struct object { /* of any of the types; `own` is what its maker below says */
    PyObject_HEAD
    void *own;
};

static struct mm_metal_state *state_of(PyObject *self) { return PyModule_GetState(PyType_GetModule(Py_TYPE(self))); }
static void *own(PyObject *self) { return ((struct object *)self)->own; }

static PyObject *throw_problem(PyObject *type, const struct mm_metal_problem *problem) {
    /* Metal's texts are UTF-8, but one may have been cut within a character. */
    PyObject *text = PyUnicode_DecodeUTF8(problem->text, (Py_ssize_t)strlen(problem->text), "replace");
    if (text) PyErr_SetObject(type, text);
    Py_XDECREF(text);
    return NULL;
}

static PyObject *none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

/* An instance that takes over `made`; NULL passes an error on. */
static PyObject *wrap(struct mm_metal_state *state, enum mm_metal_type type, void *made) {
    PyTypeObject *class = (PyTypeObject *)state->types[type];
    struct object *object = made ? (struct object *)PyType_GenericAlloc(class, 0) : NULL;
    if (object) object->own = made;
    return (PyObject *)object;
}

static void destroy(PyObject *self, void (*release)(void *)) {
    PyTypeObject *class = Py_TYPE(self);
    if (own(self)) release(own(self));
    freefunc release_memory;
    void *slot = PyType_GetSlot(class, Py_tp_free);
    memcpy(&release_memory, &slot, sizeof slot);
    release_memory(self);
    Py_DECREF(class);
}

/* ---- arguments ---- */

static bool is_a(PyObject *self, PyObject *value, enum mm_metal_type type) {
    return (PyObject *)Py_TYPE(value) == state_of(self)->types[type];
}

/* An integer within [low, high]; `name` is the argument's. */
static bool integer_of(PyObject *value, const char *name, uint64_t low, uint64_t high, uint64_t *result) {
    PyObject *index = PyNumber_Index(value);
    if (!index) return false;
    *result = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    bool outside = PyErr_Occurred() != NULL;
    if (outside && !PyErr_ExceptionMatches(PyExc_OverflowError)) return false;
    if (!outside && *result >= low && *result <= high) return true;
    PyErr_Format(PyExc_ValueError, "%s is %R; expected %llu to %llu", name, value, (unsigned long long)low, (unsigned long long)high);
    return false;
}

/* 1 to 3 positive integers, or one. */
static bool size_of(PyObject *value, const char *name, struct mm_metal_size *size) {
    uint64_t extents[3] = {1, 1, 1};
    if (PyLong_Check(value)) {
        if (!integer_of(value, name, 1, UINT32_MAX, &extents[0])) return false;
    } else {
        Py_ssize_t count = PyTuple_Check(value) ? PyTuple_Size(value) : 0;
        if (count < 1 || count > 3)
            return PyErr_Format(PyExc_TypeError, "%s is %R; expected an int or a tuple of 1 to 3 ints", name, value), false;
        for (Py_ssize_t i = 0; i < count; i++)
            if (!integer_of(PyTuple_GetItem(value, i), name, 1, UINT32_MAX, &extents[i])) return false;
    }
    *size = (struct mm_metal_size){extents[0], extents[1], extents[2]};
    return true;
}

/* The deadline on Metal's clock; None is the end of time. */
static bool deadline_of(PyObject *timeout, uint64_t *deadline) {
    *deadline = UINT64_MAX;
    if (!timeout || timeout == Py_None) return true;
    double seconds = PyFloat_AsDouble(timeout);
    if (PyErr_Occurred()) return false;
    if (!(seconds >= 0) || isinf(seconds))
        return PyErr_Format(PyExc_ValueError, "timeout is %R; expected seconds, 0 or more, or None", timeout), false;
    if (seconds < 1e9) *deadline = mm_metal_clock() + (uint64_t)(seconds * 1e9);
    return true;
}

/* How long to wait before a look at Python's signals (Ctrl-C). */
static uint64_t slice_of(uint64_t deadline) {
    uint64_t end = mm_metal_clock() + 100000000u;
    return deadline < end ? deadline : end;
}

/* ---- Pipeline ---- */

static void free_pipeline(void *made) { mm_metal_pipeline_free(made); }
static void pipeline_dealloc(PyObject *self) { destroy(self, free_pipeline); }

static PyObject *pipeline_max_threads(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((struct mm_metal_pipeline *)own(self))->max_threads);
}

static PyObject *pipeline_simd_width(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((struct mm_metal_pipeline *)own(self))->simd_width);
}

static PyGetSetDef pipeline_fields[] = {
    {"max_threads", pipeline_max_threads, NULL, "Most threads of a threadgroup, for this kernel's registers.", NULL},
    {"simd_width", pipeline_simd_width, NULL, "Threads of a simdgroup.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- Buffer ---- */

static void free_buffer(void *made) { mm_metal_buffer_free(made); }
static void buffer_dealloc(PyObject *self) { destroy(self, free_buffer); }

static PyObject *buffer_nbytes(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((struct mm_metal_buffer *)own(self))->bytes);
}

static PyObject *buffer_address(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(((struct mm_metal_buffer *)own(self))->contents);
}

static PyGetSetDef buffer_fields[] = {
    {"nbytes", buffer_nbytes, NULL, "Bytes of the buffer.", NULL},
    {"address", buffer_address, NULL, "Where its memory is, as long as this object lives. metal_queue.view() is safer.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- Event ---- */

static void free_event(void *made) { mm_metal_release(made); }
static void event_dealloc(PyObject *self) { destroy(self, free_event); }

static PyObject *event_value(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(mm_metal_event_value(own(self)));
}

static int event_set_value(PyObject *self, PyObject *value, void *unused) {
    uint64_t number;
    (void)unused;
    if (!value) return PyErr_SetString(PyExc_AttributeError, "value cannot be deleted"), -1;
    if (!integer_of(value, "value", 0, UINT64_MAX, &number)) return -1;
    mm_metal_event_set(own(self), number);
    return 0;
}

static PyObject *event_wait(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"value", "timeout", NULL};
    PyObject *value, *timeout = Py_None;
    uint64_t wanted, deadline;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O:wait", names, &value, &timeout) ||
        !integer_of(value, "value", 0, UINT64_MAX, &wanted) || !deadline_of(timeout, &deadline))
        return NULL;
    for (;;) {
        enum mm_metal_waited waited;
        uint64_t now = mm_metal_clock(), until = slice_of(deadline);
        Py_BEGIN_ALLOW_THREADS
        waited = mm_metal_event_wait(own(self), wanted, until > now ? (until - now + 999999u) / 1000000u : 0);
        Py_END_ALLOW_THREADS
        if (waited == MM_METAL_REACHED) return none();
        if (waited == MM_METAL_CANNOT_WAIT)
            return PyErr_SetString(PyExc_RuntimeError, "waiting for an event's value came with macOS 12; this system lacks it"), NULL;
        if (PyErr_CheckSignals()) return NULL;
        if (mm_metal_clock() >= deadline)
            return PyErr_Format(PyExc_TimeoutError, "the event's value is %llu after %R s; expected %llu or more",
                                (unsigned long long)mm_metal_event_value(own(self)), timeout, (unsigned long long)wanted),
                   NULL;
    }
}

static PyGetSetDef event_fields[] = {
    {"value", event_value, event_set_value, "The value that has been signalled; setting it signals from the CPU.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef event_methods[] = {
    {"wait", (PyCFunction)(void (*)(void))event_wait, METH_VARARGS | METH_KEYWORDS,
     "wait(value, timeout=None): until the value has been reached. TimeoutError after that many seconds."},
    {NULL, NULL, 0, NULL},
};

/* ---- Commands ---- */

static void free_commands(void *made) { mm_metal_commands_free(made); }
static void commands_dealloc(PyObject *self) { destroy(self, free_commands); }

static PyObject *commands_begin(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    return mm_metal_commands_begin(own(self), &problem) ? none() : throw_problem(PyExc_RuntimeError, &problem);
}

static PyObject *commands_end(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    return mm_metal_commands_end(own(self), &problem) ? none() : throw_problem(PyExc_RuntimeError, &problem);
}

static bool argument_of(PyObject *self, PyObject *value, Py_ssize_t index, struct mm_metal_argument *argument) {
    *argument = (struct mm_metal_argument){NULL, NULL, 0};
    if (value == Py_None) return true;
    if (is_a(self, value, MM_METAL_TYPE_BUFFER)) {
        argument->buffer = ((struct mm_metal_buffer *)own(value))->buffer;
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
    if (!is_a(self, pipeline, MM_METAL_TYPE_PIPELINE))
        return PyErr_Format(PyExc_TypeError, "pipeline is %R; expected a MetalPipeline", pipeline), NULL;
    Py_ssize_t size = PyTuple_Check(values) ? PyTuple_Size(values) : -1;
    if (size < 0 || size > MM_METAL_SLOTS)
        return PyErr_Format(PyExc_TypeError, "arguments is %R; expected a tuple of at most %d", values, MM_METAL_SLOTS), NULL;
    for (Py_ssize_t i = 0; i < size; i++)
        if (!argument_of(self, PyTuple_GetItem(values, i), i, &arguments[i])) return NULL;
    if (!size_of(grid_value, "grid", &grid) || !size_of(group_value, "group", &group)) return NULL;
    if (count_value && !integer_of(count_value, "count", 1, 1000000, &count)) return NULL;
    const struct mm_metal_pipeline *kernel = own(pipeline);
    double threads = (double)group.width * (double)group.height * (double)group.depth;
    if (threads > (double)kernel->max_threads)
        return PyErr_Format(PyExc_ValueError, "group is %R; expected at most %llu threads, this kernel's limit", group_value,
                            (unsigned long long)kernel->max_threads),
               NULL;
    bool done = mm_metal_commands_dispatch(own(self), kernel, arguments, (int)size, grid, group, (int64_t)count, &problem);
    return done ? none() : throw_problem(PyExc_RuntimeError, &problem);
}

static PyObject *with_event(PyObject *self, PyObject *args, const char *format,
                            bool (*encode)(struct mm_metal_commands *, mm_id, uint64_t, struct mm_metal_problem *)) {
    PyObject *event, *value;
    struct mm_metal_problem problem;
    uint64_t number;
    if (!PyArg_ParseTuple(args, format, &event, &value)) return NULL;
    if (!is_a(self, event, MM_METAL_TYPE_EVENT))
        return PyErr_Format(PyExc_TypeError, "event is %R; expected a MetalEvent", event), NULL;
    if (!integer_of(value, "value", 1, UINT64_MAX, &number)) return NULL;
    return encode(own(self), own(event), number, &problem) ? none() : throw_problem(PyExc_RuntimeError, &problem);
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
    if (!mm_metal_commands_claim(own(self), &problem)) return throw_problem(PyExc_RuntimeError, &problem);
    Py_BEGIN_ALLOW_THREADS
    mm_metal_commands_commit(own(self));
    Py_END_ALLOW_THREADS
    return none();
}

static bool is_committed(PyObject *self, const char *what) {
    struct mm_metal_commands *commands = own(self);
    if (atomic_load(&commands->phase) == MM_METAL_COMMITTED) return true;
    PyErr_Format(PyExc_RuntimeError, "%s: the command buffer has not been committed; expected commit() before it", what);
    return false;
}

static PyObject *finished(PyObject *self) {
    struct mm_metal_problem problem;
    return mm_metal_commands_succeeded(own(self), &problem) ? none() : throw_problem(PyExc_RuntimeError, &problem);
}

static PyObject *commands_wait(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"timeout", NULL};
    PyObject *timeout = Py_None;
    uint64_t deadline;
    struct mm_metal_commands *commands = own(self);
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O:wait", names, &timeout) || !deadline_of(timeout, &deadline) ||
        !is_committed(self, "wait"))
        return NULL;
    for (;;) {
        bool done;
        uint64_t until = slice_of(deadline);
        Py_BEGIN_ALLOW_THREADS
        done = mm_metal_completion_wait(commands->completion, until);
        Py_END_ALLOW_THREADS
        if (done) return finished(self);
        if (PyErr_CheckSignals()) return NULL;
        if (mm_metal_clock() >= deadline)
            return PyErr_Format(PyExc_TimeoutError, "the command buffer is %s after %R s; expected it to be completed",
                                mm_metal_commands_status(commands), timeout),
                   NULL;
    }
}

static PyObject *commands_wait_until_completed(PyObject *self, PyObject *unused) {
    (void)unused;
    if (!is_committed(self, "wait_until_completed")) return NULL;
    Py_BEGIN_ALLOW_THREADS
    mm_metal_commands_block(own(self));
    Py_END_ALLOW_THREADS
    return finished(self);
}

static PyObject *commands_times(PyObject *self, PyObject *unused) {
    struct mm_metal_times times;
    (void)unused;
    if (!is_committed(self, "times")) return NULL;
    mm_metal_commands_times(own(self), &times);
    const uint64_t values[] = {
#define X(name) times.name,
        MM_METAL_TIMES(X)
#undef X
    };
    PyObject *result = PyStructSequence_New((PyTypeObject *)state_of(self)->times);
    for (Py_ssize_t i = 0; result && i < (Py_ssize_t)(sizeof values / sizeof *values); i++) {
        PyObject *value = values[i] ? PyLong_FromUnsignedLongLong(values[i]) : none();
        if (value)
            PyStructSequence_SetItem(result, i, value);
        else
            Py_CLEAR(result);
    }
    return result;
}

static PyObject *commands_status(PyObject *self, void *unused) {
    (void)unused;
    return PyUnicode_FromString(mm_metal_commands_status(own(self)));
}

static PyGetSetDef commands_fields[] = {
    {"status", commands_status, NULL, "Metal's word: not enqueued, enqueued, committed, scheduled, completed or error.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef commands_methods[] = {
    {"begin", commands_begin, METH_NOARGS, "begin(): opens a compute encoder, in which dispatches run one after the other."},
    {"dispatch", (PyCFunction)(void (*)(void))commands_dispatch, METH_VARARGS | METH_KEYWORDS,
     "dispatch(pipeline, arguments, grid, group, count=1): encodes `grid` threads in threadgroups of `group`, `count` times. "
     "arguments: a tuple of MetalBuffers, bytes (values) and None (leave what is bound), for buffer(0), buffer(1), ..."},
    {"end", commands_end, METH_NOARGS, "end(): closes the encoder."},
    {"signal", commands_signal, METH_VARARGS, "signal(event, value): raises the event to `value` when the work so far is done."},
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

/* ---- Queue ---- */

static void free_queue(void *made) { mm_metal_queue_free(made); }
static void queue_dealloc(PyObject *self) { destroy(self, free_queue); }

static PyObject *queue_commands(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    struct mm_metal_commands *made;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    made = mm_metal_commands_new(own(self), &problem);
    Py_END_ALLOW_THREADS
    if (!made) return throw_problem(PyExc_RuntimeError, &problem);
    PyObject *result = wrap(state_of(self), MM_METAL_TYPE_COMMANDS, made);
    if (!result) mm_metal_commands_free(made);
    return result;
}

static PyMethodDef queue_methods[] = {
    {"commands", queue_commands, METH_NOARGS,
     "commands() -> MetalCommands: a new command buffer. RuntimeError when as many as the queue's limit have not completed."},
    {NULL, NULL, 0, NULL},
};

/* ---- Device ---- */

static void free_device(void *made) { mm_metal_release(made); }
static void device_dealloc(PyObject *self) { destroy(self, free_device); }

static PyObject *device_pipeline(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"source", "name", NULL};
    const char *source, *name;
    struct mm_metal_problem problem;
    struct mm_metal_pipeline *made;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "ss:pipeline", names, &source, &name)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    made = mm_metal_pipeline_new(own(self), source, name, &problem);
    Py_END_ALLOW_THREADS
    if (!made) return throw_problem(PyExc_RuntimeError, &problem);
    PyObject *result = wrap(state_of(self), MM_METAL_TYPE_PIPELINE, made);
    if (!result) mm_metal_pipeline_free(made);
    return result;
}

static PyObject *device_buffer(PyObject *self, PyObject *value) {
    struct mm_metal_problem problem;
    struct mm_metal_buffer *made;
    struct mm_metal_device_facts facts;
    uint64_t bytes;
    mm_metal_device_describe(own(self), &facts);
    if (!integer_of(value, "nbytes", 1, facts.max_buffer_bytes, &bytes)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    made = mm_metal_buffer_new(own(self), bytes, &problem);
    Py_END_ALLOW_THREADS
    if (!made) return throw_problem(PyExc_MemoryError, &problem);
    PyObject *result = wrap(state_of(self), MM_METAL_TYPE_BUFFER, made);
    if (!result) mm_metal_buffer_free(made);
    return result;
}

static PyObject *device_queue(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"limit", NULL};
    PyObject *value = NULL;
    struct mm_metal_problem problem;
    uint64_t limit = MM_METAL_MAX_IN_FLIGHT;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O:queue", names, &value) ||
        (value && !integer_of(value, "limit", 1, 1024, &limit)))
        return NULL;
    struct mm_metal_queue *made = mm_metal_queue_new(own(self), (int)limit, &problem);
    if (!made) return throw_problem(PyExc_RuntimeError, &problem);
    PyObject *result = wrap(state_of(self), MM_METAL_TYPE_QUEUE, made);
    if (!result) mm_metal_queue_free(made);
    return result;
}

static PyObject *device_event(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    mm_id made = mm_metal_event_new(own(self), &problem);
    if (!made) return throw_problem(PyExc_RuntimeError, &problem);
    PyObject *result = wrap(state_of(self), MM_METAL_TYPE_EVENT, made);
    if (!result) mm_metal_release(made);
    return result;
}

static PyObject *device_field(PyObject *self, void *field) {
    struct mm_metal_device_facts facts;
    mm_metal_device_describe(own(self), &facts);
    switch (*(const char *)field) {
        case 'n': return PyUnicode_DecodeUTF8(facts.name, (Py_ssize_t)strlen(facts.name), "replace");
        case 'u': return PyBool_FromLong(facts.unified_memory);
        case 'w': return PyLong_FromUnsignedLongLong(facts.working_set_bytes);
        case 'b': return PyLong_FromUnsignedLongLong(facts.max_buffer_bytes);
        default: return PyBool_FromLong(mm_metal_is_fake());
    }
}

static PyGetSetDef device_fields[] = {
    {"name", device_field, NULL, "The device's name.", "n"},
    {"unified_memory", device_field, NULL, "Whether CPU and GPU share memory.", "u"},
    {"working_set_bytes", device_field, NULL, "recommendedMaxWorkingSetSize: what it can use without slowing down.", "w"},
    {"max_buffer_bytes", device_field, NULL, "The largest buffer.", "b"},
    {"emulated", device_field, NULL, "True where this is a test's stand-in for Metal: timings mean nothing.", "e"},
    {NULL, NULL, NULL, NULL, NULL},
};
static PyMethodDef device_methods[] = {
    {"pipeline", (PyCFunction)(void (*)(void))device_pipeline, METH_VARARGS | METH_KEYWORDS,
     "pipeline(source, name) -> MetalPipeline: compiles Metal text and makes a pipeline of its kernel `name`. RuntimeError with "
     "the compiler's words."},
    {"buffer", device_buffer, METH_O, "buffer(nbytes) -> MetalBuffer: memory that CPU and GPU share, all zero."},
    {"queue", (PyCFunction)(void (*)(void))device_queue, METH_VARARGS | METH_KEYWORDS,
     "queue(limit=64) -> MetalQueue: a command queue for at most `limit` command buffers that have not completed."},
    {"event", device_event, METH_NOARGS, "event() -> MetalEvent: a shared event, whose value is 0."},
    {NULL, NULL, 0, NULL},
};

/* ---- the module's part ---- */

static PyObject *open_device(PyObject *module, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    mm_id device = mm_metal_device(&problem); /* the GIL stays: loading is for one thread at a time */
    if (!device) return throw_problem(PyExc_RuntimeError, &problem);
    PyObject *result = wrap(PyModule_GetState(module), MM_METAL_TYPE_DEVICE, device);
    if (!result) mm_metal_release(device);
    return result;
}

static PyObject *count_objects(PyObject *module, PyObject *unused) {
    (void)module, (void)unused;
    return PyLong_FromLong(mm_metal_owned());
}

static PyObject *use_fake(PyObject *module, PyObject *path) {
    struct mm_metal_problem problem;
    (void)module;
    if (!mm_metal_unload(&problem)) return throw_problem(PyExc_RuntimeError, &problem);
    if (path == Py_None) return none();
    PyObject *bytes = NULL;
    if (!PyUnicode_FSConverter(path, &bytes)) return NULL;
    bool found = mm_metal_load(PyBytes_AsString(bytes), &problem);
    Py_DECREF(bytes);
    return found ? none() : throw_problem(PyExc_ImportError, &problem);
}

PyMethodDef mm_metal_methods[] = {
    {"metal_device", open_device, METH_NOARGS,
     "metal_device() -> MetalDevice: the default GPU, through Metal itself rather than PyTorch. RuntimeError says why there is none."},
    {"metal_objects", count_objects, METH_NOARGS, "metal_objects() -> int: what this extension holds of Metal's now, handlers that have yet to come included."},
    {"use_metal_fake", use_fake, METH_O,
     "use_metal_fake(path | None): for tests. The library at `path` stands in for Objective-C's runtime and Metal; None ends that. "
     "RuntimeError while Metal objects are held."},
    {NULL, NULL, 0, NULL},
};

/* A slot holds void *; ISO C has no cast from a function to it, so the bits are copied. */
static PyObject *make_type(PyObject *module, const char *name, const char *doc, void (*dealloc)(PyObject *), PyMethodDef *methods,
                           PyGetSetDef *fields) {
    PyType_Slot slots[5] = {{Py_tp_doc, NULL}, {Py_tp_dealloc, NULL}, {0, NULL}, {0, NULL}, {0, NULL}};
    int count = 2;
    memcpy(&slots[0].pfunc, &doc, sizeof doc);
    memcpy(&slots[1].pfunc, &dealloc, sizeof dealloc);
    if (methods) slots[count++] = (PyType_Slot){Py_tp_methods, methods};
    if (fields) slots[count++] = (PyType_Slot){Py_tp_getset, fields};
    PyType_Spec spec = {name, sizeof(struct object), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return PyType_FromModuleAndSpec(module, &spec, NULL);
}

bool mm_metal_add_types(PyObject *module, struct mm_metal_state *state) {
    static PyStructSequence_Field fields[] = {
#define X(name) {#name, NULL},
        MM_METAL_TIMES(X)
#undef X
        {NULL, NULL},
    };
    static PyStructSequence_Desc times = {
        "metal_marlin._C.MetalTimes",
        "Nanoseconds on the clock of time.perf_counter_ns: around commit(), entering each handler, the driver's and the GPU's own "
        "times. None: not known yet.",
        fields, (int)(sizeof fields / sizeof *fields) - 1};
    static const struct {
        const char *name, *doc;
        void (*dealloc)(PyObject *);
        PyMethodDef *methods;
        PyGetSetDef *fields;
    } types[] = {
        {"metal_marlin._C.MetalDevice", "A GPU, through Metal.", device_dealloc, device_methods, device_fields},
        {"metal_marlin._C.MetalPipeline", "A compiled kernel.", pipeline_dealloc, NULL, pipeline_fields},
        {"metal_marlin._C.MetalBuffer", "Memory that CPU and GPU share.", buffer_dealloc, NULL, buffer_fields},
        {"metal_marlin._C.MetalQueue", "A command queue: what is committed to it runs in order.", queue_dealloc, queue_methods, NULL},
        {"metal_marlin._C.MetalCommands", "A command buffer: encode, commit() once, wait().", commands_dealloc, commands_methods,
         commands_fields},
        {"metal_marlin._C.MetalEvent", "A shared event: a number that only grows, and that GPU and CPU can wait for.", event_dealloc,
         event_methods, event_fields},
    };
    for (int i = 0; i < MM_METAL_TYPE_COUNT; i++) {
        PyObject *type = make_type(module, types[i].name, types[i].doc, types[i].dealloc, types[i].methods, types[i].fields);
        state->types[i] = type;
        if (!type || PyModule_AddObjectRef(module, strrchr(types[i].name, '.') + 1, type)) return false;
    }
    state->times = (PyObject *)PyStructSequence_NewType(&times);
    return state->times && !PyModule_AddObjectRef(module, "MetalTimes", state->times) &&
           !PyModule_AddFunctions(module, mm_metal_methods);
}

int mm_metal_visit_types(struct mm_metal_state *state, visitproc visit, void *arg) {
    for (int i = 0; i < MM_METAL_TYPE_COUNT; i++) Py_VISIT(state->types[i]);
    Py_VISIT(state->times);
    return 0;
}

void mm_metal_clear_types(struct mm_metal_state *state) {
    for (int i = 0; i < MM_METAL_TYPE_COUNT; i++) Py_CLEAR(state->types[i]);
    Py_CLEAR(state->times);
}
