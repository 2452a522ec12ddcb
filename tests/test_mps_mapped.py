"""Packed tiles that an Apple GPU sees in the mapped files, on the emulator: nothing is copied, whatever goes first is
there as long as it is needed, and what can't be done is said.

Where a tensor lies is asked of the system (/proc/self/maps), what a file holds of the format's definition.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import mps_loading
import numpy as np
import pytest
import torch
from conftest import same_bits

import metal_marlin._C as _C
from metal_marlin import Checkpoint, TrellisExperts, TrellisLinear, TrellisStack, cli_info, cli_run, mps_mapped
from metal_marlin.__main__ import main
from metal_marlin.mps_mapped import GpuTiles, Placement, windows

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-moe"
EXPERTS = "model.layers.2.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def repacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, its tiles at multiples of 64 bytes."""
    out = tmp_path_factory.mktemp("repacked") / "new"
    assert main(["repack", str(MODEL), str(out)]) == 0
    return out


@pytest.fixture
def gpu(fake_metal: Any, emulated: Any) -> Iterator[Any]:
    """The emulator, which is on; CPU tensors are a GPU's. Afterwards, nothing may be mapped for the GPU."""
    import emulator

    if not hasattr(emulator.torch_library(), "torch_from_blob"):
        pytest.skip(f"torch {torch.__version__} has no torch_from_blob; 2.11 has")
    assert _C.map_window_problem() is None
    yield emulated
    mps_loading.COPIES.clear()
    emulated.synchronize()
    gc.collect()
    assert _C.map_window_bytes() == 0
    assert not regions(".safetensors")


def regions(suffix: str) -> list[tuple[int, int]]:
    """Addresses at which files whose names end so are mapped shared and read only, of the system."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_, name = line.split(maxsplit=5)
        if permissions == "r--s" and name.endswith(suffix):
            first, last = (int(address, 16) for address in addresses.split("-"))
            found.append((first, last))
    return found


def in_file(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements are those of a file's page."""
    first = tensor.data_ptr()
    return any(a <= first and first + tensor.nbytes <= b for a, b in regions(".safetensors"))


def stored(file: Path) -> dict[str, np.ndarray]:
    """The trellises of a file, read by the format's definition."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: np.frombuffer(data[start:][slice(*entry["data_offsets"])], np.int16).reshape(entry["shape"])
        for name, entry in header.items()
        if name.endswith(".trellis")
    }


def groups_of(checkpoint: Checkpoint, prefix: str = EXPERTS) -> dict[str, list[Any]]:
    count = checkpoint.count_experts(prefix)
    return {p: [checkpoint.tensors[f"{prefix}.{e}.{p}.trellis"] for e in range(count)] for p in PROJECTIONS}


def placed(checkpoint: Checkpoint, prefix: str = EXPERTS) -> tuple[GpuTiles, TrellisExperts]:
    """A layer's experts, tiles where the file has them."""
    tiles = GpuTiles(checkpoint.mapping, groups_of(checkpoint, prefix), "cpu")
    stacks = []
    for name, experts in zip(PROJECTIONS, checkpoint.experts(prefix), strict=True):
        stack = TrellisStack.from_experts(experts)
        if name in tiles:
            stack.trellis = tiles.tensor(name)
        stacks.append(stack)
    return tiles, TrellisExperts(*stacks)


def copied(folder: Path, prefix: str = EXPERTS) -> TrellisExperts:
    return TrellisExperts.from_experts(*Checkpoint(folder, copy=True).experts(prefix))


def batch(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(tokens)])
    return torch.randn(tokens, 256, generator=generator), ids, torch.rand(tokens, 4, generator=generator)


# ---------------------------------------------------------------- results, and where the tiles are


@pytest.mark.parametrize("tokens", [1, 11])
def test_same_bits_as_a_copy(gpu: Any, repacked: Path, tokens: int) -> None:
    """Decode and prefill kernels; of decode every load is watched: within the tensors, aligned."""
    with Checkpoint(repacked) as checkpoint:
        tiles, experts = placed(checkpoint)
    own = copied(repacked)
    assert all(in_file(getattr(experts, name).trellis) for name in PROJECTIONS)
    assert not any(in_file(getattr(own, name).trellis) for name in PROJECTIONS)
    with gpu.configured(check=tokens == 1, races=False):
        got, want = experts(*batch(tokens)), own(*batch(tokens))
        gpu.synchronize()
    assert same_bits(got, want)
    assert want.abs().max() > 0
    assert tiles.placement == Placement(mapped=3 * 16 * 16384, copied={}, buffers=1)


