"""Compiles the Metal kernels with Apple's own compiler, ahead of time and without a GPU: every text that the C encoders
would hand to PyTorch for a set of cases that has every codebook, rate, dtype, activation and router once.

    python .ci/metal.py [LANGUAGE ...]      on a Mac with Xcode: metal3.1, metal3.2, metal4.0 unless named
    python .ci/metal.py                     elsewhere: only writes the texts into build/metal

The texts come from the encoders themselves: a shim that records them stands in for PyTorch's.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from metal_marlin import _C
from metal_marlin.selftest_cases import Sizes, cases_of

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "metal"
LANGUAGES = ("metal3.1", "metal3.2", "metal4.0")  # what torch 2.10 and later ask for on macOS 14, 15 and 26


def record() -> list[Path]:
    """One file for each text."""
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    recorder = BUILD / "recorder.so"
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    compiler = compiler if shutil.which(compiler[0]) else ["cc"]
    source = ROOT / ".ci" / "metal_recorder.c"
    subprocess.run([*compiler, "-std=c11", "-shared", "-fPIC", str(source), "-o", str(recorder)], check=True)
    os.environ["METAL_TEXTS"] = str(BUILD)
    for case in cases_of("every value"):
        prepared = case.prepare(Sizes())
        _C.use_mps_emulator(recorder)
        try:
            prepared.call(prepared.inputs)
        finally:
            _C.use_mps_emulator(None)
    return sorted(BUILD.glob("*.metal"))


def compiled(language: str, text: Path) -> str | None:
    """None, or what the compiler said."""
    command = ["xcrun", "-sdk", "macosx", "metal", f"-std={language}", "-Wall", "-Wextra", "-c", str(text)]
    done = subprocess.run([*command, "-o", str(text.with_suffix(f".{language}.air"))], text=True, capture_output=True)
    return None if done.returncode == 0 else f"{text.name}, {language}:\n{done.stderr}"


def main() -> int:
    texts = record()
    print(f"{len(texts)} texts in {BUILD.relative_to(ROOT)}")
    if len(texts) < len(_C.CODEBOOKS) + len(_C.ACTIVATIONS) + len(_C.ROUTERS):
        print("expected more: the encoders did not run", file=sys.stderr)
        return 1
    if shutil.which("xcrun") is None:
        print("xcrun is not here: nothing was compiled")
        return 0
    failed = 0
    for language in sys.argv[1:] or LANGUAGES:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            messages = [m for m in pool.map(lambda text, std=language: compiled(std, text), texts) if m is not None]
        print(f"{language}: {len(texts) - len(messages)} of {len(texts)} texts compiled")
        print("\n".join(messages[:5]), file=sys.stderr)
        failed += len(messages)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
