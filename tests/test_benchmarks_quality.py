"""The quality benchmark: scalar formats against their definitions, tables, reports and the plot."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.quality import command, gaussian
from benchmarks.quality.scalar import NF4, affine, nf4
from metal_marlin import _C

FAST = len(_C.cpu_levels()) > 1


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 64)])
def test_affine(bits, group):
    """The ends of every group are exact, and nothing is further than half a step from its weight."""
    form = affine(bits, group)
    assert form.bits == bits + 32 / group
    weight = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    found, want = (t.reshape(-1, group).numpy() for t in (form.round(weight), weight))
    step = (want.max(1) - want.min(1)) / (2**bits - 1)
    assert (np.abs(found - want) <= 0.505 * step[:, None] + 2e-3).all()
    assert all(len(np.unique(row)) <= 2**bits for row in found)
    np.testing.assert_allclose(found.min(1), want.min(1), rtol=1e-3)


def test_nf4():
    """Weights that are levels times a scale stay; others take the closest level."""
    assert len(NF4) == 16
    assert list(NF4) == sorted(NF4)
    levels = torch.tensor(NF4)
    exact = (levels[torch.arange(128) % 16] * 0.5).repeat(2, 1)
    torch.testing.assert_close(nf4().round(exact), exact)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    size = weight.abs().amax(1, keepdim=True).half().float()
    closest = levels[((weight / size).unsqueeze(-1) - levels).abs().argmin(-1)] * size
    torch.testing.assert_close(nf4().round(weight), closest)
    assert nf4().bits == 4.25


def test_groups_must_fit():
    with pytest.raises(ValueError, match="has 96 inputs; expected a multiple of the group size 64"):
        affine(2, 64).round(torch.zeros(4, 96))


def test_scalar_errors_are_above_the_bound():
    for loss in gaussian.scalars([affine(2, 64), affine(4, 32), nf4()], 2**16):
        assert 1.5 * loss.bound < loss.error < 1


@pytest.mark.skipif(not FAST, reason="the search takes a quarter of a second for a tile here")
def test_trellis_errors_are_near_the_bound():
    losses = gaussian.trellis(4)
    assert {(loss.name, loss.bits) for loss in losses} == {(c, r / 2) for c in _C.CODEBOOKS for r in _C.RATES2[c]}
    assert all(0.85 * loss.bound < loss.error < 1.6 * loss.bound for loss in losses)  # 1024 weights


def test_report(tmp_path, capsys):
    """Published results alone: the table, the JSON and the plot."""
    published = tmp_path / "published.json"
    rows = [{"name": "theirs", "bits": b, "bytes": 10**6 * b, "perplexity": 20 / b} for b in (2, 4)]
    published.write_text(json.dumps({"results": rows}))
    files = ["--json", str(tmp_path / "report.json"), "--plot", str(tmp_path / "plot.png")]
    assert main(["quality", "--tiles", "0", "--published", str(published), *files]) == 0
    assert "theirs (published)" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["perplexity"] for row in report["perplexity"]] == [10.0, 5.0]
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_shipped_results_are_well_formed():
    rows = command.published(command.Path(command.__file__).parent / "exllamav3_tiny_moe.json")
    assert {row.bits for row in rows} == {16, 4.0, 3.0, 2.25, 2.0, 1.5, 1.0}
    assert not any(row.measured for row in rows)
