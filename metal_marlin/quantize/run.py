"""quantize(): an unquantized folder to an EXL3 folder, layer by layer.

Owns the order of things: pre-flight, rates, then for every decoder layer the inputs' second moments, its attention, its
feed-forward part with the attention already quantized, and the calibration rows through the quantized layer. What a
matrix goes through is in matrix.py, rates are in rates.py, files in work.py.
"""

from __future__ import annotations

import functools
import hashlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metal_marlin import _C, ops
from metal_marlin._version import __version__
from metal_marlin.fit import free_memory
from metal_marlin.perplexity import cut_windows, token_ids
from metal_marlin.quantize import rates as allocation
from metal_marlin.quantize.calibrate import Calibration, ExpertsStandIn, Routed
from metal_marlin.quantize.matrix import SAMPLE_TILES, Search, quantize_matrices, trellis_search
from metal_marlin.quantize.source import HEAD, Matrix, Part, Source
from metal_marlin.quantize.work import FORMAT_VERSION, Work, check_free
from metal_marlin.trellis import UNMARKED, marker_value

BATCH_BYTES = 2**30  # of the working matrices of one batch
MIN_TOKENS = 2  # calibration tokens per channel of the widest input, below which there is too little text
FEED_FORWARD = ("mlp", "moe", "feed_forward", "ffn")


@dataclass(frozen=True)
class Options:
    """What the result depends on, besides the input.

    bits         target, mean over the coded weights of all linear layers but the head
    head_bits    of the head
    codebook     one of metal_marlin._C.CODEBOOKS
    uniform      one rate for all layers, not one for each group; `bits` is a rate then
    rows         calibration rows at most, of `length` tokens each
    """

    bits: float = 2.0
    head_bits: float = 6
    codebook: str = "mul1"
    uniform: bool = False
    rows: int = 128
    length: int = 2048

    def check(self) -> Options:
        """Returns self. ValueError names the option."""
        if self.codebook not in _C.CODEBOOKS:
            raise ValueError(f"codebook is {self.codebook!r}; expected one of {', '.join(_C.CODEBOOKS)}")
        have = [rate / 2 for rate in _C.RATES2[self.codebook]]
        if not have[0] <= self.bits <= have[-1]:
            raise ValueError(f"bits is {self.bits:g}; expected {have[0]:g} to {have[-1]:g}")
        rates = ", ".join(f"{rate:g}" for rate in have)
        if self.head_bits not in have:
            raise ValueError(f"head_bits is {self.head_bits:g}; expected, for {self.codebook}, one of {rates}")
        if self.uniform and self.bits not in have:
            raise ValueError(f"bits is {self.bits:g} and uniform; expected, for {self.codebook}, one of {rates}")
        if self.rows < 1 or self.length < 2:
            raise ValueError(f"rows is {self.rows}, length {self.length}; expected at least 1 and 2")
        return self


