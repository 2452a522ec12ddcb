"""Zero copy: packed weights as views of the mapped files; what happens to copies, and when a file changes."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import Backend, same_bits
from safetensors.torch import load_file

from metal_marlin import Checkpoint, TrellisExperts, TrellisStack
from metal_marlin.mapping import MappedFiles

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "tiny-moe"
LAYER = "model.layers.0.mlp.experts"


def within(tensor: torch.Tensor, mapping: MappedFiles) -> bool:
    """Whether a tensor's bytes are the mapping's own."""
    first = mapping.span(0, 1, torch.uint8).data_ptr()
    return first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= first + mapping.nbytes


def layer(checkpoint: Checkpoint, prefix: str = LAYER) -> TrellisExperts:
    return TrellisExperts.from_experts(*checkpoint.experts(prefix))


def inputs(width: int = 256, experts: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:4] for _ in range(5)])
    return torch.randn(5, width, generator=generator), ids, torch.rand(5, 4, generator=generator)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be spoiled."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


# ---------------------------------------------------------------- views


def test_tensors_are_views_of_the_file() -> None:
    """All but small tensors at odd addresses, as this file has them, and equal to what safetensors reads."""
    want = load_file(MODEL / "model.safetensors")
    checkpoint = Checkpoint(MODEL)
    assert set(checkpoint.tensors) == set(want)
    shared = 0
    for name, tensor in want.items():
        got = checkpoint.tensor(name)
        assert same_bits(got, tensor), name
        if within(got, checkpoint.mapping):
            shared += got.nbytes
        else:
            assert not name.endswith(".trellis")
            assert got.data_ptr() % got.element_size() == 0
    assert shared > 0.95 * checkpoint.nbytes


def test_experts_are_one_view(cpu: Backend) -> None:
    """Of the file, markers and scales in between; the same bits as a copy back to back, at every SIMD level."""
    checkpoint = Checkpoint(MODEL)
    shared, copied = layer(checkpoint), layer(Checkpoint(MODEL, copy=True))
    for name in ("gate_proj", "up_proj", "down_proj"):
        stack, other = getattr(shared, name), getattr(copied, name)
        assert stack.shared
        assert within(stack.trellis, checkpoint.mapping)
        assert not other.shared
        assert other.table[:, 0].tolist() == [e * other.trellis.numel() // 16 for e in range(16)]
        assert all(same_bits(stack.expert(e).trellis, other.expert(e).trellis) for e in range(16))
        assert stack.suh.data_ptr() % 2 == 0
    assert same_bits(shared(*inputs()), copied(*inputs()))


def test_the_gpu_takes_tiles_at_multiples_of_16(emulated: Any) -> None:
    with pytest.raises(RuntimeError, match="multiple of 16, as tiles are stored"):
        layer(Checkpoint(MODEL))(*inputs())


def test_experts_in_several_files(tmp_path: Path) -> None:
    """One view even so: files are mapped side by side."""
    made = checkpoints.build(tmp_path / "one", "qwen3_moe")
    checkpoint = Checkpoint(made.write(tmp_path / "three", shards=3))
    experts, want = layer(checkpoint), layer(Checkpoint(made.write()))
    assert experts.gate_proj.shared
    assert within(experts.gate_proj.trellis, checkpoint.mapping)
    x = inputs(192, experts.num_experts)
    assert same_bits(experts(*x), want(*x))


def test_writing_to_a_view_leaves_the_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    checkpoint = Checkpoint(folder)
    checkpoint.linear("lm_head").trellis.fill_(7)
    assert int(checkpoint.tensor("lm_head.trellis")[0, 0, 0]) == 7
    assert (folder / "model.safetensors").read_bytes() == before
    checkpoint.check()


def test_tensors_outlive_the_checkpoint() -> None:
    want = Checkpoint(MODEL, copy=True).linear("lm_head").trellis
    with Checkpoint(MODEL) as checkpoint:
        trellis = checkpoint.linear("lm_head").trellis
    del checkpoint
    assert same_bits(trellis, want)


# ---------------------------------------------------------------- copies of what is shared


def test_copies_hold_their_own_bytes_only() -> None:
    experts = layer(Checkpoint(MODEL))
    want, own = experts(*inputs()), 16 * 256 * 256 * 2 // 8
    stream = io.BytesIO()
    torch.save(experts, stream)
    assert len(stream.getvalue()) < 4 * own
    stream.seek(0)
    for twin in (
        copy.deepcopy(experts),
        torch.load(stream, weights_only=False),
        pickle.loads(pickle.dumps(experts)),
    ):
        assert not twin.gate_proj.shared
        assert twin.gate_proj.trellis.untyped_storage().nbytes() == own
        assert same_bits(twin(*inputs()), want)
    assert experts.gate_proj.shared
    assert experts.to("cpu").gate_proj.shared  # nothing moved
    assert experts.bfloat16().gate_proj.shared
    moved = experts.to("meta")
    assert moved.gate_proj.trellis.nbytes == own
    assert moved.gate_proj.table.is_meta


def test_state_dicts_between_shared_and_own() -> None:
    """Either loads into the other; a table that leads out of its trellis does not."""
    shared, own = layer(Checkpoint(MODEL)), layer(Checkpoint(MODEL, copy=True))
    want = own(*inputs())
    state = shared.state_dict()
    empty = copy.deepcopy(own)
    empty.gate_proj.trellis.zero_()
    empty.load_state_dict(state)
    assert same_bits(empty(*inputs()), want)
    other = layer(Checkpoint(MODEL), "model.layers.1.mlp.experts")
    assert not same_bits(other(*inputs()), want)
    other.load_state_dict(own.state_dict())
    assert same_bits(other(*inputs()), want)
    for offset in (-1, 10**9):
        table = state["gate_proj.table"].clone()
        table[3, 0] = offset
        with pytest.raises(RuntimeError, match=r"expected all tiles within gate_proj\.trellis"):
            empty.load_state_dict({**state, "gate_proj.table": table})


def test_experts_that_are_not_of_one_checkpoint_are_copied() -> None:
    gate, _, _ = Checkpoint(MODEL).experts(LAYER)
    again, _, _ = Checkpoint(MODEL).experts(LAYER)
    assert TrellisStack.from_experts(gate).shared
    assert not TrellisStack.from_experts([gate[0], *again[1:]]).shared
    assert not TrellisStack.from_experts([*gate[:1], *Checkpoint(MODEL, copy=True).experts(LAYER)[0][1:]]).shared


# ---------------------------------------------------------------- transformers, and files that change


def loaded(folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf

    with metal_marlin.hf.loading(**options):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(torch.arange(12).view(1, 12)).logits
    return out


def test_a_model_is_views() -> None:
    model = loaded(MODEL)
    tiles = [(name, b) for name, b in model.named_buffers() if name.endswith("trellis")]
    hooks = [hook for hook in model._forward_pre_hooks.values() if hasattr(hook, "mapping")]
    assert len(hooks) == 1
    assert len(tiles) == 6 * (4 + 3) + 1
    assert all(within(tensor, hooks[0].mapping) for _, tensor in tiles)
    assert same_bits(logits(model), logits(loaded(MODEL, copy=True)))
    assert same_bits(logits(copy.deepcopy(model)), logits(model))


CHANGES = {
    "truncated": (lambda file: os.truncate(file, 10**6), r"has changed .*: 1000000 bytes, expected \d+"),
    "grown": (lambda file: os.truncate(file, 10**7), "has changed .*: 10000000 bytes"),
    "rewritten": (lambda file: os.utime(file, (1, 1)), "has been written to while it was in use"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_is_an_error(folder: Path, change: str) -> None:
    """Not the end of the process (SIGBUS), and not a wrong result; what was copied goes on."""
    spoil, message = CHANGES[change]
    model, copied, checkpoint = loaded(folder), loaded(folder, copy=True), Checkpoint(folder)
    deep = copy.deepcopy(model)
    want = logits(model)
    spoil(folder / "model.safetensors")
    with pytest.raises(OSError, match=rf"model\.safetensors {message}"):
        logits(model)
    with pytest.raises(OSError, match=message), torch.inference_mode():
        model.model(torch.arange(12).view(1, 12))
    with pytest.raises(OSError, match=message):
        copy.deepcopy(model)
    with pytest.raises(OSError, match=message):
        checkpoint.check()
    with pytest.raises(OSError, match=message):
        checkpoint.mapping.populate()
    assert same_bits(logits(copied), want)
    assert same_bits(logits(deep), want)


def test_a_replaced_file_goes_on(folder: Path) -> None:
    """Deleting or replacing, as downloads do, leaves the old bytes to those who have them."""
    model = loaded(folder)
    want = logits(model)
    (folder / "model.safetensors").unlink()
    assert same_bits(logits(model), want)


def test_truncated_between_header_and_mapping(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.close()
    os.truncate(folder / "model.safetensors", 10**6)
    with pytest.raises(OSError, match="was replaced or written to after its header was read"):
        checkpoint.tensor("lm_head.trellis")


def test_replaced_between_header_and_mapping(folder: Path) -> None:
    """By a file that looks the same."""
    checkpoint = Checkpoint(folder)
    checkpoint.close()
    shutil.copy(folder / "model.safetensors", folder / "other")
    os.replace(folder / "other", folder / "model.safetensors")
    with pytest.raises(OSError, match="was replaced or written to after its header was read"):
        checkpoint.tensor("lm_head.trellis")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_load() -> None:
    """A child reads the same bytes from the same pages."""
    trellis = Checkpoint(MODEL).linear("lm_head").trellis
    want = zlib.crc32(trellis.numpy())
    child = os.fork()
    if not child:
        os._exit(int(zlib.crc32(trellis.numpy()) != want))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_resident_bytes(tmp_path: Path) -> None:
    """A checkpoint of 0.2 GB takes its size once, of which little is the process's own."""
    pytest.importorskip("transformers")
    from benchmarks.memory import checkpoint

    size = checkpoint.write(tmp_path, 1).stat().st_size
    command = [sys.executable, "-m", "benchmarks.memory.worker", "ours", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    # 30 MB: what loading any model adds to the process, libraries' pages among it; large beside 0.2 GB
    assert 0.9 * size < found["rss"] < 1.05 * size + 30e6
    assert found["anonymous"] < 0.05 * size + 30e6
