"""Builds what the emulator needs, once: its runtime (C11) and each shader (C++), with the ziglang package's compiler.

Owns the toolchain, the cache and its locks. A file in the cache is named by a hash of all that went into it and appears
whole (a rename), so any number of processes may build side by side.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from .front import HEADERS, Source, kernel_table, preprocess
from .tokens import FrontError

HERE = Path(__file__).parent
_FOUND = importlib.util.find_spec("ziglang")
ZIG = [str(Path(folder) / "zig") for folder in (_FOUND.submodule_search_locations or ())] if _FOUND else []
CPU = "x86-64-v3"  # half precision conversions in hardware
CPU_FEATURES = ("avx2", "f16c", "fma")
RUNTIME_FLAGS = shlex.split(
    "-std=c11 -O2 -g1 -fPIC -shared -fvisibility=hidden -fno-sanitize=all -fno-stack-protector "
    "-target x86_64-linux-gnu.2.28 -mcpu=x86_64_v3 -Wl,-soname,libmetal_emulator.so"
)
KERNEL_FLAGS = shlex.split(
    f"-x c++ -std=c++17 -march={CPU} -fPIC -gline-tables-only -gdwarf-4 -fno-exceptions -fno-rtti -nostdinc "
    "-nostdinc++ -fvisibility=hidden -ffp-contract=off -Xclang -ffloat16-excess-precision=none -fno-math-errno "
    "-fno-threadsafe-statics -fno-stack-protector -fstack-clash-protection -ftemplate-depth=2000 "
    "-fconstexpr-steps=10000000 -Wno-everything -fno-caret-diagnostics -ferror-limit=20"
)
# The instrumentation alone: access.c has the functions that it calls.
CHECK_FLAGS = shlex.split(
    "-DEMU_CHECKED -fsanitize=thread,alignment,array-bounds,shift-exponent,integer-divide-by-zero "
    "-mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-atomics=0 "
    "-mllvm -tsan-compound-read-before-write=1"
)


def unavailable() -> str | None:
    """Why the emulator cannot run here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the Metal emulator runs on x86-64 Linux only, not on {sys.platform} {platform.machine()}"
    if not ZIG:
        return "the Metal emulator needs the package ziglang, which is not installed"
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    missing = [feature for feature in CPU_FEATURES if feature not in flags]
    return f"the Metal emulator needs a processor with {', '.join(missing)}" if missing else None


@lru_cache(maxsize=1)
def cache() -> Path:
    """build/emulator in the repository, or the user's cache if that cannot be written, or METAL_EMULATOR_CACHE."""
    named = os.environ.get("METAL_EMULATOR_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "metal_marlin_emulator"
    for folder in [Path(named)] if named else [HERE.parents[1] / "build" / "emulator", user]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise RuntimeError("the Metal emulator finds no folder to build in; set METAL_EMULATOR_CACHE to one")


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _only_once(path: Path) -> Iterator[Path | None]:
    """Gives a name to build under, or None if `path` is there: a second process waits for the first one."""
    if path.exists():
        yield None
        return
    import fcntl  # not on every system that collects these tests

    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            yield None
            return
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            yield made
            made.rename(path)


def _texts(*patterns: str) -> dict[str, str]:
    return {str(p.relative_to(HERE)): p.read_text() for pattern in patterns for p in sorted(HERE.glob(pattern))}


@lru_cache(maxsize=1)
def _compiler_version() -> str:
    return importlib.metadata.version("ziglang")


def runtime(set_bytes: bool = True) -> Path:
    """The runtime as a shared library. set_bytes=False: as torch 2.10, without its later functions."""
    flags = [*RUNTIME_FLAGS, *([] if set_bytes else ["-DEMU_WITHOUT_SET_BYTES"])]
    key = _hash(_texts("runtime/*", "include/abi.h"), flags, _compiler_version())
    path = cache() / f"runtime-{key}.so"
    with _only_once(path) as made:
        if made:
            command = [*ZIG, "cc", *flags, *map(str, sorted(HERE.glob("runtime/*.c"))), "-o", str(made), "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=made.parent)
            if run.returncode:
                raise RuntimeError(f"the Metal emulator's runtime does not compile:\n{run.stderr}")
    return path


@lru_cache(maxsize=1)
def header_folder() -> Path:
    """Empty <metal_*> headers: while the text is preprocessed, nothing but itself shall be in it."""
    folder = cache() / f"headers-{_hash(HEADERS)}"
    for name in HEADERS:
        path = folder / f"metal_{name}"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            path.write_text("#pragma once\n")
    return folder


def parse(text: str, name: str, lint: bool = False, includes: list[Path] | None = None) -> Source:
    """A shader's kernels and rewriting. FrontError: it does not preprocess, or has what MSL or the emulator has not."""
    return Source(preprocess(text, name, [*ZIG, "clang"], header_folder(), includes), lint=lint)


@lru_cache(maxsize=1)
def _kernel_inputs() -> str:
    return _hash(_texts("tokens.py", "front.py", "include/*"), _compiler_version(), KERNEL_FLAGS, CHECK_FLAGS)


def _shaders_own(message: str) -> str:
    """A compiler's message without notes about our headers, which would only bury it."""
    ours = f"{HERE}/include/"
    lines = [
        line for line in message.splitlines() if not (ours in line and ": note:" in line) and "<built-in>" not in line
    ]
    return "\n".join(lines).replace(ours, "")


def shader(text: str, check: bool, name: str = "program_source") -> Path:
    """A shader as a shared object with all its kernels; check: with calls into access.c at every load and store."""
    path = cache() / f"shader-{_hash(text, check, name, _kernel_inputs())}.so"
    with _only_once(path) as made:
        if made:
            source = parse(text, name)
            code = source.rewritten() + kernel_table(source)
            include = ["-I", str(HERE / "include"), "-include", str(HERE / "include" / "msl.h")]
            mode = ["-O1", *CHECK_FLAGS] if check else ["-O2"]
            command = [*ZIG, "clang", *KERNEL_FLAGS, *include, *mode, "-c", "-", "-o", str(made.with_suffix(".o"))]
            run = subprocess.run(command, input=code, capture_output=True, text=True, check=False, cwd=made.parent)
            if run.returncode:
                raise FrontError(_shaders_own(run.stderr))
            # linked to the runtime by its soname: the copy that is loaded already answers
            command = [*ZIG, "ld.lld", "-shared", "-o", str(made), str(made.with_suffix(".o")), str(runtime())]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                raise FrontError(run.stderr)
    return path
