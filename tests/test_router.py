"""router against the oracle: every kind with its options, expert counts, dtypes, strides, ties, non-finite input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from conftest import DTYPES, Backend, array, assert_close, ops, same_bits

import metal_marlin._C as _C

KINDS = ("softmax_topk", "topk_softmax", "sigmoid_topk")
GROUPED = ("softmax_topk", "sigmoid_topk")


def call(backend: Backend, x: torch.Tensor, gate: torch.Tensor, correction: torch.Tensor | None, top_k: int, kind: str,
         renormalize: bool = False, scale: float = 1.0, n_group: int = 1, topk_group: int = 1) -> Any:  # fmt: skip
    correction = backend.put(None) if correction is None else correction
    return ops.router(x, gate, correction, top_k, kind, renormalize, scale, n_group, topk_group)


def check(backend: Backend, x: torch.Tensor, gate: torch.Tensor, correction: torch.Tensor | None, top_k: int, kind: str,
          *options: Any, decided: float = 0.8) -> None:  # fmt: skip
    """Logits within their bound; the oracle's ids wherever no decision is closer than rounding; weights to float32
    accuracy."""
    weights, ids, logits = call(backend, x, gate, correction, top_k, kind, *options)
    tokens, count = x[..., 0].numel(), len(gate)
    assert weights.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert logits.dtype == torch.float32
    assert weights.shape == ids.shape == (*x.shape[:-1], top_k)
    assert logits.shape == (*x.shape[:-1], count)
    rows, gates = array(x).reshape(tokens, x.shape[-1]), array(gate)
    extra = None if correction is None else array(correction)
    want = ref.router(rows, gates, extra, top_k, kind, *options)
    bound = ref.logits_bound(rows, gates)
    assert_close(logits.reshape(tokens, count), want.logits, bound + ref.F32 * np.abs(want.logits), "logits")
    if not tokens:
        return
    # A logit off by d moves its sigmoid by at most d / 4 and a softmax p by at most 2 p d; exp, sum, division and
    # correction round a few times more, relative to scores of at most `size`.
    largest = np.exp(want.logits - np.logaddexp.reduce(want.logits, axis=1, keepdims=True)).max(axis=1)
    slope = {"topk_softmax": np.ones(tokens), "sigmoid_topk": np.full(tokens, 0.25), "softmax_topk": 2 * largest}[kind]
    size = np.abs(want.logits).max(axis=1) if kind == "topk_softmax" else 4 * slope
    size = size + (0 if extra is None else np.abs(extra).max())
    noise = slope * bound.max(axis=1) + 8 * ref.F32 * size
    clear = want.margin > 2 * noise
    assert clear.mean() >= decided, "too few tokens whose selection is beyond doubt"
    got_ids = array(ids).reshape(tokens, top_k)
    assert np.array_equal(got_ids[clear], want.ids[clear])
    # weights: exp(logit) is off by the logit's own error, a sum and a division double it
    relative = 4 * bound.max(axis=1, keepdims=True) + (32 + count) * ref.F32
    assert_close(
        weights.reshape(tokens, top_k)[clear],
        want.weights[clear],
        (relative * np.abs(want.weights) + 1e-37)[clear],
        "weights",
    )


def problem(backend: Backend, rng: np.random.Generator, tokens: int, hidden: int, count: int, dtype: str = "float32",
            gate_dtype: str = "float32") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """x, a gate with logits of standard deviation 1, and a correction that changes the selection."""
    x, gate = rng.normal(size=(tokens, hidden)), rng.normal(size=(count, hidden)) / np.sqrt(hidden)
    return backend.put(x, dtype), backend.put(gate, gate_dtype), backend.put(rng.uniform(0, 0.5, count), "float32")


def test_list_of_kinds() -> None:
    assert tuple(_C.ROUTERS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renormalize", [False, True], ids=["", "renormalize"])
@pytest.mark.parametrize("corrected", [False, True], ids=["", "corrected"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_kinds(
    backend: Backend, rng: np.random.Generator, kind: str, renormalize: bool, corrected: bool, scale: float
) -> None:
    for tokens, hidden, count, top_k in ((1, 128, 8, 2), (33, 200, 64, 8), (6, 96, 128, 1)):
        x, gate, correction = problem(backend, rng, tokens, hidden, count)
        check(backend, x, gate, correction if corrected else None, top_k, kind, renormalize, scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (3, 3), (17, 5), (32, 32), (256, 8), (500, 10), (512, 32)], ids=str)
def test_expert_counts(backend: Backend, rng: np.random.Generator, sizes: tuple[int, int], kind: str) -> None:
    """Up to 512 experts and top 32; spread logits so that neighbours differ."""
    count, top_k = sizes
    for hidden, tokens in ((1, 2), (127, 5), (300, 3)):
        # one more feature per token, set in that token only, carries its logits: evenly spaced and in random order
        spread = np.stack([rng.permutation(np.linspace(-1.5, 1.5, count)) for _ in range(tokens)], axis=1)
        gate = np.concatenate([1e-3 * rng.normal(size=(count, hidden)) / np.sqrt(hidden), spread], axis=1)
        x = np.concatenate([rng.normal(size=(tokens, hidden)), np.eye(tokens)], axis=1)
        check(backend, backend.put(x, "float32"), backend.put(gate, "float32"), None, top_k, kind, True, 1.0)


@pytest.mark.parametrize("kind", GROUPED)
@pytest.mark.parametrize(
    "groups", [(64, 8, 4, 6), (32, 4, 1, 8), (16, 16, 8, 8), (24, 3, 3, 5), (256, 8, 4, 8), (12, 2, 1, 4)], ids=str
)
def test_groups(backend: Backend, rng: np.random.Generator, groups: tuple[int, int, int, int], kind: str) -> None:
    count, n_group, topk_group, top_k = groups
    for renormalize, scale in ((True, 2.5), (False, 1.0)):
        x, gate, correction = problem(backend, rng, 40, 128, count)
        for extra in (None, correction):
            check(backend, x, gate, extra, top_k, kind, renormalize, scale, n_group, topk_group)


def logits_as_input(backend: Backend, rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """x and gate (the identity) whose product is exactly `rows`."""
    return backend.put(np.array(rows), "float32"), backend.put(np.eye(len(rows[0])), "float32")


def test_dropped_groups_stay_out(backend: Backend) -> None:
    """No expert of a dropped group is chosen, even if the kept ones' corrected scores are negative and far lower."""
    x, gate = logits_as_input(backend, [[2, 1, 3, -9], [0, 0.5, 2, 1]])
    correction = backend.put(np.array([-2.0, -0.5, -0.6, -2.0]), "float32")
    weights, ids, _ = call(backend, x, gate, correction, 2, "sigmoid_topk", False, 1.0, 2, 1)
    # token 0: scores -1.12, 0.23 | 0.35, -2.0, so the group that holds the best expert loses, -0.89 to -1.65
    # token 1: scores -1.50, 0.12 | 0.28, -1.27, so the second group wins, -0.99 to -1.38
    assert array(ids).tolist() == [[1, 0], [2, 3]]
    p = 1 / (1 + np.exp(-array(x)))
    assert_close(weights, np.take_along_axis(p, array(ids), axis=1), np.full((2, 2), 8 * ref.F32))


