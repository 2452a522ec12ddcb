"""`repack`: the same tensors, tiles at cache lines, and nothing written over."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from conftest import same_bits
from safetensors import safe_open
from safetensors.torch import load_file

from metal_marlin import Checkpoint, TrellisExperts, cli_repack
from metal_marlin.__main__ import main

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-moe"


def begins(file: Path) -> dict[str, int]:
    """Where each tensor of a file begins, from the format's definition."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def test_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new"
    assert main(["repack", str(MODEL), str(out)]) == 0
    assert "313 of 313 matrices begin at cache lines" in capsys.readouterr().out
    old, new = load_file(MODEL / "model.safetensors"), load_file(out / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(same_bits(old[name], new[name]) for name in old)
    places, sizes = begins(out / "model.safetensors"), {name: tensor.element_size() for name, tensor in new.items()}
    assert all(place % (64 if name.endswith(".trellis") else sizes[name]) == 0 for name, place in places.items())
    assert any(place % 2 for place in begins(MODEL / "model.safetensors").values())
    for name in ("config.json", "tokenizer.json", "quantization_config.json"):
        assert (out / name).read_bytes() == (MODEL / name).read_bytes()
    with safe_open(MODEL / "model.safetensors", "pt") as one, safe_open(out / "model.safetensors", "pt") as other:
        assert one.metadata() == other.metadata()
    assert not list(out.glob("*.partial"))
    x, ids, weights = torch.randn(3, 256), torch.tensor([[0, 5, 9, 15]] * 3), torch.rand(3, 4)
    experts = [TrellisExperts.from_experts(*Checkpoint(d).experts("model.layers.2.mlp.experts")) for d in (MODEL, out)]
    assert experts[1].up_proj.shared
    assert same_bits(experts[0](x, ids, weights), experts[1](x, ids, weights))


def test_several_files(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    made = checkpoints.build(tmp_path / "one", "qwen3_moe", num_hidden_layers=1)
    folder = made.write(tmp_path / "three", shards=3)
    assert main(["repack", str(folder), str(tmp_path / "new")]) == 0
    assert len(list((tmp_path / "new").glob("*.safetensors"))) == 3
    checkpoint = Checkpoint(tmp_path / "new")
    assert all(same_bits(checkpoint.tensor(name), tensor) for name, tensor in made.tensors.items())


@pytest.mark.parametrize("where", ["full", "itself", "inside", "file"])
def test_where_it_does_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    before = (folder / "model.safetensors").read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    (tmp_path / "file").write_text("kept")
    out = {"full": tmp_path / "full", "itself": folder, "inside": folder / "new", "file": tmp_path / "file"}[where]
    assert main(["repack", str(folder), str(out)]) == 2
    assert "expected" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before
    assert (tmp_path / "full" / "kept").read_text() == (tmp_path / "file").read_text() == "kept"


def test_a_file_that_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    copy = cli_repack._copy

    def cut_short(source: Any, *arguments: Any) -> None:
        os.truncate(folder / "model.safetensors", 10**6)
        copy(source, *arguments)

    monkeypatch.setattr(cli_repack, "_copy", cut_short)
    assert main(["repack", str(folder), str(tmp_path / "new")]) == 2
    assert "ends too early" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("size", [10**5, 8_500_000])
def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int) -> None:
    """As on a full disk: the error names the file, whether weights or tokenizer, and nothing of ours is left."""
    folder, new = Path(shutil.copytree(MODEL, tmp_path / "model")), tmp_path / "a" / "new"
    (folder / "tokenizer.json").write_bytes(b" " * 9_000_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        assert main(["repack", str(folder), str(new)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capsys.readouterr().err
    assert "File too large" in error
    assert str(new / ("model.safetensors" if size == 10**5 else "tokenizer.json")) in error
    assert not (tmp_path / "a").exists()
    new.mkdir(parents=True)
    assert main(["repack", str(folder), str(new)]) == 0


def test_no_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody else puts there meanwhile stays."""
    (tmp_path / "new").mkdir()

    def refused(self: Path, target: Path) -> None:
        (target.parent / "others").write_text("kept")
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "replace", refused)
    assert main(["repack", str(MODEL), str(tmp_path / "new")]) == 2
    assert "new/model.safetensors could not be written: Permission denied" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["others"]


def test_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5))
    assert main(["repack", str(MODEL), str(tmp_path / "new")]) == 2
    assert "5 bytes are free; expected at least" in capsys.readouterr().err
