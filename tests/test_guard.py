"""Files that are cut short while they are read: an error, not the end of the process (SIGBUS), and no result of what
was missing. What the handler does with every other SIGBUS, and threads under the sanitizers: guard.c
(test_cache_c.py)."""

from __future__ import annotations

import copy
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import same_bits

from metal_marlin import Checkpoint, TrellisExperts, TrellisLinear, ops
from metal_marlin.packed import Packed

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-moe"
LAYER = "model.layers.4.mlp.experts"
CHANGED = r"model\.safetensors has changed while it was in use"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be spoiled."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


def cut(folder: Path, size: int = 10**5) -> None:
    os.truncate(folder / "model.safetensors", size)


def layer(folder: Path, **options: Any) -> TrellisExperts:
    return TrellisExperts.from_experts(*Checkpoint(folder, **options).experts(LAYER))


def inputs(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(rows)])
    return torch.randn(rows, 256, generator=generator), ids, torch.rand(rows, 4, generator=generator)


@pytest.mark.parametrize("how", ["thread", "process"])
def test_while_the_op_runs(tmp_path: Path, how: str) -> None:
    """Somebody else cuts the file short at some time within a loop of calls: all that is returned is right."""
    want, x = layer(MODEL)(*inputs()), inputs()
    for i in range(4 if how == "thread" else 2):
        folder = tmp_path / str(i)
        folder.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copy(MODEL / name, folder / name)
        experts = layer(folder)
        assert experts.gate_proj.shared
        if how == "thread":
            timer = threading.Timer(0.02 + 0.0037 * i, cut, (folder, i * 10**5))
            timer.start()
        else:
            code = f"import os, time; time.sleep(0.05); os.truncate({str(folder / 'model.safetensors')!r}, {i * 10**5})"
            other = subprocess.Popen([sys.executable, "-S", "-c", code])
        until = time.monotonic() + 20
        with pytest.raises(RuntimeError, match=CHANGED):  # noqa: PT012
            while time.monotonic() < until:
                assert same_bits(experts(*x), want)
        if how == "thread":
            timer.join()
        else:
            assert other.wait() == 0
        with pytest.raises(RuntimeError, match=CHANGED):
            experts(*x)


def test_every_op_asks(folder: Path) -> None:
    """And an op that reads another file goes on; a file that is whole again doesn't bring the mapping back."""
    checkpoint, other = Checkpoint(folder), layer(MODEL)
    want, experts = other(*inputs()), layer(folder)
    linear = TrellisLinear.from_tensor(checkpoint.linear("lm_head"))
    w, gate = checkpoint.linear("lm_head"), checkpoint.tensor("model.embed_tokens.weight")[:16]
    x = torch.randn(2, 256, requires_grad=True)
    y = linear(x)
    mixed = experts(x, *inputs(2)[1:])
    whole = (folder / "model.safetensors").read_bytes()
    cut(folder)
    calls: list[Callable[[], Any]] = [
        lambda: linear(x),
        lambda: experts(*inputs()),
        lambda: ops.dequantize(w.trellis, w.suh, w.svh, codebook=w.codebook),
        lambda: y.sum().backward(),
        lambda: mixed.sum().backward(),
        lambda: ops.router(x, gate, top_k=4, kind="softmax_topk", renormalize=True),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=CHANGED):
            call()
    with pytest.raises(OSError, match=CHANGED):
        checkpoint.check()
    assert same_bits(other(*inputs()), want)
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(RuntimeError, match=rf"{CHANGED}: byte \d+ of {len(whole)} could not be read"):
        linear(x)
    assert same_bits(layer(folder)(*inputs()), want)


