"""The quantizer: what it writes is what the oracle decodes, loads everywhere, survives interruptions, names bad input.

Most tests put a greedy search in the place of the real one: its codes are legal but poor, and it takes no time at any
SIMD level. Decoding is the oracle's (reference.py).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import transformers
from checkpoints import FAMILIES
from safetensors.torch import load_file, save_file

import metal_marlin.hf  # noqa: F401 -- registers EXL3
from metal_marlin import _C, Checkpoint
from metal_marlin.__main__ import main
from metal_marlin.cli_quantize import choose_codebook, read_recipe
from metal_marlin.fit import Free
from metal_marlin.quantize import Options, calibrate, matrix, quantize, rates, work
from metal_marlin.quantize.source import Source
from metal_marlin.weights import REPORT_FILE

TEXT = "".join(chr(32 + (7 * i + i * i // 11) % 90) for i in range(6000))
PLENTY = Options(4, 6, "mul1", uniform=True, rows=8, length=64)
FAST = len(_C.cpu_levels()) > 1  # the real search takes a quarter of a second for a tile without SIMD


@cache
def order() -> torch.Tensor:
    """Where in a 16 x 16 tile, row by row, the t-th weight is."""
    return torch.tensor([16 * row + column for row, column in map(reference.position, range(256))])


def greedy(tiles: torch.Tensor, rate2: int, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes for every weight in turn the new bits that come closest; the last are zeros, so that the ring closes."""
    values = reference.codebook(codebook).astype(np.float32)
    want = tiles.reshape(-1, 256)[:, order()].numpy()
    end = reference.last_bit(rate2)
    state, states = np.zeros(len(want), np.int64), np.empty(want.shape, np.int64)
    for t in range(256):
        new = end[t] - (end[t - 1] if t else 0)
        branches = 1 if end[-1] - end[t] < 16 else 2**new
        after = (state[:, None] << new & 0xFFFF) + np.arange(branches)
        best = np.abs(values[after] - want[:, t : t + 1]).argmin(1)
        state = states[:, t] = after[np.arange(len(want)), best]
    result = torch.empty(len(want), 256)
    result[:, order()] = torch.from_numpy(values[states])
    return torch.from_numpy(reference.pack(states, rate2).copy()), result.view(-1, 16, 16)


