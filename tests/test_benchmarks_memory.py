"""The benchmark of memory: its policies against brute force, its checkpoint against the reader; no timings."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.memory import checkpoint, policies
from metal_marlin import Checkpoint


def best_hits(uses: tuple[int, ...], slots: int) -> int:
    """The most hits that any evictions give: tries all."""

    @cache
    def most(place: int, here: frozenset[int]) -> int:
        if place == len(uses):
            return 0
        if uses[place] in here:
            return 1 + most(place + 1, here)
        if len(here) < slots:
            return most(place + 1, here | {uses[place]})
        return max(most(place + 1, (here - {out}) | {uses[place]}) for out in here)

    return most(0, frozenset())


@pytest.mark.parametrize("seed", range(5))
def test_belady_is_the_optimum(seed: int) -> None:
    trace = np.random.default_rng(seed).integers(0, 6, size=(20, 1, 1))
    for slots in (1, 2, 3):
        want = best_hits(tuple(trace.reshape(-1).tolist()), slots) / trace.size
        assert policies.belady(trace, 6, slots).hits == pytest.approx(want)
        for half_life in (None, 2.0, 100.0):
            assert policies.replay(trace, 6, slots, half_life=half_life).hits <= want + 1e-9


def test_replay_by_hand() -> None:
    """Two slots: 0 1 0 2 0 1. Least recently used loses 1 to 2, then 2 to 1: hits are 0 and 0."""
    trace = np.array([0, 1, 0, 2, 0, 1]).reshape(6, 1, 1)
    assert policies.replay(trace, 3, 2) == policies.Outcome(2 / 6, 4 / 6)
    told = policies.replay(trace, 3, 2, ahead=trace)
    assert told.hits == 1  # what is foretold is there
    assert policies.accuracy(trace, trace) == 1
    assert policies.previous_token(trace).reshape(-1).tolist() == [-1, 0, 1, 0, 2, 0]


def test_random_trace() -> None:
    trace = policies.random_trace(50, 3, 16, 4)
    assert trace.shape == (50, 3, 4)
    assert all(len(set(step)) == 4 and min(step) >= 0 and max(step) < 16 for step in trace.reshape(-1, 4).tolist())
    kept = policies.accuracy(policies.previous_token(trace), trace)
    assert kept > policies.accuracy(policies.previous_token(policies.random_trace(50, 3, 16, 4, sticky=0)), trace)


def test_checkpoint_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("HIDDEN", 256), ("WIDTH", 128), ("EXPERTS", 4), ("VOCABULARY", 256)):
        monkeypatch.setattr(checkpoint, name, value)
    file = checkpoint.write(tmp_path, 2)
    opened = Checkpoint(tmp_path)
    assert len(opened.groups) == 2 * (4 * 3 + 4) + 1
    assert opened.nbytes < file.stat().st_size
    assert opened.tensor("model.norm.weight").isfinite().all()
    sizes = [checkpoint.layers_for(n) for n in (1, 10**7, 10**8)]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1


def test_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    assert main(["memory", "--only", "policies", "--tokens", "16", "--json", str(tmp_path / "report.json")]) == 0
    out = capsys.readouterr().out
    for words in ("Belady's optimum", "least recently used", "ours, router", "guessed right", "tiny-moe on text"):
        assert words in out
    assert (tmp_path / "report.json").stat().st_size > 100
    assert main(["memory", "--rounds", "0"]) == 2
