"""Which of the ops' activations an experts module of transformers computes, found by trying it.

Owns the comparison. Names of classes say little (64 packages define their own experts, some with limits, some
interleaved), so the module's own gate runs on a few numbers and is matched against every activation the ops have; no
match means no silent guess.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALPHA_NAMES, LIMIT_NAMES = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")


@dataclass(frozen=True)
class Activation:
    """An activation of moe_trellis_swiglu with its constants (1.702 and 7.0 where they are not read)."""

    activation: str
    alpha: float = 1.702
    limit: float = 7.0


def find_activation(experts: nn.Module) -> Activation:
    """The activation of an experts module. ValueError, naming the class, if the ops have none that agrees with it."""
    alpha, limit = _number(experts, ALPHA_NAMES, 1.702), _number(experts, LIMIT_NAMES, 7.0)
    formulas: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
        Activation("silu"): lambda gate, up: F.silu(gate) * up,
        Activation("gelu"): lambda gate, up: F.gelu(gate) * up,
        Activation("gelu_tanh"): lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        Activation("swiglu_oai", alpha, limit): lambda gate, up: _swiglu_oai(gate, up, alpha, limit),
    }
    generator = torch.Generator("cpu").manual_seed(0)
    # far beyond every limit in use, so that a clamp shows; float64, so that no tolerance hides erf from tanh
    both = 4 * max(1.0, limit) * torch.randn(64, 16, dtype=torch.float64, device="cpu", generator=generator)
    both[:32] /= 4 * max(1.0, limit)
    layouts = (both.chunk(2, dim=-1), (both[..., ::2], both[..., 1::2]))
    try:
        found = _apply(experts, both)
    except Exception as error:
        raise ValueError(f"{type(experts).__name__}: its activation can't be tried out: {error}") from error
    for activation, formula in formulas.items():
        for gate, up in layouts:
            want = formula(gate, up)
            if found.shape == want.shape and torch.allclose(found.double(), want, rtol=1e-5, atol=1e-6):
                return activation
    names = ", ".join(activation.activation for activation in formulas)
    raise ValueError(f"{type(experts).__name__}: its activation is none of those that the experts' op has ({names})")


def _apply(experts: nn.Module, both: Tensor) -> Tensor:
    """What the module makes of the gate's and the up projection's joint output."""
    with torch.device("cpu"), torch.no_grad():
        if hasattr(experts, "_apply_gate"):
            result: Tensor = cast("Any", experts)._apply_gate(both)
            return result
        gate, up = both.chunk(2, dim=-1)
        activated: Tensor = cast("Any", experts).act_fn(gate)
        return activated * up


def _swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def _number(module: nn.Module, names: tuple[str, ...], default: float) -> float:
    values = [getattr(module, name) for name in names if isinstance(getattr(module, name, None), (int, float))]
    return float(values[0]) if values else default