def test_one_matrix(gpu: Any, repacked: Path) -> None:
    checkpoint, name = Checkpoint(repacked), "model.layers.1.self_attn.q_proj"
    tiles = GpuTiles(checkpoint.mapping, {name: [checkpoint.tensors[f"{name}.trellis"]]}, "cpu")
    linear, own = (TrellisLinear.from_tensor(checkpoint.linear(name)) for _ in range(2))
    linear.trellis = tiles.tensor(name).view(linear.trellis.shape)
    own.trellis = own.trellis.clone()
    assert in_file(linear.trellis)
    x = torch.randn(3, 256)
    got, want = linear(x), own(x)
    gpu.synchronize()
    assert same_bits(got, want)


def load(monkeypatch: pytest.MonkeyPatch, gpu: Any, folder: Path, **options: Any) -> tuple[Any, list[tuple[int, str]]]:
    """(model, what the loader logged), loaded to the emulated GPU."""
    loading = pytest.importorskip("transformers.core_model_loading")
    if not hasattr(loading, "_materialize_copy"):
        pytest.skip("transformers' loader moves tensors by another function than the one that is emulated")
    logged: list[tuple[int, str]] = []
    handler = logging.Handler(logging.INFO)
    monkeypatch.setattr(handler, "emit", lambda record: logged.append((record.levelno, record.getMessage())))
    logger = logging.getLogger("transformers.metal_marlin")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        model = mps_loading.load(gpu, folder, **options)
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
    return model, logged


def trellises(model: Any) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("trellis")}


