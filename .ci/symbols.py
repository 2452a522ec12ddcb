"""Checks csrc/torch_shim.h against PyTorch's own binaries: every symbol that we look up is exported by the library in
which we look it up, in each version from the one that the header names. And csrc/metal_queue/runtime.h, as far as
PyTorch speaks to Metal too: what its binaries import comes from the library in which we look, and messages are spelled
alike.

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
# torch_from_blob asks the device's hooks on which device its memory is, and the base class's answer is an error: only
# with at::mps::MPSHooks' own it makes a tensor of a Metal buffer (csrc/mps/window.c). Inside PyTorch, not exported.
DEVICE_OF_POINTER = "_ZNK2at3mps8MPSHooks16getDeviceFromPtrEPv"

# Messages of ours that no PyTorch binary sends under that name, so nothing here vouches for their spelling.
# Compilers turn the first three into calls of the runtime.
UNVOUCHED = {"alloc", "retain", "release", "respondsToSelector:", "initWithUTF8String:", "commandBuffer",
             "newCommandQueueWithMaxCommandBufferCount:"}  # fmt: skip

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


def library_of(release: str) -> lief.MachO.Binary:
    """libtorch_cpu.dylib of a macOS wheel."""
    wheels = list(WHEELS.glob(f"torch-{release}-*.whl"))
    if not wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command += ["--python-version", "3.12", "--dest", str(WHEELS), f"torch=={release}"]
        subprocess.run(command, check=True)
        wheels = list(WHEELS.glob(f"torch-{release}-*.whl"))
    with zipfile.ZipFile(wheels[0]) as archive:
        return lief.MachO.parse(io.BytesIO(archive.read(LIBRARY))).at(0)


def c_name(symbol: lief.MachO.Symbol) -> str:
    """As C spells it."""
    return str(symbol.name).removeprefix("_")


def wanted_of_metal() -> tuple[dict[str, str], set[str]]:
    """From metal_queue/runtime.h: symbol -> file name of its library; messages."""
    text = (ROOT / "csrc" / "metal_queue" / "runtime.h").read_text().replace("\\\n", " ")
    lists = dict(re.findall(r"#define (MM_METAL_[A-Z]+)\(X\)(.*)", text))
    paths = dict(re.findall(r'X\((\w+), "([^"]+)"\)', lists["MM_METAL_LIBRARIES"]))
    symbols = re.findall(r"X\((\w+), [^,]+, (\w+),", lists["MM_METAL_FUNCTIONS"])
    symbols += re.findall(r"X\((\w+), (\w+)\)", lists["MM_METAL_VARIABLES"])
    messages = set(re.findall(r'X\([^,]+,\s*\w+,\s*"([^"]+)"', lists["MM_METAL_MESSAGES"]))
    assert len(messages) == len(re.findall(r"\bX\(", lists["MM_METAL_MESSAGES"])), "messages are not as this reads them"
    return {name: Path(paths[library]).name for library, name in symbols}, messages


def check_metal(binaries: dict[str, lief.MachO.Binary]) -> int:
    """How many of Metal's symbols and messages differ from PyTorch's use."""
    symbols, messages = wanted_of_metal()
    failed, sent, vouched = 0, set(), set()
    for release, binary in binaries.items():
        for section in binary.sections:
            if section.name == "__objc_methname":
                sent |= set(bytes(section.content).decode("ascii").split("\0"))
        for symbol in binary.imported_symbols:
            name = c_name(symbol)
            if name not in symbols or not symbol.has_binding_info or not symbol.binding_info.has_library:
                continue
            library = Path(str(symbol.binding_info.library.name)).name
            vouched.add(name)
            if library != symbols[name]:
                print(f"torch {release} has {name} from {library}; we look in {symbols[name]}", file=sys.stderr)
                failed += 1
    unknown = messages - sent - UNVOUCHED
    if unknown:
        print(f"no torch sends {sorted(unknown)}: misspelled, or to be listed as UNVOUCHED", file=sys.stderr)
    stale = UNVOUCHED - (messages - sent)
    if stale:
        print(f"UNVOUCHED has {sorted(stale)}, which torch sends or we do not", file=sys.stderr)
    print(
        f"Metal: torch sends {len(messages & sent)} of our {len(messages)} messages, and imports {len(vouched)} of our"
        f" {len(symbols)} symbols from the same libraries: {', '.join(sorted(vouched))}"
    )
    return failed + len(unknown) + len(stale) + (len(vouched) < 4)


def main() -> int:
    lief.logging.disable()
    symbols = wanted()
    assert len(symbols) > 30, f"only {len(symbols)} symbols were found in torch_shim.h"
    failed = 0
    binaries = {release: library_of(release) for release in VERSIONS}
    for release, binary in binaries.items():
        present = set(map(c_name, binary.exported_symbols))
        due = {name for name, (first, _) in symbols.items() if first <= version(release)}
        missing = sorted(due - present)
        early = sorted((symbols.keys() - due) & present)
        print(f"torch {release} for macOS: {len(due) - len(missing)} of {len(due)} symbols", end="")
        print(f", {len(symbols) - len(due)} of later versions" + (f", already there: {early}" if early else ""))
        if missing:
            print(f"torch {release} for macOS lacks {missing}", file=sys.stderr)
        failed += len(missing)
        if "torch_from_blob" in present and DEVICE_OF_POINTER not in set(map(c_name, binary.symbols)):
            print(f"torch {release} for macOS lacks {DEVICE_OF_POINTER}, which torch_from_blob needs", file=sys.stderr)
            failed += 1
    failed += check_metal(binaries)
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    here = {name for name, (first, mps) in symbols.items() if not mps and first <= version(torch.__version__)}
    missing = sorted(name for name in here if not hasattr(library, name))
    print(f"torch {torch.__version__} on this machine: {len(here) - len(missing)} of {len(here)} symbols")
    if missing:
        print(f"torch {torch.__version__} lacks {missing}", file=sys.stderr)
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
