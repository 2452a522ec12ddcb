"""TrellisTensor and Checkpoint: what they read, and a table of files that must be refused with a clear message."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import reference as ref
import torch
from safetensors.torch import save_file

import metal_marlin._C as _C
from metal_marlin import Checkpoint, TrellisTensor
from metal_marlin.trellis import unpack_signs

PREFIX = "model.layers.0.mlp.experts"
Tensors = dict[str, Any]  # None: left out


def packed(k: int = 128, n: int = 256, rate2: int = 4, codebook: str = "mul1", bias: bool = False) -> ref.Packed:
    return ref.random_packed(np.random.default_rng([k, n, rate2]), k, n, rate2, codebook, bias)


def tensor_of(p: ref.Packed) -> TrellisTensor:
    parts = (torch.from_numpy(part) for part in (p.trellis, p.suh, p.svh))
    return TrellisTensor(*parts, p.codebook, None if p.bias is None else torch.from_numpy(p.bias), "q_proj")


def sample() -> Tensors:
    """Two experts with rates and codebooks of their own, a head with a bias, a plain tensor."""
    tensors = {"model.norm.weight": torch.ones(128, dtype=torch.bfloat16)}
    for e, rates in enumerate((((3, "mul1"), (4, "mcg"), (5, "mul1")), ((8, "3inst"), (6, "mul1"), (2, "mcg")))):
        for name, rate in zip(checkpoints.PROJECTIONS, rates, strict=True):
            sizes = (256, 128) if name == "down_proj" else (128, 256)
            tensors |= checkpoints.group(f"{PREFIX}.{e}.{name}", packed(*sizes, *rate))
    return tensors | checkpoints.group("lm_head", packed(rate2=12, bias=True))


def write(directory: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """A one-file checkpoint; tensors that are None are left out."""
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config or {"quantization_config": {"quant_method": "exl3"}}))
    return directory


# ---------------------------------------------------------------- reading


def test_tensor_properties() -> None:
    tensor = tensor_of(packed(rate2=5, bias=True)).validate()
    assert (tensor.k, tensor.n, tensor.bits, tensor.rate2) == (128, 256, 2.5, 5)
    assert tensor.nbytes == 128 * 256 * 5 // 16 + 2 * (128 + 256 + 256)


def test_checkpoint_reads_what_was_written(tmp_path: Path) -> None:
    tensors = sample()
    with Checkpoint(write(tmp_path, tensors)) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors)
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        assert len(checkpoint.groups) == 7
        assert checkpoint.quantization == {"quant_method": "exl3"}
        head = checkpoint.groups["lm_head"]
        assert (head.k, head.n, head.bits, head.codebook, head.has_bias, head.legacy) == (
            128,
            256,
            6,
            "mul1",
            True,
            False,
        )
        loaded = checkpoint.linear("lm_head")
        for part in ("trellis", "suh", "svh", "bias"):
            assert torch.equal(getattr(loaded, part), tensors[f"lm_head.{part}"])
        gate, up, down = checkpoint.experts(PREFIX)
        assert [(t.bits, t.codebook) for t in (*gate, *up, *down)] == [
            (1.5, "mul1"), (4, "3inst"), (2, "mcg"), (3, "mul1"), (2.5, "mul1"), (1, "mcg"),
        ]  # fmt: skip
        for name, message in (
            ("lm_tail", "has no quantized matrix lm_tail"),
            ("model.norm", "has no quantized matrix"),
        ):
            with pytest.raises(ValueError, match=message):
                checkpoint.linear(name)
        with pytest.raises(ValueError, match=r"no quantized matrix .*experts\.0\.w1"):
            checkpoint.experts(PREFIX, ("w1", "w3", "w2"))
        with pytest.raises(ValueError, match="has no tensor nothing"):
            checkpoint.tensor("nothing")


def test_dequantize_of_a_file_is_the_oracles(tmp_path: Path) -> None:
    tensors = sample()
    loaded = Checkpoint(write(tmp_path, tensors)).linear(f"{PREFIX}.0.gate_proj")
    arrays = [tensors[f"{PREFIX}.0.gate_proj.{part}"].numpy() for part in ("trellis", "suh", "svh")]
    got = torch.ops.metal_marlin.dequantize(loaded.trellis, loaded.suh, loaded.svh, loaded.codebook, 128, 256)
    np.testing.assert_allclose(got.numpy(), ref.dequantize(*arrays, "mul1"), atol=1e-5)


def test_shards(tmp_path: Path) -> None:
    made = checkpoints.Made(tmp_path, None, sample(), {})
    made.write(shards=3)
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) == 3
    assert set(checkpoint.tensors) == set(made.tensors)
    for e, tensor in enumerate(checkpoint.experts(PREFIX)[0]):
        assert torch.equal(tensor.trellis, made.tensors[f"{PREFIX}.{e}.gate_proj.trellis"])


def test_legacy_signs(tmp_path: Path) -> None:
    """Bit b of word w is channel 16w + b, and a set bit means -1."""
    tensors = sample()
    words = torch.tensor([0, -1, 1, 2, -32768, 0x5555, 3, 0x7FFF], dtype=torch.int16)
    want = [-1.0 if (int(word) >> b) & 1 else 1.0 for word in words for b in range(16)]
    assert unpack_signs(words).tolist() == want
    del tensors["lm_head.suh"]
    checkpoint = Checkpoint(write(tmp_path, tensors | {"lm_head.su": words}))
    assert checkpoint.groups["lm_head"].legacy
    assert checkpoint.linear("lm_head").suh.tolist() == want
    assert checkpoint.linear("lm_head").suh.dtype == torch.float16


def test_linked_files(tmp_path: Path) -> None:
    """The hub's cache holds links to files elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write(tmp_path / "blobs", sample())
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "model.safetensors")
    assert len(Checkpoint(tmp_path / "snapshot").groups) == 7


