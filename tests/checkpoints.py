"""Tiny random EXL3 checkpoints of every model family, each with the same model in dense float32 to compare with.

Every bit string is a legal trellis, so random ones make a checkpoint; the oracle (reference.py) makes the dense twin.
Owns the sizes of the families, how their files name tensors, and which of them a real conversion leaves unquantized.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import reference as ref
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

MARKERS = {"mul1": 0x83DCD12D - 2**32, "mcg": 0xCBAC1FED - 2**32}
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# every codebook, half rates and whole ones, so that neighbours in a layer differ
RATES = ((4, "mul1"), (5, "mul1"), (6, "mcg"), (4, "3inst"), (3, "mul1"), (8, "mcg"), (7, "mul1"), (10, "3inst"))
UNQUANTIZED = (
    "shared_expert_gate",
    "in_proj_ba",
    "in_proj_a",
    "in_proj_b",
)  # too narrow to be worth it; F16 in real files


@dataclass(frozen=True)
class Family:
    """A model class with sizes that take milliseconds: most widths are no multiples of 128."""

    config: str
    sizes: dict[str, Any]
    expert_names: tuple[str, str, str] = PROJECTIONS
    rename: tuple[tuple[str, str], ...] = ()  # (as in the model, as in the file)

    def make_config(self, **changes: Any) -> Any:
        return getattr(transformers, self.config)(**{**COMMON, **self.sizes, **changes})


COMMON = {
    "vocab_size": 300,
    "hidden_size": 192,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "norm_topk_prob": True}
GATED_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 96,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "moe_intermediate_size": 96, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
}  # fmt: skip
MLA = {
    "q_lora_rank": 64, "kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
    "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip

FAMILIES = {
    "llama": Family("LlamaConfig", {}),
    "qwen3": Family("Qwen3Config", {}),
    "qwen2_moe": Family("Qwen2MoeConfig", {**MOE, "norm_topk_prob": False, "shared_expert_intermediate_size": 96}),
    "qwen3_moe": Family("Qwen3MoeConfig", MOE),
    "qwen3_next": Family("Qwen3NextConfig", {**MOE, **GATED_DELTA}),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeTextConfig", {**MOE, **GATED_DELTA}, rename=((r"model.", "model.language_model."),)
    ),
    "mixtral": Family(
        "MixtralConfig",
        {"num_local_experts": 5, "num_experts_per_tok": 2},
        ("w1", "w3", "w2"),
        ((".mlp.", ".block_sparse_moe."),),
    ),
    "deepseek_v3": Family("DeepseekV3Config", {**DEEPSEEK, **MLA}),
    "deepseek_v3_groups": Family("DeepseekV3Config", {**DEEPSEEK, **MLA, "n_group": 4, "topk_group": 2}),
    "glm4_moe": Family("Glm4MoeConfig", {**DEEPSEEK, "use_qk_norm": True, "attention_bias": True}),
    "gpt_oss": Family(
        "GptOssConfig",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 8, "max_position_embeddings": 131072},
    ),
}


@dataclass
class Made:
    """A written checkpoint: its folder, its dense twin, its tensors by name in the file, and its config."""

    directory: Path
    dense: Any
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path | None = None, shards: int = 1) -> Path:
        """Writes config.json and the tensors, in one file or in several with an index."""
        directory = directory or self.directory
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, directory / "model.safetensors")
            return directory
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            part = dict(list(self.tensors.items())[shard::shards])  # every layer in every file
            save_file(part, directory / file)
            weight_map |= dict.fromkeys(part, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return directory


def group(prefix: str, packed: ref.Packed) -> dict[str, torch.Tensor]:
    """The tensors of one quantized matrix, as a file holds them."""
    parts = {"trellis": packed.trellis, "suh": packed.suh, "svh": packed.svh, "bias": packed.bias}
    tensors = {f"{prefix}.{name}": torch.from_numpy(value) for name, value in parts.items() if value is not None}
    if packed.codebook in MARKERS:
        tensors[f"{prefix}.{packed.codebook}"] = torch.tensor(MARKERS[packed.codebook], dtype=torch.int32)
    return tensors


def build(
    directory: Path,
    name: str,
    *,
    seed: int = 0,
    keep: Callable[[str], bool] = lambda path: False,
    head_tied_in_config: bool = False,
    **changes: Any,
) -> Made:
    """Makes (but doesn't write) a checkpoint of FAMILIES[name]; `changes` go to its config.

    keep  says which modules stay unquantized, by their path in the model
    """
    family = FAMILIES[name]
    rng = np.random.default_rng([seed, *name.encode()])
    rates = rates_in_turn()
    torch.manual_seed(seed)
    config = family.make_config(**changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    made = Made(directory, model)
    done: set[str] = set()
    with torch.no_grad():
        for path, module in list(model.named_modules()):
            if keep(path) or path.endswith(UNQUANTIZED):
                continue
            if isinstance(module, nn.Linear):
                made.tensors |= group(path, quantize_linear(module, rng, next(rates)))
                done |= {f"{path}.{leaf}" for leaf in ("weight", "bias")}
            elif path.endswith(".experts"):
                made.tensors |= quantize_experts(path, module, rng, rates, family.expert_names)
                done |= {f"{path}.{leaf}" for leaf, _ in module.named_parameters()}
        for key, value in model.state_dict().items():
            if key not in done:
                made.tensors[key] = stored(key, value, rng)
    for old, new in family.rename:
        made.tensors = {key.replace(old, new): value for key, value in made.tensors.items()}
    made.tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in made.tensors.items()}
    made.config = json.loads(config.to_json_string(use_diff=False))
    made.config |= {
        "architectures": [type(model).__name__],
        "dtype": "bfloat16",
        "tie_word_embeddings": head_tied_in_config,
    }
    made.config["quantization_config"] = {
        "quant_method": "exl3", "version": "1.6.5", "bits": 2.5, "head_bits": 6, "calibration": {"rows": 1, "cols": 1},
        "out_scales": "auto", "codebook": "mul1",
    }  # fmt: skip
    return made


def rates_in_turn() -> Iterator[tuple[int, str]]:
    while True:
        yield from RATES


def quantize_linear(module: nn.Linear, rng: np.random.Generator, rate: tuple[int, str]) -> ref.Packed:
    """A random matrix for a layer, whose dense weight becomes that matrix. What lies in the padding must not matter."""
    sizes = module.in_features, module.out_features
    packed = ref.random_packed(rng, *sizes, *rate, bias=module.bias is not None, junk=True)
    module.weight.copy_(torch.from_numpy(packed.dense[: sizes[0], : sizes[1]].T.copy()))
    if module.bias is not None and packed.bias is not None:
        module.bias.copy_(torch.from_numpy(packed.bias[: sizes[1]]))
    return packed


def quantize_experts(
    path: str, module: Any, rng: np.random.Generator, rates: Iterator[tuple[int, str]], names: tuple[str, str, str]
) -> dict[str, torch.Tensor]:
    """The same for all experts of a layer, in transformers' two layouts: [gate; up], and gpt-oss's interleaved one."""
    tensors: dict[str, torch.Tensor] = {}
    bias = hasattr(module, "down_proj_bias")
    sizes = module.down_proj.shape[1:] if bias else module.down_proj.shape[:0:-1]  # (intermediate, hidden)
    for e in range(module.down_proj.shape[0]):
        shapes = ((sizes[1], sizes[0]), (sizes[1], sizes[0]), (sizes[0], sizes[1]))
        packed = [ref.random_packed(rng, *shape, *next(rates), bias=bias, junk=True) for shape in shapes]
        gate, up, down = (
            torch.from_numpy(p.dense[:k, :n].copy()).float() for p, (k, n) in zip(packed, shapes, strict=True)
        )
        if bias:
            both = torch.stack([gate, up], dim=-1).flatten(-2)
            module.gate_up_proj[e].copy_(both)
            module.down_proj[e].copy_(down)
            gate_bias, up_bias, down_bias = (
                torch.from_numpy(p.bias[:n]).float()
                for p, (_, n) in zip(packed, shapes, strict=True)
                if p.bias is not None
            )
            module.gate_up_proj_bias[e].copy_(torch.stack([gate_bias, up_bias], dim=-1).flatten())
            module.down_proj_bias[e].copy_(down_bias)
        else:
            module.gate_up_proj[e].copy_(torch.cat([gate.T, up.T]))
            module.down_proj[e].copy_(down.T)
        for name, p in zip(names, packed, strict=True):
            tensors |= group(f"{path}.{e}.{name}", p)
    return tensors


def stored(key: str, value: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A plain tensor with random contents as a file holds it, which the dense twin takes over exactly."""
    if not value.is_floating_point():
        return value
    noise = torch.from_numpy(rng.normal(size=tuple(value.shape))).float()
    if "correction_bias" in key:
        dtype, random = torch.float32, 0.1 * noise
    elif key.endswith(("gate.weight", "router.weight")):
        dtype, random = torch.float16, noise / value.shape[-1] ** 0.5
    elif "norm" in key or value.dim() == 1:
        dtype, random = torch.bfloat16, value + 0.1 * noise
    else:
        dtype, random = torch.bfloat16, noise / value[0].numel() ** 0.5 if "embed" not in key else noise
    value.copy_(random.to(dtype))
    return random.to(dtype)
