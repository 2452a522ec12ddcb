"""The ops as typed Python functions, and what PyTorch needs around the C kernels: fake kernels and gradients.

The kernels live in the C extension, whose import registers `torch.ops.metal_marlin`. This file owns shapes under
tracing (`torch.compile`, meta tensors) and the backward formulas; argument checks of real tensors are the C code's.
Weights of packed layers take no gradient: the gradient is with respect to inputs and routing weights.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import _C

__all__ = ["dequantize", "moe_trellis_swiglu", "router", "trellis_linear", "trellis_quantize"]

_ops = torch.ops.metal_marlin

#: gpt-oss's constants, the only model that uses `swiglu_oai`.
SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0


class Stack(Protocol):
    """The packed weights of one projection for all experts of a layer; `modules.TrellisStack` is one."""

    @property
    def trellis(self) -> Tensor: ...
    @property
    def table(self) -> Tensor: ...
    @property
    def suh(self) -> Tensor: ...
    @property
    def svh(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


_NOTHING = torch.empty(0, dtype=torch.float16)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Optional tensors travel as empty ones: PyTorch's C ABI before 2.13 cannot free an optional."""
    if tensor is not None:
        return tensor
    if type(like) is Tensor and like.is_cpu and like.dtype is torch.float16 and not torch.compiler.is_compiling():
        return _NOTHING
    return like.new_empty(0)