# ---------------------------------------------------------------- refusals: tensors in memory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": "nf4"}, "q_proj: codebook is 'nf4'; expected one of 3inst, mcg, mul1"),
        ({"trellis": torch.zeros(8, 16, 32)}, "q_proj.trellis: is contiguous torch.float32; expected"),
        ({"trellis": torch.zeros(8, 16, 64, dtype=torch.int16)[..., ::2]}, "strided torch.int16; expected contiguous"),
        ({"trellis": torch.zeros(16, 32, dtype=torch.int16)}, r"shape is \[16, 32\]; expected \[k/16, n/16"),
        ({"trellis": torch.zeros(7, 16, 32, dtype=torch.int16)}, "k and n multiples of 128"),
        ({"trellis": torch.zeros(8, 0, 32, dtype=torch.int16)}, r"shape is \[8, 0, 32\]"),
        ({"trellis": torch.zeros(8, 16, 35, dtype=torch.int16)}, "2.1875 bits; .* for mul1, bits one of 1, 1.5"),
        ({"trellis": torch.zeros(8, 16, 72, dtype=torch.int16)}, "that is 4.5 bits"),
        ({"trellis": torch.zeros(8, 16, 144, dtype=torch.int16)}, "that is 9 bits"),
        ({"trellis": torch.zeros(8, 16, 40, dtype=torch.int16), "codebook": "mcg"}, "2.5 bits; .* for mcg, bits"),
        ({"suh": torch.zeros(256, dtype=torch.float16)}, r"q_proj.suh: is .* \[256\]; expected torch.float16 \[128\]"),
        ({"svh": torch.zeros(256)}, r"q_proj.svh: is torch.float32 \[256\]; expected torch.float16 \[256\]"),
        ({"suh": None}, "q_proj.suh: is missing"),
        ({"bias": torch.zeros(200, dtype=torch.float16)}, r"q_proj.bias: is .* \[200\]; expected .* \[256\]"),
        ({"svh": torch.zeros(256, dtype=torch.float16, device="meta")}, "svh: is on meta; its trellis is on cpu"),
    ],
)  # fmt: skip
def test_bad_tensors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tensor_of(packed()), **change).validate()