@pytest.mark.parametrize("kind", KINDS)
def test_ties(backend: Backend, kind: str) -> None:
    """Of equal scores the lower index comes first, also across the border of the selection, for any number of
    experts."""
    x, gate = logits_as_input(
        backend, [[1, 3, 1, 3, 3, 0], [0, 0, 0, 0, 0, 0], [2, 1, 1, 1, 1, 2], [-0.0, 0.0, -0.0, 0.0, -1, -1]]
    )
    _, ids, _ = call(backend, x, gate, None, 4, kind)
    assert array(ids).tolist() == [[1, 3, 4, 0], [0, 1, 2, 3], [0, 5, 1, 2], [0, 1, 2, 3]]
    for count in (1, 7, 8, 9, 31, 64, 100, 512):
        same = backend.put(np.full((3, 16), 0.25), "float32"), backend.put(np.full((count, 16), 0.5), "float32")
        top_k = min(count, 32)
        weights, ids, _ = call(backend, *same, None, top_k, kind, True)
        assert array(ids).tolist() == [list(range(top_k))] * 3, f"{count} experts"
        assert_close(weights, np.full((3, top_k), 1 / top_k), np.full((3, top_k), (16 + count) * ref.F32))


@pytest.mark.parametrize("kind", GROUPED)
def test_ties_of_groups(backend: Backend, kind: str) -> None:
    x, gate = logits_as_input(backend, [[1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 1, 1, 1, 1, 0, 0]])
    _, ids, _ = call(backend, x, gate, None, 4, kind, False, 1.0, 4, 2)
    assert array(ids).tolist() == [[0, 3, 1, 2], [2, 3, 4, 5]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_dtype", DTYPES)
def test_dtypes(backend: Backend, rng: np.random.Generator, kind: str, dtype: str, gate_dtype: str) -> None:
    """The product is a float32 one of the stored values, whatever the two dtypes."""
    for correction_dtype in DTYPES:
        x, gate, correction = problem(backend, rng, 20, 160, 16, dtype, gate_dtype)
        check(backend, x, gate, correction.to(getattr(torch, correction_dtype)), 3, kind, True, 1.0)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0)], ids=str)
