"""torch.nn modules over the ops: what a hand-written model plugs in, and what hf.py swaps into transformers' models.

Owns TrellisLinear, TrellisExperts, TrellisRouter and TrellisMoE. Storage of packed weights is left to packed.py,
arithmetic to the ops, reading files to weights.py. Packed weights are buffers: they take part in state_dict(),
.to(device) and copy.deepcopy(), keep their dtypes when a module is cast, and have no gradient; x has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metal_marlin import _C, ops
from metal_marlin.packed import Packed, TrellisStack, trellis_shape
from metal_marlin.trellis import MARKERS, TrellisTensor, marker_value, pad128, rate2_of

__all__ = ["TrellisExperts", "TrellisLinear", "TrellisMoE", "TrellisRouter", "TrellisStack"]


class TrellisLinear(Packed):
    """torch.nn.Linear on an EXL3 matrix: forward(x [..., in_features]) -> [..., out_features] in the dtype of x.

    x is float32, bfloat16 or float16, any strides. The result is rounded once, from float32. Gradient: x only.
    Buffers: trellis int16 [k/16, n/16, 16 * bits], suh float16 [k], svh float16 [n], bias float16 [n] or None, and the
    codebook's marker `mul1` or `mcg`, so that the names and values of state_dict() are those of an EXL3 file. k and n
    are the features rounded up to 128. A new module holds zeros; take weights from a checkpoint with
    `TrellisLinear.from_tensor(Checkpoint(dir).linear("model.layers.0.self_attn.q_proj"))`, or use load_state_dict.
    ValueError: a codebook, rate or size that the format doesn't have. Format: docs/format.md.
    """

    trellis: Tensor
    suh: Tensor
    svh: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: float,
        codebook: str,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(f"in_features is {in_features}, out_features is {out_features}; expected at least 1")
        k, n = pad128(in_features), pad128(out_features)
        shape = trellis_shape(k, n, bits, codebook)
        self.in_features, self.out_features, self.codebook = in_features, out_features, codebook
        self.register_buffer("trellis", torch.zeros(shape, dtype=torch.int16, device=device))
        self.register_buffer("suh", torch.zeros(k, dtype=torch.float16, device=device))
        self.register_buffer("svh", torch.zeros(n, dtype=torch.float16, device=device))
        self.register_buffer("bias", torch.zeros(n, dtype=torch.float16, device=device) if bias else None)
        if codebook in MARKERS:
            marker = torch.full((), marker_value(codebook), dtype=torch.int32, device=device)
            self.register_buffer(codebook, marker)

    @classmethod
    def from_tensor(
        cls, tensor: TrellisTensor, in_features: int | None = None, out_features: int | None = None
    ) -> TrellisLinear:
        """A module that shares the tensor's storage. Features default to the padded sizes.

        ValueError if the tensor is malformed, or if the features rounded up to 128 are not its sizes.
        """
        tensor.validate()
        in_features, out_features = in_features or tensor.k, out_features or tensor.n
        _check_size(tensor.name, "in_features", in_features, tensor.k)
        _check_size(tensor.name, "out_features", out_features, tensor.n)
        bias = tensor.bias is not None
        module = cls(in_features, out_features, bits=tensor.bits, codebook=tensor.codebook, bias=bias, device="meta")
        module.trellis, module.suh, module.svh, module.bias = tensor.trellis, tensor.suh, tensor.svh, tensor.bias
        if tensor.codebook in MARKERS:
            value = torch.full((), marker_value(tensor.codebook), dtype=torch.int32, device=tensor.trellis.device)
            setattr(module, tensor.codebook, value)
        return module

    @property
    def bits(self) -> float:
        """Bits per weight, scales not counted."""
        return rate2_of(self.trellis.shape[-1]) / 2

    def tensor(self, name: str = "trellis tensor") -> TrellisTensor:
        """The weights, sharing storage."""
        return TrellisTensor(self.trellis, self.suh, self.svh, self.codebook, self.bias, name)

    def dequantize(self) -> Tensor:
        """The matrix that forward multiplies by, float32 [in_features, out_features]: nn.Linear.weight, transposed."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return ops.dequantize(self.trellis, self.suh, self.svh, codebook=self.codebook, **sizes)

    def forward(self, x: Tensor) -> Tensor:
        held: dict[str, Any] = self._buffers  # a module looks each up in a microsecond
        return ops.trellis_linear(
            *(x, held["trellis"], held["suh"], held["svh"], held["bias"]),
            codebook=self.codebook,
            out_features=self.out_features,
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A marker that is not the codebook's multiplier means tiles that would decode to something else: an error."""
        marker, errors = state_dict.get(f"{prefix}{self.codebook}"), args[-1]
        if isinstance(marker, Tensor) and not marker.is_meta and int(marker) != marker_value(self.codebook):
            errors.append(f"{prefix}{self.codebook}: is {int(marker)}; expected {marker_value(self.codebook)}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits:g}, codebook={self.codebook!r}, bias={self.bias is not None}"


class TrellisExperts(nn.Module):
    """All routed experts of a layer, in one op.

    forward(hidden_states [..., H], top_k_index [..., top_k], top_k_weights [..., top_k]) -> [..., H] in the dtype of
    hidden_states: the sum over a token's experts e of weight * down_e(act(gate_e(x)) * up_e(x)). hidden_states is
    float32, bfloat16 or float16, top_k_index int32 or int64, top_k_weights any of these float dtypes. Gradient:
    hidden_states and top_k_weights.

    gate_proj, up_proj, down_proj  TrellisStack of [H, I], [H, I] and [I, H], each rounded up to 128
    hidden_dim, intermediate_dim   H and I; default: the padded sizes
    activation                     one of metal_marlin._C.ACTIVATIONS; alpha and limit are read by swiglu_oai (gpt-oss)
    only ValueError: stacks that don't fit together or the sizes, an unknown activation. RuntimeError, from forward:
    ids out of range.
    """

    def __init__(
        self,
        gate_proj: TrellisStack,
        up_proj: TrellisStack,
        down_proj: TrellisStack,
        hidden_dim: int | None = None,
        intermediate_dim: int | None = None,
        *,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        super().__init__()
        self.hidden_dim, self.intermediate_dim = hidden_dim or gate_proj.k, intermediate_dim or gate_proj.n
        if activation not in _C.ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(_C.ACTIVATIONS)}")
        h, i = pad128(self.hidden_dim), pad128(self.intermediate_dim)
        stacks = {"gate_proj": (gate_proj, h, i), "up_proj": (up_proj, h, i), "down_proj": (down_proj, i, h)}
        for name, (stack, k, n) in stacks.items():
            if (stack.k, stack.n, stack.num_experts) != (k, n, gate_proj.num_experts):
                raise ValueError(
                    f"{name} has {stack.num_experts} experts of [{stack.k}, {stack.n}];"
                    f" expected {gate_proj.num_experts} of [{k}, {n}]"
                )
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj
        self.num_experts = gate_proj.num_experts
        self.activation, self.alpha, self.limit = activation, alpha, limit

    @classmethod
    def from_experts(
        cls,
        gate: Sequence[TrellisTensor],
        up: Sequence[TrellisTensor],
        down: Sequence[TrellisTensor],
        hidden_dim: int | None = None,
        intermediate_dim: int | None = None,
        **options: Any,
    ) -> TrellisExperts:
        """Copies lists of matrices, one per expert, such as `*Checkpoint(dir).experts("model.layers.0.mlp.experts")`.

        `options` are activation, alpha and limit. ValueError as for TrellisStack.from_experts and TrellisExperts.
        """
        gate_proj, up_proj, down_proj = (TrellisStack.from_experts(tensors) for tensors in (gate, up, down))
        return cls(gate_proj, up_proj, down_proj, hidden_dim, intermediate_dim, **options)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return ops.moe_trellis_swiglu(
            hidden_states,
            top_k_weights,
            top_k_index,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            intermediate=self.intermediate_dim,
            activation=self.activation,
            alpha=self.alpha,
            limit=self.limit,
        )

    def extra_repr(self) -> str:
        return f"hidden_dim={self.hidden_dim}, intermediate_dim={self.intermediate_dim}, activation={self.activation!r}"


class TrellisRouter(nn.Module):
    """Scores the experts and picks the best, in one op: forward(x [..., H]) -> (weights, ids), both [..., top_k].

    weights are float32, ids int64. Gradient: x and weight, through the weights of the experts picked.

    weight      [E, H] float32, bfloat16 or float16
    correction  [E] float or None: added to the scores that experts are picked by (for topk_softmax: to the logits)
    kind        softmax_topk: weights are softmax(logits), picked, optionally renormalized (Qwen-MoE)
                topk_softmax: weights are the softmax of the picked logits (Mixtral, gpt-oss)
                sigmoid_topk: weights are sigmoid(logits), picked, optionally renormalized (DeepSeek-V3, GLM-4-MoE)
    n_group     experts form so many groups, of which the best topk_group take part
    scale       multiplies the weights at the end
    ValueError: shapes or numbers that don't fit. Best first; among equal scores the lower index first.
    """

    def __init__(
        self,
        weight: Tensor,
        top_k: int,
        *,
        kind: str = "softmax_topk",
        renormalize: bool = True,
        scale: float = 1.0,
        correction: Tensor | None = None,
        n_group: int = 1,
        topk_group: int = 1,
    ) -> None:
        super().__init__()
        if kind not in _C.ROUTERS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(_C.ROUTERS)}")
        if weight.dim() != 2:
            raise ValueError(f"weight has shape {list(weight.shape)}; expected [experts, features]")
        if not 1 <= top_k <= min(weight.shape[0], _C.MAX_TOP_K):
            raise ValueError(f"top_k is {top_k}; expected 1 to {min(weight.shape[0], _C.MAX_TOP_K)}")
        if correction is not None and tuple(correction.shape) != tuple(weight.shape[:1]):
            raise ValueError(f"correction has shape {list(correction.shape)}; expected {list(weight.shape[:1])}")
        if n_group < 1 or weight.shape[0] % n_group or not 1 <= topk_group <= n_group:
            raise ValueError(
                f"n_group is {n_group}, topk_group is {topk_group}; expected a divisor of {weight.shape[0]} experts,"
                " and 1 to n_group"
            )
        self.top_k, self.kind, self.renormalize, self.scale = top_k, kind, renormalize, scale
        self.n_group, self.topk_group = n_group, topk_group
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.correction: Tensor | None
        self.register_buffer("correction", correction)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids, *_ = ops.router(
            x,
            self.weight,
            self.correction,
            top_k=self.top_k,
            kind=self.kind,
            renormalize=self.renormalize,
            scale=self.scale,
            n_group=self.n_group,
            topk_group=self.topk_group,
        )
        return weights, ids

    def extra_repr(self) -> str:
        sizes = f"experts={self.weight.shape[0]}, features={self.weight.shape[1]}, top_k={self.top_k}"
        return f"{sizes}, kind={self.kind!r}, renormalize={self.renormalize}, scale={self.scale}"


class TrellisMoE(nn.Module):
    """A mixture-of-experts block: forward(x [..., H]) -> [..., H], the routed experts' sum plus shared(x), if any.

    router   any module that maps x to (weights, ids), such as TrellisRouter
    experts  TrellisExperts, or metal_marlin.sharding.ShardedExperts, of which each process of a group holds a part
    shared   any module from [..., H] to [..., H], or None
    """

    def __init__(self, router: nn.Module, experts: TrellisExperts, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x)
        y: Tensor = self.experts(x, ids, weights)
        return y if self.shared is None else y + self.shared(x)


def _check_size(name: str, argument: str, size: int, padded: int) -> None:
    if pad128(size) != padded:
        raise ValueError(
            f"{name}: {argument} is {size}; its trellis has {padded}, so expected {padded - 127} to {padded}"
        )
