/* What memory.h offers, as functions over capsules: _C.map_* and _C.cache_*. Errors are OSError for files, TimeoutError for a read
 * that does not end. */
#include "memory/python.h"

#include <stdlib.h>
#include <string.h>

#include "memory/memory.h"

#define MAP_NAME MM_MAP_CAPSULE
#define CACHE_NAME "metal_marlin.cache"
#define MOST_ITEMS 4096

static PyObject *raise_problem(const struct mm_memory_problem *problem) {
    PyErr_SetString(problem->timeout ? PyExc_TimeoutError : PyExc_OSError, problem->text);
    return NULL;
}

static PyObject *none(void) {
    Py_INCREF(Py_None);
    return Py_None;
}

/* Paths as C strings, which live as long as *kept does. Free the array. */
static const char **paths_of(PyObject *paths, Py_ssize_t *count, PyObject **kept) {
    *count = PySequence_Size(paths);
    *kept = *count < 0 ? NULL : PyList_New(0);
    const char **texts = *kept ? calloc((size_t)*count + 1, sizeof *texts) : NULL;
    for (Py_ssize_t i = 0; texts && i < *count; i++) {
        PyObject *path = PySequence_GetItem(paths, i), *bytes = NULL;
        bool good = path && PyUnicode_FSConverter(path, &bytes) && !PyList_Append(*kept, bytes);
        if (good) texts[i] = PyBytes_AsString(bytes);
        Py_XDECREF(path);
        Py_XDECREF(bytes);
        if (!good) {
            free(texts);
            texts = NULL;
        }
    }
    if (!texts) {
        if (!PyErr_Occurred()) PyErr_NoMemory();
        Py_CLEAR(*kept);
    }
    return texts;
}

/* ---- map_* ---- */

static void close_map(PyObject *capsule) { mm_map_close(PyCapsule_GetPointer(capsule, MAP_NAME)); }

