"""TrellisLinear, TrellisExperts, TrellisRouter, TrellisMoE: results against the oracle, and manners as nn.Modules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DTYPES, array, assert_close, same_bits
from torch import nn

from metal_marlin import TrellisExperts, TrellisLinear, TrellisMoE, TrellisRouter, TrellisStack, TrellisTensor

MIXED = ((4, "mul1"), (5, "mul1"), (6, "mcg"), (8, "3inst"), (3, "mul1"))


def tensor_of(p: ref.Packed, name: str = "w") -> TrellisTensor:
    bias = None if p.bias is None else torch.from_numpy(p.bias)
    return TrellisTensor(*(torch.from_numpy(part) for part in (p.trellis, p.suh, p.svh)), p.codebook, bias, name)


def linear_of(p: ref.Packed, *sizes: int) -> TrellisLinear:
    return TrellisLinear.from_tensor(tensor_of(p), *sizes)


def packed(k: int = 200, n: int = 130, rate2: int = 5, codebook: str = "mul1", bias: bool = True) -> ref.Packed:
    return ref.random_packed(np.random.default_rng([k, n, rate2]), k, n, rate2, codebook, bias, junk=True)


def experts_of(m: ref.Experts) -> TrellisExperts:
    lists = ([tensor_of(p, f"{i}") for i, p in enumerate(projection)] for projection in (m.gate, m.up, m.down))
    return TrellisExperts.from_experts(
        *lists, m.hidden, m.intermediate, activation=m.activation, alpha=m.alpha, limit=m.limit
    )


def mixture(bias: bool = False, activation: str = "silu") -> ref.Experts:
    rng = np.random.default_rng(3)
    return ref.random_experts(rng, 5, 200, 96, MIXED, bias, junk=True, activation=activation)


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(rng: np.random.Generator, dtype: str) -> None:
    p = packed()
    x = torch.from_numpy(rng.normal(size=(2, 3, 200))).to(getattr(torch, dtype))
    y = linear_of(p, 200, 130)(x)
    assert (y.dtype, y.shape) == (x.dtype, (2, 3, 130))
    rows = array(x).reshape(-1, 200)
    want = ref.linear(rows, p, 130)
    assert_close(y.reshape(-1, 130), want, ref.rounded(ref.linear_bound(rows, p, 130), want, dtype))


def test_linear_dequantize() -> None:
    p = packed()
    np.testing.assert_allclose(linear_of(p, 200, 130).dequantize().numpy(), p.dense[:200, :130], atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
def test_experts(rng: np.random.Generator, activation: str) -> None:
    m = mixture(bias=activation == "swiglu_oai", activation=activation)
    x = torch.from_numpy(rng.normal(size=(7, 200))).float()
    weights = torch.from_numpy(rng.dirichlet(np.ones(2), size=7)).float()
    ids = torch.from_numpy(rng.integers(0, 5, size=(7, 2)))
    args = array(x), array(weights), array(ids), m
    want = ref.moe(*args)
    got = experts_of(m)(x, ids, weights)
    assert_close(got, want, ref.rounded(ref.moe_bound(*args), want, "float32"))


def test_moe(rng: np.random.Generator) -> None:
    """Router, experts and a shared expert joined, on a batch of sequences."""
    m, p = mixture(), packed(200, 200, bias=False)
    gate = torch.from_numpy(rng.normal(size=(5, 200)) / 14).float()
    correction = torch.from_numpy(0.1 * rng.normal(size=5)).float()
    router = TrellisRouter(gate, 2, kind="sigmoid_topk", scale=1.5, correction=correction)
    block = TrellisMoE(router, experts_of(m), linear_of(p, 200, 200))
    x = torch.from_numpy(rng.normal(size=(2, 4, 200))).float()
    rows = array(x).reshape(-1, 200)
    routing = ref.router(rows, array(gate), array(correction), 2, "sigmoid_topk", True, 1.5)
    want = ref.moe(rows, routing.weights, routing.ids, m) + ref.linear(rows, p, 200)
    np.testing.assert_allclose(array(block(x)).reshape(-1, 200), want, atol=1e-4)
    assert block(x).shape == x.shape


def test_stack_gives_back_its_experts() -> None:
    m = mixture(bias=True)
    stack = TrellisStack.from_experts([tensor_of(p) for p in m.up])
    assert (stack.num_experts, stack.k, stack.n) == (5, 256, 128)
    for e, p in enumerate(m.up):
        expert = stack.expert(e).validate()
        assert (expert.rate2, expert.codebook) == (p.rate2, p.codebook)
        for part in ("trellis", "suh", "svh", "bias"):
            assert same_bits(getattr(expert, part), torch.from_numpy(getattr(p, part)))


# ---------------------------------------------------------------- manners

MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[torch.Tensor, ...]]]] = {
    "linear": lambda: (linear_of(packed(), 200, 130), (x(),)),
    "3inst": lambda: (linear_of(packed(codebook="3inst", rate2=4), 200, 130), (x(),)),
    "experts": lambda: (experts_of(mixture(bias=True)), (x(), torch.tensor([[0, 3]] * 6), torch.full((6, 2), 0.5))),
    "moe": lambda: (
        TrellisMoE(TrellisRouter(x(5), 2), experts_of(mixture()), linear_of(packed(n=200), 200, 200)),
        (x(),),
    ),
}


def x(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 200, generator=torch.Generator().manual_seed(rows))


@pytest.fixture(params=MODULES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return MODULES[request.param]()


def scales(module: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that casting must not touch."""
    ours = [m for m in module.modules() if isinstance(m, (TrellisLinear, TrellisStack))]
    return {f"{i}.{name}": value.clone() for i, m in enumerate(ours) for name, value in m.named_buffers()}


