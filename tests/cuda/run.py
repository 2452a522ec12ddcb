"""Runs the Metal kernels on an NVIDIA GPU: the text of metal/, translated to CUDA C++ word by word, against the oracle.

Needs nvcc, a C++ preprocessor (c++, or $CXX), libcuda and NumPy; neither torch nor this package, built. See README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda"
sys.path.insert(0, str(HERE))
import cases  # noqa: E402

BARRIER = r"\b(?:threadgroup|simdgroup)_barrier\([^)]*\);"
BUILT_INS = {
    "threadgroup_position_in_grid": "uint3{blockIdx.x, blockIdx.y, blockIdx.z}",
    "thread_position_in_grid": "position",
    "simdgroup_index_in_threadgroup": "threadIdx.x >> 5",
    "thread_index_in_simdgroup": "threadIdx.x & 31",
    "thread_index_in_threadgroup": "threadIdx.x",
}
QUALIFIERS = {"inline": "__device__ inline", "constant": "const", "device": "", "thread": "", "threadgroup": ""}
FLAGS = ("-cubin", "-std=c++17", "-O3", "-lineinfo", "--fmad=false", "--ftz=false", "--prec-div=true",
         "--prec-sqrt=true", "--expt-relaxed-constexpr", "-w")  # fmt: skip

# Bugs that a tool must find: the kernel file, the text, what takes its place, the tool.
SEEDED = [
    ("linear", "if (element < width) v[i] =", "if (element <= width) v[i] =", "memcheck"),
    ("linear", "if (column + 4 * lane + i < width) y", "if (column + 4 * lane + i <= width) y", "memcheck"),
    ("moe_prefill", "column + 4 * lane + i < h", "column + 4 * lane + i <= h", "memcheck"),
    ("moe_decode", "act + ulong(members[simd]) * n", "act + ulong(members[simd] + 1) * n", "memcheck"),
    ("moe_prefill", "if (r < rows) v = *(", "v = *(", "memcheck"),
    ("dequantize", "uint row = simd; row < 16;", "uint row = simd; row < 15;", "initcheck"),
    ("dequantize", "threadgroup_barrier(", "if (lane) threadgroup_barrier(", "synccheck"),
]


# ---------------------------------------------------------------- Metal to CUDA


def preprocess(case: cases.Case) -> str:
    """The kernel file after the preprocessor, with its line markers: the sanitizer then names lines of metal/."""
    stubs = BUILD / "include"
    stubs.mkdir(parents=True, exist_ok=True)
    for name in ("metal_stdlib", "metal_simdgroup", "metal_simdgroup_matrix"):
        (stubs / name).touch()
    defines = "".join(f"#define {name} {value}\n" for name, value in case.prefix.items())
    command = [os.environ.get("CXX", "c++"), "-E", "-x", "c++", "-undef", "-nostdinc", "-D__METAL_VERSION__=310"]
    command += [f"-I{folder}" for folder in (ROOT / "metal", ROOT / "csrc", stubs)]
    text = defines + f'#include "{case.source}.metal"\n'
    return subprocess.run([*command, "-"], input=text, capture_output=True, text=True, check=True).stdout


def parameters(text: str, start: int) -> list[tuple[str, str, str]]:
    """(type, attribute, its argument) of each parameter of the kernel whose list opens before `start`."""
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    inside = re.sub(r"^#.*$", "", text[start : end - 1], flags=re.M)
    found = []
    for one in re.split(r",(?![^(]*\))", inside):
        match = re.fullmatch(r"\s*(.*?)\s*\w+\s*\[\[\s*(\w+)(?:\((.*)\))?\s*\]\]\s*", one, flags=re.S)
        assert match, f"cannot read a parameter: {one}"
        found.append((match[1], match[2], match[3]))
    return found


def translate(text: str) -> tuple[str, dict[str, dict[int, str]]]:
    """CUDA C++, and the slots of each kernel with their types. A kernel becomes a device function of the same text,
    called by a __global__ function `mm_NAME` that takes the slots in their order and the grid in threads."""
    kernels: dict[str, dict[int, str]] = {}
    wrappers = []
    for match in re.finditer(r"\bkernel\s+void\s+(\w+)\s*\(", text):
        types, values = {}, []
        for kind, attribute, argument in parameters(text, match.end()):
            if attribute == "buffer":
                slot = sum(int(part) for part in argument.split("+"))
                assert slot not in types, f"{match[1]}: slot {slot} twice"
                assert slot < 31, f"{match[1]}: Metal has no slot {slot}"
                types[slot] = kind
                values.append(f"a{slot}")
            else:
                assert kind == ("uint3" if attribute.endswith("in_grid") else "uint"), attribute
                values.append(BUILT_INS[attribute])
        kernels[match[1]] = dict(sorted(types.items()))
        declared = ", ".join(f"{kind.replace('&', '')} a{slot}" for slot, kind in kernels[match[1]].items())
        wrappers.append(
            f'extern "C" __global__ void __launch_bounds__(1024) mm_{match[1]}({declared}, uint3 grid) {{\n'
            "  uint3 position = {blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y, blockIdx.z};\n"
            f"  if (position.x < grid.x) {match[1]}({', '.join(values)});\n}}\n"
        )
    text = re.sub(r"\s*\[\[.*?\]\]", "", text)
    text = re.sub(r"\bkernel\s+void\b", "static __device__ void", text)
    text = re.sub(
        r"^(\s*)(?:alignas\(\d+\)\s+)?threadgroup\s+(\w+)\s+(\w+)((?:\[[^;=]*\])?);",
        r"\1MM_THREADGROUP \2 \3\4; mm_poison(&\3, sizeof \3);",
        text,
        flags=re.M,
    )
    text = text + "\n" + "".join(wrappers)
    for old, new in QUALIFIERS.items():
        text = re.sub(rf"\b{old}\b(?=\s)", new, text)
    return f'#include "metal.cuh"\n{text}', kernels


class Module:
    """One variant, compiled; the file is kept under its text's hash."""

    def __init__(self, case: cases.Case, options: argparse.Namespace):
        text = preprocess(case)
        if options.edit:
            old, new, which = options.edit
            found = list(re.finditer(old, text))[int(which) :]
            assert found, f"nothing to edit in {case.source}: {old}"
            text = text[: found[0].start()] + new + text[found[0].end() :]
        text, self.kernels = translate(text)
        flags = [*FLAGS, f"-arch={options.arch}", f"-I{HERE}", *([] if options.plain else ["-DMM_POISON"])]
        key = "\n".join([*flags, (HERE / "metal.cuh").read_text(encoding="ascii"), text])
        self.path = BUILD / f"{case.source}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.cubin"
        if self.path.exists():
            return
        unique = self.path.with_suffix(f".{os.getpid()}.{id(self)}.cu")
        unique.write_text(text, encoding="ascii")
        made = unique.with_suffix(".cubin")
        done = subprocess.run([options.nvcc, *flags, "-o", made, unique], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case.name}: nvcc refused the text\n{done.stdout}{done.stderr}")
        made.replace(self.path)
        unique.replace(self.path.with_suffix(".cu"))