def _call(op: Any, asked: bool, *args: Any) -> Any:
    """The op, below autograd's keys where no gradient is asked for: their layer for custom ops is in Python and takes
    8 µs, which a model would pay for each layer and token."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or (asked and torch.is_grad_enabled()):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def trellis_linear(
    x: Tensor,
    trellis: Tensor,
    suh: Tensor,
    svh: Tensor,
    bias: Tensor | None = None,
    *,
    codebook: str,
    out_features: int | None = None,
) -> Tensor:
    """A linear layer with an EXL3 weight: ``y = ((x * suh) H W) H * svh + bias``.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16, any strides.
        trellis: ``[k / 16, n / 16, 16 * bits]`` int16, contiguous; ``k`` and ``n`` are ``in_features`` and
            ``out_features`` rounded up to multiples of 128.
        suh: ``[k]`` float16, input scales. svh: ``[n]`` float16, output scales. bias: ``[n]`` float16, or None.
        codebook: ``"3inst"``, ``"mcg"`` or ``"mul1"``.
        out_features: the true width, at most ``n`` (the default).

    Returns:
        ``[..., out_features]`` of x's dtype. All arithmetic is float32; the result is rounded once.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: docs/format.md, "The layer"; the rotations are exllamav3's, and its golden data is the test's.
    """
    n = svh.shape[0] if out_features is None else out_features
    return _call(  # type: ignore[no-any-return]
        _ops.trellis_linear.default, x.requires_grad, x, trellis, suh, svh, _or_empty(bias, suh), codebook, n
    )


def moe_trellis_swiglu(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate: Stack,
    up: Stack,
    down: Stack,
    *,
    intermediate: int | None = None,
    activation: str = "silu",
    alpha: float = SWIGLU_OAI_ALPHA,
    limit: float = SWIGLU_OAI_LIMIT,
) -> Tensor:
    """All routed experts of a mixture-of-experts layer: ``sum_j w_j down_e(act(gate_e(x), up_e(x)))``, ``e = ids_j``.

    Args:
        x: ``[..., hidden]``, float32, bfloat16 or float16, any strides.
        weights: ``[..., top_k]`` routing weights, a float dtype; ``top_k`` at most 32.
        ids: ``[..., top_k]`` expert of each slot, int32 or int64, in ``[0, experts)``; experts at most 512. -1
            (``_C.NO_EXPERT``) is a slot without an expert: it costs and adds nothing, whatever its weight, whose
            gradient is 0. So a process computes its own part of a mixture that is spread over several.
        gate, up, down: stacks with ``trellis`` (flat int16: all experts' tiles), ``table`` (``[experts, 3]`` int64:
            offset in int16 elements, 2 x bits, index in ``_C.CODEBOOKS``), ``suh`` ``[experts, k]``,
            ``svh`` ``[experts, n]``, ``bias`` ``[experts, n]`` or None, all float16. Rates and codebooks may differ
            from expert to expert and between the projections. A stack's ``formats``, if it has them, are the bits
            ``16 * codebook + 2 * bits - 1`` of what occurs: on a GPU, kernels are compiled for those alone. Its
            ``parts``, if it has them, are the five tensors at once.
        intermediate: the true expert width (default: ``down.suh.shape[1]``). Channels beyond it are padding and count
            as zero.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` (each: act(g) * u) or ``"swiglu_oai"`` (gpt-oss; uses
            ``alpha`` and ``limit``).

    Returns:
        ``[..., hidden]`` of x's dtype; sums over experts are float32, in the order of expert ids.

    Raises:
        RuntimeError: an argument does not fit, an id is out of range; the message names it.
    """
    width = down.suh.shape[1] if intermediate is None else intermediate
    flat: list[Tensor] = []
    formats = 0
    for stack in (gate, up, down):
        parts = getattr(stack, "parts", None) or (stack.trellis, stack.table, stack.suh, stack.svh, stack.bias)
        flat += (*parts[:4], _or_empty(parts[4], parts[2]))
        formats |= getattr(stack, "formats", -1)
    return _call(  # type: ignore[no-any-return]
        _ops.moe_trellis_swiglu.default,
        x.requires_grad or weights.requires_grad,
        *(x, weights, ids, *flat, width, activation, alpha, limit, formats),
    )


def router(
    x: Tensor,
    gate: Tensor,
    correction: Tensor | None = None,
    *,
    top_k: int,
    kind: str = "softmax_topk",
    renormalize: bool = True,
    scale: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    return_logits: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Chooses each token's experts: gate product, scores, top k, weights, in one op.

    Args:
        x: ``[..., hidden]``; gate: ``[experts, hidden]``; correction: ``[experts]`` or None; float dtypes.
        kind: ``"softmax_topk"``: p = softmax(logits), the top k of p + correction, weights p (Qwen2/3-MoE).
            ``"topk_softmax"``: the top k of logits + correction, weights = softmax over those (Mixtral, gpt-oss).
            ``"sigmoid_topk"``: p = sigmoid(logits), the top k of p + correction, weights p (DeepSeek-V3, GLM-4-MoE).
        renormalize: divide the weights by their sum (+ 1e-20). scale: factor on the weights, applied last.
        n_group, topk_group: choose only within the ``topk_group`` groups of experts whose two best scores sum highest
            (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
        return_logits: also return the gate product.

    Returns:
        weights ``[..., top_k]`` float32 and ids ``[..., top_k]`` int64, best first, equal scores by lower index (a NaN
        ranks above numbers); with ``return_logits`` also logits ``[..., experts]`` float32, without correction.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
    """
    offsets = _or_empty(correction, gate)
    weights, ids, logits = _call(
        _ops.router.default,
        x.requires_grad or gate.requires_grad or offsets.requires_grad,
        *(x, gate, offsets, top_k, kind, renormalize, scale, n_group, topk_group),
    )
    return (weights, ids, logits) if return_logits else (weights, ids)


def dequantize(
    trellis: Tensor,
    suh: Tensor | None,
    svh: Tensor | None,
    *,
    codebook: str,
    in_features: int | None = None,
    out_features: int | None = None,
) -> Tensor:
    """The dense weight of a packed matrix, float32 ``[in_features, out_features]`` (so ``y = x @ W``).

    Args:
        trellis, codebook: as in `trellis_linear`. suh, svh: ``[k]``, ``[n]`` float16; both None gives the weight in the
            rotated domain, the codebook's own values, exactly.
        in_features, out_features: the true sizes (default: the packed ones).

    Raises:
        RuntimeError: an argument does not fit; the message names it.
    """
    k, n = trellis.shape[0] * _C.TILE, trellis.shape[1] * _C.TILE
    return _ops.dequantize(  # type: ignore[no-any-return]
        trellis,
        trellis.new_empty(0, dtype=torch.float16) if suh is None else suh,
        trellis.new_empty(0, dtype=torch.float16) if svh is None else svh,
        codebook,
        k if in_features is None else in_features,
        n if out_features is None else out_features,
    )


def trellis_quantize(tiles: Tensor, rate2: int, codebook: str) -> tuple[Tensor, Tensor]:
    """Quantizes tiles of 16 x 16 weights: each becomes the stream whose decoded values are closest to it in the sum
    of squared differences.

    Scales, rotations and the order in which a matrix's tiles are visited belong to the caller: tiles are taken as they
    are, in units of the codebook, whose values have a standard deviation of 1.24 (3inst, mcg) or 1.00 (mul1).

    Args:
        tiles: ``[..., 16, 16]`` float32 on the CPU, any strides, finite and at most 65504 in size; the second last
            dimension counts inputs.
        rate2: twice the bits per weight: 2, 4, ... 16, and for ``"mul1"`` also 3, 5 and 7.
        codebook: ``"3inst"``, ``"mcg"`` or ``"mul1"``.

    Returns:
        packed ``[..., 8 * rate2]`` int16, each tile's stream as an EXL3 file's ``trellis`` holds it, and values
        ``[..., 16, 16]`` float32, what it decodes to. Both are the same bits at every SIMD level and for any number of
        threads.

    Raises:
        RuntimeError: an argument does not fit; the message names it, what was expected and what came.

    Source: the Viterbi algorithm (1967) on the format's circular streams (docs/format.md); csrc/quantize/search.c says
    how, and how close it comes to the optimum.
    """
    return _ops.trellis_quantize(tiles, rate2, codebook)  # type: ignore[no-any-return]


# ---- fake kernels: shapes and devices only, so that symbolic sizes stay symbolic ----


def _same_device(op: str, **tensors: Tensor) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items()}
    first, device = next(iter(devices.items()))
    others = ", ".join(f"{name} on {other}" for name, other in devices.items() if other.type != device.type)
    if others:
        raise RuntimeError(f"metal_marlin::{op}: expected all tensors on one device, got {first} on {device}, {others}")


@torch.library.register_fake("metal_marlin::trellis_linear")
def _(x: Tensor, trellis: Tensor, suh: Tensor, svh: Tensor, bias: Tensor, codebook: str, out_features: int) -> Tensor:
    _same_device("trellis_linear", x=x, trellis=trellis, suh=suh, svh=svh, bias=bias)
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.register_fake("metal_marlin::trellis_linear_backward")
def _(grad: Tensor, trellis: Tensor, suh: Tensor, svh: Tensor, codebook: str, in_features: int) -> Tensor:
    _same_device("trellis_linear_backward", grad=grad, trellis=trellis, suh=suh, svh=svh)
    return grad.new_empty((*grad.shape[:-1], in_features))


def _named_stacks(rest: tuple[Any, ...]) -> dict[str, Tensor]:
    """The packed tensors among an op's arguments after ids, by the names of its schema."""
    parts = ("trellis", "table", "suh", "svh", "bias")
    names = [f"{stack}_{part}" for stack in ("gate", "up", "down") for part in parts]
    return dict(zip(names, rest, strict=False))


@torch.library.register_fake("metal_marlin::moe_trellis_swiglu")
def _(x: Tensor, weights: Tensor, ids: Tensor, *rest: Any) -> Tensor:
    _same_device("moe_trellis_swiglu", x=x, weights=weights, ids=ids, **_named_stacks(rest))
    return x.new_empty(x.shape)


@torch.library.register_fake("metal_marlin::moe_trellis_swiglu_backward")
def _(grad: Tensor, x: Tensor, weights: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _same_device("moe_trellis_swiglu_backward", grad=grad, x=x, weights=weights, ids=ids, **_named_stacks(rest))
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


@torch.library.register_fake("metal_marlin::router")
def _(
    x: Tensor,
    gate: Tensor,
    correction: Tensor,
    top_k: int,
    kind: str,
    renormalize: bool,
    scale: float,
    n_group: int,
    topk_group: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("router", x=x, gate=gate, correction=correction)
    lead = x.shape[:-1]
    return (
        x.new_empty((*lead, top_k), dtype=torch.float32),
        x.new_empty((*lead, top_k), dtype=torch.int64),
        x.new_empty((*lead, gate.shape[0]), dtype=torch.float32),
    )


@torch.library.register_fake("metal_marlin::dequantize")
def _(trellis: Tensor, suh: Tensor, svh: Tensor, codebook: str, in_features: int, out_features: int) -> Tensor:
    _same_device("dequantize", trellis=trellis, suh=suh, svh=svh)
    return trellis.new_empty((in_features, out_features), dtype=torch.float32)


@torch.library.register_fake("metal_marlin::trellis_quantize")
def _(tiles: Tensor, rate2: int, codebook: str) -> tuple[Tensor, Tensor]:
    return tiles.new_empty((*tiles.shape[:-2], 8 * rate2), dtype=torch.int16), tiles.new_empty(tiles.shape)


# ---- gradients ----


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, trellis, suh, svh, _bias, codebook, _out_features = inputs
    ctx.save_for_backward(trellis, suh, svh)
    ctx.codebook, ctx.in_features = codebook, x.shape[-1]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = None
    if ctx.needs_input_grad[0]:
        dx = _ops.trellis_linear_backward(grad, *ctx.saved_tensors, ctx.codebook, ctx.in_features)
    return dx, None, None, None, None, None, None


torch.library.register_autograd("metal_marlin::trellis_linear", _linear_backward, setup_context=_linear_setup)


def _linear_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, trellis, suh, svh, codebook, _in_features = inputs
    ctx.save_for_backward(trellis, suh, svh)
    ctx.codebook, ctx.out_features = codebook, grad.shape[-1]


def _linear_backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The layer is linear: the derivative of its gradient with respect to `grad` is the layer itself, without bias."""
    trellis, suh, svh = ctx.saved_tensors
    y = _ops.trellis_linear(grad, trellis, suh, svh, suh.new_empty(0), ctx.codebook, ctx.out_features)
    return y, None, None, None, None, None


torch.library.register_autograd(
    "metal_marlin::trellis_linear_backward", _linear_backward_backward, setup_context=_linear_backward_setup
)

_MOE_TENSORS = 18  # x, weights, ids, and five tensors of each projection


def _moe_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_MOE_TENSORS])
    ctx.rest = inputs[_MOE_TENSORS:]


def _moe_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = dweights = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dx, dweights = _ops.moe_trellis_swiglu_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return (dx, dweights, *([None] * (len(ctx.rest) + _MOE_TENSORS - 2)))


torch.library.register_autograd("metal_marlin::moe_trellis_swiglu", _moe_backward, setup_context=_moe_setup)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "metal_marlin::moe_trellis_swiglu_backward is not differentiable: a second derivative of the mixture is not"
        " implemented; expected a first-order backward"
    )


torch.library.register_autograd("metal_marlin::moe_trellis_swiglu_backward", _no_second_derivative)


def _router_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, gate, correction, _top_k, kind, renormalize, scale, _n_group, _topk_group = inputs
    ctx.save_for_backward(x, gate, correction, output[1], output[2])
    ctx.kind, ctx.renormalize, ctx.scale = kind, renormalize, scale
    ctx.mark_non_differentiable(output[1])


def _router_backward(
    ctx: Any, grad_weights: Tensor | None, _grad_ids: Tensor | None, grad_logits: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The choice itself has no slope; the chosen weights do. With p the scores and r the weights before `scale`:
    renormalized r = p / s: dp = (dr - sum(r dr)) / s; softmax: dl = p (dp - sum(p dp)); sigmoid: dl = p (1 - p) dp."""
    x, gate, correction, ids, logits = ctx.saved_tensors
    dlogits = torch.zeros_like(logits) if grad_logits is None else grad_logits.to(torch.float32)
    dcorrection = None
    if grad_weights is not None:
        dweights = grad_weights.to(torch.float32) * ctx.scale
        if ctx.kind == "topk_softmax":
            shifted = logits if correction.numel() == 0 else logits + correction
            weights = torch.softmax(shifted.gather(-1, ids), -1)
            dchosen = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
            routed = torch.zeros_like(logits).scatter_add(-1, ids, dchosen)
            if correction.numel() and ctx.needs_input_grad[2]:
                dcorrection = routed.reshape(-1, routed.shape[-1]).sum(0).to(correction.dtype)
        else:
            softmax = ctx.kind == "softmax_topk"
            scores = torch.softmax(logits, -1) if softmax else torch.sigmoid(logits)
            if ctx.renormalize:
                chosen = scores.gather(-1, ids)
                total = chosen.sum(-1, keepdim=True) + 1e-20
                dweights = (dweights - (chosen / total * dweights).sum(-1, keepdim=True)) / total
            dscores = torch.zeros_like(logits).scatter_add(-1, ids, dweights)
            if softmax:
                routed = scores * (dscores - (scores * dscores).sum(-1, keepdim=True))
            else:
                routed = scores * (1 - scores) * dscores
        dlogits = dlogits + routed
    dx = (dlogits @ gate.to(torch.float32)).to(x.dtype) if ctx.needs_input_grad[0] else None
    dgate = None
    if ctx.needs_input_grad[1]:
        flat = dlogits.reshape(-1, dlogits.shape[-1])
        dgate = (flat.T @ x.reshape(-1, x.shape[-1]).to(torch.float32)).to(gate.dtype)
    return dx, dgate, dcorrection, None, None, None, None, None, None


torch.library.register_autograd("metal_marlin::router", _router_backward, setup_context=_router_setup)


def _no_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(
        "metal_marlin::trellis_quantize is not differentiable: its values are steps of its tiles; expected tiles that"
        " need no gradient"
    )


torch.library.register_autograd("metal_marlin::trellis_quantize", _no_derivative)