def test_casting_leaves_the_weights(case: tuple[nn.Module, tuple[torch.Tensor, ...]]) -> None:
    module, args = case
    before, want = scales(module), module(*args)
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        cast(module)
        after = scales(module)
        assert all(same_bits(after[name], value) for name, value in before.items()), cast
    module.to(torch.bfloat16).to("cpu", torch.float32).type(torch.float32)
    after = scales(module)
    assert all(same_bits(after[name], value) for name, value in before.items())
    if not any(True for _ in module.parameters()):
        assert same_bits(module(*args), want)
    assert all(value.is_meta for value in scales(module.to("meta")).values())


def test_copies(case: tuple[nn.Module, tuple[torch.Tensor, ...]]) -> None:
    module, args = case
    want = module(*args)
    twin = copy.deepcopy(module)
    for name, value in twin.named_buffers():
        assert value.data_ptr() != module.get_buffer(name).data_ptr()
    assert same_bits(twin(*args), want)
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    assert same_bits(torch.load(stream, weights_only=False)(*args), want)


def test_state_dict(case: tuple[nn.Module, tuple[torch.Tensor, ...]]) -> None:
    module, args = case
    want = module(*args)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    twin = copy.deepcopy(module)
    for name, value in (*twin.named_buffers(), *twin.named_parameters()):
        if not name.endswith("table"):  # zeros are no valid rate
            value.detach().zero_()
    assert not same_bits(twin(*args), want)
    twin.load_state_dict(state)
    assert same_bits(twin(*args), want)


def test_linears_state_is_a_files() -> None:
    """The names and values of an EXL3 file: a state loads into a new module, and one of another codebook does not."""
    module = linear_of(packed(), 200, 130)
    assert list(module.state_dict()) == ["trellis", "suh", "svh", "bias", "mul1"]
    assert int(module.state_dict()["mul1"]) == 0x83DCD12D - 2**32
    new = TrellisLinear(200, 130, bits=2.5, codebook="mul1", bias=True)
    new.load_state_dict(module.state_dict())
    assert same_bits(new(x()), module(x()))
    with pytest.raises(RuntimeError, match=r'Missing key.*"mcg"'):
        TrellisLinear(200, 130, bits=2, codebook="mcg", bias=True).load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for trellis"):
        TrellisLinear(200, 130, bits=3, codebook="mul1", bias=True).load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="mul1: is 5; expected -2082680531"):
        new.load_state_dict({**module.state_dict(), "mul1": torch.tensor(5, dtype=torch.int32)})


def test_stacks_of_other_rates_do_not_mix() -> None:
    """Equal in size and in every shape: only the table tells them apart."""
    rng = np.random.default_rng(0)
    stacks = [
        TrellisStack.from_experts([tensor_of(ref.random_packed(rng, 128, 128, rate2, "mul1")) for rate2 in rates])
        for rates in ((4, 6), (6, 4))
    ]
    stacks[0].load_state_dict(stacks[0].state_dict())
    with pytest.raises(RuntimeError, match=r"table: is for .*\[\[6, 2\], \[4, 2\]\].*expected \[\[4, 2\], \[6, 2\]\]"):
        stacks[0].load_state_dict(stacks[1].state_dict())


def test_gradient_of_x(case: tuple[nn.Module, tuple[torch.Tensor, ...]]) -> None:
    """Directional derivative against a central difference."""
    module, (value, *rest) = case
    value = value.clone().requires_grad_()
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(9))
    y = module(value, *rest)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(8))
    (y * probe).sum().backward()
    with torch.no_grad():
        step = 1e-2
        ends = [(module(value + sign * step * direction, *rest) * probe).sum().double() for sign in (1, -1)]
    want = float((ends[0] - ends[1]) / (2 * step))
    got = float((value.grad * direction).sum())
    assert abs(got - want) <= 2e-3 * max(1.0, abs(want))
    assert not any(buffer.requires_grad for buffer in module.buffers())


@pytest.mark.parametrize("backend_name", ["aot_eager", "inductor"])
def test_compile(case: tuple[nn.Module, tuple[torch.Tensor, ...]], backend_name: str) -> None:
    module, args = case
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend=backend_name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), module(*args), rtol=0, atol=1e-5)