def test_written_to_while_the_op_runs(folder: Path) -> None:
    """No SIGBUS then, but weights that nobody knows."""
    experts = layer(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    with pytest.raises(RuntimeError, match="has been written to while it was in use"):
        experts(*inputs())


def test_compiled(folder: Path) -> None:
    """Hooks are compiled away, the op isn't."""
    experts = layer(folder)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    want = experts(*inputs())
    assert same_bits(compiled(*inputs()), want)
    cut(folder)
    with pytest.raises(RuntimeError, match=CHANGED):
        compiled(*inputs())


# ---------------------------------------------------------------- models and copies


def loaded(folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf

    with metal_marlin.hf.loading(**options):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("where", ["model.layers.2.mlp.gate", "model.norm", "lm_head"])
def test_within_a_forward_pass(folder: Path, where: str) -> None:
    """In the middle, before the last op, and after it."""
    model = loaded(folder)
    model.get_submodule(where).register_forward_hook(lambda *_: cut(folder))
    with torch.inference_mode(), pytest.raises((RuntimeError, OSError), match=CHANGED):
        model(torch.arange(12).view(1, 12))


def test_while_it_is_copied(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, original = loaded(folder), Packed.__deepcopy__

    def cutting(self: Packed, memo: dict[int, Any]) -> Packed:
        cut(folder)
        return original(self, memo)

    monkeypatch.setattr(Packed, "__deepcopy__", cutting)
    with pytest.raises(OSError, match=CHANGED):
        copy.deepcopy(model)


def test_a_whole_model_in_a_pickle(folder: Path) -> None:
    """Owns its weights; not written once the file has changed."""
    model, stream, ids = loaded(folder), io.BytesIO(), torch.arange(12).view(1, 12)
    torch.save(model, stream)
    with torch.inference_mode():
        want = model(ids).logits
    cut(folder)
    with pytest.raises(OSError, match=CHANGED):
        torch.save(model, io.BytesIO())
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    with torch.inference_mode():
        assert same_bits(again(ids).logits, want)
    assert type(again.model.layers[0].mlp.gate) is type(model.model.layers[0].mlp.gate)


@pytest.mark.parametrize("copied", [False, True])
def test_while_it_loads(folder: Path, monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    pytest.importorskip("transformers")
    from metal_marlin import hf

    check = hf.check_load

    def cutting(*arguments: Any) -> None:
        check(*arguments)
        cut(folder)

    monkeypatch.setattr(hf, "check_load", cutting)
    with pytest.raises(OSError, match=CHANGED):
        loaded(folder, copy=copied, populate=False)


def test_tensors_that_are_copied(folder: Path) -> None:
    checkpoint, copied = Checkpoint(folder), Checkpoint(folder, copy=True)
    odd = next(
        name
        for name, info in checkpoint.tensors.items()
        if info.dtype == "F16" and checkpoint.mapping.place(info) % 2 and info.begin > 2 * 10**5
    )
    assert copied.tensor(odd).isfinite().all()
    cut(folder)
    for read in (lambda: copied.tensor("lm_head.trellis"), lambda: checkpoint.tensor(odd)):
        with pytest.raises(OSError, match=CHANGED):
            read()


# ---------------------------------------------------------------- beside others' handlers

BESIDE = """
import faulthandler, mmap, os, shutil, signal, sys, tempfile
from pathlib import Path
when, then = sys.argv[1:]
if when == "before":
    faulthandler.enable()
import torch
from metal_marlin import Checkpoint, TrellisLinear
with tempfile.TemporaryDirectory() as folder:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path("models/tiny-moe") / name, folder)
    linear = TrellisLinear.from_tensor(Checkpoint(folder).linear("lm_head"))
    if when == "after":
        faulthandler.enable()
    if when == "off":
        faulthandler.enable()
        faulthandler.disable()
    os.truncate(Path(folder) / "model.safetensors", 0)
    for _ in range(3):
        try:
            linear(torch.zeros(1, 256))
        except RuntimeError as error:
            assert "has changed while it was in use: 0 bytes" in str(error), error
            print("refused", flush=True)
if then == "fault":
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * mmap.PAGESIZE)
        theirs = mmap.mmap(file.fileno(), 2 * mmap.PAGESIZE)
        file.truncate(0)
        print(theirs[mmap.PAGESIZE])
elif then == "kill":
    os.kill(os.getpid(), signal.SIGBUS)
elif then == "python":
    signal.signal(signal.SIGBUS, lambda *_: print("called"))
    os.kill(os.getpid(), signal.SIGBUS)
"""


@pytest.mark.parametrize(
    ("when", "then"),
    [("never", "fault"), ("before", "fault"), ("after", "fault"), ("off", "kill"), ("after", "python")],
)
def test_beside_faulthandler(when: str, then: str) -> None:
    """Whichever comes first: our file is an error, a stranger's is still the end, and faulthandler tells of it once."""
    command = [sys.executable, "-c", BESIDE, when, then]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONFAULTHANDLER"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=100)
    assert done.stdout == "refused\n" * 3 + ("called\n" if then == "python" else ""), done.stderr
    assert done.returncode == (0 if then == "python" else -signal.SIGBUS), done.stderr
    assert done.stderr.count("Fatal Python error: Bus error") == (then == "fault" and when in ("before", "after"))