static PyObject *map_open(PyObject *self, PyObject *paths) {
    (void)self;
    Py_ssize_t count = 0;
    PyObject *kept = NULL, *begins = NULL, *capsule = NULL, *result = NULL;
    const char **texts = paths_of(paths, &count, &kept);
    size_t *offsets = texts ? calloc((size_t)count + 1, sizeof *offsets) : NULL;
    if (offsets) {
        struct mm_memory_problem problem = {.timeout = false};
        struct mm_map *map = mm_map_open(texts, (int)count, offsets, &problem);
        if (!map) raise_problem(&problem);
        capsule = map ? PyCapsule_New(map, MAP_NAME, close_map) : NULL;
        if (map && !capsule) mm_map_close(map);
        begins = capsule ? PyTuple_New(count) : NULL;
        for (Py_ssize_t i = 0; begins && i < count; i++) {
            PyObject *begin = PyLong_FromSize_t(offsets[i]);
            if (!begin || PyTuple_SetItem(begins, i, begin)) Py_CLEAR(begins);
        }
        if (begins) result = Py_BuildValue("ONNO", capsule, PyLong_FromVoidPtr(mm_map_base(map)), PyLong_FromSize_t(mm_map_bytes(map)), begins);
    } else if (!PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    Py_XDECREF(begins);
    Py_XDECREF(capsule);
    Py_XDECREF(kept);
    free(offsets);
    free(texts);
    return result;
}

static PyObject *map_check(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *capsule;
    Py_ssize_t begin = 0, bytes = -1;
    if (!PyArg_ParseTuple(arguments, "O|nn:map_check", &capsule, &begin, &bytes)) return NULL;
    const struct mm_map *map = PyCapsule_GetPointer(capsule, MAP_NAME);
    struct mm_memory_problem problem = {.timeout = false};
    if (!map) return NULL;
    if (bytes < 0) return mm_map_same(map, &problem) ? none() : raise_problem(&problem);
    if (begin < 0 || (size_t)begin > mm_map_bytes(map) || (size_t)bytes > mm_map_bytes(map) - (size_t)begin)
        return PyErr_Format(PyExc_ValueError, "%zd bytes at %zd of a mapping of %zu", bytes, begin, mm_map_bytes(map));
    struct mm_span span = {(const char *)mm_map_base(map) + begin, (size_t)bytes};
    return mm_maps_same(&span, 1, &problem) ? none() : raise_problem(&problem);
}

static PyObject *map_populate(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *capsule;
    Py_ssize_t begin, bytes;
    if (!PyArg_ParseTuple(arguments, "Onn:map_populate", &capsule, &begin, &bytes)) return NULL;
    const struct mm_map *map = PyCapsule_GetPointer(capsule, MAP_NAME);
    if (!map) return NULL;
    if (begin < 0 || bytes < 0) return PyErr_Format(PyExc_ValueError, "begin is %zd, bytes is %zd; expected 0 or more", begin, bytes);
    struct mm_memory_problem problem = {.timeout = false};
    PyThreadState *released = PyEval_SaveThread();
    bool good = mm_map_populate(map, (size_t)begin, (size_t)bytes, &problem);
    PyEval_RestoreThread(released);
    return good ? none() : raise_problem(&problem);
}

/* ---- cache_* ---- */

static void close_cache(PyObject *capsule) {
    struct mm_cache *cache = PyCapsule_GetPointer(capsule, CACHE_NAME);
    PyThreadState *released = PyEval_SaveThread(); /* a reader may be within a read */
    mm_cache_close(cache);
    PyEval_RestoreThread(released);
}

static bool integers_of(PyObject *values, int64_t *out, Py_ssize_t most, Py_ssize_t *count) {
    *count = PySequence_Size(values);
    if (*count < 0) return false;
    if (*count > most) return PyErr_Format(PyExc_ValueError, "%zd items; expected at most %zd", *count, most), false;
    for (Py_ssize_t i = 0; i < *count; i++) {
        PyObject *value = PySequence_GetItem(values, i);
        out[i] = value ? PyLong_AsLongLong(value) : -1;
        Py_XDECREF(value);
        if (PyErr_Occurred()) return false;
    }
    return true;
}

static PyObject *cache_open(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *paths, *pieces, *kept = NULL, *result = NULL;
    long long items, slots, slot_bytes;
    struct mm_cache_options options = {0};
    if (!PyArg_ParseTuple(arguments, "OSLLLidd:cache_open", &paths, &pieces, &items, &slots, &slot_bytes, &options.readers, &options.half_life,
                          &options.bytes_per_second))
        return NULL;
    Py_ssize_t count = 0, size = PyBytes_Size(pieces);
    if (size % (Py_ssize_t)sizeof(struct mm_piece))
        return PyErr_Format(PyExc_ValueError, "pieces has %zd bytes; expected int64 [pieces, 5]", size);
    const char **texts = paths_of(paths, &count, &kept);
    struct mm_piece *copied = texts ? malloc((size_t)size + 1) : NULL;
    if (copied) {
        memcpy(copied, PyBytes_AsString(pieces), (size_t)size);
        options.paths = texts;
        options.files = (int)count;
        options.pieces = copied;
        options.piece_count = size / (Py_ssize_t)sizeof *copied;
        options.items = items;
        options.slots = slots;
        options.slot_bytes = slot_bytes;
        struct mm_memory_problem problem = {.timeout = false};
        struct mm_cache *cache = mm_cache_open(&options, &problem);
        if (!cache) raise_problem(&problem);
        PyObject *capsule = cache ? PyCapsule_New(cache, CACHE_NAME, close_cache) : NULL;
        if (cache && !capsule) mm_cache_close(cache);
        if (capsule) result = Py_BuildValue("NN", capsule, PyLong_FromVoidPtr(mm_cache_base(cache)));
    } else if (!PyErr_Occurred()) {
        PyErr_NoMemory();
    }
    Py_XDECREF(kept);
    free(copied);
    free(texts);
    return result;
}

/* Whether a signal's handler has raised something, such as Ctrl-C. context: where the thread's state is while it is without the GIL. */
static bool signalled(void *context) {
    PyThreadState **released = context;
    PyEval_RestoreThread(*released);
    bool raised = PyErr_CheckSignals() != 0;
    *released = PyEval_SaveThread();
    return raised;
}

static PyObject *cache_acquire(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *capsule, *values;
    PyThreadState *released;
    struct mm_patience patience = {.interrupted = signalled, .context = &released};
    int64_t items[MOST_ITEMS], found[MOST_ITEMS];
    Py_ssize_t count = 0;
    if (!PyArg_ParseTuple(arguments, "OOd:cache_acquire", &capsule, &values, &patience.seconds)) return NULL;
    struct mm_cache *cache = PyCapsule_GetPointer(capsule, CACHE_NAME);
    if (!cache || !integers_of(values, items, MOST_ITEMS, &count)) return NULL;
    struct mm_memory_problem problem = {.timeout = false};
    released = PyEval_SaveThread();
    bool good = mm_cache_acquire(cache, items, count, found, &patience, &problem);
    PyEval_RestoreThread(released);
    if (!good) return problem.interrupted ? NULL : raise_problem(&problem);
    if (PyErr_CheckSignals()) { /* a Ctrl-C of meanwhile: raised behind our back it would leave the pins to nobody */
        mm_cache_release(cache, items, count, &problem);
        return NULL;
    }
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; i++) {
        PyObject *slot = PyLong_FromLongLong(found[i]);
        if (!slot || PyList_SetItem(list, i, slot)) Py_CLEAR(list);
    }
    if (!list) mm_cache_release(cache, items, count, &problem);
    return list;
}