def test_batch_shapes(backend: Backend, rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    x, gate, correction = problem(backend, rng, int(np.prod(shape)), 64, 12)
    check(backend, x.reshape(*shape, 64), gate, correction, 4, "softmax_topk", True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend: Backend, rng: np.random.Generator, dtype: str) -> None:
    """Views of x, the gate and the correction give the results of their contiguous copies."""
    x = backend.put(rng.normal(size=(64, 6, 2)), dtype).permute(1, 2, 0)[::2, 1]
    gate = backend.put(rng.normal(size=(64, 24)), dtype).t()[::2]
    correction = backend.put(rng.normal(size=(12, 2)), "float32")[:, 0]
    got = call(backend, x, gate, correction, 3, "sigmoid_topk", True)
    want = call(backend, x.contiguous(), gate.contiguous(), correction.contiguous(), 3, "sigmoid_topk", True)
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    expanded = call(backend, x[:1].expand(4, 64), gate[:1].expand(8, 64), correction[:1].expand(8), 3, "topk_softmax")
    assert array(expanded[1]).tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_input(backend: Backend, rng: np.random.Generator, kind: str, poison: float) -> None:
    """Non-finite x, gate or correction: the ids stay distinct and in range, and other tokens keep their bits."""
    for count, top_k, groups in ((8, 3, (1, 1)), (64, 32, (8, 4)), (5, 5, (1, 1))):
        groups = groups if kind in GROUPED else (1, 1)
        x, gate, correction = problem(backend, rng, 4, 40, count)
        clean = call(backend, x, gate, correction, top_k, kind, True, 1.0, *groups)
        for name in ("x", "gate", "correction", "all"):
            dirty = {"x": x.clone(), "gate": gate.clone(), "correction": correction.clone()}
            if name == "all":
                dirty["x"].fill_(poison)
            else:
                dirty[name].reshape(-1)[2] = poison
            weights, ids, logits = call(backend, *dirty.values(), top_k, kind, True, 1.0, *groups)
            assert all(0 <= i < count for i in array(ids).reshape(-1)), f"{name}, {count} experts"
            assert all(len(set(row)) == top_k for row in array(ids).tolist()), f"{name}, {count} experts"
            if name == "x":
                assert not torch.isfinite(logits[0]).any()
                rest = zip((weights, ids, logits), clean, strict=True)
                assert all(same_bits(a[1:], b[1:]) for a, b in rest), f"{name}, {count} experts"


def test_nan_is_largest(backend: Backend) -> None:
    """A NaN score is selected first, so that it shows in the result; several of them by index."""
    nan = float("nan")
    gate = backend.put(np.eye(6), "float32")
    correction = backend.put(np.array([0, 0, nan, 0, nan, 0]), "float32")
    x = backend.put(np.array([[1.0, 2, 3, 4, 5, 6]]), "float32")
    for kind in KINDS:
        _, ids, _ = call(backend, x, gate, correction, 4, kind)
        assert array(ids).tolist() == [[2, 4, 5, 3]], kind
    _, ids, _ = call(backend, x * nan, gate, None, 4, "softmax_topk")
    assert array(ids).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(backend: Backend, kind: str) -> None:
    """Logits at which exp over- or underflows still give finite weights that sum to 1."""
    x, gate = logits_as_input(
        backend, [[1000, 0, -1000, 500], [-3e38, -2e38, -1e38, 0], [3e38, 3e38, -3e38, 0], [80, 90, -90, 89]]
    )
    weights, ids, _ = call(backend, x, gate, None, 2, kind, True)
    assert torch.isfinite(weights).all()
    assert_close(weights.sum(-1), np.ones(4), np.full(4, 8 * ref.F32))
    # the sigmoids of 80, 90 and 89 are all 1 in float32, so the lowest index comes first
    assert array(ids)[:, 0].tolist() == ([0, 3, 0, 0] if kind == "sigmoid_topk" else [0, 3, 0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_batch_invariance(backend: Backend, rng: np.random.Generator, kind: str) -> None:
    x, gate, correction = problem(backend, rng, 70, 160, 40)
    whole = call(backend, x, gate, correction, 4, kind, True)
    for part in (slice(0, 1), slice(1, 4), slice(5, 22), slice(69, 70)):
        got = call(backend, x[part], gate, correction, 4, kind, True)
        assert all(same_bits(a, b[part]) for a, b in zip(got, whole, strict=True)), str(part)
