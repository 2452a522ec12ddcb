"""Checks csrc/torch_shim.h against PyTorch's own binaries: every symbol that we look up is exported by the library in
which we look it up, in each version from the one that the header names.

    python .ci/symbols.py        needs the `wheels` extra; downloads 330 MB of macOS wheels into build/symbols, once

The macOS wheels are read, not run. On Linux the installed torch is asked, by dlsym as our loader does.
"""

from __future__ import annotations

import ctypes
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import lief
import torch

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "build" / "symbols"
VERSIONS = ("2.10.0", "2.13.0", "2.15.0")  # our floor, the version that the tests run with, the newest
PLATFORMS = ("macosx_11_0_arm64", "macosx_14_0_arm64")  # what torch 2.10 and later ones ask for
LIBRARY = "torch/lib/libtorch_cpu.dylib"  # where csrc/module.c looks

Version = tuple[int, ...]


def version(text: str) -> Version:
    return tuple(int(part) for part in text.split(".")[:2])


def wanted() -> dict[str, tuple[Version, bool]]:
    """Symbol: first torch version, whether only macOS has it. From the X-macro lists."""
    text = (ROOT / "csrc" / "torch_shim.h").read_text().replace("\\\n", " ")
    found: dict[str, tuple[Version, bool]] = {}
    for name, entries in re.findall(r"#define (MM_\w*SYMBOLS)\(X\)(.*)", text):
        symbols = re.findall(r'X\([^,]+,\s*(\w+),\s*\(.*?\),\s*"(\d+\.\d+)"\)', entries)
        assert len(symbols) == len(re.findall(r"\bX\(", entries)), f"{name} is not written as this script reads it"
        found |= {symbol: (version(first), "MPS" in name) for symbol, first in symbols}
    return found


def exports(release: str) -> set[str]:
    """What libtorch_cpu.dylib of a macOS wheel exports, as C spells it."""
    wheels = list(WHEELS.glob(f"torch-{release}-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command += ["--python-version", "3.12", "--dest", str(WHEELS), f"torch=={release}"]
        subprocess.run(command, check=True)
        wheels = list(WHEELS.glob(f"torch-{release}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        binary = lief.MachO.parse(io.BytesIO(archive.read(LIBRARY))).at(0)
    return {str(symbol.name).removeprefix("_") for symbol in binary.exported_symbols}


def main() -> int:
    lief.logging.disable()
    symbols = wanted()
    assert len(symbols) > 30, f"only {len(symbols)} symbols were found in torch_shim.h"
    failed = 0
    for release in VERSIONS:
        present = exports(release)
        due = {name for name, (first, _) in symbols.items() if first <= version(release)}
        missing = sorted(due - present)
        early = sorted((symbols.keys() - due) & present)
        print(f"torch {release} for macOS: {len(due) - len(missing)} of {len(due)} symbols", end="")
        print(f", {len(symbols) - len(due)} of later versions" + (f", already there: {early}" if early else ""))
        if missing:
            print(f"torch {release} for macOS lacks {missing}", file=sys.stderr)
        failed += len(missing)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    here = {name for name, (first, mps) in symbols.items() if not mps and first <= version(torch.__version__)}
    missing = sorted(name for name in here if not hasattr(library, name))
    print(f"torch {torch.__version__} on this machine: {len(here) - len(missing)} of {len(here)} symbols")
    if missing:
        print(f"torch {torch.__version__} lacks {missing}", file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
