"""from_pretrained of an EXL3 folder, for every model family: logits against a dense twin, and loading's manners."""

from __future__ import annotations

import copy
import json
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
import torch
import transformers
from checkpoints import FAMILIES, Made
from conftest import same_bits
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import auto

import metal_marlin.hf as hf
from metal_marlin import Checkpoint, TrellisExperts, TrellisLinear
from metal_marlin.hf_routers import FusedRouter

MOE = [name for name in FAMILIES if name not in ("llama", "qwen3")]
ROUTED_IN_THE_BLOCK = ("deepseek_v3", "deepseek_v3_groups", "glm4_moe")  # by older transformers: not to be swapped
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TINY = Path(__file__).parent.parent / "models" / "tiny-moe"
REFERENCE = Path(__file__).parent / "data" / "tiny_moe_reference.npz"


def token_ids(rows: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def load(
    directory: Path, dtype: torch.dtype = torch.float32, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
) -> Any:
    return auto_class.from_pretrained(directory, dtype=dtype, **kwargs)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=token_ids() if ids is None else ids, **kwargs).logits


def assert_same_logits(model: Any, dense: Any) -> None:
    """Float32 on both sides; the logits' spread is about 1."""
    torch.testing.assert_close(logits(model), logits(dense), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name -> Made, written, one for all tests of this file."""

    @cache
    def make(name: str) -> Made:
        made = checkpoints.build(tmp_path_factory.mktemp("models") / name, name)
        made.write()
        return made

    return make


@pytest.fixture
def silence() -> Iterator[list[str]]:
    """Fails the test if transformers or Python warned while it ran; the list holds what transformers logged."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.addFilter(lambda record: "fast path is not available" not in record.getMessage())  # of linear attention
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield messages
    logger.removeHandler(handler)


# ---------------------------------------------------------------- families


@pytest.mark.parametrize("name", FAMILIES)
def test_family(folders: Any, silence: list[str], capfd: pytest.CaptureFixture[str], name: str) -> None:
    """Loads without a warning, with a progress bar; quantized matrices stay packed; logits and greedy text agree."""
    made = folders(name)
    model = load(made.directory)
    assert silence == []
    assert "Loading weights" in capfd.readouterr().err
    groups = Checkpoint(made.directory).groups.values()
    linears = [module for module in model.modules() if isinstance(module, TrellisLinear)]
    stacks = [module for module in model.modules() if isinstance(module, TrellisExperts)]
    in_stacks = sum(3 * experts.num_experts for experts in stacks)
    assert len(linears) + in_stacks == len(groups)
    assert {g.codebook for g in groups} == {"3inst", "mcg", "mul1"}
    assert len({g.rate2 for g in groups}) >= 5
    assert not any(type(module) is nn.Linear and module.out_features > 8 for module in model.modules())
    if name in MOE:
        assert stacks
        assert all(
            len(set(zip(s.rates2, s.codebooks, strict=True))) > 2 for e in stacks for s in (e.gate_proj, e.down_proj)
        )
        fused = sum(isinstance(module, FusedRouter) for module in model.modules())
        assert fused == len(stacks) or (fused == 0 and name in ROUTED_IN_THE_BLOCK and VERSION < (5, 23))
    warnings.simplefilter(
        "default"
    )  # some models say in their first forward which optional package would make them faster
    assert_same_logits(model, made.dense)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    prompt = token_ids(1, 5)
    assert torch.equal(model.generate(prompt, **greedy), made.dense.generate(prompt, **greedy))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_shards(folders: Any, silence: list[str], tmp_path: Path, name: str) -> None:
    made = folders(name)
    sharded = load(made.write(tmp_path, shards=3))
    assert silence == []
    assert same_bits(logits(sharded), logits(load(made.directory)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_dtypes(folders: Any, silence: list[str], name: str, dtype: torch.dtype) -> None:
    """The model computes in its dtype, the weights keep their own; memory is the file's."""
    made = folders(name)
    model = load(made.directory, dtype)
    assert silence == []
    got = logits(model)
    assert got.dtype == dtype
    want = logits(made.dense)
    cosine = torch.nn.functional.cosine_similarity(got.float(), want, dim=-1)
    assert float(cosine.median()) > 0.99
    checkpoint = Checkpoint(made.directory)
    head = checkpoint.linear("lm_head")
    assert same_bits(model.lm_head.suh, head.suh)
    assert same_bits(model.lm_head.trellis, head.trellis)
    assert resident_bytes(model) <= 1.1 * checkpoint.nbytes


def resident_bytes(model: nn.Module) -> int:
    """Whole 64-byte lines that parameters and buffers lie in: stacks of one layer may be views of the same memory."""
    lines: set[int] = set()
    for tensor in (*model.parameters(), *model.buffers()):
        first = tensor.data_ptr()
        lines.update(range(first // 64, (first + tensor.nbytes + 63) // 64))
    return 64 * len(lines)


def test_default_dtype_is_the_files(folders: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders("qwen3_moe").directory)
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype is torch.float64; expected one of torch.float32"):
        load(folders("qwen3_moe").directory, torch.float64)


def test_vision_language_config(silence: list[str], tmp_path: Path) -> None:
    """Real Qwen3.5 folders have a composite config; its text model alone loads as a causal language model."""
    made = checkpoints.build(tmp_path, "qwen3_5_moe")
    text = {key: value for key, value in made.config.items() if key != "quantization_config"}
    text["dtype"] = "float32"  # older transformers don't pass from_pretrained's dtype on to it
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 192}
    made.config = {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": text,
        "vision_config": vision,
        "quantization_config": made.config["quantization_config"],
        "tie_word_embeddings": False,
    }
    made.tensors["model.visual.merger.norm.weight"] = torch.ones(32)  # not loaded, as transformers has it
    model = load(made.write())
    assert silence == []
    warnings.simplefilter("default")
    assert_same_logits(model, made.dense)


# ---------------------------------------------------------------- parts that are not quantized, or otherwise stored


def test_partly_quantized(silence: list[str], tmp_path: Path) -> None:
    """Linear layers and whole layers of experts that were left in bfloat16 load as transformers has them."""
    kept = ("layers.0.self_attn.o_proj", "layers.1.mlp.experts", "lm_head")
    made = checkpoints.build(tmp_path, "qwen3_moe", keep=lambda path: path.endswith(kept))
    split_experts(made.tensors, "model.layers.1.mlp.experts")
    model = load(made.write())
    assert silence == []
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert not isinstance(model.model.layers[1].mlp.experts, TrellisExperts)
    assert isinstance(model.model.layers[0].mlp.experts, TrellisExperts)
    assert_same_logits(model, made.dense)


def split_experts(tensors: dict[str, torch.Tensor], path: str) -> None:
    """From transformers' stacked parameters to one tensor per expert, as files have them."""
    gate_up, down = tensors.pop(f"{path}.gate_up_proj"), tensors.pop(f"{path}.down_proj")
    for e in range(len(down)):
        gate, up = gate_up[e].chunk(2)
        for name, value in zip(checkpoints.PROJECTIONS, (gate, up, down[e]), strict=True):
            tensors[f"{path}.{e}.{name}.weight"] = value.clone()


def test_quantized_head_unties(silence: list[str], tmp_path: Path) -> None:
    """A file with lm_head.trellis has a head of its own, whatever tie_word_embeddings says."""
    made = checkpoints.build(tmp_path, "qwen3", head_tied_in_config=True)
    model = load(made.write())
    assert silence == []
    assert isinstance(model.lm_head, TrellisLinear)
    assert model.config.tie_word_embeddings is False
    assert_same_logits(model, made.dense)
    model.tie_weights()
    assert isinstance(model.lm_head, TrellisLinear)


def test_tied_head(silence: list[str], tmp_path: Path) -> None:
    """Without lm_head in the file, the embeddings serve as the head."""
    made = checkpoints.build(tmp_path, "qwen3", keep=lambda path: path == "lm_head", head_tied_in_config=True)
    del made.tensors["lm_head.weight"]
    made.dense.lm_head.weight = made.dense.model.embed_tokens.weight
    model = load(made.write())
    assert silence == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_logits(model, made.dense)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe"])
def test_legacy_signs(silence: list[str], tmp_path: Path, name: str) -> None:
    """sv, sign bits, gives what svh of +-1 gives: for linear layers and for all experts of a projection."""
    made = checkpoints.build(tmp_path / "new", name)
    rng = np.random.default_rng(0)
    old = Made(tmp_path / "old", None, dict(made.tensors), made.config)
    for key in list(made.tensors):  # svh only: suh has to keep numbers in range
        prefix, _, leaf = key.rpartition(".")
        if leaf == "svh" and prefix.endswith(("k_proj", "gate_proj", "lm_head")):
            negative = rng.integers(0, 2, made.tensors[key].numel())
            made.tensors[key] = torch.from_numpy(1.0 - 2.0 * negative).half()
            words = (negative.reshape(-1, 16) << np.arange(16)).sum(-1).astype(np.uint16).view(np.int16)
            del old.tensors[key]
            old.tensors[f"{prefix}.sv"] = torch.from_numpy(words)
    models = [load(each.write()) for each in (made, old)]
    assert silence == []
    warnings.simplefilter("default")
    assert same_bits(*(logits(model) for model in models))


def test_base_model(folders: Any, silence: list[str]) -> None:
    """AutoModel takes the language model without its head, and transformers says so as it does for any model."""
    made = folders("qwen3_moe")
    model = load(made.directory, auto_class=AutoModel)
    assert [message.count("lm_head") for message in silence] == [4]
    with torch.no_grad():
        got, want = (each(input_ids=token_ids()).last_hidden_state for each in (model, made.dense.model))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- routers


@pytest.mark.parametrize("name", MOE)
def test_router_outputs(folders: Any, name: str) -> None:
    """Router logits are recorded from the fused routers, and copies of the model still compute."""
    made = folders(name)
    model = copy.deepcopy(load(made.directory))
    ids = token_ids()
    with torch.no_grad():
        got, want = (each(input_ids=ids, output_router_logits=True) for each in (model, made.dense))
    if not hasattr(want, "router_logits"):
        pytest.skip("this version of transformers doesn't record this model's router logits")
    assert len(got.router_logits) == len(want.router_logits) > 0
    for ours, theirs in zip(got.router_logits, want.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if getattr(want, "aux_loss", None) is not None:
        torch.testing.assert_close(got.aux_loss, want.aux_loss, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- gradients, compiling, saving


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_gradient_of_the_input(folders: Any, name: str) -> None:
    """What an adapter's training needs, through attention, routers, experts and head."""
    made = folders(name)
    model = load(made.directory)
    grads = []
    for each in (model, made.dense):
        x = each.get_input_embeddings()(token_ids()).detach().requires_grad_()
        each(inputs_embeds=x).logits.logsumexp(-1).sum().backward()
        grads.append(x.grad)
    scale = float(grads[1].abs().max())
    torch.testing.assert_close(*grads, rtol=0, atol=1e-4 * scale)
    made.dense.zero_grad()
    assert model.hf_quantizer.is_trainable


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_compile(folders: Any, name: str) -> None:
    model = load(folders(name).directory)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, use_cache=False), logits(model), rtol=0, atol=1e-4)


def test_saving_is_refused(folders: Any, silence: list[str], tmp_path: Path) -> None:
    model = load(folders("llama").directory)
    with pytest.raises(ValueError, match="quantized with exl3 and is not serializable"):
        model.save_pretrained(tmp_path)
    assert any("copy the folder instead" in message for message in silence)


def test_other_devices_are_refused() -> None:
    quantizer = hf.Exl3Quantizer(hf.Exl3Config(bits=2.0), pre_quantized=True)
    for device_map in ("mps", {"": "cuda:0"}, {"": 0}, {"": torch.device("mps")}):
        with pytest.raises(NotImplementedError, match="this version of metal_marlin runs EXL3 models on the CPU only"):
            quantizer.validate_environment(device_map=device_map)
    for device_map in (None, "auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}):
        quantizer.validate_environment(device_map=device_map)
    assert quantizer.update_device_map("auto") == {"": "cpu"}


def test_unpacked_pickles_are_refused() -> None:
    with pytest.raises(ValueError, match="weights_only is False; expected True"):
        hf.Exl3Quantizer(hf.Exl3Config(), pre_quantized=True).validate_environment(weights_only=False)


# ---------------------------------------------------------------- registration


def test_a_taken_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("OtherConfig", (), {"__module__": "exllamav3.integration"})
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "exl3", other)
    with pytest.raises(ImportError, match=r"'exl3' is already registered, by exllamav3\.integration\.OtherConfig"):
        hf._register()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["exl3"] is other


def test_registering_again_is_harmless() -> None:
    hf._register()
    wrapped = PreTrainedModel._load_pretrained_model
    hf._wrap_loading()
    again = PreTrainedModel._load_pretrained_model
    assert again.metal_marlin_wraps is wrapped.metal_marlin_wraps
    assert auto.AUTO_QUANTIZER_MAPPING["exl3"] is hf.Exl3Quantizer


def test_the_package_does_not_import_transformers() -> None:
    """metal_marlin alone is for people without it."""
    import subprocess

    code = "import sys, metal_marlin; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_config_keeps_its_values() -> None:
    values = {"bits": 2.5, "version": "1.6.5", "calibration": {"rows": 1}, "something_new": 3}
    config = hf.Exl3Config.from_dict({"quant_method": "exl3", **values})
    assert config.to_dict() == {"quant_method": "exl3", **values}
    assert json.loads(config.to_json_string())["bits"] == 2.5
    assert isinstance(types.SimpleNamespace(**config.to_dict()).calibration, dict)


# ---------------------------------------------------------------- a real model


def test_bundled_model_against_exllamav3(silence: list[str]) -> None:
    """exllamav3's own logits (of a GPU, in float16) of 64 tokens. One token's routing is a near tie which float16 broke
    otherwise (token 28, last layer: logits 1.1109 and 1.1105): the mean is over the other 63."""
    recorded = np.load(REFERENCE)
    model = load(TINY)
    assert silence == []
    got = torch.log_softmax(logits(model, torch.from_numpy(recorded["ids"]).long()[None])[0].double(), -1)
    want = torch.log_softmax(torch.from_numpy(recorded["logits"]).double(), -1)
    divergence = (want.exp() * (want - got)).sum(-1)
    assert int((got.argmax(-1) == want.argmax(-1)).sum()) >= 63
    assert float(divergence.median()) < 2e-5
    assert float(divergence.sort().values[:-1].mean()) < 5e-5


def test_bundled_models_memory() -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY)
    assert resident_bytes(model) <= 1.1 * (TINY / "model.safetensors").stat().st_size
