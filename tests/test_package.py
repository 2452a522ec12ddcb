"""Facts about the package and its papers: one version, one portable binary, an old torch named, papers that run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

import metal_marlin
import metal_marlin._C as _C

# Processes of their own: one thread each, since pytest -n gives every core a process already.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
PAPERS = [
    ROOT / "README.md",
    *sorted(ROOT.glob("*/README.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *ROOT.glob("models/*/README.md"),
]


def blocks(paper: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", paper.read_text(encoding="utf-8"), re.S | re.M)


def python(script: str, **options: object) -> subprocess.CompletedProcess[str]:
    options.setdefault("env", ONE_THREAD)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, **options)


# ---------------------------------------------------------------- version


def test_the_version_is_said_once():
    version = metal_marlin.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert importlib.metadata.version("metal_marlin") == version
    said = [
        path
        for path in (*ROOT.glob("metal_marlin/*.py"), *ROOT.glob("csrc/**/*.[ch]"), ROOT / "setup.py")
        if version in path.read_text()
    ]
    assert said == [ROOT / "metal_marlin" / "_version.py"]
    assert f'"{version}"' not in (ROOT / "pyproject.toml").read_text()
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert newest[1] == version


def test_constraints_pin_what_pyproject_asks_for():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    asked = {re.split(r"[^A-Za-z0-9_-]", need)[0] for need in importlib.metadata.requires("metal_marlin") or []}
    missing = {name for name in asked if name.lower().replace("_", "-") not in pinned} - {
        "metal_marlin",
        "metal-marlin",
    }
    assert not missing


# ---------------------------------------------------------------- the binary


def test_the_binary_is_abi3():
    assert Path(_C.__file__).name == "_C.abi3.so"


@pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("readelf"), reason="needs readelf")
def test_the_binary_links_to_neither_torch_nor_python_and_exports_its_init_only():
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\.so", dynamic)
    assert set(needed) <= {
        "libm",
        "libdl",
        "libc",
        "libpthread",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
        "libasan",
        "libubsan",
    }
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", _C.__file__], capture_output=True, text=True, check=True
    ).stdout
    exported = [
        line.split()[-1] for line in symbols.splitlines() if re.search(r"(GLOBAL|WEAK)\s+DEFAULT\s+\d+\s", line)
    ]
    assert [name for name in exported if not name.startswith("__")] == ["PyInit__C"]


def test_importing_needs_no_transformers():
    result = python("import sys, metal_marlin; assert 'transformers' not in sys.modules, 'imported'", cwd=ROOT)
    assert result.returncode == 0, result.stderr


LOAD_EXTENSION = """
import importlib.util
spec = importlib.util.spec_from_file_location("metal_marlin._C", {file!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


@pytest.mark.parametrize("version", ["2.9.1", None])
def test_an_old_torch_is_named(tmp_path, version):
    """A process whose torch has none of the C ABI: what an older torch looks like from where the extension stands."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n" if version else "")
    result = python(LOAD_EXTENSION.format(file=_C.__file__), env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert result.returncode == 1  # an exception, not a crash
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: metal_marlin needs torch >= 2.10")
    assert str(version) in error
    assert re.search(r"lacks the symbol (aoti_)?torch_\w+, which came with torch 2\.\d+", error)


def test_no_torch_at_all(tmp_path):
    result = python("import sys; sys.modules['torch'] = None\n" + LOAD_EXTENSION.format(file=_C.__file__), cwd=tmp_path)
    assert result.returncode == 1
    assert "ModuleNotFoundError" in result.stderr
    assert "torch" in result.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------- the papers


def test_the_readmes_python_runs():
    script = "\n".join(blocks(ROOT / "README.md", "python"))
    assert script.count("import") >= 4
    result = python(script, cwd=ROOT)
    assert result.returncode == 0, result.stderr


RUN_BY_TEST_CLI = {"demo", "perplexity"}  # with these arguments; they take a few seconds each
COMMANDS = [
    shlex.split(line, comments=True)
    for block in blocks(ROOT / "README.md", "sh")
    for line in block.splitlines()
    if line.startswith("python -m metal_marlin ") and line.split()[3] not in RUN_BY_TEST_CLI
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_readmes_commands_run(command):
    arguments = [sys.executable, *command[1:]]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_readme_names_existing_targets():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {word for block in blocks(ROOT / "README.md", "sh") for word in re.findall(r"^make ([a-z]+)", block, re.M)}
    assert named
    assert named <= targets


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(paper):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", paper.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (paper.parent / target).exists(), f"{paper.name} links to {target}"


def test_the_tables_of_the_readme_are_those_of_the_code():
    """Rates, limits and level names are the C code's; the README repeats them for people."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in _C.CODEBOOKS)
    assert f"≤ {_C.MAX_EXPERTS} experts, top-k ≤ {_C.MAX_TOP_K}" in text
    halves = {rate / 2 for name in _C.CODEBOOKS for rate in _C.RATES2[name] if rate % 2}
    assert halves == {1.5, 2.5, 3.5}
    assert {name for name in _C.CODEBOOKS if any(rate % 2 for rate in _C.RATES2[name])} == {"mul1"}
    assert all({rate for rate in _C.RATES2[name] if rate % 2 == 0} == set(range(2, 17, 2)) for name in _C.CODEBOOKS)


@pytest.fixture(scope="module")
def written_format() -> dict:
    """The names that the Python of docs/format.md defines; running it checks its worked examples."""
    names: dict = {}
    for block in blocks(ROOT / "docs" / "format.md", "python"):
        exec(compile(textwrap.dedent(block), "docs/format.md", "exec"), names)
    return names


@pytest.mark.parametrize("name", _C.CODEBOOKS)
def test_the_written_codebooks_are_the_products(written_format, name):
    np.testing.assert_array_equal(
        written_format["codebook"](name).view(np.uint16), reference.codebook(name).view(np.uint16)
    )


@pytest.mark.parametrize("rate", [(2, "3inst"), (6, "mcg"), (16, "mul1"), (3, "mul1"), (7, "mul1")], ids=str)
def test_the_written_decoder_is_the_product(written_format, rate):
    rate2, name = rate
    random = np.random.default_rng(rate2)
    trellis = random.integers(-(2**15), 2**15, (8, 8, 8 * rate2), dtype=np.int16)
    suh, svh = (random.standard_normal(128).astype(np.float16) for _ in range(2))
    tensors = [torch.from_numpy(array) for array in (trellis, suh, svh)]
    np.testing.assert_array_equal(
        written_format["what"](trellis, name).astype(np.float32),
        metal_marlin.dequantize(tensors[0], None, None, codebook=name).numpy(),
    )
    want = written_format["weight"](trellis, suh, svh, name)
    got = metal_marlin.dequantize(*tensors, codebook=name).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_the_bundled_model_holds_no_code():
    names = {path.name for path in (ROOT / "models" / "tiny-moe").iterdir()}
    assert not [name for name in names if name.endswith((".py", ".bin", ".pt", ".pkl"))]
    assert "auto_map" not in json.loads((ROOT / "models" / "tiny-moe" / "config.json").read_text())
