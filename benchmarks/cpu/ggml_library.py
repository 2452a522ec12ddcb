"""ggml's C functions through ctypes: of ik_llama.cpp's one library or of the two that llama-cpp-python brings.

Owns signatures, the numbers of the types, and where the two differ. No compiler is needed once a library is there.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cpu.contender import Absent
from benchmarks.cpu.shapes import Array

IK_VARIABLE = "METAL_MARLIN_IK_GGML"
SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
F32, I32 = 0, 26
TYPES = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q8_0": 8, "IQ2_XXS": 16, "IQ3_XXS": 18, "IQ4_XS": 23, "BF16": 30}
IK_TYPES = {
    "IQ2_KT": 153, "IQ3_KT": 154, "IQ4_KT": 155, "IQ2_KS": 145, "IQ3_KS": 156, "IQ4_KS": 144,
    "Q2_K_R4": 210, "Q3_K_R4": 211, "Q4_K_R4": 212, "IQ4_KS_R4": 344, "Q8_K_R8": 399,
}  # fmt: skip
SILU = 10  # enum ggml_unary_op of ik_llama.cpp

P, I64, SIZE, INT = c.c_void_p, c.c_int64, c.c_size_t, c.c_int


class InitParams(c.Structure):
    """struct ggml_init_params."""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", c.c_bool))


COMMON: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "ggml_init": (P, InitParams),
    "ggml_free": (None, P),
    "ggml_new_tensor_2d": (P, P, INT, I64, I64),
    "ggml_new_tensor_3d": (P, P, INT, I64, I64, I64),
    "ggml_mul_mat": (P, P, P, P),
    "ggml_mul_mat_id": (P, P, P, P, P),
    "ggml_mul": (P, P, P, P),
    "ggml_add": (P, P, P, P),
    "ggml_reshape_3d": (P, P, P, I64, I64, I64),
    "ggml_view_2d": (P, P, P, I64, I64, SIZE, SIZE),
    "ggml_nbytes": (SIZE, P),
    "ggml_row_size": (SIZE, INT, I64),
    "ggml_new_graph": (P, P),
    "ggml_build_forward_expand": (None, P, P),
    "ggml_set_input": (None, P),
    "ggml_set_output": (None, P),
    "ggml_type_name": (c.c_char_p, INT),
    "ggml_backend_cpu_init": (P,),
    "ggml_backend_cpu_set_n_threads": (None, P, INT),
    "ggml_backend_free": (None, P),
    "ggml_backend_graph_compute": (INT, P, P),
    "ggml_backend_cpu_buffer_type": (P,),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, P, P),
    "ggml_backend_buffer_free": (None, P),
    "ggml_backend_tensor_set": (None, P, P, SIZE, SIZE),
    "ggml_backend_tensor_get": (None, P, P, SIZE, SIZE),
    "ggml_gallocr_new": (P, P),
    "ggml_gallocr_free": (None, P),
    "ggml_gallocr_alloc_graph": (c.c_bool, P, P),
}
DEQUANTIZED = ("Q2_K", "Q3_K", "Q4_K")
COMMON |= {f"dequantize_row_{kind[0].lower()}{kind[1:]}": (None, P, P, I64) for kind in DEQUANTIZED}
QUANTIZE = (SIZE, INT, P, P, I64, I64, I64, P)
ONLY_IK: dict[str, tuple[Any, ...]] = {
    "ggml_moe_up_gate": (P, P, P, P, P, P, INT),
    "ggml_mul_multi_add": (P, P, P, P),
    "ggml_quantize_chunk": (*QUANTIZE, P),  # one more argument, for the user's own data
}
ONLY_MAINLINE: dict[str, tuple[Any, ...]] = {
    "ggml_swiglu_split": (P, P, P, P),
    "ggml_quantize_chunk": QUANTIZE,
    "ggml_cpu_init": (None,),
    "ggml_backend_cpu_reg": (P,),
    "ggml_backend_reg_dev_get": (P, P, SIZE),
    "ggml_backend_dev_supports_op": (c.c_bool, P, P),
    "ggml_backend_reg_get_proc_address": (P, P, c.c_char_p),
    "ggml_backend_buft_name": (c.c_char_p, P),
}


def find(ik: bool, given: str) -> list[Path]:
    """The libraries' files. Absent: there are none, or no path was given."""
    if ik:
        path = given or os.environ.get(IK_VARIABLE, "")
        if not path:
            raise Absent(f"{IK_VARIABLE} is not set and no --library ik=FILE was given")
        if not Path(path).is_file():
            raise Absent(f"{path} is not a file")
        return [Path(path).resolve()]
    if given:
        folder = Path(given)
    else:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise Absent("No module named 'llama_cpp'")
        folder = Path(spec.origin).parent / "lib"
    found = [folder / f"libggml-{part}.{SUFFIX}" for part in ("base", "cpu")]
    for path_of in found:
        if not path_of.is_file():
            raise Absent(f"{path_of} is not a file")
    return found


