/* The Python module metal_marlin._C: finds torch, picks the SIMD level, registers the ops, and hands Python the lists
 * that the C code derives from its X-macros. The ops themselves are reached through torch.ops.metal_marlin; what is
 * Metal's own (metal_queue/types.c) through metal_marlin.metal_queue. */
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "cpu/cpu.h"
#include "memory/python.h"
#include "metal_queue/types.h"
#include "mm.h"
#include "mps/mps.h"
#include "mps/python.h"

static const struct mm_kernels *levels[MM_MAX_CPU_LEVELS];
static int level_count;

static void use_level(const struct mm_kernels *level) {
    level->prepare();
    mm_cpu = level;
}

static PyObject *tuple_of(const char *const *names, int count) {
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple && i < count; i++) {
        PyObject *name = PyUnicode_FromString(names[i]);
        if (!name || PyTuple_SetItem(tuple, i, name)) Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *level_names(void) {
    const char *names[MM_MAX_CPU_LEVELS];
    for (int i = 0; i < level_count; i++) names[i] = levels[i]->name;
    return tuple_of(names, level_count);
}

static bool choose_level(const char *name, const char *source) {
    for (int i = 0; i < level_count; i++)
        if (!strcmp(levels[i]->name, name)) return use_level(levels[i]), true;
    PyObject *names = level_names();
    if (names) PyErr_Format(PyExc_ValueError, "%s is '%s'; this machine runs %S", source, name, names);
    Py_XDECREF(names);
    return false;
}

static PyObject *cpu_level(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return PyUnicode_FromString(mm_cpu->name);
}

static PyObject *cpu_levels(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return level_names();
}

#define X(id, name, ...) name,
static const char *const codebooks[] = {MM_CODEBOOKS(X)};
#undef X

static PyObject *cpu_input_limits(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyObject *limits = PyDict_New();
    for (int i = 0; limits && i < level_count; i++) {
        PyObject *of_level = PyDict_New();
        for (int codebook = 0; of_level && codebook < MM_CODEBOOK_COUNT; codebook++) {
            PyObject *limit = PyLong_FromLong(levels[i]->input_limits[codebook]);
            if (!limit || PyDict_SetItemString(of_level, codebooks[codebook], limit)) Py_CLEAR(of_level);
            Py_XDECREF(limit);
        }
        if (!of_level || PyDict_SetItemString(limits, levels[i]->name, of_level)) Py_CLEAR(limits);
        Py_XDECREF(of_level);
    }
    return limits;
}

static PyObject *set_cpu_level(PyObject *self, PyObject *name) {
    (void)self;
    PyObject *bytes = PyUnicode_Check(name) ? PyUnicode_AsUTF8String(name) : NULL;
    if (!bytes) {
        if (!PyErr_Occurred()) PyErr_Format(PyExc_TypeError, "name is %R; expected a str", name);
        return NULL;
    }
    bool found = choose_level(PyBytes_AsString(bytes), "name");
    Py_DECREF(bytes);
    if (!found) return NULL;
    Py_INCREF(Py_None);
    return Py_None;
}

/* None while the MPS backend is on, else why it is off. */
static const char *mps_missing = "torch has not been looked at";

static PyObject *mps_problem(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    if (mm_mps_device_type() < 0) return PyUnicode_FromFormat("this torch lacks the symbol %s", mps_missing);
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *use_mps_emulator(PyObject *self, PyObject *path) {
    (void)self;
    mm_mps_unload();
    if (path == Py_None) {
        Py_INCREF(Py_None);
        return Py_None;
    }
    PyObject *bytes = NULL;
    if (!PyUnicode_FSConverter(path, &bytes)) return NULL;
    const char *missing = mm_mps_load(NULL, PyBytes_AsString(bytes));
    if (missing) PyErr_Format(PyExc_ImportError, "%S is no emulator of torch's MPS shim: %s", path, missing);
    Py_DECREF(bytes);
    if (missing) return NULL;
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *mps_commit_problem(PyObject *self, PyObject *unused) {
    (void)unused;
    if (mm_mps_device_type() < 0) return mps_problem(self, NULL);
    if (!mm_mps._ZN5torch3mps6commitEv) return PyUnicode_FromString("this torch lacks torch::mps::commit()");
    Py_INCREF(Py_None);
    return Py_None;
}

static PyObject *mps_commit(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    PyThreadState *released = PyEval_SaveThread(); /* the stream's queue may be busy with a block of a thread that needs it */
    const char *message = mm_mps_commit();
    PyEval_RestoreThread(released);
    if (message) return PyErr_Format(PyExc_RuntimeError, "mps_commit: %s", message);
    Py_INCREF(Py_None);
    return Py_None;
}

static PyMethodDef methods[] = {
    {"mps_problem", mps_problem, METH_NOARGS, "mps_problem() -> str | None: why the MPS backend is off, None if it is on."},
    {"mps_commit", mps_commit, METH_NOARGS,
     "mps_commit(): hands what torch has encoded on its MPS stream to the GPU, without waiting for it. For measuring: torch "
     "commits by itself. RuntimeError where mps_commit_problem() says why not."},
    {"mps_commit_problem", mps_commit_problem, METH_NOARGS,
     "mps_commit_problem() -> str | None: why mps_commit() does not work here, None if it does."},
    {"use_mps_emulator", use_mps_emulator, METH_O,
     "use_mps_emulator(path | None): for tests. CPU tensors go to the MPS backend, whose shim is the library at `path`; None "
     "ends that. Kernels run asynchronously: synchronize the emulator before reading results."},
    {"cpu_level", cpu_level, METH_NOARGS, "cpu_level() -> str: the SIMD level in use."},
    {"cpu_levels", cpu_levels, METH_NOARGS, "cpu_levels() -> tuple[str, ...]: what this machine runs, the default last."},
    {"cpu_input_limits", cpu_input_limits, METH_NOARGS,
     "cpu_input_limits() -> dict[str, dict[str, int]]: of each level and codebook, 0 if it multiplies with the format's weights to the "
     "bit and float32 inputs. Else it leaves out the weights' rounding to binary16, and below 2**24, which stands for float32 inputs, "
     "inputs are rounded to integers of at most this in a block of 128, and 3inst's and mcg's weights to multiples of 2**-12."},
    {"set_cpu_level", set_cpu_level, METH_O,
     "set_cpu_level(name): switch the SIMD level for calls that start from now on. ValueError for one that this "
     "machine does not run."},
    {NULL, NULL, 0, NULL},
};

/* The torch library of this process: next to torch's Python files, where its wheels put it. */
static PyObject *torch_library_path(PyObject *torch) {
#ifdef __APPLE__
    const char *format = "%U/lib/libtorch_cpu.dylib";
#else
    const char *format = "%U/lib/libtorch_cpu.so";
#endif
    PyObject *paths = PyObject_GetAttrString(torch, "__path__");
    PyObject *folder = paths ? PySequence_GetItem(paths, 0) : NULL;
    PyObject *path = folder && PyUnicode_Check(folder) ? PyUnicode_FromFormat(format, folder) : NULL;
    PyObject *bytes = path ? PyUnicode_EncodeFSDefault(path) : NULL;
    Py_XDECREF(path);
    Py_XDECREF(folder);
    Py_XDECREF(paths);
    return bytes;
}

static bool load_torch(void) {
    PyObject *torch = PyImport_ImportModule("torch");
    if (!torch) return false;
    PyObject *path = torch_library_path(torch);
    if (!path) PyErr_Clear(); /* no such folder: search the process */
    const char *version = NULL, *missing = mm_torch_load(path ? PyBytes_AsString(path) : NULL, &version);
    if (!missing) mps_missing = mm_mps_load(path ? PyBytes_AsString(path) : NULL, NULL);
    Py_XDECREF(path);
    if (missing) {
        PyObject *have = PyObject_GetAttrString(torch, "__version__");
        if (!have) PyErr_Clear();
        PyErr_Format(PyExc_ImportError,
                     "metal_marlin needs torch >= " MM_TORCH_MIN_VERSION
                     ": this torch (%S) lacks the symbol %s, which came with torch %s",
                     have ? have : Py_None, missing, version);
        Py_XDECREF(have);
    }
    Py_DECREF(torch);
    return !missing;
}

static bool pick_level(void) {
    level_count = mm_cpu_levels(levels);
    const char *wanted = getenv("METAL_MARLIN_CPU");
    if (wanted && *wanted) return choose_level(wanted, "METAL_MARLIN_CPU");
    use_level(levels[level_count - 1]);
    return true;
}

static bool add(PyObject *module, const char *name, PyObject *value) {
    bool added = value && !PyModule_AddObjectRef(module, name, value);
    Py_XDECREF(value);
    return added;
}

static bool append(PyObject *list, PyObject *value) {
    bool appended = value && !PyList_Append(list, value);
    Py_XDECREF(value);
    return appended;
}

static PyObject *rates_of(bool half_rates) {
    PyObject *rates = PyList_New(0);
    for (int rate2 = MM_MIN_RATE2; rates && rate2 <= MM_MAX_RATE2; rate2++)
        if (rate2 % 2 == 0 || (half_rates && rate2 <= MM_MAX_HALF_RATE2))
            if (!append(rates, PyLong_FromLong(rate2))) Py_CLEAR(rates);
    PyObject *tuple = rates ? PyList_AsTuple(rates) : NULL;
    Py_XDECREF(rates);
    return tuple;
}

static bool set(PyObject *dict, const char *key, PyObject *value) {
    bool done = value && !PyDict_SetItemString(dict, key, value);
    Py_XDECREF(value);
    return done;
}

static bool add_codebooks(PyObject *module) {
    PyObject *multipliers = PyDict_New(), *rates = PyDict_New();
    bool done = multipliers && rates;
#define X(id, name, multiplier, addend, half_rates)                                 \
    done = done && set(multipliers, name, PyLong_FromUnsignedLong(multiplier)) && \
           set(rates, name, rates_of(half_rates));
    MM_CODEBOOKS(X)
#undef X
    done = done && !PyModule_AddObjectRef(module, "MULTIPLIERS", multipliers) &&
           !PyModule_AddObjectRef(module, "RATES2", rates);
    Py_XDECREF(multipliers);
    Py_XDECREF(rates);
    return done;
}

static bool add_lists(PyObject *module) {
#define X(id, name, ...) name,
    static const char *const activations[] = {MM_ACTIVATIONS(X)};
    static const char *const routers[] = {MM_ROUTERS(X)};
#undef X
    return add(module, "CODEBOOKS", tuple_of(codebooks, MM_CODEBOOK_COUNT)) &&
           add(module, "ACTIVATIONS", tuple_of(activations, MM_ACTIVATION_COUNT)) &&
           add(module, "ROUTERS", tuple_of(routers, MM_ROUTER_COUNT)) && add_codebooks(module);
}

static int execute(PyObject *module) {
    static bool registered; /* ops belong to the process, not to the module object */
    if (!registered) {
        const char *message = NULL;
        if (!load_torch() || !pick_level()) return -1;
        if (!mm_ops_register(&message)) {
            PyErr_Format(PyExc_ImportError, "metal_marlin could not register its ops: %s", message);
            return -1;
        }
        registered = true;
    }
    return add_lists(module) && !PyModule_AddFunctions(module, mm_memory_methods) &&
                   !PyModule_AddFunctions(module, mm_mps_methods) && mm_metal_add_types(module, PyModule_GetState(module)) &&
                   !PyModule_AddIntConstant(module, "MAX_EXPERTS", MM_MAX_EXPERTS) &&
                   !PyModule_AddIntConstant(module, "MAX_TOP_K", MM_MAX_TOP_K) &&
                   !PyModule_AddIntConstant(module, "NO_EXPERT", MM_NO_EXPERT) &&
                   !PyModule_AddIntConstant(module, "HADAMARD", MM_HADAMARD) &&
                   !PyModule_AddIntConstant(module, "TILE", MM_TILE)
               ? 0
               : -1;
}

static int traverse(PyObject *module, visitproc visit, void *arg) {
    struct mm_metal_state *state = PyModule_GetState(module);
    return state ? mm_metal_visit_types(state, visit, arg) : 0;
}

static int clear(PyObject *module) {
    struct mm_metal_state *state = PyModule_GetState(module);
    if (state) mm_metal_clear_types(state);
    return 0;
}

static void destroy(void *module) { clear(module); }

static PyModuleDef_Slot slots[] = {{Py_mod_exec, NULL}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "metal_marlin._C",
    .m_doc = "C half of metal_marlin: registers torch.ops.metal_marlin and lists what the kernels know.",
    .m_size = sizeof(struct mm_metal_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = traverse,
    .m_clear = clear,
    .m_free = destroy,
};

PyMODINIT_FUNC PyInit__C(void) {
    /* A slot holds void *; ISO C has no cast from a function to it, so copy the bits. */
    int (*exec)(PyObject *) = execute;
    memcpy(&slots[0].value, &exec, sizeof exec);
    return PyModuleDef_Init(&definition);
}
