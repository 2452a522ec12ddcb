"""Builds the one C extension, metal_marlin._C, from csrc/.

Owns how C becomes a binary: sources, flags, the stable ABI. Metadata lives in pyproject.toml, the version in
metal_marlin/_version.py. The build needs a C11 compiler and setuptools, but no torch (PyTorch's C ABI is found at run
time), no CMake and no C++. METAL_MARLIN_CFLAGS is appended to the compiler's flags, METAL_MARLIN_LDFLAGS to the
linker's.
"""

import os
import shlex
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ABI3 = (3, 10)  # the oldest Python whose stable ABI the extension is built for

if sysconfig.get_config_var("Py_GIL_DISABLED"):
    sys.exit("metal_marlin: free-threaded Python has no stable ABI yet; build with an ordinary Python 3.10 or newer")

CFLAGS = [
    "-std=c11",
    "-O3",
    "-fvisibility=hidden",  # one exported name: PyInit__C
    "-fexceptions",  # an error thrown by torch passes through our C frames ...
    "-funwind-tables",  # ... and without unwind tables it would end the process
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",  # 8-wide vectors are passed to inlined functions only
]
LIBRARIES = ["m", "dl", "pthread"] if sys.platform.startswith("linux") else []


def sources() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.c"))


def headers() -> list[str]:
    folders = (ROOT / "csrc").rglob("*.h"), (ROOT / "metal").iterdir()
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in folder)


def inline(path: Path, seen: set[Path]) -> str:
    """The text of a Metal file with its #include "..." lines replaced by what they name, each file once."""
    seen.add(path)
    lines = []
    for line in path.read_text(encoding="ascii").splitlines():
        if not line.startswith('#include "'):
            lines.append(line)
            continue
        name = line.split('"')[1]
        found = next(folder / name for folder in (path.parent, ROOT / "csrc") if (folder / name).exists())
        if found not in seen:
            lines.append(inline(found, seen))
    return "\n".join(lines) + "\n"


def metal_text(folder: Path) -> str:
    """A C file with the text of every kernel file in metal/: torch compiles it on the user's machine, for its GPU."""
    parts = ["/* Made by setup.py from metal/. */"]
    for path in sorted((ROOT / "metal").glob("*.metal")):
        # Numbers rather than a string: C compilers need not take strings of this length.
        numbers = ",".join(str(byte) for byte in inline(path, set()).encode("ascii"))
        parts.append(f"extern const char mm_metal_text_{path.stem}[];")
        parts.append(f"const char mm_metal_text_{path.stem}[] = {{{numbers},0}};")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "metal_text.c"
    target.write_text("\n".join(parts) + "\n", encoding="ascii")
    return str(target)


class ParallelBuild(build_ext):
    """Compiles the files of the extension side by side: setuptools' own `parallel` only knows whole extensions."""

    def build_extension(self, ext: Extension) -> None:
        ext.sources = [*sources(), metal_text(Path(self.build_temp))]  # may run twice: bdist_wheel asks again
        compile_in_turn = self.compiler.compile

        def compile_all(files, *args, **kwargs):  # type: ignore[no-untyped-def]
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                objects = pool.map(lambda file: compile_in_turn([file], *args, **kwargs), files)
                return [name for names in objects for name in names]

        self.compiler.compile = compile_all
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_in_turn


setup(
    ext_modules=[
        Extension(
            "metal_marlin._C",
            sources=sources(),
            depends=headers(),
            include_dirs=["csrc"],
            define_macros=[("Py_LIMITED_API", f"0x{ABI3[0]:02X}{ABI3[1]:02X}0000")],
            py_limited_api=True,
            extra_compile_args=CFLAGS + shlex.split(os.environ.get("METAL_MARLIN_CFLAGS", "")),
            extra_link_args=shlex.split(os.environ.get("METAL_MARLIN_LDFLAGS", "")),
            libraries=LIBRARIES,
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": f"cp{ABI3[0]}{ABI3[1]}"}},
)
