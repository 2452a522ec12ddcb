"""EXL3 folders that from_pretrained must refuse: a clear exception each, before a weight is read or any code is run."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from checkpoints import Made
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

import metal_marlin.hf

EXPERTS = "model.layers.0.mlp.experts"
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder in which nothing is wrong, for the tests to spoil copies of."""
    return checkpoints.build(tmp_path_factory.mktemp("good"), "qwen3_moe", num_hidden_layers=1)


@pytest.fixture
def made(good: Made, tmp_path: Path) -> Made:
    return Made(tmp_path, None, dict(good.tensors), json.loads(json.dumps(good.config)))


@pytest.fixture(autouse=True)
def no_weights_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before the loader starts."""
    monkeypatch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", started)


def started(*args: Any, **kwargs: Any) -> None:
    pytest.fail("the loader started")


def load(directory: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **kwargs)


def int16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int16)


def float16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


def drop(*names: str) -> Callable[[Made], None]:
    """Removes every tensor whose name begins with one of `names`."""

    def spoil(made: Made) -> None:
        made.tensors = {key: value for key, value in made.tensors.items() if not key.startswith(names)}

    return spoil


def put(**tensors: torch.Tensor) -> Callable[[Made], None]:
    """Sets tensors of Q."""
    return lambda made: made.tensors.update({f"{Q}.{name}": value for name, value in tensors.items()})


def rename(old: str, new: str) -> Callable[[Made], None]:
    def spoil(made: Made) -> None:
        made.tensors = {key.replace(old, new): value for key, value in made.tensors.items()}

    return spoil


def config(**changes: Any) -> Callable[[Made], None]:
    return lambda made: made.config.update(changes)


BAD: dict[str, tuple[Callable[[Made], object], str]] = {
    # the format, whatever the model
    "trellis without suh": (drop(f"{Q}.suh"), r"q_proj\.suh is missing; the group has mul1, svh, trellis"),
    "wrong marker": (put(mul1=torch.tensor(7, dtype=torch.int32)), r"q_proj\.mul1: is 7; expected -2082680531"),
    "both markers": (put(mcg=torch.tensor(0, dtype=torch.int32)), "q_proj has the markers mcg and mul1"),
    "width": (put(trellis=int16(16, 16, 35)), r"q_proj\.trellis: shape is \[16, 16, 35\], that is 2\.1875 bits"),
    "half rate with mcg": (rename("q_proj.mul1", "q_proj.mcg"), r"q_proj\.mcg: is -2082680531; expected -877912083"),
    # the model
    "rows": (
        put(trellis=int16(8, 16, 32), suh=float16(128)),
        r"q_proj\.trellis: is a matrix of 128 inputs and 256 outputs; expected 256 and 256, which is 192 and 192",
    ),
    "columns": (put(trellis=int16(16, 24, 32), svh=float16(384)), "256 inputs and 384 outputs; expected 256 and 256"),
    "config's hidden_size": (
        config(hidden_size=320),
        r"k_proj\.trellis: is a matrix of 256 inputs and 128 outputs; expected 384 and 128, which is 320 and 96",
    ),
    "config's vocab_size": (config(vocab_size=600), r"lm_head\.trellis: .*expected 256 and 640, which is 192 and 600"),
    "an extra bias": (put(bias=float16(256)), r"q_proj\.bias: is extra; the layer has no bias"),
    "a missing bias": (config(attention_bias=True), r"self_attn\.k_proj\.bias: is missing; the layer has a bias"),
    "an extra layer": (rename("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"), r"is extra; .* has no layer"),
    "a missing layer": (
        drop(f"{Q}."),
        r"layers\.0\.self_attn\.q_proj\.weight: is missing; Qwen3MoeForCausalLM needs it",
    ),
    "a slice": (
        rename("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.slice.0"),
        r"q_proj\.slice\.0: is a slice .*slices aren't supported",
    ),
    "a missing expert": (
        drop(f"{EXPERTS}.3."),
        r"mlp\.experts\.3\.gate_proj\.trellis: is missing; other matrices of these experts are quantized",
    ),
    "a missing projection": (drop(f"{EXPERTS}.5.down_proj"), r"mlp\.experts\.5\.down_proj\.trellis: is missing"),
    "too many experts": (
        config(num_experts=4, num_local_experts=4),
        r"experts\.4\.gate_proj\.trellis: is extra; the layer has 4 experts",
    ),
    "too few experts": (config(num_experts=8, num_local_experts=8), r"experts\.6\.gate_proj\.trellis: is missing"),
    "experts' size": (
        config(moe_intermediate_size=200),
        r"experts\.0\.down_proj\.trellis: .* of 128 inputs and 256 outputs; expected 256 and 256, which is 200",
    ),
    "experts' bias": (
        lambda made: made.tensors.update({f"{EXPERTS}.2.up_proj.bias": float16(128)}),
        r"experts\.2\.up_proj\.bias: is extra; the layer has no bias",
    ),
    "experts' names": (
        rename("experts.0.up_proj", "experts.0.middle"),
        r"experts\.0\.middle: expected a projection named gate_proj, up_proj, down_proj or w1, w3, w2",
    ),
    "two ways of naming": (rename("experts.0.up_proj", "experts.0.w3"), r"w3.*is extra|is missing"),
    "some experts legacy": (
        lambda made: (
            drop(f"{EXPERTS}.1.up_proj.suh")(made),
            made.tensors.update({f"{EXPERTS}.1.up_proj.su": int16(16)}),
        ),
        r"experts\.\*\.up_proj: some experts have su and sv, others suh and svh; expected one of the two",
    ),
    "activation": (config(hidden_act="relu"), r"experts: Qwen3MoeExperts: its activation is none of those"),
    # plain tensors
    "a missing norm": (drop("model.norm.weight"), r"model\.norm\.weight: is missing; Qwen3MoeForCausalLM needs it"),
    "a missing router": (drop("model.layers.0.mlp.gate."), r"mlp\.gate\.weight: is missing"),
    "an extra tensor": (
        lambda made: made.tensors.update({"model.layers.0.mlp.extra.weight": float16(3)}),
        r"mlp\.extra\.weight: is extra; Qwen3MoeForCausalLM has no",
    ),
    "a norm's shape": (
        lambda made: made.tensors.update({"model.norm.weight": float16(7)}),
        r"model\.norm\.weight: has shape \[7\]; expected \[192\]",
    ),
    "a router's shape": (
        lambda made: made.tensors.update({"model.layers.0.mlp.gate.weight": float16(5, 192)}),
        r"mlp\.gate\.weight: has shape \[5, 192\]; expected \[6, 192\]",
    ),
    # config
    "nothing quantized": (
        lambda made: setattr(made, "tensors", {k: v for k, v in made.tensors.items() if ".weight" in k}),
        r"config\.json says exl3, but no tensor is named \*\.trellis",
    ),
    "no quantization_config": (
        lambda made: made.config.pop("quantization_config"),
        r"model\.safetensors: holds .*\.trellis, but config\.json has no quantization_config; expected one with",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(made: Made, case: str) -> None:
    spoil, message = BAD[case]
    spoil(made)
    with pytest.raises(ValueError, match=message):
        load(made.write())


def test_the_good_one_starts(made: Made) -> None:
    """The loader is reached if nothing is wrong: the refusals above are not for another reason."""
    with pytest.raises(pytest.fail.Exception, match="the loader started"):
        load(made.write())


# ---------------------------------------------------------------- files


def test_truncated_file(made: Made) -> None:
    file = made.write() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: has .* bytes of data; .* the file is truncated"):
        load(made.directory)


def test_malformed_header(made: Made) -> None:
    file = made.write() / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:12] = b"]]]]"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors: malformed JSON"):
        load(made.directory)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../x.safetensors", "outside"),
        ("absent.safetensors", "missing"),
        ("x.bin", r"x\.bin; expected a \.safetensors"),
    ],
)
def test_bad_index(made: Made, shard: str, message: str) -> None:
    made.write(shards=2)
    file = made.directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][f"{Q}.trellis"] = shard
    file.write_text(json.dumps(index))
    save_file({f"{Q}.trellis": int16(1)}, made.directory.parent / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        load(made.directory)


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("dtype_in_config", [True, False])
def test_pickles_are_never_read(made: Made, tmp_path: Path, dtype_in_config: bool) -> None:
    if not dtype_in_config:  # then transformers would look into the weights for it
        del made.config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"only pickles \(pytorch_model\.bin\), which are never read"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------- code


def test_code_in_a_known_models_folder_is_not_run(made: Made) -> None:
    """Many folders carry their original repository's auto_map; transformers' own class is used instead."""
    plant(made)
    with pytest.raises(pytest.fail.Exception, match="the loader started"):
        load(made.directory)
    assert not (made.directory / "ran").exists()


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": False}])
def test_code_of_an_unknown_model_is_not_run(made: Made, kwargs: dict[str, bool]) -> None:
    made.config["model_type"] = "unheard_of"
    plant(made)
    with pytest.raises(ValueError, match=r"unheard_of|custom code"):
        load(made.directory, **kwargs)
    assert not (made.directory / "ran").exists()


def plant(made: Made) -> None:
    made.config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    made.write()
    (made.directory / "evil.py").write_text(f"open({str(made.directory / 'ran')!r}, 'w').close()\n")


def test_a_state_dict_is_refused(good: Made, made: Made) -> None:
    with pytest.raises(ValueError, match="expected one instead of a state_dict"):
        type(good.dense).from_pretrained(None, config=AutoConfig.from_pretrained(made.write()), state_dict=made.tensors)


def test_quantizing_on_the_fly_is_refused(made: Made) -> None:
    del made.config["quantization_config"]
    with pytest.raises(ValueError, match=r"config\.json has none; expected one of method exl3"):
        load(made.write(), quantization_config=metal_marlin.hf.Exl3Config())
