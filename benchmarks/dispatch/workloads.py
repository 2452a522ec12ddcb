"""What experiment 5 runs: plain matrix products, layers of router and experts, a whole model's forward.

Owns the workloads and their sizes. A workload is a function of two hooks: `after_op`, called after every op, and
`after_layer`, called after every layer; what the hooks do (wait, commit, nothing) is the experiment's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.dispatch import layers
from benchmarks.dispatch.layers import After, nothing
from benchmarks.dispatch.result import Fact, Settings

MATMULS_A_LAYER = 8
MODEL_TOKENS = 128
BUNDLED = Path(__file__).resolve().parent.parent.parent / "models" / "tiny-moe"
#: The random-weight model, for devices without kernels of ours: 8 layers of 16 experts, 0.35 billion weights.
RANDOM_MODEL: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4,
    "vocab_size": 8192, "norm_topk_prob": True, "tie_word_embeddings": True,
}  # fmt: skip
QUICK_MODEL = {**RANDOM_MODEL, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}


@dataclass(frozen=True)
class Workload:
    """`run(after_op, after_layer)` computes `title` once and returns its result, without waiting for it."""

    key: str
    title: str
    run: Callable[[After, After], Tensor]
    facts: dict[str, Fact] = field(default_factory=dict)

    def ops(self) -> int:
        """How many ops one run has, by counting the hook's calls."""
        count = 0

        def one_more() -> None:
            nonlocal count
            count += 1

        self.run(one_more, nothing)
        return count


def matmuls(settings: Settings) -> Workload:
    """x = x @ w, MATMULS_A_LAYER times a layer."""
    s = settings
    dtype = getattr(torch, s.dtype)
    generator = torch.Generator().manual_seed(s.seed)
    weights = [
        torch.randn(s.hidden, s.hidden, generator=generator).div_(s.hidden**0.5).to(s.device, dtype)
        for _ in range(s.layers)
    ]
    x = layers.tokens(s, s.batch)

    def run(after_op: After, after_layer: After) -> Tensor:
        y = x
        for weight in weights:
            for _ in range(MATMULS_A_LAYER):
                y = y @ weight
                after_op()
            after_layer()
        return y

    title = f"{MATMULS_A_LAYER * s.layers} products of [{s.batch}, {s.hidden}] by [{s.hidden}, {s.hidden}], {s.dtype}"
    return Workload("matmuls", title, run, {"batch": s.batch, "hidden": s.hidden, "dtype": s.dtype})


def moe(settings: Settings, batch: int | None = None) -> Workload:
    """Router, experts, residual, through settings.layers layers that share their weights: at the default sizes one
    layer's are larger than any cache, so a second set would cost memory and change nothing."""
    s, count = settings, batch or settings.batch
    layer, x = layers.of(s), layers.tokens(s, count)

    def run(after_op: After, after_layer: After) -> Tensor:
        y = x
        for _ in range(s.layers):
            weights, ids = layer.route(y, after_op)
            y = y + layer.together(y, weights, ids, after_op)
            after_op()
            after_layer()
        return y

    shape = f"{s.experts} experts of {s.hidden} x {s.intermediate}, top {s.top_k}, {count} token{'s' * (count != 1)}"
    facts: dict[str, Fact] = {"batch": count, "form": layer.form, "layers": s.layers}
    return Workload("moe", f"{s.layers} layers of router and {shape}; {layer.form}", run, facts)


def model(settings: Settings, count: int = MODEL_TOKENS) -> Workload:
    """The forward of a whole model on `count` tokens: the bundled packed one where our ops run, otherwise one of random
    dense weights. ImportError: no transformers; the message says what to install."""
    network, what = _network(settings)
    vocabulary = network.config.vocab_size
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(0, vocabulary, (1, count), generator=generator).to(settings.device)
    hooks = _Hooks(network)

    def run(after_op: After, after_layer: After) -> Tensor:
        hooks.after_op, hooks.after_layer = after_op, after_layer
        logits: Tensor = network(input_ids=ids, use_cache=False).logits
        return logits

    title = f"forward of {what}, {count} token{'s' if count > 1 else ''}"
    return Workload("model", title, run, {"tokens": count, "model": what, "layers": len(network.model.layers)})


class _Hooks:
    """Calls `after_op` after every module that has no children and `after_layer` after every layer. The hooks stay on
    the network, so that all variants carry the same cost on the host."""

    def __init__(self, network: Any) -> None:
        self.after_op: After = nothing
        self.after_layer: After = nothing
        for module in network.modules():
            if not any(True for _ in module.children()):
                module.register_forward_hook(self._op)
        for layer in network.model.layers:
            layer.register_forward_hook(self._layer)

    def _op(self, *_: Any) -> None:
        self.after_op()

    def _layer(self, *_: Any) -> None:
        self.after_layer()


def _network(settings: Settings) -> tuple[Any, str]:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'metal_marlin[hf]'") from None
    with quietly(transformers.utils.logging):
        return _loaded(settings, transformers)


@contextlib.contextmanager
def quietly(logging: Any) -> Iterator[None]:
    """Without transformers' warnings and progress bars, which are the whole process's."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _loaded(settings: Settings, transformers: Any) -> tuple[Any, str]:
    packed = settings.device in ("cpu", "mps")
    if packed and (BUNDLED / "model.safetensors").is_file():
        import metal_marlin.hf  # noqa: F401 -- registers EXL3 with transformers

        network = transformers.AutoModelForCausalLM.from_pretrained(
            str(BUNDLED), dtype="auto", local_files_only=True, trust_remote_code=False
        )
        return network.eval().to(settings.device), "the bundled 2-bit Qwen3-MoE (22 M weights, 6 layers)"
    sizes = QUICK_MODEL if settings.quick else RANDOM_MODEL
    config = transformers.Qwen3MoeConfig(**sizes)
    torch.manual_seed(settings.seed)
    with torch.device(settings.device):
        network = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    count = sum(parameter.numel() for parameter in network.parameters())
    layers_and = f"{sizes['num_hidden_layers']} layers of {sizes['num_experts']} experts"
    return network.eval(), f"a Qwen3-MoE of random {settings.dtype} weights ({count / 1e6:,.0f} M, {layers_and})"
