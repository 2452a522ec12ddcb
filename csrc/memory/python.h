/* The functions of memory/ for Python: metal_marlin/mapping.py and cached.py call them, nobody else. */
#ifndef MM_MEMORY_PYTHON_H
#define MM_MEMORY_PYTHON_H

#include <Python.h>

#define MM_MAP_CAPSULE "metal_marlin.map" /* of map_open: a struct mm_map */

extern PyMethodDef mm_memory_methods[];

#endif
