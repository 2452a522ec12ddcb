"""Routers of transformers' models, computed by the fused op.

Owns the list of router classes that the op can stand in for. A swapped router keeps its class (by a subclass, so that
hooks which record outputs still find it), its parameters and its outputs (logits, scores, ids); logits and scores come
as float32. Before a class is swapped its own forward runs against ours on random numbers: transformers of another
version may route otherwise, and then keeps its own routing, as every class does that is not listed here (among them
Gemma-4, whose router normalizes and scales its input, and DeepSeek-V4, whose first layers route by token id).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from metal_marlin import ops

# softmax, top-k; renormalized if `norm_topk_prob` says so or there is no such attribute
SOFTMAX_TOPK = (
    "FlexOlmoTopKRouter", "MellumTopKRouter", "MiniMaxTopKRouter", "MixtralTopKRouter", "OlmoeTopKRouter",
    "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "Qwen3NextTopKRouter", "Qwen3OmniMoeTalkerTextTopKRouter",
    "Qwen3OmniMoeTextTopKRouter", "Qwen3OmniMoeThinkerTextTopKRouter", "Qwen3VLMoeTextTopKRouter",
    "Qwen3_5MoeTopKRouter",
)  # fmt: skip
# top-k of the logits (plus `bias`, if there is one), softmax of those
TOPK_SOFTMAX = (
    "AriaTextTopKRouter", "GptOssTopKRouter", "GraniteMoeHybridTopKRouter", "GraniteMoeSharedTopKRouter",
    "GraniteMoeTopKRouter",
)  # fmt: skip
# sigmoid, groups, top-k by score plus `e_score_correction_bias`, scaling
SIGMOID_TOPK = (
    "DeepseekV32TopkRouter", "DeepseekV3TopkRouter", "Dots1TopkRouter", "ExaoneMoeTopkRouter", "Glm4MoeLiteTopkRouter",
    "Glm4MoeTopkRouter", "Glm4vMoeTextTopkRouter", "GlmMoeDsaTopkRouter", "KimiLinearTopkRouter",
    "MiMoV2FlashTopkRouter", "SolarOpenTopkRouter",
)  # fmt: skip
# the same with the correction as an argument of forward
SIGMOID_TOPK_ARGUMENT = ("HYV3TopKRouter", "MiniMaxM2TopKRouter")

KINDS = {
    **dict.fromkeys(SOFTMAX_TOPK, "softmax_topk"),
    **dict.fromkeys(TOPK_SOFTMAX, "topk_softmax"),
    **dict.fromkeys(SIGMOID_TOPK + SIGMOID_TOPK_ARGUMENT, "sigmoid_topk"),
}
PROBE_TOKENS, PROBE_FEATURES = 32, 8


@dataclass(frozen=True)
class Routing:
    """Arguments of the op that don't change from call to call."""

    kind: str
    top_k: int
    renormalize: bool
    scale: float
    n_group: int
    topk_group: int


class FusedRouter:
    """Comes before the router's own class: hidden_states [..., H] -> (logits [T, E], scores, ids, both [T, top_k])."""

    weight: Tensor
    routing: Routing

    def forward(self, hidden_states: Tensor, e_score_correction_bias: Tensor | None = None) -> tuple[Tensor, ...]:
        routing = self.routing
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        bias: Tensor | None = getattr(self, "bias", None)
        correction = (
            bias
            if routing.kind == "topk_softmax"
            else getattr(self, "e_score_correction_bias", e_score_correction_bias)
        )
        scores, ids, *rest = ops.router(
            x,
            self.weight,
            correction,
            top_k=routing.top_k,
            kind=routing.kind,
            renormalize=routing.renormalize,
            scale=routing.scale,
            n_group=routing.n_group,
            topk_group=routing.topk_group,
            return_logits=True,
        )
        logits = rest[0]
        return (logits if bias is None else logits + bias), scores, ids

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The class is made when it is needed, so that pickles name what it is made of."""
        return _new_fused, (type(self).__bases__[1],), self.__dict__.copy()


def _new_fused(base: type) -> Any:
    return object.__new__(_fused_class(base))


def fuse_routers(model: nn.Module) -> int:
    """Swaps every router of `model` that the op can stand in for, in place; weights may still be on the meta device.

    Returns how many. Whatever isn't listed or doesn't agree with the op keeps its own routing.
    """
    agrees: dict[tuple[type, Routing], bool] = {}
    count = 0
    for module in model.modules():
        if type(module).__name__ not in KINDS:
            continue
        routing = _routing(module)
        if routing is None:
            continue
        key = type(module), routing
        if key not in agrees:
            agrees[key] = _agrees(module, routing)
        if agrees[key]:
            _fuse(module, routing)
            count += 1
    return count


def _routing(module: Any) -> Routing | None:
    """The op's arguments for a router, None if it lacks an attribute."""
    try:
        return Routing(
            kind=KINDS[type(module).__name__],
            top_k=int(module.top_k),
            renormalize=bool(getattr(module, "norm_topk_prob", True)),
            scale=float(getattr(module, "routed_scaling_factor", getattr(module, "router_scaling_factor", 1.0))),
            n_group=int(getattr(module, "num_group", 1)),
            topk_group=int(getattr(module, "topk_group", 1)),
        )
    except (AttributeError, TypeError, ValueError):
        return None


def _fuse(module: Any, routing: Routing) -> None:
    module.routing = routing
    base: Any = type(module)
    module.__class__ = _fused_class(base)


@cache
def _fused_class(base: type) -> type:
    return type(f"Fused{base.__name__}", (FusedRouter, base), {"__module__": __name__, "__doc__": base.__doc__})


@torch.no_grad()
def _agrees(module: Any, routing: Routing) -> bool:
    """Whether a small router of the same class and settings gives the op's ids, scores and logits."""
    experts = module.weight.shape[0]
    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    probe: Any = object.__new__(type(module))
    nn.Module.__init__(probe)
    probe.__dict__.update({name: value for name, value in module.__dict__.items() if not name.startswith("_")})
    probe.training, probe.hidden_dim = False, PROBE_FEATURES
    probe.weight = nn.Parameter(random(experts, PROBE_FEATURES))
    for name in ("bias", "e_score_correction_bias"):
        if isinstance(getattr(module, name, None), Tensor):
            setattr(probe, name, nn.Parameter(random(experts)))
    x = random(PROBE_TOKENS, PROBE_FEATURES)
    extra = (random(experts),) if type(module).__name__ in SIGMOID_TOPK_ARGUMENT else ()
    with torch.device("cpu"):
        try:
            own = probe(x, *extra)
            _fuse(probe, routing)
            logits, scores, ids = probe(x, *extra)
            own_logits, own_scores, own_ids = own
            # no order is promised where top-k leaves its picks unsorted: compare the scores by expert
            want = torch.zeros_like(logits).scatter(1, own_ids, own_scores.float())
            got = torch.zeros_like(logits).scatter(1, ids, scores)
            same_logits = torch.allclose(own_logits.float(), logits, rtol=1e-4, atol=1e-4)
            return same_logits and torch.allclose(want, got, rtol=1e-4, atol=1e-5)
        except Exception:  # another contract, or numbers that the op refuses
            return False
