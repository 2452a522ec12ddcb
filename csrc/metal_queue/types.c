/* Python's view of metal_queue/queue.h: the types but for MetalCommands, and the module's part. The GIL is released wherever Metal
 * may wait. Instances come from a MetalDevice only and own one object each; there is no closing, so no use after it. */
#include "metal_queue/types.h"

#include <string.h>

#include "metal_queue/python.h"

/* ---- Pipeline ---- */

static void free_pipeline(void *made) { mm_metal_pipeline_free(made); }
static void pipeline_dealloc(PyObject *self) { mm_python_destroy(self, free_pipeline); }

static PyObject *pipeline_max_threads(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((struct mm_metal_pipeline *)mm_python_own(self))->max_threads);
}

static PyObject *pipeline_simd_width(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((struct mm_metal_pipeline *)mm_python_own(self))->simd_width);
}

static PyGetSetDef pipeline_fields[] = {
    {"max_threads", pipeline_max_threads, NULL, "Most threads of a threadgroup, for this kernel's registers.", NULL},
    {"simd_width", pipeline_simd_width, NULL, "Threads of a simdgroup.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- Buffer ---- */

static void free_buffer(void *made) { mm_metal_buffer_free(made); }
static void buffer_dealloc(PyObject *self) { mm_python_destroy(self, free_buffer); }

static PyObject *buffer_nbytes(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(((struct mm_metal_buffer *)mm_python_own(self))->bytes);
}

static PyObject *buffer_address(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromVoidPtr(((struct mm_metal_buffer *)mm_python_own(self))->contents);
}

static PyGetSetDef buffer_fields[] = {
    {"nbytes", buffer_nbytes, NULL, "Bytes of the buffer.", NULL},
    {"address", buffer_address, NULL, "Where its memory is, as long as this object lives. metal_queue.view() is safer.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

/* ---- Event ---- */

static void free_event(void *made) { mm_metal_release(made); }
static void event_dealloc(PyObject *self) { mm_python_destroy(self, free_event); }

static PyObject *event_value(PyObject *self, void *unused) {
    (void)unused;
    return PyLong_FromUnsignedLongLong(mm_metal_event_value(mm_python_own(self)));
}

static int event_set_value(PyObject *self, PyObject *value, void *unused) {
    uint64_t number;
    (void)unused;
    if (!value) return PyErr_SetString(PyExc_AttributeError, "value cannot be deleted"), -1;
    if (!mm_python_integer(value, "value", 0, UINT64_MAX, &number)) return -1;
    mm_metal_event_set(mm_python_own(self), number);
    return 0;
}

static PyObject *event_wait(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"value", "timeout", NULL};
    PyObject *value, *timeout = Py_None;
    uint64_t wanted, deadline;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "O|O:wait", names, &value, &timeout) ||
        !mm_python_integer(value, "value", 0, UINT64_MAX, &wanted) || !mm_python_deadline(timeout, &deadline))
        return NULL;
    for (;;) {
        enum mm_metal_waited waited;
        uint64_t now = mm_metal_clock(), until = mm_python_slice(deadline);
        Py_BEGIN_ALLOW_THREADS
        waited = mm_metal_event_wait(mm_python_own(self), wanted, until > now ? (until - now + 999999u) / 1000000u : 0);
        Py_END_ALLOW_THREADS
        if (waited == MM_METAL_REACHED) return mm_python_none();
        if (waited == MM_METAL_CANNOT_WAIT)
            return PyErr_Format(PyExc_RuntimeError, "waiting for an event's value came with macOS 12; this system lacks it");
        if (PyErr_CheckSignals()) return NULL;
        if (mm_metal_clock() >= deadline)
            return PyErr_Format(PyExc_TimeoutError, "the event's value is %llu after %R s; expected %llu or more",
                                (unsigned long long)mm_metal_event_value(mm_python_own(self)), timeout,
                                (unsigned long long)wanted);
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

/* ---- Queue ---- */

static void free_queue(void *made) { mm_metal_queue_free(made); }
static void queue_dealloc(PyObject *self) { mm_python_destroy(self, free_queue); }

static PyObject *queue_commands(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    struct mm_metal_commands *made;
    (void)unused;
    Py_BEGIN_ALLOW_THREADS
    made = mm_metal_commands_new(mm_python_own(self), &problem);
    Py_END_ALLOW_THREADS
    if (!made) return mm_python_raise(PyExc_RuntimeError, &problem);
    PyObject *result = mm_python_wrap(mm_python_state(self), MM_METAL_TYPE_COMMANDS, made);
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
static void device_dealloc(PyObject *self) { mm_python_destroy(self, free_device); }

static PyObject *device_pipeline(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"source", "name", NULL};
    const char *source, *name;
    struct mm_metal_problem problem;
    struct mm_metal_pipeline *made;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "ss:pipeline", names, &source, &name)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    made = mm_metal_pipeline_new(mm_python_own(self), source, name, &problem);
    Py_END_ALLOW_THREADS
    if (!made) return mm_python_raise(PyExc_RuntimeError, &problem);
    PyObject *result = mm_python_wrap(mm_python_state(self), MM_METAL_TYPE_PIPELINE, made);
    if (!result) mm_metal_pipeline_free(made);
    return result;
}

static PyObject *device_buffer(PyObject *self, PyObject *value) {
    struct mm_metal_problem problem;
    struct mm_metal_buffer *made;
    struct mm_metal_device_facts facts;
    uint64_t bytes;
    mm_metal_device_describe(mm_python_own(self), &facts);
    if (!mm_python_integer(value, "nbytes", 1, facts.max_buffer_bytes, &bytes)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    made = mm_metal_buffer_new(mm_python_own(self), bytes, &problem);
    Py_END_ALLOW_THREADS
    if (!made) return mm_python_raise(PyExc_MemoryError, &problem);
    PyObject *result = mm_python_wrap(mm_python_state(self), MM_METAL_TYPE_BUFFER, made);
    if (!result) mm_metal_buffer_free(made);
    return result;
}

static PyObject *device_queue(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"limit", NULL};
    PyObject *value = NULL;
    struct mm_metal_problem problem;
    uint64_t limit = MM_METAL_MAX_IN_FLIGHT;
    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|O:queue", names, &value) ||
        (value && !mm_python_integer(value, "limit", 1, 1024, &limit)))
        return NULL;
    struct mm_metal_queue *made = mm_metal_queue_new(mm_python_own(self), (int)limit, &problem);
    if (!made) return mm_python_raise(PyExc_RuntimeError, &problem);
    PyObject *result = mm_python_wrap(mm_python_state(self), MM_METAL_TYPE_QUEUE, made);
    if (!result) mm_metal_queue_free(made);
    return result;
}

static PyObject *device_event(PyObject *self, PyObject *unused) {
    struct mm_metal_problem problem;
    (void)unused;
    mm_id made = mm_metal_event_new(mm_python_own(self), &problem);
    if (!made) return mm_python_raise(PyExc_RuntimeError, &problem);
    PyObject *result = mm_python_wrap(mm_python_state(self), MM_METAL_TYPE_EVENT, made);
    if (!result) mm_metal_release(made);
    return result;
}

static PyObject *device_field(PyObject *self, void *field) {
    struct mm_metal_device_facts facts;
    mm_metal_device_describe(mm_python_own(self), &facts);
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
     "pipeline(source, name) -> MetalPipeline: compiles Metal text and makes a pipeline of its kernel `name`. RuntimeError "
     "with the compiler's words."},
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
    if (!device) return mm_python_raise(PyExc_RuntimeError, &problem);
    PyObject *result = mm_python_wrap(PyModule_GetState(module), MM_METAL_TYPE_DEVICE, device);
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
    if (!mm_metal_unload(&problem)) return mm_python_raise(PyExc_RuntimeError, &problem);
    if (path == Py_None) return mm_python_none();
    PyObject *bytes = NULL;
    if (!PyUnicode_FSConverter(path, &bytes)) return NULL;
    bool found = mm_metal_load(PyBytes_AsString(bytes), &problem);
    Py_DECREF(bytes);
    return found ? mm_python_none() : mm_python_raise(PyExc_ImportError, &problem);
}

