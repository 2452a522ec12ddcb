"""The parts behind from_pretrained: experts of unquantized models, the search for an activation, the fused routers."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from checkpoints import FAMILIES
from conftest import same_bits
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

import metal_marlin.hf  # noqa: F401  (registers the experts implementation)
from metal_marlin import hf_routers
from metal_marlin.hf_activation import Activation, find_activation
from metal_marlin.hf_experts import experts_forward

# ---------------------------------------------------------------- experts of unquantized models

NEMOTRON = {
    "hidden_size": 64, "intermediate_size": 48, "vocab_size": 300, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 40, "n_group": 1, "topk_group": 1, "layers_block_type": ["moe", "attention"],
}  # fmt: skip


@cache
def dense(name: str) -> Any:
    """A small unquantized model; its weights are large enough for the experts to matter."""
    torch.manual_seed(0)
    config = transformers.NemotronHConfig(**NEMOTRON) if name == "nemotron_h" else FAMILIES[name].make_config()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            if "experts" in path or "bias" in path:
                value.normal_(std=0.2)
    return model


def run(model: Any, implementation: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_experts_implementation(implementation)
    return model(input_ids=ids).logits


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"])
def test_unquantized_models(name: str) -> None:
    """Gated and gateless experts, with biases, transposed and interleaved: as transformers' own loop over experts."""
    model, ids = dense(name), torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want, got = run(model, "eager", ids), run(model, "metal_marlin", ids)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert same_bits(run(model, "metal_marlin", ids), got)
        text = model.generate(ids[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert text.shape == (1, 12)


def experts(name: str) -> Any:
    return next(module for path, module in dense(name).named_modules() if path.endswith(".experts"))


def arguments(module: Any, tokens: int = 7, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = getattr(module, "hidden_dim", None) or module.hidden_size
    x = torch.randn(tokens, hidden, generator=generator)
    ids = torch.randint(0, module.num_experts, (tokens, top_k), generator=generator)
    return x, ids, torch.rand(tokens, top_k, generator=generator)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_unquantized_experts_gradients(name: str) -> None:
    """With respect to inputs, router weights and every parameter."""
    module = experts(name)
    x, ids, weights = arguments(module)
    grads = []
    for implementation in ("eager", "metal_marlin"):
        module.config._experts_implementation = implementation
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_(), *module.parameters()]
        y = module(leaves[0], ids, leaves[1])
        grads.append(torch.autograd.grad((y * y.detach().sin()).sum(), leaves))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_unquantized_experts_edges() -> None:
    """No tokens; and expert-parallel sentinels, ids past the last expert, which add nothing and take no gradient."""
    module = experts("gpt_oss")
    x, ids, weights = arguments(module)
    assert experts_forward(module, x[:0], ids[:0], weights[:0]).shape == (0, x.shape[1])
    ids = torch.where(torch.arange(3) == 1, module.num_experts, ids)
    weights.requires_grad_()
    got = experts_forward(module, x, ids, weights)
    torch.testing.assert_close(got, experts_forward(module, x, ids[:, ::2], weights[:, ::2]))
    (grad,) = torch.autograd.grad(got.sum(), weights)
    assert torch.equal(grad[:, 1], torch.zeros(len(x)))
    assert bool((grad[:, ::2] != 0).all())
    everywhere = torch.full_like(ids, module.num_experts)
    assert torch.equal(experts_forward(module, x, everywhere, weights), torch.zeros_like(x))


def test_unquantized_experts_dtypes_and_devices() -> None:
    """bfloat16 weights with float32 router weights; output in the dtype of the hidden states."""
    module = experts("qwen3_moe")
    x, ids, weights = arguments(module)
    with torch.no_grad():
        want = experts_forward(module, x, ids, weights)
        got = experts_forward(module.bfloat16(), x.bfloat16(), ids, weights)
    module.float()
    assert got.dtype == torch.bfloat16
    assert float(F.cosine_similarity(got.float(), want, dim=-1).min()) > 0.999


def test_unquantized_experts_compile() -> None:
    module = experts("gpt_oss")
    args = arguments(module)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: experts_forward(module, *a), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (7, 4):
        args = arguments(module, tokens)
        torch.testing.assert_close(compiled(*args), experts_forward(module, *args))


def test_grouped_mm_opcheck() -> None:
    for transposed in (False, True):
        x, weight = torch.randn(6, 4, requires_grad=True), torch.randn(3, *((4, 5) if transposed else (5, 4)))
        weight.requires_grad_()
        torch.library.opcheck(torch.ops.metal_marlin.grouped_mm, (x, weight, torch.tensor([2, 2, 5]), transposed))


# ---------------------------------------------------------------- activations


class Gate(nn.Module):
    """As much of an experts module as the search looks at."""

    def __init__(self, act: str | Callable[[torch.Tensor], torch.Tensor], **numbers: float) -> None:
        super().__init__()
        self.act_fn = ACT2FN[act] if isinstance(act, str) else act
        for name, value in numbers.items():
            setattr(self, name, value)


class ClampedGate(Gate):
    """DeepSeek-V4's: limits around a SiLU."""

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


class OaiGate(Gate):
    """MiniMax-M3's: gpt-oss's formula, not interleaved, other names."""

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
        return gate * torch.sigmoid(self.swiglu_alpha * gate) * (up + 1)


@pytest.mark.parametrize(
    ("act", "want"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
    ],
)
def test_plain_activations(act: str, want: str) -> None:
    assert find_activation(Gate(act)) == Activation(want)


def test_gated_activations() -> None:
    assert find_activation(experts("gpt_oss")) == Activation("swiglu_oai", 1.702, 7.0)
    assert find_activation(experts("qwen3_moe")) == Activation("silu")
    assert find_activation(OaiGate("silu", swiglu_alpha=1.5, swiglu_limit=3.0)) == Activation("swiglu_oai", 1.5, 3.0)


@pytest.mark.parametrize(
    "gate", [Gate("relu"), Gate("relu2"), Gate("quick_gelu"), Gate("gelu_10"), ClampedGate("silu", limit=10.0)], ids=str
)
def test_other_activations_are_refused(gate: Gate) -> None:
    with pytest.raises(ValueError, match=f"{type(gate).__name__}: its activation is none of those"):
        find_activation(gate)


def test_activations_that_fail_are_refused() -> None:
    with pytest.raises(ValueError, match="Gate: its activation can't be tried out: no"):
        find_activation(Gate(fail))


def fail(gate: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no")


# ---------------------------------------------------------------- routers


@cache
def classes() -> dict[str, str]:
    """Router class -> the module of the installed transformers that defines it."""
    folder = Path(transformers.__file__).parent / "models"
    pattern = re.compile(rf"^class ({'|'.join(hf_routers.KINDS)})\(", re.MULTILINE)
    found = {}
    for file in folder.glob("*/modeling_*.py"):
        for name in pattern.findall(file.read_text(encoding="utf-8")):
            found[name] = f"transformers.models.{file.parent.name}.{file.stem}"
    return found


@pytest.mark.parametrize("name", sorted(hf_routers.KINDS))
def test_fused_router(name: str) -> None:
    """Every class of the list, built with random settings, gives what its own forward gives, and keeps its class."""
    if name not in classes():
        pytest.skip("not in this version of transformers")
    router_class = getattr(importlib.import_module(classes()[name]), name)
    experts_count, hidden, top_k = 16, 32, 4
    numbers = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), experts_count)
    numbers |= {"num_experts_per_tok": top_k, "moe_topk": top_k, "moe_num_active_primary_experts": top_k}
    settings = SimpleNamespace(
        **numbers, hidden_size=hidden, n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
        router_scaling_factor=2.5, text_config=SimpleNamespace(**numbers, hidden_size=hidden), topk_method="noaux_tc",
    )  # fmt: skip
    torch.manual_seed(0)
    router = router_class(settings)
    with torch.no_grad():
        for value in router.state_dict().values():
            value.normal_()
    x = torch.randn(50, hidden)
    extra = (torch.randn(experts_count),) if name in hf_routers.SIGMOID_TOPK_ARGUMENT else ()
    with torch.no_grad():
        want = router(x, *extra)
        if not isinstance(want, tuple) or want[1].shape != want[2].shape:
            pytest.skip("in this version of transformers it gives something else, or routes in the block around it")
        assert hf_routers.fuse_routers(nn.ModuleList([router])) == 1
        logits, scores, ids = router(x, *extra)
    assert isinstance(router, router_class)
    assert isinstance(router, hf_routers.FusedRouter)
    torch.testing.assert_close(logits, want[0].float(), rtol=1e-4, atol=1e-4)
    spread = [torch.zeros(50, experts_count).scatter(1, i, s.float()) for _, s, i in (want, (logits, scores, ids))]
    torch.testing.assert_close(*spread, rtol=1e-4, atol=1e-5)
    assert (scores.dtype, ids.dtype) == (torch.float32, torch.int64)


def test_routers_that_differ_keep_their_own() -> None:
    """A class of a listed name with another forward, as of another transformers version, is left alone."""

    class MixtralTopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.weight = 2, nn.Parameter(torch.zeros(4, 8, device="meta"))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            logits = F.linear(x, self.weight)
            scores, ids = torch.topk(torch.softmax(logits, -1), self.top_k)
            return logits, 0.5 * scores, ids

    class Qwen3MoeTopKRouter(MixtralTopKRouter):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return F.linear(x, self.weight)

    routers = nn.ModuleList([MixtralTopKRouter(), Qwen3MoeTopKRouter(), nn.Linear(1, 1)])
    kinds = [type(module) for module in routers]
    assert hf_routers.fuse_routers(routers) == 0
    assert [type(module) for module in routers] == kinds