# ---------------------------------------------------------------- the GPU


class Gpu:
    """The driver API. Every buffer is an allocation of its own, of its exact size: memcheck sees where it ends."""

    def __init__(self, poison: bool):
        self.lib, self.poison = ctypes.CDLL("libcuda.so.1"), poison
        self.buffers: dict[int, np.ndarray] = {}  # address: an array of the same size and type
        self.loaded: dict[Path, ctypes.c_void_p] = {}
        self.seen: dict[str, list[int]] = {}  # kernel: most threadgroup memory, registers, bytes of stack
        self.module: Module | None = None
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        version = [ctypes.c_int(), ctypes.c_int()]
        for attribute, value in zip((75, 76), version, strict=True):  # compute capability, major and minor
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        self.arch = f"sm_{version[0].value}{version[1].value}"

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.lib, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorName(code, ctypes.byref(text))
            raise SystemExit(f"FAILED: {name}: {text.value.decode() if text.value else code}")

    def empty(self, shape: tuple[int, ...], dtype: str) -> int:
        like, address = np.empty(shape, dtype), ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(like.nbytes))
        if self.poison:  # NaN, or -1
            self.call("cuMemsetD8_v2", address, ctypes.c_ubyte(0xFF), ctypes.c_size_t(like.nbytes))
        self.buffers[address.value] = like
        return address.value

    def put(self, array: np.ndarray) -> int:
        array = np.ascontiguousarray(array)
        address = self.empty(array.shape, array.dtype.name)
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), array.ctypes.data_as(ctypes.c_void_p),
                  ctypes.c_size_t(array.nbytes))  # fmt: skip
        return address

    def get(self, address: int) -> np.ndarray:
        array = np.empty_like(self.buffers[address])
        self.call("cuMemcpyDtoH_v2", array.ctypes.data_as(ctypes.c_void_p), ctypes.c_uint64(address),
                  ctypes.c_size_t(array.nbytes))  # fmt: skip
        return array

    def free(self) -> None:
        for address in self.buffers:
            self.call("cuMemFree_v2", ctypes.c_uint64(address))
        self.buffers.clear()

    def function(self, name: str) -> ctypes.c_void_p:
        assert self.module
        function = ctypes.c_void_p()
        if self.module.path not in self.loaded:
            self.loaded[self.module.path] = ctypes.c_void_p()
            handle = ctypes.byref(self.loaded[self.module.path])
            self.call("cuModuleLoad", handle, str(self.module.path).encode())
        handle = self.loaded[self.module.path]
        self.call("cuModuleGetFunction", ctypes.byref(function), handle, f"mm_{name}".encode())
        sizes = []
        for attribute in (1, 4, 3):
            value = ctypes.c_int()
            self.call("cuFuncGetAttribute", ctypes.byref(value), attribute, function)
            sizes.append(value.value)
        assert sizes[0] <= 32768, f"{name}: {sizes[0]} bytes of threadgroup memory, Metal has 32768"
        self.seen[name] = [max(pair) for pair in zip(sizes, self.seen.get(name, sizes), strict=True)]
        return function

    def launch(self, name: str, values: dict[int, Any], grid: tuple[int, int], size: int, threads=False) -> None:
        """`grid` counts threadgroups; with `threads`, threads along x, and the last threadgroup may be cut short."""
        assert self.module
        function, held = self.function(name), []
        for slot, kind in self.module.kernels[name].items():  # a slot without a value is an error, one too many is not
            value = values[slot]
            if kind.endswith("*"):
                assert value in self.buffers, f"{name}: slot {slot} wants a tensor"
                held.append(ctypes.c_uint64(value))
            else:
                scalar = {"constant long&": ctypes.c_int64, "constant float&": ctypes.c_float}[kind]
                held.append(scalar(value))
        groups, lengths = (-(-grid[0] // size), grid[1]) if threads else grid, (ctypes.c_uint * 3)()
        lengths[:] = (grid[0] if threads else grid[0] * size, grid[1], 1)
        held.append(lengths)
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.cast(ctypes.byref(a), ctypes.c_void_p) for a in held])
        self.call("cuLaunchKernel", function, *groups, 1, size, 1, 1, 0, None, pointers, None)
        self.call("cuCtxSynchronize")