# ---------------------------------------------------------------- refusals: tensors in a file

GATE = f"{PREFIX}.0.gate_proj"


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: None})


def with_(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


def int32(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int32)


BAD_GROUPS = {
    "no suh": (without(f"{GATE}.suh"), r"gate_proj\.suh is missing; the group has mul1, svh, trellis"),
    "no svh": (without(f"{GATE}.svh"), r"gate_proj\.svh is missing"),
    "no trellis": (without(f"{GATE}.trellis"), r"gate_proj\.trellis is missing; the group has mul1, suh, svh"),
    "a marker alone": (with_("model.norm.mcg", int32(1)), r"model\.norm\.trellis is missing; the group has mcg"),
    "su next to suh": (with_(f"{GATE}.su", torch.zeros(8, dtype=torch.int16)), r"gate_proj\.su is extra"),
    "weight next to trellis": (with_(f"{GATE}.weight", torch.zeros(1)), r"gate_proj\.weight is extra"),
    "scale": (with_(f"{GATE}.scale", torch.zeros(1)), r"gate_proj\.scale is extra"),
    "both markers": (
        with_(f"{GATE}.mcg", int32(0xCBAC1FED - 2**32)),
        r"gate_proj has the markers mcg and mul1; expected at most one",
    ),
    "another multiplier": (
        with_(f"{GATE}.mul1", int32(12345)),
        r"gate_proj\.mul1: is 12345; expected -2082680531, the multiplier of mul1",
    ),
    "a marker of another dtype": (
        with_(f"{GATE}.mul1", torch.tensor(-2082680531)),
        r"gate_proj\.mul1: is I64 \[\]; expected I32 \[\]",
    ),
    "a marker of another shape": (with_(f"{GATE}.mul1", int32(0).view(1)), r"mul1: is I32 \[1\]; expected I32 \[\]"),
    "width": (
        with_(f"{GATE}.trellis", torch.zeros(8, 16, 35, dtype=torch.int16)),
        r"gate_proj\.trellis: shape is \[8, 16, 35\], that is 2\.1875 bits",
    ),
    "half rate with mcg": (
        with_(f"{PREFIX}.0.up_proj.trellis", torch.zeros(8, 16, 40, dtype=torch.int16)),
        r"up_proj\.trellis: shape is \[8, 16, 40\], that is 2\.5 bits; .*for mcg, bits one of 1, 2, 3",
    ),
    "half rate with 3inst": (without(f"{GATE}.mul1"), r"1\.5 bits; .*for 3inst, bits one of"),
    "sizes": (
        with_(f"{GATE}.trellis", torch.zeros(9, 16, 32, dtype=torch.int16)),
        r"shape is \[9, 16, 32\]; expected \[k/16, n/16, 16 \* bits\] with k and n multiples of 128",
    ),
    "rank": (with_(f"{GATE}.trellis", torch.zeros(8, 32, dtype=torch.int16)), r"shape is \[8, 32\]; expected"),
    "dtype": (
        with_(f"{GATE}.trellis", torch.zeros(8, 16, 32)),
        r"trellis: is F32 \[8, 16, 32\]; expected I16 \[8, 16, 32\]",
    ),
    "length of suh": (
        with_(f"{GATE}.suh", torch.zeros(256, dtype=torch.float16)),
        r"suh: is F16 \[256\]; expected F16 \[128\]",
    ),
    "dtype of svh": (with_(f"{GATE}.svh", torch.zeros(256)), r"svh: is F32 \[256\]; expected F16 \[256\]"),
    "length of bias": (
        with_("lm_head.bias", torch.zeros(200, dtype=torch.float16)),
        r"lm_head\.bias: is F16 \[200\]; expected F16 \[256\]",
    ),
}


@pytest.mark.parametrize("case", BAD_GROUPS)
def test_bad_groups(tmp_path: Path, case: str) -> None:
    spoil, message = BAD_GROUPS[case]
    tensors = sample()
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        Checkpoint(write(tmp_path, tensors))


def test_a_missing_expert(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in sample().items() if f"{PREFIX}.1.up_proj" not in name}
    with pytest.raises(
        ValueError, match=r"no quantized matrix .*experts\.1\.up_proj; another projection has 2 experts"
    ):
        Checkpoint(write(tmp_path, tensors)).experts(PREFIX)


def test_many_problems_are_one_message(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in sample().items() if not name.endswith("suh")}
    with pytest.raises(ValueError, match="suh is missing") as caught:
        Checkpoint(write(tmp_path, tensors))
    assert str(caught.value).count("suh is missing") == 7
    tensors = {f"{i}.trellis": torch.zeros(1, dtype=torch.int16) for i in range(20)}
    with pytest.raises(ValueError, match=r"\.\.\. and 32 more"):
        Checkpoint(write(tmp_path, tensors))


# ---------------------------------------------------------------- refusals: files


def header(entries: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


BAD_FILES = {
    "empty": (b"", r"the header's length is 0; expected at most 0 in a file of 0 bytes"),
    "seven bytes": (b"\0" * 7, "in a file of 7 bytes"),
    "length beyond the file": (header({}, length=1000), "the header's length is 1000; expected at most 2"),
    "length beyond any file": (header({}, length=2**63), "expected at most 2"),
    "not JSON": (header(b"{'a': 1}"), "malformed JSON"),
    "not text": (header(b"\xff\xfe\x00\x01"), "malformed JSON"),
    "a thousand brackets": (header(b"[" * 200_000), "malformed JSON"),
    "a list": (header([1, 2]), "the header is a list; expected an object"),
    "a name twice": (
        header(
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "'a' appears twice",
    ),
    "no offsets": (header({"a": {"dtype": "U8", "shape": [1]}}), "a: is .* expected dtype, shape and data_offsets"),
    "entry is a number": (header({"a": 1}), "a: is 1 in the header"),
    "unknown dtype": (header({"a": entry(0, 1, "Q4")}, b"x"), "a: dtype is 'Q4'; expected one of"),
    "dtype is a list": (header({"a": entry(0, 1, [])}, b"x"), r"a: dtype is \[\]"),
    "negative size": (header({"a": entry(0, 1, shape=[-1])}, b"x"), r"a: shape is \[-1\]; expected a list of sizes"),
    "size is true": (header({"a": entry(0, 1, shape=[True])}, b"x"), r"a: shape is \[True\]"),
    "offsets are three": (
        header({"a": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, b"x"),
        r"\[0, 1, 2\]; expected \[begin",
    ),
    "offsets backwards": (header({"a": entry(0, 1) | {"data_offsets": [1, 0]}}, b"x"), "expected 1 bytes for U8"),
    "more than the shape": (
        header({"a": entry(0, 4, shape=[3])}, b"xxxx"),
        r"is \[0, 4\]; expected 3 bytes for U8 \[3\]",
    ),
    "huge shape": (header({"a": entry(0, 4, shape=[2**62, 2**62])}, b"xxxx"), "expected .* bytes for U8"),
    "overlap": (
        header({"a": entry(0, 3), "b": entry(2, 4)}, b"xxxx"),
        "b: data_offsets begin at 2, which overlaps the tensor before it; expected 3",
    ),
    "hole": (header({"a": entry(0, 1), "b": entry(2, 4)}, b"xxxx"), "b: .* leaves a hole; expected 1"),
    "truncated": (
        header({"a": entry(0, 100)}, b"x" * 60),
        "has 60 bytes of data; its header describes 100: the file is truncated",
    ),
    "out of range": (header({"a": entry(0, 2**62)}, b"xxxx"), "the file is truncated"),
    "trailing": (header({"a": entry(0, 1)}, b"xx"), "has 2 bytes of data; its header describes 1: bytes follow"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str) -> None:
    content, message = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    file = write(tmp_path, {"a.weight": torch.arange(16.0)}) / "model.safetensors"
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            Checkpoint(tmp_path)


def test_random_damage_is_an_error_or_harmless(tmp_path: Path, rng: np.random.Generator) -> None:
    """Whatever bytes a header holds, opening it either works or raises ValueError, and what opens can be read."""
    file = write(tmp_path, sample()) / "model.safetensors"
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    end = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    for _ in range(300):
        damaged = whole.copy()
        damaged[rng.integers(0, end, rng.integers(1, 4))] = rng.integers(0, 256)
        file.write_bytes(damaged.tobytes())
        try:
            with Checkpoint(tmp_path) as checkpoint:
                for prefix in checkpoint.groups:
                    checkpoint.linear(prefix)
        except ValueError:
            continue


# ---------------------------------------------------------------- refusals: folders


def index(directory: Path, weight_map: Any, **files: Tensors) -> None:
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


ONE = {"a": torch.zeros(1)}
BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda d: None, r"holds no weights; expected model\.safetensors or"),
    "pickles only": (
        lambda d: (d / "pytorch_model.bin").write_bytes(b"\x80\x04."),
        r"only pickles \(pytorch_model\.bin\)",
    ),
    "missing shard": (
        lambda d: index(d, {"a": "x.safetensors"}),
        r"index\.json: names x\.safetensors, which is missing",
    ),
    "shard above": (
        lambda d: index(d, {"a": "../x.safetensors"}),
        r"index\.json: names .*\.\./x\.safetensors, which is outside",
    ),
    "shard elsewhere": (
        lambda d: index(d, {"a": "/etc/x.safetensors"}),
        r"names /etc/x\.safetensors, which is outside",
    ),
    "shard is a pickle": (lambda d: index(d, {"a": "x.bin"}), r"names x\.bin; expected a \.safetensors file"),
    "tensor not in its shard": (
        lambda d: index(d, {"a": "x.safetensors", "b": "x.safetensors"}, x=ONE),
        r"expected b in x\.safetensors, which lacks it",
    ),
    "tensor in two shards": (
        lambda d: index(d, {"a": "x.safetensors", "b": "y.safetensors"}, x=ONE, y={**ONE, "b": torch.zeros(1)}),
        r"y\.safetensors: a is also in x\.safetensors",
    ),
    "empty index": (lambda d: index(d, {}), "names no files"),
    "index without a map": (lambda d: index(d, None), r"expected an object with weight_map"),
    "index maps to numbers": (lambda d: index(d, {"a": 1}), r"expected an object with weight_map"),
    "index is not JSON": (lambda d: (d / "model.safetensors.index.json").write_text("{"), "malformed JSON"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{,}"), r"config\.json: malformed JSON"),
    "config is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        r"config\.json: is a list; expected an object",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folders(tmp_path: Path, case: str) -> None:
    spoil, message = BAD_FOLDERS[case]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        Checkpoint(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        Checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "quantization_config is missing; expected one with quant_method 'exl3'"),
        ({"quantization_config": 3}, "quantization_config is 3"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'; expected 'exl3'"),
        ({"text_config": {"quantization_config": {}}}, "quant_method is None; expected 'exl3'"),
    ],
)
def test_bad_configs(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    checkpoint = Checkpoint(write(tmp_path, sample(), config))
    with pytest.raises(ValueError, match=message):
        checkpoint.quantization  # noqa: B018


def test_the_formats_constants() -> None:
    """The test's own spelling of the markers agrees with the extension's."""
    assert {name: _C.MULTIPLIERS[name] - 2**32 for name in checkpoints.MARKERS} == checkpoints.MARKERS