static PyObject *cache_release(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *capsule, *values;
    int64_t items[MOST_ITEMS];
    Py_ssize_t count = 0;
    if (!PyArg_ParseTuple(arguments, "OO:cache_release", &capsule, &values)) return NULL;
    struct mm_cache *cache = PyCapsule_GetPointer(capsule, CACHE_NAME);
    if (!cache || !integers_of(values, items, MOST_ITEMS, &count)) return NULL;
    struct mm_memory_problem problem;
    if (mm_cache_release(cache, items, count, &problem)) return none();
    PyErr_SetString(PyExc_ValueError, problem.text);
    return NULL;
}

static PyObject *cache_prefetch(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *capsule, *values;
    int64_t items[MOST_ITEMS];
    Py_ssize_t count = 0;
    if (!PyArg_ParseTuple(arguments, "OO:cache_prefetch", &capsule, &values)) return NULL;
    struct mm_cache *cache = PyCapsule_GetPointer(capsule, CACHE_NAME);
    if (!cache || !integers_of(values, items, MOST_ITEMS, &count)) return NULL;
    return PyLong_FromLongLong(mm_cache_prefetch(cache, items, count));
}

static PyObject *cache_statistics(PyObject *self, PyObject *arguments) {
    (void)self;
    PyObject *capsule;
    int reset = 0;
    if (!PyArg_ParseTuple(arguments, "Op:cache_statistics", &capsule, &reset)) return NULL;
    struct mm_cache *cache = PyCapsule_GetPointer(capsule, CACHE_NAME);
    if (!cache) return NULL;
    struct mm_cache_statistics s = mm_cache_statistics(cache, reset != 0);
    int64_t slots[5];
    mm_cache_slots(cache, slots);
#define N(value) (long long)(value)
    return Py_BuildValue("{sLsLsLsLsLsLsLsLsLsLsLsLsLsL}", "hits", N(s.hits), "late", N(s.late), "misses", N(s.misses), "prefetched",
                         N(s.prefetched), "useful", N(s.useful), "evictions", N(s.evictions), "reads", N(s.reads), "bytes", N(s.bytes),
                         "failures", N(s.failures), "stalls", N(s.stalls), "stall_ns", N(s.stall_ns), "pending", N(slots[1] + slots[2]),
                         "filled", N(slots[3]), "pinned", N(slots[4]));
#undef N
}

PyMethodDef mm_memory_methods[] = {
    {"map_open", map_open, METH_O,
     "map_open(paths) -> (map, address, bytes, begins): maps files one behind the other, privately; begins are where each lies. OSError."},
    {"map_check", map_check, METH_VARARGS,
     "map_check(map, begin=0, bytes=-1): OSError if a file, of those in a range of bytes if one is given, has changed since map_open, or "
     "if something that it lacks was read."},
    {"map_populate", map_populate, METH_VARARGS, "map_populate(map, begin, bytes): reads a range into memory. OSError."},
    {"cache_open", cache_open, METH_VARARGS,
     "cache_open(paths, pieces, items, slots, slot_bytes, readers, half_life, bytes_per_second) -> (cache, address): pieces is int64 "
     "[pieces, 5], native: item, file, begin, bytes, place in the slot; sorted by item. bytes_per_second 0: no simulated disk. OSError."},
    {"cache_acquire", cache_acquire, METH_VARARGS,
     "cache_acquire(cache, items, seconds) -> list of slots: pins distinct items and waits for them. OSError; TimeoutError; what a "
     "signal's handler raises meanwhile, such as KeyboardInterrupt. Then none is pinned."},
    {"cache_release", cache_release, METH_VARARGS, "cache_release(cache, items): unpins. ValueError: one isn't pinned."},
    {"cache_prefetch", cache_prefetch, METH_VARARGS, "cache_prefetch(cache, items) -> int: how many were taken to be read ahead."},
    {"cache_statistics", cache_statistics, METH_VARARGS, "cache_statistics(cache, reset) -> dict of counts."},
    {NULL, NULL, 0, NULL},
};
