"""CachedWeightBuffers: the same results under any budget, what is read and evicted, and what can go wrong."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Backend, same_bits

from benchmarks.memory import policies
from metal_marlin import Checkpoint, TrellisExperts
from metal_marlin.cached import CachedExperts, CachedWeightBuffers, cache_experts

MODEL = Path(__file__).resolve().parent.parent / "models" / "tiny-moe"
EXPERT = 3 * 256 * 256 * 2 // 8  # bytes of an expert's tiles
PATHS = [f"model.layers.{i}.mlp.experts" for i in range(6)]


def layers_of(checkpoint: Checkpoint, paths: Sequence[str] = PATHS) -> dict[str, list[list[Any]]]:
    names = ("gate_proj", "up_proj", "down_proj")
    return {
        p: [[checkpoint.tensors[f"{p}.{e}.{n}.trellis"] for n in names] for e in range(16)] for p in paths
    }  # fmt: skip


def made(budget: int, folder: Path = MODEL, paths: Sequence[str] = PATHS, **options: Any) -> CachedWeightBuffers:
    return CachedWeightBuffers(list(layers_of(Checkpoint(folder), paths).values()), budget, top_k=4, **options)


def pair(budget: int, folder: Path = MODEL, **options: Any) -> tuple[TrellisExperts, CachedExperts]:
    """A layer, and the same one behind a cache."""
    checkpoint = Checkpoint(folder)
    experts = TrellisExperts.from_experts(*checkpoint.experts(PATHS[0]))
    cache = CachedWeightBuffers(list(layers_of(checkpoint, PATHS[:1]).values()), budget, top_k=4, **options)
    return experts, CachedExperts(experts, cache, 0)


def tokens(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(16, generator=generator)[:4] for _ in range(count)])
    x = torch.randn(count, 256, generator=generator).to(dtype)
    return x, ids, torch.rand(count, 4, generator=generator)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("slots", [16, 8, 5, 4])
def test_results(cpu: Backend, slots: int) -> None:
    """The same bits where a call's experts fit; else within float32's rounding of sums of 4 terms."""
    experts, cached = pair(slots * EXPERT)
    with torch.no_grad():
        for seed in range(6):
            one = tokens(1, seed)
            assert same_bits(cached(*one), experts(*one))
        many = tokens(40)
        want, got = experts(*many), cached(*many)
        if slots == 16:
            assert same_bits(got, want)
        assert (got - want).abs().max() <= 8 * 2**-24 * want.abs().max()
        half = tokens(40, dtype=torch.bfloat16)
        want, got = experts(*half), cached(*half)
        assert got.dtype == torch.bfloat16
        assert (got.float() - want.float()).abs().max() <= 2**-7 * want.float().abs().max()
        batch = [part.view(5, 8, -1) for part in many]
        assert same_bits(cached(*batch).view(40, -1), cached(*many))
    statistics = cached.cache.statistics()
    assert statistics.pinned == 0
    assert statistics.failures == 0
    assert statistics.bytes == statistics.reads * EXPERT
    assert statistics.filled <= slots


def test_no_tokens() -> None:
    _, cached = pair(4 * EXPERT)
    with torch.no_grad():
        assert cached(*tokens(1)).shape == (1, 256)
        empty = [part[:0] for part in tokens(1)]
        assert cached(*empty).shape == (0, 256)


def test_threads_share_a_cache() -> None:
    """Eight at once, in a cache of two calls' experts: every result has the bits of the resident layer."""
    experts, cached = pair(8 * EXPERT)
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for i in range(25):
                one = tokens(1, 100 * seed + i)
                if not same_bits(cached(*one), experts(*one)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    statistics = cached.cache.statistics()
    assert statistics.hits + statistics.late + statistics.misses == 8 * 25 * 4
    assert statistics.pinned == 0


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a prompt and of decoding, at budgets down to one token's experts; the look-ahead finds most experts."""
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf

    load = transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.arange(200, 248).view(1, 48)

    def run(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            out = model(ids[:, :8], use_cache=True)
            rows = [out.logits[0, -1]]
            for i in range(8, 48):
                out = model(ids[:, i : i + 1], past_key_values=out.past_key_values)
                rows.append(out.logits[0, -1])
        return torch.stack(rows)

    want = run(load(MODEL, dtype=torch.float32))
    rates = {}
    for look_ahead, slots in (("router", 48), ("previous", 48), ("none", 48), ("router", 16), ("none", 4)):
        with metal_marlin.hf.loading(cache_bytes=slots * EXPERT, look_ahead=look_ahead):
            model = load(MODEL, dtype=torch.float32)
        assert not [name for name, _ in model.named_buffers() if "experts" in name and name.endswith("trellis")]
        got = run(model)
        assert (got - want).abs().max() < 1e-4
        if slots >= 16:
            assert same_bits(got[1:], want[1:]) or (got - want).abs().max() < 1e-5
        statistics = model.metal_marlin_cache.statistics()
        assert statistics.filled <= slots == model.metal_marlin_cache.slots
        rates[look_ahead, slots] = statistics.hit_rate
        assert (statistics.prefetched > 0) == (look_ahead != "none")
    assert rates["router", 48] > rates["none", 48] > 0.5
    assert rates["none", 4] < 0.1
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(model)
    assert same_bits(run(copy.deepcopy(model)), got)


def test_gradients_are_refused() -> None:
    _, cached = pair(16 * EXPERT)
    x, ids, weights = tokens(1)
    with pytest.raises(NotImplementedError, match=r"experts in a cache have no gradient; .* torch\.no_grad"):
        cached(x.requires_grad_(), ids, weights)


def test_slots_without_an_expert() -> None:
    """Id -1, as TrellisExperts takes it."""
    experts, cached = pair(4 * EXPERT)
    for count in (1, 12):  # in one part, and in several
        x, ids, weights = tokens(count)
        ids[:, 2] = -1
        with torch.no_grad():
            want, got = experts(x, ids, weights), cached(x, ids, weights)
        assert same_bits(got, want) if count == 1 else torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert -1 not in cached._previous


def test_compile() -> None:
    """torch.compile leaves the experts to run as they are."""
    experts, cached = pair(8 * EXPERT)
    with torch.no_grad():
        compiled = torch.compile(lambda *a: cached(*a) * 2, backend="eager")
        assert same_bits(compiled(*tokens(1)), experts(*tokens(1)) * 2)


# ---------------------------------------------------------------- what is kept


def test_bytes_are_the_files() -> None:
    cache, checkpoint = made(6 * EXPERT), Checkpoint(MODEL)
    for layer, e in ((0, 3), (5, 15), (2, 0)):
        with cache.use(layer, [e]) as (slot,):
            got = cache.tiles[slot * EXPERT // 2 : (slot + 1) * EXPERT // 2]
            parts = [checkpoint.tensor(info_name(layer, e, n)) for n in ("gate_proj", "up_proj", "down_proj")]
            assert torch.equal(got, torch.cat([part.reshape(-1) for part in parts]))


def info_name(layer: int, e: int, projection: str) -> str:
    return f"{PATHS[layer]}.{e}.{projection}.trellis"


@pytest.mark.parametrize("slots", [8, 24, 48])
@pytest.mark.parametrize("half_life", [1.0, 4.0])
def test_eviction_is_the_documented_rule(slots: int, half_life: float) -> None:
    """As many hits as the rule in Python, which shares no code, use by use, on made-up routing."""
    trace = policies.random_trace(60, 6, 16, 4, seed=slots)
    cache = made(slots * EXPERT, half_life=half_life, look_ahead="none")
    for token in trace.tolist():
        for layer, experts in enumerate(token):
            with cache.use(layer, experts):
                pass
    statistics = cache.statistics()
    uses = trace.size
    want = policies.replay(trace, 16, slots, half_life=half_life * slots)
    assert statistics.hits / uses == pytest.approx(want.hits)
    assert statistics.reads == statistics.misses == uses - statistics.hits
    assert cache.statistics(reset=True).hits == statistics.hits
    assert cache.statistics().hits == 0


def test_pinned_experts_stay() -> None:
    cache = made(6 * EXPERT)
    pinned = cache.acquire(0, [1, 2])
    for e in range(16):
        with cache.use(3, [e]):
            pass
    with cache.use(0, [1, 2]) as again:
        assert again == pinned
    assert cache.statistics().hits == 2
    assert cache.statistics().pinned == 2


def test_prefetch() -> None:
    cache = made(8 * EXPERT)
    assert cache.prefetch(1, [3, 4, 5]) == 3
    assert cache.prefetch(1, [3, 4, 6]) == 1
    for _ in range(1000):
        if not cache.statistics().pending:
            break
        time.sleep(0.01)
    with cache.use(1, [3, 6]):
        pass
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.prefetched, statistics.useful) == (2, 0, 4, 2)
    cache.acquire(2, list(range(8)))
    assert cache.prefetch(1, [9]) == 0  # nothing is taken from what is in use


# ---------------------------------------------------------------- what goes wrong

REFUSED = {
    "budget": ({"budget": 4 * EXPERT - 1}, "has 196607 bytes; expected at least 196608: 4 experts of a token, 49152"),
    "look_ahead": ({"look_ahead": "future"}, "look_ahead is 'future'; expected one of router, previous, none"),
    "readers": ({"readers": 0}, "readers is 0"),
    "timeout": ({"timeout": 0}, "timeout is 0"),
    "half_life": ({"half_life": float("nan")}, "half_life is nan"),
    "disk": ({"bytes_per_second": -1}, "bytes_per_second is -1"),
    "layers": ({"paths": ()}, "layers is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        made(**{"budget": 8 * EXPERT, **options})  # type: ignore[arg-type]


def test_bad_experts() -> None:
    cache = made(8 * EXPERT)
    for call in (cache.acquire, cache.prefetch, cache.release):
        with pytest.raises(ValueError, match=r"experts are \[16\]; expected 0 to 15, as layer 0 has"):
            call(0, [16])
    with pytest.raises(OSError, match="9 experts are needed at once; the cache holds 8"):
        cache.acquire(0, list(range(9)))
    _, cached = pair(8 * EXPERT)
    x, ids, weights = tokens(1)
    with torch.no_grad(), pytest.raises(ValueError, match="expected 0 to 15"):
        cached(x, ids + 16, weights)


BAD_ITEMS: dict[str, tuple[tuple[Any, Any], type[Exception], str]] = {
    "no layer": ((6, [0]), ValueError, "layer is 6; expected a whole number from 0 to 5"),
    "a layer from the end": ((-1, [0]), ValueError, "layer is -1; expected"),
    "a layer by name": (("0", [0]), TypeError, "layer is '0'; expected"),
    "an expert by name": ((0, ["0"]), TypeError, r"experts are \['0'\]; expected whole numbers from 0 to 15"),
    "one expert": ((0, 3), TypeError, "experts are 3; expected whole numbers"),
    "an expert twice": ((0, [1, 2, 1]), ValueError, r"experts are \[1, 2, 1\]; expected each of them once"),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items(name: str) -> None:
    (layer, experts), error, message = BAD_ITEMS[name]
    cache = made(8 * EXPERT)
    for call in (cache.acquire, cache.release, cache.prefetch):
        if call == cache.prefetch and "twice" in name:
            continue  # asked for once
        with pytest.raises(error, match=message):
            call(layer, experts)
    assert cache.statistics().pinned == 0


def test_releasing_what_is_not_in_use() -> None:
    """Takes nothing from those who use the others."""
    cache = made(8 * EXPERT)
    cache.acquire(2, np.array([1, 5]))
    for layer, experts in ((2, [1, 6]), (3, [1]), (0, [15])):
        with pytest.raises(ValueError, match=rf"experts are \[.*\] of layer {layer}, and one of them is not in use"):
            cache.release(layer, experts)
    assert cache.statistics().pinned == 2
    cache.release(2, [5, 1])
    with pytest.raises(ValueError, match="not in use"):
        cache.release(2, [1])


def test_state_dict_has_no_tiles() -> None:
    """And tiles are not loaded into cached experts."""
    experts, cached = pair(8 * EXPERT)
    state = experts.state_dict()
    assert {name for name in state if "trellis" in name or "table" in name} == state.keys() - cached.state_dict().keys()
    with pytest.raises(RuntimeError, match=r"gate_proj\.trellis: the tiles of cached experts are read from") as caught:
        cached.load_state_dict(state)
    assert "Unexpected" not in str(caught.value)
    cached.load_state_dict(cached.state_dict())


def test_a_budget_larger_than_the_model() -> None:
    assert made(10**12).slots == 96


CHANGES = {
    "truncated": (lambda file: os.truncate(file, 10**6), "10000|has changed|ends within"),
    "rewritten": (lambda file: os.utime(file, (1, 1)), "has been written to while it was in use"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes(folder: Path, change: str) -> None:
    """What is in memory goes on; the next read is an error, and nothing stays pinned."""
    spoil, message = CHANGES[change]
    experts, cached = pair(8 * EXPERT, folder)
    copied = copy.deepcopy(experts)
    with torch.no_grad():
        here = tokens(1)
        want = cached(*here)
        spoil(folder / "model.safetensors")
        assert same_bits(cached(*here), want)
        others = [
            one
            for one in (tokens(1, seed) for seed in range(9))
            if not set(one[1][0].tolist()) <= set(here[1][0].tolist())
        ]
        with pytest.raises(OSError, match=message):
            cached(*others[0])
        assert same_bits(cached(*here), copied(*here))
    assert cached.cache.statistics().pinned == 0
    assert cached.cache.statistics().failures > 0


def test_a_disk_that_stalls() -> None:
    """A second's timeout, not a hang; and the cache can be let go while the read is still going on."""
    cache = made(8 * EXPERT, bytes_per_second=1000.0, timeout=0.2)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"model\.safetensors: 16384 bytes .* not read in 0\.2 s: .* stalls"):
        cache.acquire(0, [1, 2])
    assert 0.15 < time.monotonic() - started < 5
    assert cache.statistics().pinned == 0
    del cache
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("waits_for", ["a read that takes a minute", "room"])
def test_ctrl_c_while_it_waits(waits_for: str) -> None:
    """At once, and nothing stays pinned: the next call has all slots."""
    room = waits_for == "room"
    cache = made(4 * EXPERT, bytes_per_second=0.0 if room else 800.0, look_ahead="none")
    if room:
        cache.acquire(1, [0, 1])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, signal.raise_signal, (signal.SIGINT,))
    started = time.monotonic()
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            cache.acquire(0, [0, 1, 2, 3])
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 5
    assert cache.statistics().pinned == (2 if room else 0)


def test_a_file_replaced_before_the_cache_opens_it(folder: Path) -> None:
    """Another file of the same size and header: the model is refused, rather than made of both."""
    transformers = pytest.importorskip("transformers")
    import metal_marlin.hf
    from metal_marlin import hf_memory

    file, other = folder / "model.safetensors", folder / "other"
    shutil.copy(file, other)
    install = hf_memory.cache_experts

    def replacing(*args: Any, **options: Any) -> Any:
        os.replace(other, file)
        return install(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_memory, "cache_experts", replacing)
        with (
            metal_marlin.hf.loading(cache_bytes=8 * EXPERT),
            pytest.raises(OSError, match="was replaced or written to"),
        ):
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache_bytes": 0}, ValueError, "cache_bytes is 0; expected a whole number of bytes"),
        ({"cache_bytes": 2.5}, ValueError, r"cache_bytes is 2\.5"),
        ({"cache_bytes": "2e6"}, ValueError, "cache_bytes is '2e6'"),
        ({"context": 0}, ValueError, "context is 0; expected a number of tokens"),
        ({"readers": 1.5}, ValueError, r"readers is 1\.5; expected a whole number from 1 to 64"),
        ({"timeout": "a"}, TypeError, "timeout is 'a'; expected a number"),
        ({"look_ahead": "junk"}, ValueError, "look_ahead is 'junk'"),
    ],
)
def test_bad_options_of_loading(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Before anything is read."""
    pytest.importorskip("transformers")
    import metal_marlin.hf

    with pytest.raises(error, match=message), metal_marlin.hf.loading(**options):
        pytest.fail("it went on")


def test_no_room_in_time() -> None:
    cache = made(4 * EXPERT, timeout=0.2)
    cache.acquire(0, [0, 1, 2])
    with pytest.raises(TimeoutError, match="no room for 2 experts came free"):
        cache.acquire(1, [0, 1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork() -> None:
    """A child has no readers: an error, not a hang, and the parent goes on."""
    cache = made(8 * EXPERT)
    cache.acquire(0, [0])
    child = os.fork()
    if not child:
        try:
            cache.acquire(0, [1])
        except OSError as error:
            os._exit(0 if "load the model after forking" in str(error) else 2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(cache.acquire(0, [1])) == 1


def test_a_cache_of_mixed_sizes() -> None:
    """Experts of other rates take slots of the largest one's size, and the same results follow."""
    import checkpoints

    pytest.importorskip("transformers")
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Checkpoint(checkpoints.build(Path(temporary), "qwen3_moe").write())
        path = PATHS[0]
        width = checkpoint.config["moe_intermediate_size"]
        experts = TrellisExperts.from_experts(*checkpoint.experts(path), 192, width)
        holder = torch.nn.Module()
        holder.experts = experts
        names = ("gate_proj", "up_proj", "down_proj")
        infos = [[checkpoint.tensors[f"{path}.{e}.{n}.trellis"] for n in names] for e in range(experts.num_experts)]
        assert len({sum(part.nbytes for part in parts) for parts in infos}) > 1
        largest = max(sum(part.nbytes for part in parts) for parts in infos)
        cache = cache_experts(holder, {"experts": infos}, 2 * largest, top_k=2)
        assert (cache.slots, cache.slot_bytes) == (2, largest)
        x = torch.randn(7, 192)
        ids, weights = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(7)]), torch.rand(7, 2)
        with torch.no_grad():
            want = experts(x, ids, weights)
            assert (holder.experts(x, ids, weights) - want).abs().max() <= 8 * 2**-24 * want.abs().max()
            assert same_bits(holder.experts(x[:1], ids[:1], weights[:1]), want[:1])


def test_trace_is_int64() -> None:
    assert policies.random_trace(3, 2, 8, 2).dtype == np.int64
