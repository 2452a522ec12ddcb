"""The CPU's SIMD levels as a C program of their own (levels.c): for this machine, with and without sanitizers, and for
arm64 under qemu-user, so that the NEON level is run on any Linux machine.

qemu shows what the instructions compute, not how fast they are. `-cpu max` has every extension, a Neoverse N1 neither
FEAT_I8MM nor FEAT_SHA3, a Cortex-A72 only what the first arm64 had: code that needs more would end there with an
illegal instruction.

No emulator that installs from Debian or PyPI knows AVX-VNNI, AVX-512 or AMX. emulated_avx512.h computes in C what
those levels' intrinsics and assembly do, so that their own text runs wherever there is AVX2.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import reference as ref

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [ROOT / "tests" / "levels.c", *sorted((ROOT / "csrc" / "cpu").glob("*.c"))]
# As setup.py compiles them, but with the assertions.
FLAGS = ["-std=c11", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi", "-UNDEBUG", f"-I{ROOT / 'csrc'}"]
AVX512 = "avx2 fma f16c avx512f avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni"
X86_64 = {  # levels, and what Linux calls the features that they need
    "avx2": "avx2 fma f16c",
    "avx512": AVX512,
    "avx512-fp16": f"{AVX512} avx512_fp16",
    "avx2-int16": "avx2 fma f16c",
    "avx-vnni-int16": "avx2 fma f16c avx_vnni",
    "avx-vnni-int8": "avx2 fma f16c avx_vnni",
    "avx512-int16": AVX512,
    "avx512-fp16-int16": f"{AVX512} avx512_fp16",
    "avx512-int8": AVX512,
    "avx512-fp16-int8": f"{AVX512} avx512_fp16",
    "amx-int8": f"{AVX512} avx512_fp16 amx_tile amx_int8",
}
ARM64 = {  # as qemu calls the CPUs: Armv8.0; Armv8.2 with half precision and dot products; everything
    "cortex-a72": ["scalar", "neon", "neon-int16"],
    "neoverse-n1": ["scalar", "neon", "neon-fp16", "neon-int16", "neon-int8"],
    "max": ["scalar", "neon", "neon-fp16", "neon-int16", "neon-int8"],
}
# Leaks are the test's own: it never frees its guarded memory. The suite itself may run under sanitizers.
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}


def built(compiler: list[str], program: Path, *flags: str) -> Path:
    command = [*compiler, *FLAGS, *flags, *map(str, SOURCES), "-lm", "-o", str(program)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return program


def native_compiler() -> list[str]:
    configured = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    for command in (shlex.split(configured), ["cc"], ["gcc"], ["clang"]):
        if shutil.which(command[0]):
            return command
    pytest.skip("no C compiler")


def hashed(values: np.ndarray) -> str:
    """FNV-1a of a codebook's values, as levels.c prints it."""
    hash_ = 2166136261
    for byte in values.astype("<f2").tobytes():
        hash_ = (hash_ ^ byte) * 16777619 & 0xFFFFFFFF
    return f"{hash_:08x}"


def check(*command: str | Path) -> list[str]:
    """Runs the program; returns the levels that it found. Codebooks are compared with the oracle's."""
    done = subprocess.run(list(map(str, command)), text=True, capture_output=True, env=os.environ | SANITIZER_OPTIONS)
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[-1][2:] == ["0", "failed"]
    for name in ref.CODEBOOKS:
        assert ["codebook", name, hashed(ref.codebook(name))] in lines
    return lines[0][1:]


@pytest.mark.parametrize("sanitized", [False, True], ids=["plain", "sanitized"])
def test_native(tmp_path: Path, sanitized: bool) -> None:
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1"] if sanitized else []
    compiler = native_compiler()
    if sanitized:
        empty = tmp_path / "empty.c"
        empty.write_text("int main(void) { return 0; }\n")
        probe = [*compiler, *flags, str(empty), "-o", str(tmp_path / "empty")]
        if subprocess.run(probe, capture_output=True).returncode:
            pytest.skip(f"{compiler[0]} has no sanitizers here")
    levels = check(built(compiler, tmp_path / "levels", *flags))
    assert levels[0] == "scalar"
    if (cpuinfo := Path("/proc/cpuinfo")).exists() and platform.machine() == "x86_64":
        flags_here = set(re.findall(r"^flags\s*:(.*)", cpuinfo.read_text(), re.M)[0].split())
        assert levels[1:] == [level for level, needs in X86_64.items() if set(needs.split()) <= flags_here]
    if platform.machine() in ("arm64", "aarch64"):
        assert levels in ARM64.values()


def test_emulated_avx512(tmp_path: Path) -> None:
    """The levels with AVX-VNNI, AVX-512 and AMX on a CPU that need not have any of them."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists():
        pytest.skip("the emulation of AVX-512 is for Linux on x86-64")
    if missing := {"avx2", "fma", "f16c"} - set(re.findall(r"^flags\s*:(.*)", cpuinfo.read_text(), re.M)[0].split()):
        pytest.skip(f"the emulation of AVX-512 runs on AVX2; this CPU lacks {', '.join(sorted(missing))}")
    compiler = native_compiler()
    flags = ["-O1", "-mavx2", "-mfma", "-mf16c", "-include", str(ROOT / "tests" / "emulated_avx512.h")]
    (tmp_path / "empty.c").touch()
    probe = [*compiler, *flags, "-fsyntax-only", str(tmp_path / "empty.c")]
    errors = subprocess.run(probe, text=True, capture_output=True).stderr
    if reason := re.search(r"error.*(gcc \d+ or clang \d+ is needed.*)", errors):
        pytest.skip(f"{compiler[0]}: {reason[1]}")
    assert check(built(compiler, tmp_path / "levels", *flags)) == ["scalar", *X86_64]


@pytest.fixture(scope="module")
def arm64_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statically linked, so that qemu needs no arm64 libraries. zig's first build for a target takes a minute more."""
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("ziglang is not installed (pip install ziglang): nothing here compiles for arm64")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl", "-static"]
    return built(zig, tmp_path_factory.mktemp("arm64") / "levels")


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ARM64)
def test_arm64(cpu: str, request: pytest.FixtureRequest) -> None:
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        pytest.skip("qemu-aarch64 is not installed (Debian's package qemu-user)")
    assert check(qemu, "-cpu", cpu, request.getfixturevalue("arm64_program")) == ARM64[cpu]
