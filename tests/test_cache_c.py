"""The cache of experts and the guard of mapped files as C programs (cache.c, guard.c): threads, evictions, files that
change, others' signal handlers, under the sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from test_levels import native_compiler

ROOT = Path(__file__).resolve().parent.parent
MEMORY = [ROOT / "csrc" / "memory" / name for name in ("map.c", "guard.c", "cache.c")]
BUILDS = {
    "plain": ["-O2"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


@pytest.mark.parametrize("name", ["cache", "guard"])
@pytest.mark.parametrize("build", BUILDS)
def test_stress(tmp_path: Path, build: str, name: str) -> None:
    """No wrong byte, no lost pin, no data race, no wait without an end; no signal that is lost, or comes to the wrong
    handler."""
    compiler, flags = native_compiler(), BUILDS[build]
    empty, program = tmp_path / "empty.c", tmp_path / name
    empty.write_text("int main(void) { return 0; }\n")
    if subprocess.run([*compiler, *flags, str(empty), "-o", str(program)], capture_output=True).returncode:
        pytest.skip(f"{compiler[0]} has no {flags[-1]}")
    environment = os.environ | {"LD_PRELOAD": "", "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"}
    if subprocess.run([str(program)], capture_output=True, env=environment).returncode:
        pytest.skip(f"programs built with {flags[-1]} don't run here")
    sources = [str(ROOT / "tests" / f"{name}.c"), *map(str, MEMORY)]
    command = [*compiler, "-std=c11", *flags, f"-I{ROOT / 'csrc'}", *sources, "-lm", "-lpthread"]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = subprocess.run([str(program), str(tmp_path)], capture_output=True, text=True, env=environment, timeout=120)
    print(run.stdout, run.stderr)
    assert run.returncode == 0, run.stdout + run.stderr[-3000:]
    assert run.stdout.endswith("0 wrong\n")
