"""Builds the wheels of every platform on Linux, with one compiler (zig's clang, from PyPI), and checks what came out.

    python .ci/wheels.py [PLATFORM TAG ...]        into dist/; needs the `wheels` extra

Each wheel is cross-built: setup.py runs here, the compiler aims elsewhere. That works because the extension is C with
Python's stable ABI and nothing else: no torch at build time, no library of Python to link with. The one thing in
Python's headers that depends on the platform is pyconfig.h; the copy that is used here says what holds on all of them.

Checked: the tag, the files inside, the exported and needed symbols, unwind tables, the oldest system that loads it, the
signature that macOS asks for, abi3audit, and auditwheel for Linux. Nothing is executed: that needs the platform.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import lief

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheels"
DIST = ROOT / "dist"

# platform tag: zig's target, extra words for the linker. manylinux_2_28 and macOS 11 are as old as torch 2.10's own
# wheels ask for; macOS resolves Python's symbols when the module is loaded, which its linker must be told. (zig makes a
# dylib, not a bundle; Python loads both. A dylib has a name of its own, which would otherwise be its path here.)
TARGETS = {
    "macosx_11_0_arm64": ("aarch64-macos.11.0", "-undefined dynamic_lookup -Wl,-install_name,@rpath/_C.abi3.so"),
    "manylinux_2_28_x86_64": ("x86_64-linux-gnu.2.28", ""),
    "manylinux_2_28_aarch64": ("aarch64-linux-gnu.2.28", ""),
}

# What Python's headers may ask of pyconfig.h under the limited API, on 64-bit Linux and macOS alike. The build Python's
# own file may hold more (which functions its libc has) or refuse other machines (Debian's does).
PYCONFIG = """
#define SIZEOF_SHORT 2
#define SIZEOF_INT 4
#define SIZEOF_LONG 8
#define SIZEOF_LONG_LONG 8
#define SIZEOF_VOID_P 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_TIME_T 8
#define SIZEOF_OFF_T 8
#define SIZEOF_WCHAR_T 4
#define SIZEOF_PID_T 4
#define SIZEOF_FLOAT 4
#define SIZEOF_DOUBLE 8
#define HAVE_STDARG_PROTOTYPES 1
#define HAVE_SYS_TYPES_H 1
#define HAVE_SYS_STAT_H 1
#define HAVE_UNISTD_H 1
#define HAVE_STDDEF_H 1
#define HAVE_LONG_LONG 1
"""


class Failed(Exception):
    """A wheel is not what it should be."""


def need(good: bool, message: str) -> None:
    if not good:
        raise Failed(message)


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last = "\n".join(done.stdout.splitlines()[-30:])
    need(done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{last}")
    return done.stdout


# ---- building ----


def headers() -> Path:
    """Python's headers with a pyconfig.h for every platform."""
    target = BUILD / "include"
    shutil.copytree(sysconfig.get_path("include"), target)
    (target / "pyconfig.h").write_text(PYCONFIG)
    return target