def make_tokenizer(directory: Path) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {"<end>": 0, "<unk>": 1} | {chr(32 + i): 2 + i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    fast.save_pretrained(directory)


def make_model(directory: Path, family: str = "qwen3_moe", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """An unquantized folder of a random model, and the model."""
    torch.manual_seed(0)
    config = FAMILIES[family].make_config(**changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3 or name.endswith(("gate.weight", "router.weight", "bias")):
                parameter.normal_(0, 0.05)
            parameter.data = parameter.data.to(dtype)  # not the buffers
    model.save_pretrained(directory)
    make_tokenizer(directory)
    return model


SMALL = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "model"
    make_model(directory, **SMALL)
    return directory


def silent(line: str) -> None:
    pass


def convert(source: Path, out: Path, options: Options = PLENTY, **kwargs: Any) -> dict[str, Any]:
    return quantize(source, out, options, **{"text": TEXT, "search": greedy, "say": silent, **kwargs})


def decoded(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> np.ndarray:
    """[in, out] of a stored matrix by the oracle."""
    found = checkpoint.linear(name)
    dense = reference.dequantize(found.trellis.numpy(), found.suh.numpy(), found.svh.numpy(), found.codebook)
    return dense[: shape[0], : shape[1]]


# ---------------------------------------------------------------- the method


def correlated(rng: np.random.Generator, tokens: int, k: int) -> torch.Tensor:
    """Inputs with a few large and many dependent channels, float32 [tokens, k]."""
    mix = rng.normal(size=(k // 4, k)) * np.exp(rng.normal(size=k))
    return torch.from_numpy(rng.normal(size=(tokens, k // 4)) @ mix + 0.3 * rng.normal(size=(tokens, k))).float()


def proxy(w: np.ndarray, q: np.ndarray, x: np.ndarray) -> float:
    return float((((w - q).T @ x.T) ** 2).sum() / ((w.T @ x.T) ** 2).sum())


@pytest.mark.parametrize(("rate2", "codebook"), [(4, "mul1"), (5, "mul1"), (6, "mcg"), (4, "3inst")])
def test_codes_stand_for_what_is_returned(rng, rate2, codebook):
    w = torch.from_numpy(rng.normal(size=(2, 128, 256)) * np.exp(rng.normal(size=(2, 128, 1)))).float()
    x = correlated(rng, 500, 128)
    coded, dense = matrix.quantize_matrices(w, (x.T @ x)[None] / 500, rate2, codebook, [1, 2], search=greedy)
    for one, want, original in zip(coded, dense, w, strict=True):
        assert one.trellis.shape == (8, 16, 8 * rate2)
        found = reference.dequantize(one.trellis.numpy(), one.suh.numpy(), one.svh.numpy(), codebook)
        np.testing.assert_allclose(want, found, rtol=0, atol=1e-5 * np.abs(found).max())
        assert one.proxy == pytest.approx(proxy(original.numpy(), found, x.numpy()), rel=1e-3)


def test_feedback_is_a_block_ldl(rng):
    x = correlated(rng, 500, 64).double()
    m = (x.T @ x / 500)[None]
    unit = matrix.feedback(m.float())[0].double() + torch.eye(64)
    assert not unit.triu(1).any()
    inverse = torch.linalg.inv(unit)
    d = inverse @ m[0] @ inverse.T
    blocks = torch.block_diag(*[d[i : i + 16, i : i + 16] for i in range(0, 64, 16)])
    torch.testing.assert_close(d, blocks, rtol=0, atol=1e-4 * float(d.max()))


def test_second_moments_pay(rng):
    """The same matrix with and without what its inputs say; uniform noise in the place of a search."""
    w, x = torch.from_numpy(rng.normal(size=(1, 256, 128))).float(), correlated(rng, 2000, 256)
    errors = []
    for m in (None, (x.T @ x)[None] / 2000):
        _, dense = matrix.quantize_matrices(w, m, 4, "mul1", [1], search=matrix.gaussian_search())
        errors.append(proxy(w[0].numpy(), dense[0].numpy(), x.numpy()))
    assert errors[1] < 0.6 * errors[0]


def test_dead_channels_are_exactly_zero(rng):
    w = torch.from_numpy(rng.normal(size=(1, 128, 128))).float()
    w[:, :, 7] = 0
    w[:, 5] = 0
    coded, dense = matrix.quantize_matrices(w, None, 4, "mul1", [1], search=greedy)
    assert coded[0].svh[7] == 0
    assert not dense[0, :, 7].any()
    zeros, nothing = matrix.quantize_matrices(0 * w, None, 4, "mul1", [1], search=greedy)
    assert not nothing.any()
    assert bool(torch.isfinite(zeros[0].suh).all())


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
def test_scales_of_any_size_fit_float16(rng, size):
    w = torch.from_numpy(rng.normal(size=(1, 128, 128)) * size).float()
    coded, _ = matrix.quantize_matrices(w, None, 6, "mul1", [1], search=greedy)
    assert coded[0].weight < 0.25
    assert bool(torch.isfinite(coded[0].suh).all() and torch.isfinite(coded[0].svh).all())


@pytest.mark.parametrize("size", [1e-8, 1e-12, 1e-15, 1e-20, 1e-38])
def test_one_tiny_channel_spoils_nothing(rng, size):
    """An input or output whose weights have decayed to almost nothing, as in trained models; a scale each must fit."""
    whole = torch.from_numpy(rng.normal(size=(1, 128, 128))).float()
    x = correlated(rng, 500, 128)
    for place in ((0, 5), (0, slice(None), 5)):
        w = whole.clone()
        w[place] *= size
        coded, _ = matrix.quantize_matrices(w, (x.T @ x)[None] / 500, 6, "mul1", [1], search=greedy)
        assert coded[0].proxy < 0.3
        assert bool(torch.isfinite(coded[0].suh).all() and torch.isfinite(coded[0].svh).all())


@pytest.mark.parametrize("size", [0, 1e-30, 1e-18, 1e-13, 1e-10, 1e6, 1e8])
def test_a_matrix_of_any_size_codes(rng, size):
    """With second moments too: a matrix of zeros (a layer that is switched off) and one beyond float16."""
    x = correlated(rng, 500, 128)
    w = torch.from_numpy(rng.normal(size=(1, 128, 128))).float() * size
    coded, dense = matrix.quantize_matrices(w, (x.T @ x)[None] / 500, 6, "mul1", [1], search=greedy)
    assert bool(torch.isfinite(coded[0].suh).all() and torch.isfinite(coded[0].svh).all())
    assert coded[0].suh.all()
    if size < 1e-12:  # no two float16 scales reach there
        assert not dense.any()
    else:
        assert coded[0].proxy < 0.3


@pytest.mark.parametrize("m", [torch.zeros(1, 128, 128), torch.ones(1, 128, 128), torch.full((1, 128, 128), math.nan)])
def test_useless_second_moments(rng, m):
    """Nothing seen, one direction only, or not finite: still codes."""
    w = torch.from_numpy(rng.normal(size=(1, 128, 128))).float()
    coded, dense = matrix.quantize_matrices(w, m, 6, "mul1", [1], search=greedy)
    assert float((w - dense).square().mean()) < 0.3
    assert coded[0].weight < 0.3


@pytest.mark.skipif(not FAST, reason="the search takes a quarter of a second for a tile here")
def test_real_search_comes_near_the_bound(rng):
    """Gaussian weights at 2 bits: 1.09 times the rate-distortion bound, and this search is an optimum or near it."""
    w = torch.from_numpy(rng.normal(size=(1, 128, 256))).float()
    coded, _ = matrix.quantize_matrices(w, None, 4, "mul1", [1])
    assert 1.0 < coded[0].weight / 2.0**-4 < 1.2


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("family", list(FAMILIES))
def test_calibration_sees_what_the_model_computes(family, tmp_path):
    """Layer by layer: outputs, and second moments of every linear layer's inputs, are those of transformers' own."""
    model = make_model(tmp_path / "in", family).float()
    source, ids = Source(tmp_path / "in"), torch.randint(3, 90, (3, 40), generator=torch.Generator().manual_seed(1))
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x, path=path: inputs.update({path: x[0].flatten(0, -2)}))
        outputs_of = lambda m, x, y, path=path: outputs.update({path: y[0] if isinstance(y, tuple) else y})  # noqa: E731
        if path in {part.path for part in source.layers}:
            module.register_forward_hook(outputs_of)
    with torch.no_grad():
        with_stored_biases(model)(input_ids=ids)
    state = calibrate.Calibration(source, ids)

    def check(found: torch.Tensor, path: str) -> None:
        x = inputs[path].double()
        want = x.T @ x / ids.numel()
        found = found[: len(want), : len(want)].double()
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5 * float(want.abs().max()))

    for part in source.layers:
        state.load(part)
        moments, _ = state.moments(part, part.matrices)
        for one in part.matrices:
            check(moments[one.name], one.path)
        state.advance(part)
        want = outputs[part.path]
        torch.testing.assert_close(state.state, want, rtol=0, atol=1e-5 * float(want.abs().max()))
        state.unload(part)
    state.load(source.head)
    check(state.head_moments(source.head), "lm_head")


def test_second_moments_of_experts():
    """Of each expert's tokens, weighted by the router's weights; few are helped out with the layer's, one a channel."""
    generator = torch.Generator().manual_seed(0)
    calls = [
        (torch.randn(t, 4, generator=generator), torch.randint(0, 3, (t, 2), generator=generator, dtype=torch.int32),
         torch.rand(t, 2, generator=generator))
        for t in (90, 60)
    ]  # fmt: skip
    calls[1][1][7:9, 1] = 3  # expert 3 gets two tokens, expert 4 none
    x, ids, weights = (torch.cat(parts).double().numpy() for parts in zip(*calls, strict=True))
    routed = calibrate.Routed(list(calls))
    for inner in (None, torch.tanh):
        inputs = x if inner is None else np.tanh(x)
        everyone = inputs.T @ inputs / len(inputs)
        for e in range(5):
            own = [(inputs[t], weights[t, s]) for t in range(len(x)) for s in range(2) if ids[t, s] == e]
            total = sum((w * w * np.outer(v, v) for v, w in own), np.zeros((4, 4)))
            power = sum(w * w for _, w in own)
            if len(own) < 16 * 4:
                share = 4 * (power / len(own) if own else 1)
                total, power = total + share * everyone, power + share
            found, tokens = routed.moments(e, 8, inner)
            assert tokens == len(own)
            np.testing.assert_allclose(found[:4, :4].numpy(), total / power, rtol=1e-4, atol=1e-6)
            assert not found[4:].any()
            assert not found[:, 4:].any()
        assert (ids == 0).sum() >= 64


# ---------------------------------------------------------------- whole models


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "glm4_moe", "gpt_oss", "qwen3_5_moe", "deepseek_v3", "qwen3_next", "llama"]
)
def test_families(family, tmp_path):
    """Every matrix lands where it belongs: the loaded model computes what the original does with decoded weights."""
    names = {"num_experts", "num_local_experts", "n_routed_experts"} & FAMILIES[family].sizes.keys()
    changes = {"num_experts_per_tok": 2, **dict.fromkeys(names, 3)}
    if family in ("qwen3_moe", "mixtral", "gpt_oss"):  # the others' two layers differ
        changes["num_hidden_layers"] = 1
    model = make_model(tmp_path / "in", family, **changes).float()
    convert(tmp_path / "in", tmp_path / "out")
    checkpoint = Checkpoint(tmp_path / "out")
    source = Source(tmp_path / "in")
    for m in source.everything():
        original = source.weight(m).numpy()
        found = decoded(checkpoint, m.name, original.shape)
        assert ((found - original) ** 2).sum() < 0.35 * (original**2).sum(), m.name
        put(model, m, torch.from_numpy(found).float())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    model = with_stored_biases(model)
    ids = torch.randint(3, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, rtol=0, atol=1e-4 * float(want.std()))


def put(model: Any, m: Any, weight: torch.Tensor) -> None:
    """Into the original model: the test's own idea of where a matrix belongs."""
    module, leaf = model.get_submodule(m.path), m.name.rpartition(".")[2]
    if not m.path.endswith(".experts"):
        module.weight.data = weight.T.contiguous()
        return
    e = int(m.name.split(".")[-2])
    what = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(leaf, leaf)
    if hasattr(module, "down_proj_bias"):  # gpt-oss: [in, out], gate and up in turns
        place = module.down_proj[e] if what == "down_proj" else module.gate_up_proj[e][:, what == "up_proj" :: 2]
        place.data.copy_(weight)
        return
    half = module.gate_up_proj.shape[1] // 2
    place = module.down_proj[e] if what == "down_proj" else (
        module.gate_up_proj[e][:half] if what == "gate_proj" else module.gate_up_proj[e][half:]
    )  # fmt: skip
    place.data.copy_(weight.T)


def with_stored_biases(model: Any) -> Any:
    """Routers and biases as float16, which is how they are stored."""
    for name, parameter in model.named_parameters():
        if "bias" in name or name.endswith(("gate.weight", "router.weight")):
            parameter.data = parameter.data.half().float()
    return model


def test_files_look_like_exllamav3s(small, tmp_path, capsys):
    """Names, dtypes, shapes and JSON of the checkpoint that exllamav3 made of the same architecture."""
    theirs = Path(__file__).parent.parent / "models" / "tiny-moe"
    convert(small, tmp_path / "out")

    def kinds(checkpoint: Checkpoint) -> set[tuple[str, str, int]]:
        some = {n: i for n, i in checkpoint.tensors.items() if ".experts." not in n or ".experts.1." in n}
        return {(n, i.dtype, len(i.shape)) for n, i in some.items() if "layers" not in n or ".layers.1." in n}

    assert kinds(Checkpoint(tmp_path / "out")) == kinds(Checkpoint(theirs))
    configs = [json.loads((d / "config.json").read_text()) for d in (tmp_path / "out", theirs)]
    ours, other = (config["quantization_config"] for config in configs)
    assert {k: type(v) for k, v in ours.items()} == {k: type(v) for k, v in other.items()}
    assert (ours["bits"], ours["head_bits"], ours["codebook"]) == (4, 6, "mul1")
    storage = json.loads((tmp_path / "out" / "quantization_config.json").read_text())["tensor_storage"]
    one = storage["model.layers.1.mlp.experts.1.up_proj"]
    assert (one["quant_format"], one["bits_per_weight"], one["mul1_multiplier"]) == ("exl3", 4, 0x83DCD12D)
    assert one["stored_tensors"]["model.layers.1.mlp.experts.1.up_proj.trellis"] == {
        "shape": [8, 8, 64], "n_bytes": 8192, "dtype": "torch.int16",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "written by metal_marlin" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*manifest*")) + list((tmp_path / "out").glob("lock"))


@pytest.mark.parametrize("codebook", ["mcg", "3inst"])
def test_tied_head_float32_and_other_codebooks(codebook, tmp_path):
    """A tied head is coded on its own; float32 input; no calibration."""
    make_model(tmp_path / "in", dtype=torch.float32, **SMALL, tie_word_embeddings=True)
    lines: list[str] = []
    options = Options(3, 8, codebook, uniform=True)
    convert(tmp_path / "in", tmp_path / "out", options, text=None, say=lines.append)
    assert any("no calibration text" in line for line in lines)
    checkpoint = Checkpoint(tmp_path / "out")
    assert {(g.codebook, g.bits) for p, g in checkpoint.groups.items() if p != "lm_head"} == {(codebook, 3)}
    assert checkpoint.groups["lm_head"].bits == 8
    assert checkpoint.tensors["model.embed_tokens.weight"].dtype == "F16"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.skipif(not FAST, reason="the search takes a quarter of a second for a tile here")
def test_command(tmp_path, capsys):
    """The whole way with the real search, and the result scored by `perplexity`."""
    small = tmp_path / "in"
    make_model(small, **{**SMALL, "num_hidden_layers": 1})
    (tmp_path / "text").write_text(TEXT)
    arguments = ["--bits", "2.5", "--calibration", str(tmp_path / "text"), "--rows", "8", "--length", "64"]
    assert main(["quantize", str(small), str(tmp_path / "out"), *arguments, "--for", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "mul1: CPUs multiply it in integers" in printed
    assert "bits per weight" in printed
    found = []
    for directory in (small, tmp_path / "out"):
        assert main(["perplexity", str(directory), str(tmp_path / "text"), "--length", "64", "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["perplexity"])
    assert found[1] == pytest.approx(found[0], rel=0.1)
    # what it decided is a recipe
    groups, recipe = Checkpoint(tmp_path / "out").groups, read_recipe(tmp_path / "out" / REPORT_FILE)
    source = Source(tmp_path / "in")
    fixed = rates.from_recipe(source, recipe, "mul1", 6)
    assert {m.name: fixed[m.group] for m in source.everything()} == {name: g.rate2 for name, g in groups.items()}


@pytest.mark.skipif(not FAST, reason="the search takes a quarter of a second for a tile here")
@pytest.mark.parametrize("rate2", [2, 3, 4, 5, 6, 7, 8])
def test_the_distortions_that_rates_are_chosen_by(rng, rate2):
    """The table is what the search reaches on Gaussian tiles; beyond 4 bits a sample's few largest numbers decide."""
    tiles = torch.from_numpy(rng.normal(size=(48, 16, 16))).float() * matrix.BEST_RMS["mul1"][rate2]
    values = matrix.trellis_search(tiles, rate2, "mul1")[1]
    error = float((tiles - values).square().mean() / tiles.square().mean())
    assert error == pytest.approx(matrix.DISTORTION[rate2], rel=0.08)


# ---------------------------------------------------------------- interruptions


class Interrupted(BaseException):
    pass


def interrupt_after(calls: int) -> Any:
    def search(tiles: torch.Tensor, rate2: int, codebook: str) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise Interrupted
        return greedy(tiles, rate2, codebook)

    return search


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "lock"}


def test_an_interrupted_run_goes_on(small, tmp_path):
    """Interrupted in each layer and the head in turn, the result is the same bytes."""
    convert(small, tmp_path / "whole")
    for calls in (10, 30, 40):
        with pytest.raises(Interrupted):
            convert(small, tmp_path / "out", search=interrupt_after(calls))
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.quantizing" / "config.json").exists()
    lines: list[str] = []
    convert(small, tmp_path / "out", say=lines.append)
    assert any(line.startswith("resumed: ") for line in lines)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out.quantizing").exists()


def test_a_full_disk_loses_nothing_finished(small, tmp_path, monkeypatch):
    saved = []

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        if len(saved) == 2:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved.append(file)
        save_file(tensors, file, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(work, "save_file", full)
        with pytest.raises(OSError, match=r"No space left.*\n?.*goes on"):
            convert(small, tmp_path / "out")
    folder = tmp_path / "out.quantizing"
    assert [path.name for path in sorted(folder.glob("model*"))] == [work_name(0), work_name(1)]
    convert(small, tmp_path / "out")
    Checkpoint(tmp_path / "out")


def work_name(index: int) -> str:
    return f"model-{index + 1:05}-of-00004.safetensors"


def test_a_resumed_run_must_be_the_same_run(small, tmp_path):
    with pytest.raises(Interrupted):
        convert(small, tmp_path / "out", search=interrupt_after(40))
    with pytest.raises(ValueError, match=r"interrupted run with other settings \(bits was 4, is 3\)"):
        convert(small, tmp_path / "out", replace(PLENTY, bits=3))
    with pytest.raises(ValueError, match="calibration was"):
        convert(small, tmp_path / "out", text=TEXT[::-1])
    for broken in ("[]", "{", '{"identity": {}}'):
        (tmp_path / "out.quantizing" / work.MANIFEST).write_text(broken)
        with pytest.raises(ValueError, match=r"manifest\.json"):
            convert(small, tmp_path / "out")


def test_a_killed_process_leaves_nothing_whole(small, tmp_path):
    """Killed without a chance to clean up; the next run takes over its lock and its layers."""
    script = (
        "import os, sys; sys.path[:0] = sys.argv[3:]; import test_quantize as t; from pathlib import Path\n"
        "count = 0\n"
        "def search(*a):\n"
        "    global count; count += 1\n"
        "    if count > 40: os.kill(os.getpid(), 9)\n"
        "    return t.greedy(*a)\n"
        "t.convert(Path(sys.argv[1]), Path(sys.argv[2]), search=search)\n"
    )
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    command = [sys.executable, "-c", script, str(small), str(tmp_path / "out"), *here]
    ended = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -9, ended.stderr.decode()
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "out.quantizing" / work.MANIFEST).read_text())["files"]
    convert(small, tmp_path / "out")
    Checkpoint(tmp_path / "out")


def test_interrupted_before_the_first_manifest(small, tmp_path, monkeypatch):
    """Killed, or out of disk, while the first manifest was being written: nothing is lost, so the next run goes on."""

    def full(file: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(work, "_sync", full)
        with pytest.raises(OSError, match=r"manifest\.json: can't be written: .*No space.*the same command goes on"):
            convert(small, tmp_path / "out", text=None)
    assert list((tmp_path / "out.quantizing").iterdir())
    convert(small, tmp_path / "out", text=None)
    Checkpoint(tmp_path / "out")


def test_killed_after_the_folder_got_its_name(small, tmp_path, monkeypatch):
    convert(small, tmp_path / "whole", text=None)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *a, **k: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            convert(small, tmp_path / "out", text=None)
    assert (tmp_path / "out" / work.MANIFEST).exists()
    with pytest.raises(ValueError, match="out is whole"):
        convert(small, tmp_path / "out", text=None)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not (tmp_path / "out" / work.LOCK).exists()


def test_two_processes_cannot_share_a_folder(small, tmp_path):
    with (
        work.Work(tmp_path / "out", {"a": 1}, 4),
        pytest.raises(ValueError, match="in use by another process"),
        work.Work(tmp_path / "out", {"a": 1}, 4),
    ):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*arguments: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match=r"lock: can't be locked: .*not supported"), work.Work(tmp_path / "out", {}, 4):
        pass


# ---------------------------------------------------------------- rates


def test_allocation_spends_the_budget_where_it_helps(small):
    source = Source(small)
    groups = [g for g in rates.groups_of(source) if g != "lm_head"]
    errors = {g: 1.0 if "experts" in g else 100.0 for g in groups}
    for bits in (1.0, 1.5, 2.0, 2.25, 3.0):
        found = rates.allocate(source, errors, bits, 6, "mul1")
        assert bits - 0.2 <= rates.mean_bits(source, found) <= bits
        assert found["lm_head"] == 12
        low = min(found[g] for g in groups if "experts" not in g)
        assert low >= max(found[g] for g in groups if "experts" in g)
    assert set(rates.allocate(source, errors, 2.5, 6, "mcg").values()) <= set(range(2, 17, 2))
    counted = {m.group: 0 for m in source.everything()}
    for m in source.everything():
        counted[m.group] += m.weights
    found = rates.allocate(source, errors, 2.0, 6, "mul1")
    # no exchange of one step between two groups lowers the error at the same or a lower cost
    d = matrix.DISTORTION
    steps = _C.RATES2["mul1"]
    for up in groups:
        for down in groups:
            i, j = steps.index(found[up]), steps.index(found[down])
            if up == down or i + 1 == len(steps) or j == 0:
                continue
            cost = (steps[i + 1] - found[up]) * counted[up] - (found[down] - steps[j - 1]) * counted[down]
            gain = errors[up] * (d[found[up]] - d[steps[i + 1]]) - errors[down] * (d[steps[j - 1]] - d[found[down]])
            assert cost > 0 or gain <= 1e-9, (up, down)


def test_measured_errors(small, tmp_path):
    """A group whose output hardly counts in its layer measures low."""
    shutil.copytree(small, tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    for name in tensors:
        if name.endswith("o_proj.weight"):
            tensors[name] *= 1e-3
    save_file(tensors, tmp_path / "in" / "model.safetensors", {"format": "pt"})
    rows = torch.randint(3, 90, (2, 64), generator=torch.Generator().manual_seed(0))
    before, after = (rates.measure(Source(d), rows, "mul1", 2) for d in (small, tmp_path / "in"))
    name = "model.layers.0.self_attn.o_proj"
    assert 0 < after[name] < 1e-4 * before[name]
    assert after.keys() == {g for g in rates.groups_of(Source(small)) if g != "lm_head"}


def test_recipe(small, tmp_path):
    recipe = {"rates": {"*": 2, "*.qkv": 3.5, "model.layers.1.mlp.experts.down": 1.5}}
    convert(small, tmp_path / "out", recipe=recipe, text=None)
    groups = Checkpoint(tmp_path / "out").groups
    assert groups["model.layers.0.self_attn.k_proj"].bits == 3.5
    assert groups["model.layers.1.mlp.experts.1.down_proj"].bits == 1.5
    assert groups["model.layers.0.mlp.experts.1.down_proj"].bits == 2
    source = Source(small)
    for bad, message in (
        ({}, "rates is None"),
        ({"rates": {"*": 2.25}}, "has 2.25 bits"),
        ({"rates": {"*": True}}, "rates is {'.': True}"),
        ({"rates": {"*": 2, "nothing": 2}}, "nothing matches none"),
        ({"rates": {"*.qkv": 2}}, "gives no rate for"),
    ):
        with pytest.raises(ValueError, match=message):
            rates.from_recipe(source, bad, "mul1", 6)


def test_read_recipe(tmp_path):
    (tmp_path / "a.json").write_text('{"rates": {"*": 2}, "matrices": {}}')
    assert read_recipe(tmp_path / "a.json") == {"rates": {"*": 2}}
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match="is a list"):
        read_recipe(tmp_path / "b.json")
    (tmp_path / "c.toml").write_text('of = 2026-01-01\n[rates]\n"*" = 2\n')  # what else it holds is not for JSON
    if sys.version_info >= (3, 11):
        assert read_recipe(tmp_path / "c.toml") == {"rates": {"*": 2}}
    else:
        with pytest.raises(ValueError, match="TOML needs"):
            read_recipe(tmp_path / "c.toml")


@pytest.mark.parametrize(
    ("arguments", "codebook"),
    [
        (("mcg", "cpu", 2, False), "mcg"),
        (("auto", "cpu", 2, False), "mul1"),
        (("auto", "apple", 2, False), "mcg"),
        (("auto", "apple", 2.25, False), "mcg"),
        (("auto", "apple", 1.5, False), "mul1"),
        (("auto", "apple", 2.5, True), "mul1"),
        (("auto", "apple", 2, False, {"rates": {"*": 2, "*.experts.down": 2.5}}), "mul1"),
        (("auto", "apple", 2, False, {"rates": {"*": 2, "*.experts.down": 3.0}}), "mcg"),
    ],
)
def test_codebook_by_place(arguments, codebook):
    found, why = choose_codebook(*arguments)
    assert found == codebook
    assert why


# ---------------------------------------------------------------- bad input


def spoil(source: Path, target: Path, change: Any) -> Path:
    """A copy of a model folder with its tensors and config changed by change(tensors, config)."""
    shutil.copytree(source, target)
    tensors, config = load_file(target / "model.safetensors"), json.loads((target / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


UP = "model.layers.1.mlp.experts.1.up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, c: t[UP].view(-1)[3].fill_(math.nan), f"{UP}: holds 1 NaN or infinite"),
        (lambda t, c: t["model.norm.weight"].fill_(math.inf), "model.norm.weight: holds 128 NaN"),
        (lambda t, c: t.pop(UP), f"{UP}: is missing"),
        (lambda t, c: t.update({UP: t[UP][:64].clone()}), rf"{UP}: has shape \[64, 128\]"),
        (lambda t, c: t.update({"model.layers.0.extra.weight": t[UP].clone()}), "extra.weight: is extra"),
        (lambda t, c: t.update({UP: t[UP].to(torch.int8)}), f"{UP}: is I8"),
        (lambda t, c: t["model.layers.0.mlp.gate.weight"].fill_(1e5), "gate.weight: reaches 99840; expected at most"),
        (lambda t, c: c.update(model_type="nothing"), "no causal language model for model_type 'nothing'"),
        (lambda t, c: c.update(quantization_config={"quant_method": "fp8"}), "already quantized .fp8."),
    ],
)
def test_bad_models(small, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        convert(spoil(small, tmp_path / "in", change), tmp_path / "out", text=None)
    assert not (tmp_path / "out").exists()


def test_biases_must_be_there(tmp_path):
    """As everything else: without them the result could not be loaded."""
    make_model(tmp_path / "oss", "gpt_oss", num_hidden_layers=1, num_local_experts=2)
    make_model(tmp_path / "qwen", "qwen3_moe", **SMALL, attention_bias=True)
    fused = "model.layers.0.mlp.experts.down_proj_bias"
    for name, bias in (("oss", fused), ("oss", fused.replace("down", "gate_up")), ("qwen", BIAS), ("oss", BIAS)):
        bad = spoil(tmp_path / name, tmp_path / f"{name}-{bias}", lambda t, c, bias=bias: t.pop(bias))
        with pytest.raises(ValueError, match=f"{bias}: is missing"):
            Source(bad)
    extra = UP.replace("weight", "bias")
    bad = spoil(tmp_path / "qwen", tmp_path / "extra", lambda t, c: t.update({extra: torch.zeros(128)}))
    with pytest.raises(ValueError, match=f"{extra}: is extra"):
        Source(bad)


def test_fused_experts_are_read_once(tmp_path, monkeypatch):
    """Not all of a layer's experts for each of its matrices; what is wrong with one is said with its number."""
    make_model(tmp_path / "in", "gpt_oss", num_hidden_layers=1, num_local_experts=8)
    source, read = Source(tmp_path / "in"), [0]
    isfinite = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda t: (read.__setitem__(0, read[0] + t.numel()), isfinite(t))[1])
    for m in source.layers[0].experts[0].matrices.values():
        source.weight(m)
        source.bias(m)
    fused = [info for name, info in source.checkpoint.tensors.items() if ".experts." in name]
    assert read[0] <= 2 * sum(math.prod(info.shape) for info in fused)
    name = "model.layers.0.mlp.experts.down_proj"
    bad = spoil(tmp_path / "in", tmp_path / "bad", lambda t, c: t[name][5].view(-1)[3].fill_(math.nan))
    with pytest.raises(ValueError, match=rf"{name}\[5\]: holds 1 NaN"):
        convert(bad, tmp_path / "out", text=None)


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), (" \n\0", "is empty"), ("too short", "expected at least 256")]
)
def test_bad_calibration(small, tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        convert(small, tmp_path / "out", text=text)


def test_a_missing_tokenizer(small, tmp_path):
    """transformers then makes one that knows no word: all of the text would be ends of documents."""
    shutil.copytree(small, tmp_path / "in")
    for file in (tmp_path / "in").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer makes . different tokens"):
        convert(tmp_path / "in", tmp_path / "out", text="\0".join(["a text"] * 3000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(0.5), "bits is 0.5; expected 1 to 8"),
        (Options(2, 6.5), "head_bits is 6.5"),
        (Options(2.25, uniform=True), "bits is 2.25 and uniform"),
        (Options(2, codebook="x"), "codebook is 'x'"),
        (Options(rows=0), "rows is 0"),
    ],
)
def test_bad_options(small, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(small, tmp_path / "out", options)


def test_output_in_the_way(small, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(ValueError, match="isn't an empty folder"):
        convert(small, tmp_path / "out")
    (tmp_path / "free.quantizing").mkdir()
    (tmp_path / "free.quantizing" / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        convert(small, tmp_path / "free")
    assert (tmp_path / "free.quantizing" / "file").read_text() == "mine"


def test_output_through_links(small, tmp_path, monkeypatch):
    """A link to an empty folder, and paths that end in dots: found out before the work, not after it."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    convert(small, tmp_path / "link", text=None)
    Checkpoint(tmp_path / "real")
    calls: list[int] = []
    monkeypatch.chdir(tmp_path / "real")
    for out in (Path("."), tmp_path / "real" / "..", tmp_path / "link"):
        with pytest.raises(ValueError, match="isn't an empty folder"):
            convert(small, out, text=None, search=lambda *a: calls.append(1))
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    with pytest.raises(ValueError, match="disk is a mount point"):
        convert(small, tmp_path / "disk", text=None, search=lambda *a: calls.append(1))
    assert not calls


def test_too_little_disk_or_memory(small, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(OSError, match="GB are free"):
            convert(small, tmp_path / "out")
    limit = Free(10**5, 10**6, "memory.max")  # of a container; the machine has more
    monkeypatch.setattr("metal_marlin.fit.cgroup_memory", lambda: limit)
    with pytest.raises(ValueError, match="of memory here"):
        convert(small, tmp_path / "out2")


def test_a_reader_that_leaves_does_not_end_the_run(small, tmp_path):
    """As `quantize ... | head -1`: the work goes on, where a broken pipe ends other commands, with status 0."""
    script = (
        "import sys, metal_marlin.quantize as q, metal_marlin.__main__ as m\n"
        "def run(*a, say, **k):\n"
        "    sys.stdin.read()\n"
        "    for i in range(3): say('line')\n"
        "    open(sys.argv[2], 'w').write('done')\n"
        "q.quantize = run\n"
        "sys.exit(m.main(['quantize', sys.argv[1], sys.argv[2]]))\n"
    )
    command = [sys.executable, "-c", script, str(small), str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=Path(__file__).parent.parent, **pipes) as process:
        assert process.stdout is not None
        assert b"codebook" in process.stdout.readline()
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.close()
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0, errors.decode()
    assert (tmp_path / "out").read_text() == "done"


def test_command_line_errors(small, tmp_path, capsys):
    for arguments, message in (
        (["nowhere", "x"], "nowhere is not a directory"),
        ([str(small), "x", "--calibration", "nowhere"], "nowhere is not a file"),
        ([str(small), "x", "--bits", "9"], "bits is 9"),
        ([str(small), "x", "--bits", "3", "--recipe", "y"], "--bits 3 and --recipe"),
        ([str(small), str(small)], "isn't an empty folder"),
    ):
        assert main(["quantize", *arguments]) == 2
        assert message in capsys.readouterr().err
