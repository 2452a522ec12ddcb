/* The functions of mps/window.h for Python: metal_marlin/mps_mapped.py calls them, nobody else. */
#ifndef MM_MPS_PYTHON_H
#define MM_MPS_PYTHON_H

#include <Python.h>

extern PyMethodDef mm_mps_methods[];

#endif