def test_repr() -> None:
    text = repr(TrellisMoE(TrellisRouter(x(5), 2), experts_of(mixture()), linear_of(packed(), 200, 130)))
    for part in (
        "TrellisRouter(experts=5, features=200, top_k=2, kind='softmax_topk', renormalize=True, scale=1.0)",
        "hidden_dim=200, intermediate_dim=96, activation='silu'",
        "TrellisStack(experts=5, k=256, n=128, bits=1.5/2/2.5/3/4, codebook=3inst/mcg/mul1, bias=False)",
        "TrellisLinear(in_features=200, out_features=130, bits=2.5, codebook='mul1', bias=True)",
    ):
        assert part in text


# ---------------------------------------------------------------- refusals


def stack(k: int = 128, n: int = 128, experts: int = 2) -> TrellisStack:
    return TrellisStack(k, n, [4] * experts, ["mul1"] * experts)


REFUSALS: dict[str, tuple[Callable[[], Any], str]] = {
    "in_features": (
        lambda: linear_of(packed(), 100, 130),
        r"w: in_features is 100; its trellis has 256, so expected 129 to 256",
    ),
    "out_features": (lambda: linear_of(packed(), 200, 257), "w: out_features is 257"),
    "no features": (lambda: TrellisLinear(0, 1, bits=2, codebook="mul1"), "in_features is 0"),
    "codebook": (lambda: TrellisLinear(1, 1, bits=2, codebook="x"), "codebook is 'x'; expected one of 3inst"),
    "bits": (lambda: TrellisLinear(1, 1, bits=2.25, codebook="mul1"), "bits is 2.25"),
    "rate": (lambda: TrellisLinear(1, 1, bits=4.5, codebook="mul1"), "4.5 bits; .*for mul1, bits one of 1, 1.5, 2"),
    "half rate": (lambda: TrellisLinear(1, 1, bits=1.5, codebook="mcg"), "1.5 bits; .*for mcg, bits one of 1, 2"),
    "no experts": (lambda: TrellisStack.from_experts([]), "experts is empty"),
    "rates and codebooks": (lambda: TrellisStack(128, 128, [4, 4], ["mul1"]), "rates2 has 2 entries, codebooks 1"),
    "too many experts": (lambda: stack(experts=513), "513 entries.*1 to 512"),
    "size of a stack": (lambda: stack(k=100), "k is 100.*expected multiples of 128"),
    "unequal sizes": (
        lambda: TrellisStack.from_experts([tensor_of(packed(128, 128), "a"), tensor_of(packed(128, 256), "b")]),
        r"b: is \[128, 256, 'bias'\]; expected \[128, 128, 'bias'\], as a",
    ),
    "unequal biases": (
        lambda: TrellisStack.from_experts([tensor_of(packed(bias=b), str(b)) for b in (True, False)]),
        r"False: is .*'no bias'\]; expected .*'bias'\], as True",
    ),
    "activation": (
        lambda: TrellisExperts(stack(), stack(), stack(), activation="relu"),
        "activation is 'relu'; expected",
    ),
    "fewer down experts": (lambda: TrellisExperts(stack(), stack(), stack(experts=1)), "down_proj has 1 experts"),
    "down's size": (
        lambda: TrellisExperts(stack(128, 256), stack(128, 256), stack()),
        r"down_proj has 2 experts of \[128, 128\]; expected 2 of \[256, 128\]",
    ),
    "hidden": (
        lambda: TrellisExperts(stack(), stack(), stack(), 129),
        r"gate_proj .*\[128, 128\]; expected 2 of \[256, 128\]",
    ),
    "router's kind": (lambda: TrellisRouter(x(5), 2, kind="best"), "kind is 'best'; expected one of softmax_topk"),
    "router's weight": (lambda: TrellisRouter(x()[0], 2), r"weight has shape \[200\]"),
    "top_k": (lambda: TrellisRouter(x(5), 6), "top_k is 6; expected 1 to 5"),
    "correction": (lambda: TrellisRouter(x(5), 2, correction=x()[0]), r"correction has shape \[200\]; expected \[5\]"),
    "groups": (lambda: TrellisRouter(x(6), 2, n_group=4), "n_group is 4, topk_group is 1; expected a divisor of 6"),
    "topk_group": (lambda: TrellisRouter(x(6), 2, n_group=3, topk_group=4), "topk_group is 4"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    make, message = REFUSALS[name]
    with pytest.raises(ValueError, match=message):
        make()


def test_malformed_tensors_are_refused() -> None:
    tensor = tensor_of(packed())
    bad = TrellisTensor(tensor.trellis, tensor.suh[:-1], tensor.svh, "mul1", None, "layer")
    for make in (TrellisLinear.from_tensor, lambda t: TrellisStack.from_experts([t])):
        with pytest.raises(ValueError, match=r"layer\.suh: is torch.float16 \[255\]; expected torch.float16 \[256\]"):
            make(bad)


def test_ids_out_of_range() -> None:
    module = experts_of(mixture())
    with pytest.raises(RuntimeError, match="5"):
        module(x(1), torch.tensor([[0, 5]]), torch.ones(1, 2))