def commit_time() -> str:
    """For the times in an archive, so that a commit gives the same bytes twice. Without git: 1980, where zip begins."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True, capture_output=True)
    return done.stdout.strip() if done.returncode == 0 else "315532800"


def build(tag: str, include: Path) -> Path:
    """One wheel, in dist/."""
    zig_target, link_words = TARGETS[tag]
    compiler = f"{shlex.quote(sys.executable)} -m ziglang cc -target {zig_target}"
    env = os.environ | {
        "CC": f"{compiler} -I{shlex.quote(str(include))}",  # before the build Python's own headers
        "LDSHARED": f"{compiler} -shared -s {link_words}",
        "METAL_MARLIN_CFLAGS": "-g0 -fPIC -Werror -Wpedantic -Wconversion -Wshadow",
        "SOURCE_DATE_EPOCH": commit_time(),
    }
    folder = BUILD / tag
    run(
        *(sys.executable, "setup.py", "build", "--build-base", folder, "egg_info", "--egg-base", BUILD),
        *("bdist_wheel", "--plat-name", tag, "--dist-dir", DIST, "--bdist-dir", folder / "wheel"),
        env=env,
    )
    (wheel,) = DIST.glob(f"metal_marlin-*-{tag}.whl")
    return wheel


# ---- checking ----


def check_contents(wheel: Path) -> bytes:
    """The names inside and the tag; returns the extension module."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        module = archive.read("metal_marlin/_C.abi3.so") if "metal_marlin/_C.abi3.so" in names else b""
        tags = [archive.read(name).decode() for name in names if name.endswith(".dist-info/WHEEL")]
        sources = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "metal_marlin").rglob("*.py"))
    need(bool(module), "metal_marlin/_C.abi3.so is missing")
    tag = wheel.stem.split("-", 2)[2]
    need(tag.startswith("cp310-abi3-"), f"the tag is {tag}, expected cp310-abi3-…")
    need(len(tags) == 1 and f"Tag: {tag}" in tags[0], f"WHEEL does not say {tag}")
    package = r"metal_marlin/((quantize/)?\w+\.py|\w+\.pyi|py\.typed|_C\.abi3\.so)"
    allowed = package + r"|metal_marlin-[\w.]+\.dist-info/[\w./]+"
    stray = [name for name in names if not re.fullmatch(allowed, name) or re.search(r"/(tests?|emulator)\b", name)]
    need(not stray, f"the wheel holds what it should not: {stray}")
    missing = [name for name in sources if name not in names]
    need(not missing, f"Python files are missing: {missing}")
    need(str(ROOT).encode() not in module, f"the module names the build folder, {ROOT}")
    for metal in (ROOT / "metal").glob("*.metal"):  # the text is compiled on the user's machine
        kernels = re.findall(rb"^kernel void (\w+)", metal.read_bytes(), re.M)
        need(all(name in module for name in kernels), f"the module lacks the text of metal/{metal.name}")
    return module


def check_elf(tag: str, module: bytes, wheel: Path) -> str:
    """A Linux module; returns what to print about it."""
    elf = lief.ELF.parse(io.BytesIO(module))
    machine = {"x86_64": lief.ELF.ARCH.X86_64, "aarch64": lief.ELF.ARCH.AARCH64}[tag.split("_", 3)[3]]
    need(elf.header.machine_type == machine, f"machine type {elf.header.machine_type}, expected {machine}")
    exports = {str(symbol.name) for symbol in elf.exported_symbols}
    need(exports == {"PyInit__C"}, f"exports {sorted(exports)}, expected only PyInit__C")
    libraries = set(map(str, elf.libraries))
    known = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0"}
    need(libraries <= known, f"needs {sorted(libraries)}, expected libc's own libraries only")
    need(elf.has_section(".eh_frame"), "no .eh_frame: an error of torch could not pass through our frames")
    shown = run(sys.executable, "-m", "auditwheel", "show", wheel)
    found = re.search(r'following\s+platform\s+tag:\s*"(manylinux_2_(\d+)_\w+)"', shown)
    limit = int(tag.split("_")[2])
    need(found is not None and int(found[2]) <= limit, f"auditwheel does not find manylinux_2_{limit}:\n{shown}")
    return f"auditwheel: {found[1] if found else ''}"


