"""python -m benchmarks quality: perplexity against bits and bytes, and a table of weight errors.

Perplexity is that of `python -m metal_marlin perplexity`, all formats on the same windows in one run. The scalar
formats are applied to the linear layers of the decoder; the head gets 6 bits in groups of 64, as the head of the
trellis checkpoints has 6 bits, and embeddings stay as they are. GGUF's types need ggml's library (docs/cpu.md).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import machine
from benchmarks.cpu.contender import Absent
from benchmarks.quality import gaussian
from benchmarks.quality.scalar import Scalar, affine, gguf, nf4
from metal_marlin import Checkpoint
from metal_marlin.cli_run import load, windows_of
from metal_marlin.perplexity import perplexity
from metal_marlin.quantize.source import HEAD, KEPT

FORMATS = [affine(bits, group) for bits in (2, 3, 4) for group in (32, 64)] + [nf4()]
HEAD_FORMAT = affine(6, 64)
GAUSSIAN_TILES = 200


@dataclass(frozen=True)
class Row:
    """A line of the table. bits: of the decoder's linear layers, scales included where `measured` here."""

    name: str
    bits: float
    bytes: int
    perplexity: float
    measured: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `quality`."""
    parser.add_argument("model", metavar="MODEL_DIR", nargs="?", help="the unquantized model; without: weights only")
    parser.add_argument("text", metavar="TEXT", nargs="?", help="a UTF-8 file to score, NUL between documents")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="DIR", help="quantized folders of that model")
    parser.add_argument(
        "--published", metavar="FILE", help="results of others, laid out as exllamav3_tiny_moe.json here"
    )
    parser.add_argument("--windows", type=int, default=400, metavar="N", help="windows to score (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens in one (default: %(default)s)")
    parser.add_argument("--tiles", type=int, default=GAUSSIAN_TILES, metavar="N", help="Gaussian tiles; 0: no table")
    parser.add_argument("--no-scalar", action="store_true", help="leave out the affine formats, NF4 and GGUF")
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE")
    parser.add_argument(
        "--plot", metavar="FILE", help="write a plot of perplexity against bytes to FILE (PNG, SVG, ...)"
    )


def run(arguments: argparse.Namespace) -> int:
    """The exit status."""
    rows: list[Row] = []
    formats = [] if arguments.no_scalar else list(FORMATS)
    try:
        formats += [] if arguments.no_scalar else gguf()
    except Absent as absent:
        print(f"without GGUF's types: {absent}")
    if (arguments.model is None) != (arguments.text is None):
        raise SystemExit("quality: MODEL_DIR and TEXT go together; expected both or neither")
    if arguments.published:
        rows += published(Path(arguments.published))
    if arguments.model:
        for row in perplexities(arguments, formats):
            rows.append(row)
            print(f"  {row.name:<32} {row.perplexity:.4f}", flush=True)
    losses = []
    if arguments.tiles:
        losses = gaussian.trellis(arguments.tiles) + gaussian.scalars(formats, 2**20)
    print(table(rows, losses))
    report = {
        **machine.describe(),
        "perplexity": [asdict(row) for row in rows],
        "gaussian": [{**asdict(loss), "bound": loss.bound} for loss in losses],
    }
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1))
    if arguments.plot:
        plot(rows, Path(arguments.plot))
    return 0


def published(file: Path) -> list[Row]:
    """Results that others report."""
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    return [Row(one["name"], one["bits"], one["bytes"], one["perplexity"], measured=False) for one in found]


def perplexities(arguments: argparse.Namespace, formats: list[Scalar]) -> Iterator[Row]:
    """The model, every checkpoint, and the model in every scalar format."""
    model, tokenizer = load(arguments.model, "float32")
    text = Path(arguments.text).read_text(encoding="utf-8")
    windows = windows_of(text, tokenizer, arguments.length, arguments.windows)
    source = Checkpoint(arguments.model)
    size = sum(file.stat().st_size for file in source.files)
    yield Row("unquantized", 16, size, perplexity(model, windows).perplexity)
    for directory in arguments.checkpoints:
        quantized, _ = load(directory, "float32")
        yield Row(f"ours, {directory}", *measure_folder(Path(directory)), perplexity(quantized, windows).perplexity)
        del quantized
    for form in formats:
        model, _ = load(arguments.model, "float32")
        saved = apply(model, form)
        yield Row(form.name, form.bits, round(size - saved), perplexity(model, windows).perplexity)


def measure_folder(directory: Path) -> tuple[float, int]:
    """(bits per weight of the linear layers but the head, scales included; bytes of the files)."""
    checkpoint = Checkpoint(directory)
    groups = [group for prefix, group in checkpoint.groups.items() if prefix != HEAD]
    bits = 8 * sum(group.nbytes for group in groups) / sum(group.k * group.n for group in groups)
    return bits, sum(file.stat().st_size for file in checkpoint.files)


@torch.no_grad()
def apply(model: Any, form: Scalar) -> float:
    """Rounds a model's weights in place; returns the bytes saved next to 16-bit weights."""
    saved = 0.0
    for path, module in model.named_modules():
        head = module is model.get_output_embeddings()
        own = HEAD_FORMAT if head else form
        weights = []
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] not in KEPT:
            weights = [module.weight]
        elif path.endswith(".experts"):
            weights = [p for name, p in module.named_parameters() if p.dim() == 3]
        for weight in weights:
            weight.data = own.round(weight)
            saved += weight.numel() * (16 - own.bits) / 8
    return saved


def table(rows: list[Row], losses: list[gaussian.Loss]) -> str:
    """Both tables, as text."""
    lines = []
    if rows:
        lines += ["", f"{'':<34}{'bits':>7}{'MB':>9}{'perplexity':>12}"]
        for row in sorted(rows, key=lambda row: (-row.bytes, row.perplexity)):
            name = row.name if row.measured else f"{row.name} (published)"
            lines.append(f"{name[-34:]:<34}{row.bits:>7.3f}{row.bytes / 1e6:>9.2f}{row.perplexity:>12.4f}")
    if losses:
        lines += ["", f"{'Gaussian weights':<34}{'bits':>7}{'error':>12}{'bound':>12}{'ratio':>8}{'dB':>8}"]
        for loss in losses:
            tail = f"{loss.error:>12.6f}{loss.bound:>12.6f}{loss.error / loss.bound:>8.3f}"
            lines.append(f"{loss.name:<34}{loss.bits:>7.2f}{tail}{-10 * math.log10(loss.error):>8.2f}")
    return "\n".join(lines)


def plot(rows: list[Row], file: Path) -> None:
    """Perplexity against bytes, both logarithmic; the unquantized model as a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    series: dict[str, list[Row]] = {}
    for row in rows:
        if row.bits < 16:
            kind = row.name.split(",")[0].split(" ")[0]
            series.setdefault(kind if row.measured else f"{kind}, published", []).append(row)
    for name, points in series.items():
        points = sorted(points, key=lambda row: row.bytes)
        style = "o-" if name.startswith("ours") else "s--" if "published" in name else "^"
        axes.plot([p.bytes / 1e6 for p in points], [p.perplexity for p in points], style, label=name)
    for row in rows:
        if row.bits == 16 and row.measured:
            axes.axhline(row.perplexity, color="gray", linewidth=0.8, label="unquantized")
    axes.set(xlabel="file, MB", ylabel="perplexity", xscale="log", yscale="log")
    axes.legend()
    axes.grid(which="both", linewidth=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