def worst_of(got: np.ndarray, want: np.ndarray, bound: Any) -> float:
    """The largest error as a share of its bound; NaN agrees with NaN alone."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.abs(got - want)
        share = np.where(error == 0, 0.0, error / bound)
    share = np.where(np.isnan(got) & np.isnan(want), 0.0, np.where(np.isnan(share), np.inf, share))
    return float(share.max(initial=0.0))


def run(chosen: list[cases.Case], options: argparse.Namespace) -> int:
    gpu = None if options.compile_only else Gpu(not options.plain)
    options.arch = options.arch or (gpu.arch if gpu else "sm_90")
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        modules = list(pool.map(lambda case: Module(case, options), chosen))
    print(f"{len({m.path for m in modules})} variants compiled for {options.arch}, {time.monotonic() - start:.0f} s")
    if not gpu:
        return 0
    rows: dict[str, list[Any]] = {}
    failed = 0
    for case, gpu.module in zip(chosen, modules, strict=True):
        row = rows.setdefault(case.name.split()[0], [0, 0, 0.0])
        bad = []
        for what, got, want, bound in case.run(gpu):
            share = worst_of(got, want, bound)
            row[1], row[2] = row[1] + 1, max(row[2], share)
            if not share <= 1:
                bad.append(f"{what}: {share:.3g} x its bound")
        gpu.free()
        row[0] += 1
        failed += bool(bad)
        if bad or options.verbose:
            print(f"{'FAILED' if bad else 'passed'}  {case.name}  {'; '.join(bad)}", flush=True)
    print(f"\n{'group':<16}{'cases':>6}{'checks':>8}{'worst error / bound':>21}")
    for name, (count, checks, share) in rows.items():
        print(f"{name:<16}{count:>6}{checks:>8}{share:>21.3f}")
    print(f"\n{'kernel':<22}{'threadgroup bytes':>18}{'registers':>11}{'stack bytes':>13}")
    for name, (shared, registers, stack) in sorted(gpu.seen.items()):
        print(f"{name:<22}{shared:>18}{registers:>11}{stack:>13}")
    print(f"\n{len(chosen) - failed} passed, {failed} failed, {time.monotonic() - start:.0f} s")
    return failed


# ---------------------------------------------------------------- under compute-sanitizer


def sanitizer(tool: str, *arguments: str, limit: int = 150) -> tuple[int, str]:
    """Exit status (9: the tool found something; 124: out of time) and output of the quick cases under one tool."""
    command = ["timeout", "-k", "5", str(limit)]
    command += [shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer", "--tool", tool]
    command += ["--error-exitcode", "9", "--target-processes", "application-only", "--print-limit", "3"]
    command += ["--padding", "64"] if tool == "memcheck" else []
    command += [sys.executable, str(HERE / "run.py"), "--quick", "--plain", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return 9 if re.search(r"SUMMARY: [1-9]", done.stdout) else done.returncode, done.stdout


def sanitize(only: str) -> int:
    """The four tools on the quick cases: each must run to its end and find nothing."""
    print(f"\n{'tool':<12}{'result':<10}{'seconds':>8}")
    failed = 0
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        start = time.monotonic()
        code, output = sanitizer(tool, "--only", only)
        clean = code == 0 and " 0 failed" in output and re.search(r"SUMMARY: 0 (errors|hazards)", output)
        failed += not clean
        print(f"{tool:<12}{'clean' if clean else 'FAILED':<10}{time.monotonic() - start:>8.0f}", flush=True)
        summary = [line for line in output.splitlines() if "SUMMARY" in line or line.endswith(" s")]
        print("\n".join(summary[-2:] if clean else output.splitlines()[-40:]), flush=True)
    return failed


def mutate(jobs: int) -> int:
    """Each bug of SEEDED under its tool, and each barrier left out under racecheck. A barrier that is not missed is
    printed, not a failure: another one beside it may do its work."""
    tried = [(source, re.escape(old), new, 0, tool, True) for source, old, new, tool in SEEDED]
    for source in sorted({case.source for case in cases.all_cases()}):
        text = preprocess(next(case for case in cases.all_cases() if case.source == source))
        count = len(re.findall(BARRIER, text))
        tried += [(source, BARRIER, ";", i, "racecheck", False) for i in range(count)]

    def one(bug: tuple[str, str, str, int, str, bool]) -> int:
        source, old, new, which, tool, _ = bug
        return sanitizer(tool, "--only", f"^{source}", "--edit", old, new, str(which))[0]

    missed, pool = 0, ThreadPoolExecutor(jobs)
    print(f"\n{'file':<13}{'bug':<48}{'tool':<11}result")
    for (source, old, new, which, tool, must), code in zip(tried, pool.map(one, tried), strict=True):
        result = {9: "found", 0: "not found", 1: "wrong results", 124: "out of time"}.get(code, f"exit status {code}")
        missed += must and code != 9
        bug = new if must else f"without barrier {which}: {where(source, old, which)}"
        print(f"{source:<13}{bug[:46]:<48}{tool:<11}{result}", flush=True)
    return missed


def where(source: str, pattern: str, which: int) -> str:
    """FILE:LINE of the match number `which`, by the preprocessor's markers."""
    text = preprocess(next(case for case in cases.all_cases() if case.source == source))
    before = text[: list(re.finditer(pattern, text))[which].start()]
    marker = list(re.finditer(r'^# (\d+) "(.*?)".*\n', before, flags=re.M))[-1]
    return f"{Path(marker[2]).name}:{int(marker[1]) + before[marker.end() :].count(chr(10))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name matches this regular expression")
    parser.add_argument("--quick", action="store_true", help="the selection that the sanitizer runs")
    parser.add_argument("--plain", action="store_true", help="fresh memory stays as it is, for initcheck")
    parser.add_argument("--edit", nargs=3, metavar=("REGEX", "NEW", "N"), help="put NEW in place of match N")
    parser.add_argument("--sanitize", action="store_true", help="the four tools of compute-sanitizer")
    parser.add_argument("--mutate", type=int, metavar="JOBS", help="seeded bugs, JOBS at a time")
    parser.add_argument("--compile-only", action="store_true", help="without a GPU: translate and compile")
    parser.add_argument("--arch", help="such as sm_90; the GPU's own by default")
    parser.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    parser.add_argument("--verbose", action="store_true", help="a line for every case")
    options = parser.parse_args()
    chosen = [c for c in cases.all_cases() if re.search(options.only, c.name) and (c.quick or not options.quick)]
    BUILD.mkdir(parents=True, exist_ok=True)
    if options.sanitize or options.mutate:
        options.plain = True
        sys.exit(bool(sanitize(options.only) if options.sanitize else mutate(options.mutate)))
    sys.exit(bool(run(chosen, options)))


if __name__ == "__main__":
    main()