class Library:
    """The functions as attributes, without the prefix: library.mul_mat(...). types: name -> number, of those it has."""

    def __init__(self, ik: bool, given: str) -> None:
        self.ik, self.paths = ik, find(ik, given)
        try:
            loaded = [c.CDLL(str(path), mode=c.RTLD_GLOBAL) for path in self.paths]
        except OSError as error:
            raise Absent(str(error)) from None
        self.functions: dict[str, Any] = {}
        for name, (result, *arguments) in {**COMMON, **(ONLY_IK if ik else ONLY_MAINLINE)}.items():
            function = next((getattr(library, name) for library in loaded if hasattr(library, name)), None)
            if function is None:
                raise Absent(f"{self.paths[-1]} has no {name}: another version of ggml than this was written for")
            function.restype, function.argtypes = result, arguments
            self.functions[name.removeprefix("ggml_")] = function
        if not ik:
            self.cpu_init()
        self.free(self.context())  # the first one fills tables that conversions read
        named = {**TYPES, **(IK_TYPES if ik else {})}
        self.types = {name: number for name, number in named.items() if self._named(number) == name.lower()}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.functions[name]
        except KeyError:
            raise AttributeError(name) from None

    def _named(self, number: int) -> str:
        found: bytes | None = self.type_name(number)
        return (found or b"").decode().lower()

    def context(self, size: int = 1 << 20) -> Any:
        """A context for tensors whose data lies elsewhere. There can be 64 at a time in older versions, which answer
        NULL beyond that and crash when it is used."""
        made = self.init(InitParams(size, None, True))
        if not made:
            raise MemoryError("ggml has no context left")
        return made

    def repacking(self) -> Any:
        """The buffer type that lays weights out for the processor as they are set. Absent: this build has none."""
        device = self.backend_reg_dev_get(self.backend_cpu_reg(), 0)
        address = self.backend_reg_get_proc_address(self.backend_cpu_reg(), b"ggml_backend_dev_get_extra_bufts")
        if address:
            found = c.CFUNCTYPE(c.POINTER(P), P)(address)(device)
            i = 0
            while found and found[i]:
                if self.backend_buft_name(found[i]) == b"CPU_REPACK":
                    return found[i]
                i += 1
        raise Absent("this build of ggml has no repacked weights")

    def multiplies(self, weights: Any, experts: bool, columns: int) -> bool:
        """Whether the product with a tensor in a repacking buffer exists on this processor. Setting a tensor whose type
        is not repacked here would crash."""
        context = self.context()
        if experts:
            x, ids = self.new_tensor_3d(context, F32, columns, 1, 1), self.new_tensor_2d(context, I32, 1, 1)
            product = self.mul_mat_id(context, weights, x, ids)
        else:
            product = self.mul_mat(context, weights, self.new_tensor_2d(context, F32, columns, 1))
        answer = bool(self.backend_dev_supports_op(self.backend_reg_dev_get(self.backend_cpu_reg(), 0), product))
        self.free(context)
        return answer

    def quantize(self, kind: str, weights: Array) -> Array:
        """[rows, columns] as bytes of that type, without an importance matrix."""
        number = self.types[kind]
        rows, columns = weights.shape
        source = np.ascontiguousarray(weights, np.float32)
        out = np.zeros(int(self.row_size(number, columns)) * rows, np.uint8)
        more = (None,) if self.ik else ()
        self.quantize_chunk(number, source.ctypes.data, out.ctypes.data, 0, rows, columns, None, *more)
        return out

    def dequantize(self, kind: str, packed: Array, columns: int) -> Array:
        """What quantize() gave, of a type in DEQUANTIZED, as float32 [rows, columns]."""
        rows = packed.nbytes // int(self.row_size(self.types[kind], columns))
        out = np.empty((rows, columns), np.float32)
        self.functions[f"dequantize_row_{kind[0].lower()}{kind[1:]}"](packed.ctypes.data, out.ctypes.data, out.size)
        return out