def quantize(
    directory: str | Path,
    out: str | Path,
    options: Options,
    *,
    text: str | None = None,
    recipe: dict[str, Any] | None = None,
    search: Search = trellis_search,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Writes the EXL3 checkpoint `out` of the model in `directory`; returns its report.

    text    to calibrate with, documents separated by NUL; None: every input counts alike, which is much worse
    recipe  {"rates": {group or pattern: bits}}: fixes the rates (rates.py)
    say     is told what happens, a line at a time

    An interrupted run is taken up by the same call. ValueError: input, options or folders that don't fit. OSError: the
    disk; nothing that was finished is lost.
    """
    out = Path(out).resolve()  # the folder that a link leads to: what gets its name must lie beside it
    return _Run(Path(directory), out, options.check(), text, recipe, search, say).run()


class _Run:
    def __init__(
        self,
        directory: Path,
        out: Path,
        options: Options,
        text: str | None,
        recipe: dict[str, Any] | None,
        search: Search,
        say: Callable[[str], None],
    ) -> None:
        check_free(out)
        self.out, self.options, self.search, self.say = out, options, search, say
        self.recipe = recipe
        self.source = Source(directory)
        self.rows = None if text is None else self._rows(text)
        self.rates: dict[str, int] = {}
        self.tiles_done = self.tiles_total = 0
        self.began = time.monotonic()

    def run(self) -> dict[str, Any]:
        source, options = self.source, self.options
        self._check_memory()
        calibration = None if self.rows is None else hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()
        identity = {
            "input": source.fingerprint(), "calibration": calibration, "recipe": self.recipe,
            **asdict(options), "method": 1,
        }  # fmt: skip
        with Work(self.out, identity, len(source.parts)) as work:
            self._choose_rates(work)
            self._check_disk(work)
            state = None if self.rows is None else Calibration(source, self.rows)
            todo = [i for i in range(len(source.parts)) if not work.done(i)]
            if len(todo) < len(source.parts):
                self.say(f"resumed: {len(source.parts) - len(todo)} of {len(source.parts)} parts are finished")
            self.tiles_total = sum(self._tiles(source.parts[i]) for i in todo)
            self.began = time.monotonic()
            for index, part in enumerate(source.parts):
                last = not any(i > index for i in todo)
                if index in todo:
                    self._make(work, index, part, state)
                elif state is not None and part.path and not last:
                    self._replay(work, index, part, state)
            return self._finish(work)

    # ------------------------------------------------------------------ before

    def _rows(self, text: str) -> Tensor:
        """Calibration rows, int64 [rows, length], spread evenly over the text. ValueError: too little of it."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(self.source.directory), local_files_only=True, trust_remote_code=False
        )
        if not text.strip("\0 \t\r\n"):
            raise ValueError("the calibration text is empty; expected some hundred kilobytes like what it will read")
        ids = token_ids(
            text, lambda part: tokenizer.encode(part, add_special_tokens=False, verbose=False), tokenizer.eos_token_id
        )  # fmt: skip
        if len(set(ids)) <= 2:  # end of text and unknown: transformers makes an empty tokenizer where there is none
            raise ValueError(
                f"{self.source.directory}: its tokenizer makes {len(set(ids))} different tokens of the calibration"
                " text; expected the model's tokenizer files there, and a text of more than one word"
            )
        limit = getattr(self.source.config, "max_position_embeddings", None) or self.options.length
        windows = cut_windows(ids, min(self.options.length, limit, max(2, len(ids))))
        if int(windows.max()) >= self.source.config.vocab_size:
            raise ValueError(f"token id {int(windows.max())} of the calibration text: expected less than vocab_size")
        count = min(self.options.rows, len(windows))
        rows = windows[torch.linspace(0, len(windows) - 1, count).round().long()]
        widest = max(m.in_features for m in self.source.everything() if not m.path.endswith("experts"))
        if rows.numel() < MIN_TOKENS * widest:
            raise ValueError(
                f"the calibration text gives {rows.numel()} tokens; expected at least {MIN_TOKENS * widest},"
                f" {MIN_TOKENS} for each of a layer's {widest} inputs"
            )
        self.say(f"calibration  {count} rows of {rows.shape[1]} tokens")
        return rows

    def _choose_rates(self, work: Work) -> None:
        source, options = self.source, self.options
        if work.manifest["rates"] is not None:
            self.rates = work.manifest["rates"]
        elif self.recipe is not None:
            self.rates = allocation.from_recipe(source, self.recipe, options.codebook, options.head_bits)
        elif options.uniform or options.bits == _C.RATES2[options.codebook][0] / 2:
            self.rates = allocation.uniform(source, options.bits, options.head_bits)
        else:
            errors = None
            if self.rows is not None:
                self.say("measuring what each group of layers adds to the error ...")
                errors = allocation.measure(source, self.rows, options.codebook, options.bits)
            self.rates = allocation.allocate(source, errors, options.bits, options.head_bits, options.codebook)
        work.manifest["rates"] = self.rates
        work.write_manifest()
        if self.rows is None:
            self.say("no calibration text: every input counts alike. With --calibration FILE the result is much better")
        for line in allocation.describe(source, self.rates, options.codebook):
            self.say(line)

    def _check_disk(self, work: Work) -> None:
        need = sum(self._bytes(part) for i, part in enumerate(self.source.parts) if not work.done(i))
        free = shutil.disk_usage(work.folder).free
        if need * 1.02 + 2**24 > free:
            raise OSError(f"{work.folder}: {free / 1e9:.2f} GB are free; expected at least {need / 1e9:.2f} GB")

    def _check_memory(self) -> None:
        need, total = self._memory(), free_memory().total
        if need > total:
            raise ValueError(
                f"this model needs about {need / 1e9:.1f} GB of memory here, and there are {total / 1e9:.1f} GB;"
                " expected fewer calibration rows (--rows), or a larger machine"
            )

    def _memory(self) -> int:
        """Bytes at most, roughly: the largest part in float32, the rows' states and what experts get, and a batch."""
        largest = max(4 * sum(m.weights for m in part.everything()) for part in self.source.parts)
        widest = max(m.k for m in self.source.everything())
        batch = BATCH_BYTES + 6 * 4 * max(m.weights for m in self.source.everything()) + 4 * 4 * widest**2
        states = 0 if self.rows is None else 4 * 4 * self.rows.numel() * self.source.config.hidden_size
        return largest + batch + states + 2**29

    def _bytes(self, part: Part) -> int:
        coded = sum(m.weights * self.rates[m.group] // 16 + 2 * (m.k + 2 * m.n) + 300 for m in part.everything())
        return coded + sum(self.source.checkpoint.tensors[name].nbytes + 200 for name in part.plain)

    def _tiles(self, part: Part) -> int:
        found = part.everything()
        return sum(m.tiles + (3 * SAMPLE_TILES if self.rates[m.group] <= 8 else 0) for m in found)

    # ------------------------------------------------------------------ parts

    def _make(self, work: Work, index: int, part: Part, state: Calibration | None) -> None:
        began = time.monotonic()
        tensors: dict[str, Tensor] = {}
        for name, path in part.plain.items():
            tensors[name] = self.source.plain(name, path).contiguous()
        facts: dict[str, Any] = {}
        if part.everything():
            if state is None:
                self._code(part.everything(), None, None, tensors, facts)
            elif part.path:
                state.load(part)
                self._make_layer(part, state, tensors, facts)
                state.advance(part)
                state.unload(part)
            else:
                state.load(part)
                moments = dict.fromkeys([m.name for m in part.matrices], state.head_moments(part))
                self._code(part.matrices, moments, state, tensors, facts)
                state.unload(part)
        work.save(index, tensors, facts)
        if not facts:
            return
        errors = torch.tensor([fact["proxy"] for fact in facts.values()])
        few = sum(fact.get("tokens", math.inf) < MIN_TOKENS * fact["k"] for fact in facts.values())
        line = f"{part.name:<9} error {errors.mean():.4f} (worst {errors.max():.4f}), {time.monotonic() - began:.0f} s"
        if few:
            line += f"; {few} matrices of experts with few tokens: helped out with those of the layer"
        self.say(f"{line}, {self._left()} left")

    def _make_layer(self, part: Part, state: Calibration, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        def late(matrix: Matrix) -> bool:
            return any(word in matrix.path[len(part.path) :].split(".")[1] for word in FEED_FORWARD)

        early, later = [m for m in part.matrices if not late(m)], [m for m in part.matrices if late(m)]
        if early:
            moments, _ = state.moments(part, early)
            self._code(early, moments, state, tensors, facts)
        if later or part.experts:
            moments, records = state.moments(part, later, record_experts=bool(part.experts))
            self._code(later, moments, state, tensors, facts)
            for experts in part.experts:
                stand_in = self.source.model.get_submodule(experts.path)
                self._make_experts(stand_in, Routed(records[experts.path]), state, tensors, facts)

    def _make_experts(
        self,
        stand_in: ExpertsStandIn,
        routed: Routed,
        state: Calibration,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
    ) -> None:
        """Gate and up of some experts, then down of the same, whose inputs come from the quantized gate and up."""
        matrices, count = stand_in.experts.matrices, stand_in.num_experts
        one = matrices[0, "gate_proj"]
        step = max(1, BATCH_BYTES // (4 * (6 * one.weights + 5 * max(one.k, one.n) ** 2)))
        for begin in range(0, count, step):
            chosen = range(begin, min(begin + step, count))
            for projections in (("gate_proj", "up_proj"), ("down_proj",)):
                found: dict[int, tuple[Tensor, int]] = {}
                k = matrices[0, projections[0]].k
                for e in chosen:
                    inner = None if len(projections) == 2 else functools.partial(stand_in.inner, e=e)
                    found[e] = routed.moments(e, k, inner)
                for projection in projections:
                    group = {e: matrices[e, projection] for e in chosen}
                    moments = {matrix.name: found[e][0] for e, matrix in group.items()}
                    self._code(group.values(), moments, state, tensors, facts)
                    for e, matrix in group.items():
                        facts[matrix.name]["tokens"] = found[e][1]

    def _code(
        self,
        matrices: Iterable[Matrix],
        moments: dict[str, Tensor] | None,
        state: Calibration | None,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
    ) -> None:
        """Codes matrices in batches of equal size and rate, and puts the coded ones in their places."""
        sizes: dict[tuple[int, int, int], list[Matrix]] = {}
        for matrix in matrices:
            sizes.setdefault((matrix.k, matrix.n, self.rates[matrix.group]), []).append(matrix)
        for (k, n, rate2), same in sizes.items():
            step = max(1, BATCH_BYTES // (4 * (6 * k * n + 4 * k * k)))
            for begin in range(0, len(same), step):
                batch = same[begin : begin + step]
                weights = torch.zeros(len(batch), k, n)
                for w, matrix in zip(weights, batch, strict=True):
                    value = self.source.weight(matrix) if state is None else state.get(matrix)
                    w[: matrix.in_features, : matrix.out_features] = value
                stacked = None if moments is None else torch.stack([moments[matrix.name] for matrix in batch])
                seeds = [matrix.seed for matrix in batch]
                codebook = self.options.codebook
                coded, _ = quantize_matrices(
                    weights, stacked, rate2, codebook, seeds, search=self.search, tick=self._tick
                )  # fmt: skip
                for matrix, code in zip(batch, coded, strict=True):
                    facts[matrix.name] = {"proxy": code.proxy, "weight": code.weight, "k": matrix.k}
                    for part in ("suh", "svh"):
                        if not bool(torch.isfinite(getattr(code, part)).all()):
                            raise ValueError(f"{matrix.name}: its {part} don't fit float16; the weights are too large")
                        tensors[f"{matrix.name}.{part}"] = getattr(code, part)
                    if codebook != UNMARKED:
                        tensors[f"{matrix.name}.{codebook}"] = torch.tensor(marker_value(codebook), dtype=torch.int32)
                    tensors[f"{matrix.name}.trellis"] = code.trellis
                    bias = self.source.bias(matrix)
                    if bias is not None:
                        tensors[f"{matrix.name}.bias"] = bias
                    if state is not None:
                        self._put(state, matrix, tensors)

    def _put(self, state: Calibration, matrix: Matrix, tensors: dict[str, Tensor]) -> None:
        """From here on the layer computes with what the file says."""
        trellis, suh, svh = (tensors[f"{matrix.name}.{part}"] for part in ("trellis", "suh", "svh"))
        dense = ops.dequantize(trellis, suh, svh, codebook=self.options.codebook)
        state.put(matrix, dense[: matrix.in_features, : matrix.out_features].contiguous())

    def _replay(self, work: Work, index: int, part: Part, state: Calibration) -> None:
        """The rows through a layer that was finished before an interruption."""
        tensors = work.load(index)
        state.load(part, matrices=False)
        for matrix in part.everything():
            self._put(state, matrix, tensors)
        state.advance(part)
        state.unload(part)

    def _tick(self, tiles: int) -> None:
        self.tiles_done += tiles
        if sys.stderr.isatty():
            share = self.tiles_done / max(1, self.tiles_total)
            print(f"\r{share:6.1%}  {self._left()} left   ", end="", file=sys.stderr, flush=True)

    def _left(self) -> str:
        if not self.tiles_done:
            return "?"
        seconds = (time.monotonic() - self.began) * max(0, self.tiles_total - self.tiles_done) / self.tiles_done
        hours, minutes = divmod(int(seconds + 30) // 60, 60)
        return f"{hours} h {minutes:02} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"

    # ------------------------------------------------------------------ after

    def _finish(self, work: Work) -> dict[str, Any]:
        options, source = self.options, self.source
        bits = allocation.mean_bits(source, self.rates)
        rows = [0, 0] if self.rows is None else list(self.rows.shape)
        quantization = {
            "quant_method": "exl3", "version": FORMAT_VERSION, "bits": round(bits, 4),
            "head_bits": _number(self.rates.get(HEAD, round(2 * options.head_bits)) / 2),
            "calibration": {"rows": rows[0], "cols": rows[1]}, "out_scales": "always", "codebook": options.codebook,
        }  # fmt: skip
        facts = {name: fact for entry in work.manifest["files"].values() for name, fact in entry["facts"].items()}
        report = {
            "quantizer": f"metal_marlin {__version__}", "options": asdict(options), "bits": bits,
            "rates": {group: _number(rate2 / 2) for group, rate2 in self.rates.items()},
            "matrices": facts,
        }  # fmt: skip
        work.finish(source.directory, source.checkpoint.config, quantization, report)
        total = sum(entry["size"] for entry in work.manifest["files"].values())
        self.say(f"{self.out}: {bits:.4g} bits per weight, head {quantization['head_bits']}, {total / 1e6:,.1f} MB")
        return report


def _number(bits: float) -> float | int:
    return int(bits) if bits == int(bits) else bits