def check_signature(module: bytes, offset: int, size: int) -> None:
    """The ad-hoc signature that arm64 macOS wants: a hash of every page, which must be right, and the flag that says
    that nobody signed it. Big-endian; the structures are in xnu's osfmk/kern/cs_blobs.h."""
    blob = module[offset : offset + size]
    magic, _, count = struct.unpack_from(">III", blob)
    need(magic == 0xFADE0CC0, f"signature magic 0x{magic:08x}, expected an embedded signature's 0xfade0cc0")
    index = dict(struct.unpack_from(">II", blob, 12 + 8 * i) for i in range(count))
    need(0 in index, "the signature has no code directory")
    directory = blob[index[0] :]
    fields = struct.unpack_from(">IIIIIIIIIBBBB", directory)
    magic, flags, hashes, slots, limit = fields[0], fields[3], fields[4], fields[7], fields[8]
    hash_size, hash_type, page = fields[9], fields[10], 1 << fields[12]
    need(magic == 0xFADE0C02 and bool(flags & 2), f"code directory 0x{magic:08x}, flags 0x{flags:x}: not ad hoc")
    need((hash_type, hash_size) == (2, 32), f"hash type {hash_type} of {hash_size} bytes, expected SHA-256")
    need(limit == offset and slots == -(-limit // page), f"the signature covers {limit} bytes of {offset}")
    for slot in range(slots):
        digest = hashlib.sha256(module[slot * page : min((slot + 1) * page, limit)]).digest()
        at = hashes + slot * hash_size
        need(digest == directory[at : at + hash_size], f"the signature's hash of page {slot} is wrong")


def check_macho(tag: str, module: bytes) -> str:
    """A macOS module; returns what to print about it."""
    binaries = lief.MachO.parse(io.BytesIO(module))
    need(binaries is not None and len(binaries) == 1, "not a Mach-O file for one architecture")
    macho = binaries.at(0)
    need(macho.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64, f"CPU {macho.header.cpu_type}, expected ARM64")
    oldest = tuple(macho.build_version.minos[:2])
    need(oldest == tuple(map(int, tag.split("_")[1:3])), f"the oldest macOS is {oldest}, expected {tag}")
    need(macho.build_version.platform == lief.MachO.BuildVersion.PLATFORMS.MACOS, "not for macOS")
    exports = {str(symbol.name) for symbol in macho.exported_symbols}
    exports -= {"___dso_handle", "__mh_dylib_header"}  # zig's linker adds these
    need(exports == {"_PyInit__C"}, f"exports {sorted(exports)}, expected only _PyInit__C")
    libraries = [(str(command.name), command.command) for command in macho.libraries]
    itself = [name for name, kind in libraries if kind == lief.MachO.LoadCommand.TYPE.ID_DYLIB]
    needed = [name for name, _ in libraries if name not in itself]
    need(itself == ["@rpath/_C.abi3.so"], f"calls itself {itself}, expected a name without a folder of this machine")
    need(needed == ["/usr/lib/libSystem.B.dylib"], f"needs {needed}, expected the system library only")
    for symbol in macho.imported_symbols:  # -2: look in whatever the process has loaded
        name, ordinal = str(symbol.name), symbol.binding_info.library_ordinal if symbol.has_binding_info else None
        python = name.startswith(("_Py", "__Py"))
        need(ordinal is None or (ordinal == -2) == python, f"{name} is bound to library {ordinal}")
    sections = {str(section.name) for section in macho.sections}
    need("__unwind_info" in sections, f"no __unwind_info in {sections}: torch's errors could not pass our frames")
    need(macho.has_code_signature, "no code signature: arm64 macOS would not load it")
    check_signature(module, macho.code_signature.data_offset, macho.code_signature.data_size)
    return f"macOS {oldest[0]}.{oldest[1]}, ad-hoc signature over every page"


def main() -> int:
    lief.logging.disable()
    tags = sys.argv[1:] or list(TARGETS)
    unknown = [tag for tag in tags if tag not in TARGETS]
    if unknown:
        print(f"no such platform: {unknown}; there are {list(TARGETS)}", file=sys.stderr)
        return 2
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    include = headers()
    failed = 0
    for tag in tags:
        for old in DIST.glob(f"metal_marlin-*-{tag}.whl"):
            old.unlink()
        wheel = None
        try:
            wheel = build(tag, include)
            module = check_contents(wheel)
            note = check_macho(tag, module) if tag.startswith("macosx") else check_elf(tag, module, wheel)
            run(sys.executable, "-m", "abi3audit", "--strict", wheel)
        except Failed as error:
            print(f"{tag}: FAILED: {error}", file=sys.stderr)
            failed += 1
            if wheel:
                wheel.unlink()
            continue
        size, digest = wheel.stat().st_size, hashlib.sha256(wheel.read_bytes()).hexdigest()
        print(f"{wheel.relative_to(ROOT)}: {size // 1024} KiB, {note}, abi3audit passed, sha256 {digest}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