def test_a_model(gpu: Any, repacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through transformers: all tiles in the file, results the same bits as of a model that copies all."""
    matrices = stored(repacked / "model.safetensors")
    model, logged = load(monkeypatch, gpu, repacked)
    assert not [t for t in mps_loading.COPIES if t.dtype == torch.int16]
    assert {t.dtype for t in mps_loading.COPIES} == {torch.float32, torch.float16, torch.int32, torch.int64}
    other, silent = load(monkeypatch, gpu, repacked, copy=True)
    nbytes = sum(m.nbytes for m in matrices.values())
    assert sum(t.nbytes for t in mps_loading.COPIES if t.dtype == torch.int16) == nbytes
    assert model.metal_marlin_placement == Placement(nbytes, {}, 1)
    assert logged == [(logging.INFO, f"on cpu, {model.metal_marlin_placement}")]
    assert silent == []
    assert not hasattr(other, "metal_marlin_placement")
    assert len(trellises(model)) == 6 * (4 + 3) + 1
    assert all(in_file(t) for t in trellises(model).values())
    assert not any(in_file(t) for t in trellises(other).values())
    for module_name, module in model.named_modules():
        if isinstance(module, TrellisLinear):
            assert np.array_equal(module.trellis.numpy(), matrices[f"{module_name}.trellis"])
        if isinstance(module, TrellisStack):
            path, projection = module_name.rsplit(".", 1)
            for e in range(module.num_experts):
                assert np.array_equal(module.expert(e).trellis.numpy(), matrices[f"{path}.{e}.{projection}.trellis"])
    x = torch.randn(1, 2, 256)
    got, want = (m.model.layers[3].mlp(m.model.layers[3].self_attn.q_proj(x)) for m in (model, other))
    assert same_bits(got, want)


# ---------------------------------------------------------------- who goes first


@pytest.mark.parametrize("order", [*itertools.permutations(["checkpoint", "tiles", "experts"])], ids="-".join)
def test_a_tensor_keeps_its_pages(gpu: Any, repacked: Path, tmp_path: Path, order: tuple[str, ...]) -> None:
    """Whatever goes first, even the file's name: the tensor that is left shows what was in the file."""
    file = Path(shutil.copytree(repacked, tmp_path / "model")) / "model.safetensors"
    want = stored(file)[f"{EXPERTS}.7.up_proj.trellis"]
    kept: dict[str, Any] = {"checkpoint": Checkpoint(file.parent)}
    kept["tiles"], kept["experts"] = placed(kept["checkpoint"])
    expert = kept["experts"].up_proj.expert(7).trellis
    file.unlink()
    for name in order:
        del kept[name]
        assert _C.map_window_bytes() > 0
        assert np.array_equal(expert.numpy(), want)
    del expert
    assert _C.map_window_bytes() == 0
    assert not regions(".safetensors (deleted)")


def test_what_the_gpu_still_reads(gpu: Any, repacked: Path) -> None:
    """An op is encoded and every tensor dropped before it runs: pages stay until it is done."""
    own = copied(repacked)(*batch(2))
    gpu.synchronize()
    with gpu.configured(delay_us=200_000, commit_every=1):
        got = placed(Checkpoint(repacked))[1](*batch(2))
        gc.collect()
        assert _C.map_window_bytes() > 0
        gpu.synchronize()
    assert same_bits(got, own)
    gc.collect()
    assert _C.map_window_bytes() == 0


def test_a_model_goes(gpu: Any, repacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With cycles among its hooks; a copy owns its weights, and so does what state is loaded into. No file changes."""
    before = (repacked / "model.safetensors").read_bytes()
    model, _ = load(monkeypatch, gpu, repacked)
    layer = model.model.layers[0]
    twin = copy.deepcopy(layer)
    assert not any(in_file(t) for t in trellises(twin).values())
    state = {name: torch.zeros_like(t) if "trellis" in name else t for name, t in layer.self_attn.state_dict().items()}
    layer.self_attn.load_state_dict(state)
    assert not any(in_file(t) or t.any() for t in trellises(layer.self_attn).values())
    layer.mlp.experts.load_state_dict(twin.mlp.experts.state_dict())
    assert not any(in_file(t) for t in trellises(layer).values())
    assert same_bits(layer.mlp.experts.up_proj.trellis, twin.mlp.experts.up_proj.trellis)
    assert (repacked / "model.safetensors").read_bytes() == before
    for part in model.model.layers:
        part.half()
    assert all(t.dtype == torch.int16 for t in trellises(model).values())
    assert sum(map(in_file, trellises(model).values())) == 5 * 7 + 1
    del model, layer, twin, state, part
    gc.collect()
    assert _C.map_window_bytes() == 0


# ---------------------------------------------------------------- what can't stay, and why


def check_copied(model: Any, logged: list[tuple[int, str]], reason: str) -> None:
    """All tiles were copied, for one reason, and a warning says so."""
    placement = model.metal_marlin_placement
    assert placement.mapped == placement.buffers == 0
    ((found, nbytes),) = placement.copied.items()
    assert reason in found
    assert nbytes == sum(m.nbytes for m in stored(MODEL / "model.safetensors").values())
    assert logged == [(logging.WARNING, f"on cpu, {placement}")]
    assert nbytes == sum(t.nbytes for t in mps_loading.COPIES if t.dtype == torch.int16)
    mps_loading.COPIES.clear()
    assert not any(in_file(t) for t in trellises(model).values())


def test_a_file_of_exllamav3(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, logged = load(monkeypatch, gpu, MODEL)
    check_copied(model, logged, "multiples of 32 bytes; python -m metal_marlin repack")
    with torch.inference_mode():
        assert model(torch.arange(3)[None]).logits.isfinite().all()


@pytest.mark.parametrize("answer", [1, 2], ids=["nil", "nil-after-deallocator"])
def test_metal_makes_no_buffer(
    gpu: Any, fake_metal: Any, repacked: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    with fake_metal.faults(no_buffer=answer):
        model, logged = load(monkeypatch, gpu, repacked)
        with pytest.raises(RuntimeError, match=r"^Metal made no buffer over 16384 bytes of a mapped file$"):
            Checkpoint(repacked).mapping.gpu_window(0, 16384, "cpu")
    check_copied(model, logged, "Metal made no buffer over ")
    assert _C.map_window_bytes() == 0


@pytest.mark.parametrize("answer", [1, 2], ids=["fails", "fails-after-deleter"])
def test_torch_makes_no_tensor(gpu: Any, fake_metal: Any, repacked: Path, answer: int) -> None:
    checkpoint = Checkpoint(repacked)
    with fake_metal.faults(no_tensor=answer):
        tiles = GpuTiles(checkpoint.mapping, groups_of(checkpoint), "cpu")
    ((reason, nbytes),) = tiles.placement.copied.items()
    assert "PyTorch made no tensor of a Metal buffer" in reason
    assert (nbytes, tiles.placement.mapped, _C.map_window_bytes()) == (3 * 16 * 16384, 0, 0)


def test_no_device(gpu: Any, fake_metal: Any, repacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_metal.faults(no_device=True):
        model, logged = load(monkeypatch, gpu, repacked)
    check_copied(model, logged, "no Metal device: MTLCreateSystemDefaultDevice() is nil")


def test_torch_without_from_blob(gpu: Any, repacked: Path) -> None:
    """As torch 2.10: the symbol isn't there. `info` says so, and so does the placement."""
    checkpoint = Checkpoint(repacked)
    _C.use_mps_emulator(str(gpu.build(set_bytes=False)))
    reason = "this torch lacks the symbol torch_from_blob, which came with torch 2.11"
    assert mps_mapped.problem() == reason
    assert cli_info.facts()["weights"]["mps"] == f"one copy: {reason}"
    tiles = GpuTiles(checkpoint.mapping, groups_of(checkpoint), "cpu")
    assert tiles.placement == Placement(copied={reason: 3 * 16 * 16384})
    with pytest.raises(RuntimeError, match=f"^{reason}$"):
        checkpoint.mapping.gpu_window(0, 1, "cpu")


def test_info(gpu: Any) -> None:
    assert "python -m metal_marlin repack" in cli_info.facts()["weights"]["mps"]
    _C.use_mps_emulator(None)
    assert cli_info.facts()["weights"]["mps"] == "one copy: there is no MPS backend in this process"


@pytest.mark.parametrize(("most", "buffers"), [(1 << 20, 6), (3 << 20, 2)])
def test_several_buffers(
    gpu: Any, fake_metal: Any, repacked: Path, monkeypatch: pytest.MonkeyPatch, most: int, buffers: int
) -> None:
    with fake_metal.faults(max_buffer=most):
        model, logged = load(monkeypatch, gpu, repacked)
    assert model.metal_marlin_placement.copied == {}
    assert model.metal_marlin_placement.buffers >= buffers
    assert all(last - first <= most for first, last in regions(".safetensors"))
    assert all(in_file(t) for t in trellises(model).values())
    experts = model.model.layers[2].mlp.experts
    got, want = experts(*batch(2)), copied(repacked)(*batch(2))
    gpu.synchronize()
    assert same_bits(got, want)
    assert len(logged) == 1


def test_larger_than_any_buffer(gpu: Any, fake_metal: Any, repacked: Path) -> None:
    """A layer's experts don't fit into one buffer; smaller matrices do."""
    checkpoint, name = Checkpoint(repacked), "model.layers.1.self_attn.q_proj"
    groups = {**groups_of(checkpoint), name: [checkpoint.tensors[f"{name}.trellis"]]}
    with fake_metal.faults(max_buffer=65536):
        tiles = GpuTiles(checkpoint.mapping, groups, "cpu")
        with pytest.raises(RuntimeError, match=r"^a window of 69632 bytes; Metal's buffers have at most 65536 here$"):
            checkpoint.mapping.gpu_window(0, 69000, "cpu")
    ((reason, nbytes),) = tiles.placement.copied.items()
    assert reason.endswith("larger than Metal's largest buffer of 65536 bytes")
    assert (nbytes, tiles.placement.mapped, tiles.placement.buffers) == (3 * 16 * 16384, 16384, 1)
    assert name in tiles
    assert "up_proj" not in tiles


def test_a_layer_in_two_files(gpu: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made = checkpoints.build(tmp_path / "one", "qwen3_moe", num_hidden_layers=1)
    folder = made.write(tmp_path / "three", shards=3)
    assert main(["repack", str(folder), str(tmp_path / "new")]) == 0
    checkpoint = Checkpoint(tmp_path / "new")
    groups = groups_of(checkpoint, "model.layers.0.mlp.experts")
    tiles = GpuTiles(checkpoint.mapping, groups, "cpu")
    apart = [name for name, infos in groups.items() if len({info.file for info in infos}) > 1]
    assert apart
    assert [name for name in groups if name not in tiles] == apart
    assert list(tiles.placement.copied) == ["a layer's experts lie in several files, and a Metal buffer lies over one"]


def test_a_file_that_changes(gpu: Any, repacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check before every forward pass, and before a window is made, are those of the CPU."""
    folder = Path(shutil.copytree(repacked, tmp_path / "model"))
    model, _ = load(monkeypatch, gpu, folder)
    checkpoint = Checkpoint(folder)
    mapping = checkpoint.mapping
    os.truncate(folder / "model.safetensors", 100_000)
    with pytest.raises(OSError, match=r"model\.safetensors has changed while it was in use"):
        model(torch.arange(3)[None])
    with pytest.raises(OSError, match=r"model\.safetensors has changed while it was in use"):
        GpuTiles(mapping, groups_of(checkpoint), "cpu")


@pytest.mark.parametrize("found", [True, False], ids=["accelerate", "no-accelerate"])
def test_command_line(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    """`--device mps` loads straight to the GPU where transformers can."""
    transformers = pytest.importorskip("transformers")
    seen: list[Any] = []

    class Model(torch.nn.Module):
        config = transformers.PretrainedConfig()

        def to(self, device: str) -> Model:
            seen.append(device)
            return self

    def from_pretrained(path: str, **options: Any) -> Model:
        seen.append(options.get("device_map"))
        return Model()

    monkeypatch.setattr(cli_run, "mps_problem", lambda: None)
    monkeypatch.setattr(cli_run.importlib.util, "find_spec", lambda name: object() if found else None)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: None)
    cli_run.load(MODEL, "float32", "mps")
    assert seen == ["mps" if found else None, "mps"]


# ---------------------------------------------------------------- bad input


def test_bad_arguments(gpu: Any, repacked: Path) -> None:
    mapping = Checkpoint(repacked).mapping
    for begin, end in ((-1, 5), (5, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"begin is {begin}, end is {end}; expected 0 <= begin < end"):
            mapping.gpu_window(begin, end, "cpu")
    for begin, end in ((0, mapping.nbytes + 1), (mapping.nbytes + 4096, mapping.nbytes + 4097)):
        with pytest.raises(
            OSError, match=f"bytes {begin} to {end} of a mapping of {mapping.nbytes}; expected 1 or more"
        ):
            mapping.gpu_window(begin, end, "cpu")
    with pytest.raises(ValueError, match="invalid PyCapsule"):
        _C.map_window(object(), 0, 1)
    number, place, nbytes = _C.map_window(mapping._map, 70_000, 70_001)
    assert (place % 4096, nbytes % 4096, place <= 70_000 < place + nbytes) == (0, 0, True)
    tensor = torch.ops.metal_marlin.mapped_window(torch.empty(0), number)
    assert (tensor.dtype, tensor.nbytes, in_file(tensor)) == (torch.int16, nbytes, True)
    for wrong in (number, 0, -1, 2**62):
        with pytest.raises(RuntimeError, match="window is not a number that map_window has just returned"):
            torch.ops.metal_marlin.mapped_window(torch.empty(0), wrong)
    assert _C.map_window_holds(tensor.data_ptr())
    assert not _C.map_window_holds(torch.empty(4).data_ptr())
    _C.use_mps_emulator(None)
    with pytest.raises(RuntimeError, match="like is on the CPU; expected a tensor on the MPS device"):
        torch.ops.metal_marlin.mapped_window(torch.empty(0), 1)


def test_windows() -> None:
    """Random spans: each whole in one window of its file, none larger than Metal's largest."""
    rng, page = np.random.default_rng(5), _C.page_bytes()
    for most in (8 * page, 64 * page):
        spans, files = {}, {}
        for i in range(300):
            file, begin = i % 3, int(rng.integers(0, 900 * page))
            spans[str(i)] = (file * 1000 * page + begin, file * 1000 * page + begin + int(rng.integers(1, 7 * page)))
            files[str(i)] = file
        found = windows(spans, files, most)
        assert sorted(name for *_, names in found for name in names) == sorted(spans)
        for begin, end, names in found:
            assert -(-end // page) * page - begin // page * page <= most
            assert len({files[name] for name in names}) == 1
            assert all(begin <= spans[name][0] and spans[name][1] <= end for name in names)
        assert len(found) < len(spans)
    near = {"a": (0, 100), "b": (100, 200), "c": (mps_mapped.WINDOW_BYTES, mps_mapped.WINDOW_BYTES + 1)}
    assert [names for *_, names in windows(near, dict.fromkeys(near), 1 << 40)] == [["a", "b"], ["c"]]