PyMethodDef mm_metal_methods[] = {
    {"metal_device", open_device, METH_NOARGS,
     "metal_device() -> MetalDevice: the default GPU, through Metal itself rather than PyTorch. RuntimeError says why there is "
     "none."},
    {"metal_objects", count_objects, METH_NOARGS,
     "metal_objects() -> int: what this extension holds of Metal's now, handlers that have yet to come included."},
    {"use_metal_fake", use_fake, METH_O,
     "use_metal_fake(path | None): for tests. The library at `path` stands in for Objective-C's runtime and Metal; None ends "
     "that. RuntimeError while Metal objects are held."},
    {NULL, NULL, 0, NULL},
};

/* A slot holds void *; ISO C has no cast from a function to it, so the bits are copied. */
static PyObject *make_type(PyObject *module, const char *name, const char *doc, void (*dealloc)(PyObject *),
                           PyMethodDef *methods, PyGetSetDef *fields) {
    PyType_Slot slots[5] = {{Py_tp_doc, NULL}, {Py_tp_dealloc, NULL}, {0, NULL}, {0, NULL}, {0, NULL}};
    int count = 2;
    memcpy(&slots[0].pfunc, &doc, sizeof doc);
    memcpy(&slots[1].pfunc, &dealloc, sizeof dealloc);
    if (methods) slots[count++] = (PyType_Slot){Py_tp_methods, methods};
    if (fields) slots[count++] = (PyType_Slot){Py_tp_getset, fields};
    const unsigned flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION;
    PyType_Spec spec = {name, sizeof(struct mm_python_object), 0, flags, slots};
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
        "Nanoseconds on the clock of time.perf_counter_ns: around commit(), entering each handler, the driver's and the GPU's "
        "own times. None: not known yet.",
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
        {"metal_marlin._C.MetalQueue", "A command queue: what is committed to it runs in order.", queue_dealloc, queue_methods,
         NULL},
        {"metal_marlin._C.MetalCommands", "A command buffer: encode, commit() once, wait().", mm_python_commands_dealloc,
         mm_python_commands_methods, mm_python_commands_fields},
        {"metal_marlin._C.MetalEvent", "A shared event: a number that only grows, and that GPU and CPU can wait for.",
         event_dealloc, event_methods, event_fields},
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
