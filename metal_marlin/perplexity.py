"""Perplexity of a causal language model on a text, by one protocol that the command line, the demo and the tests share.

Tokens are each document's ids (documents are separated by NUL) followed by one end-of-text id, concatenated and cut
into windows. Each window is read on its own, and every token of it but the first is a target; the result is exp(mean
negative log-likelihood) over all targets. Loading a model is left to the caller: nothing here needs transformers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

# Float32 logits of one batch: few enough to stay out of the way, enough rows to share a decoded tile.
LOGITS_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Perplexity:
    """`perplexity` = exp(`loss`), the mean of `targets` next-token losses in `windows` windows of `length` tokens."""

    perplexity: float
    loss: float
    windows: int
    length: int
    targets: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.windows * self.length / self.seconds if self.seconds else math.inf


def token_ids(text: str, encode: Callable[[str], Iterable[int]], separator: int | None) -> list[int]:
    """Ids of every NUL-separated document of `text`, each followed by `separator`, an end-of-text id or None."""
    ids: list[int] = []
    for document in text.split("\0"):
        if document:
            ids.extend(encode(document))
            if separator is not None:
                ids.append(separator)
    return ids


def cut_windows(ids: list[int], length: int, limit: int | None = None) -> torch.Tensor:
    """The first `limit` whole windows of `ids` (None: all), int64 [windows, length]; an unfilled last one is dropped.

    ValueError if length < 2 (a window needs a target), limit < 1, or the text is shorter than one window.
    """
    if length < 2:
        raise ValueError(f"length is {length}; a window needs at least 2 tokens")
    if limit is not None and limit < 1:
        raise ValueError(f"windows is {limit}; expected at least 1")
    count = len(ids) // length
    if count == 0:
        raise ValueError(f"the text has {len(ids)} tokens; one window needs {length}")
    if limit is not None:
        count = min(count, limit)
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def batch_size(length: int, vocabulary: int) -> int:
    """Windows per forward pass whose float32 logits stay within LOGITS_BYTES: 1 to 8."""
    return max(1, min(8, LOGITS_BYTES // (4 * length * vocabulary)))


@torch.inference_mode()
def perplexity(model: Any, windows: torch.Tensor, *, batch: int | None = None, progress: bool = True) -> Perplexity:
    """Perplexity of `model`, called as model(input_ids=..., use_cache=False).logits, on int64 [windows, length].

    The loss is computed in float32 per token and summed in float64; the result depends on `batch` by rounding only.
    `progress` shows a bar on stderr. ValueError if an id lies outside the model's vocabulary.
    """
    count, length = windows.shape
    vocabulary = int(model.config.get_text_config().vocab_size)
    if int(windows.max()) >= vocabulary:
        raise ValueError(
            f"token id {int(windows.max())} is not in the model's vocabulary of {vocabulary}: wrong tokenizer?"
        )
    step = batch or batch_size(length, vocabulary)
    device = next(model.parameters()).device
    total, done, began = 0.0, 0, time.perf_counter()
    with tqdm(total=count, desc="perplexity", unit="window", disable=not progress, leave=False) as bar:
        for rows in windows.split(step):
            rows = rows.to(device)
            logits = model(input_ids=rows, use_cache=False).logits
            for row, row_logits in zip(rows, logits, strict=True):
                losses = torch.nn.functional.cross_entropy(row_logits[:-1].float(), row[1:], reduction="none")
                total += float(losses.cpu().double().sum())  # MPS has no float64
            done += len(rows)
            bar.update(len(rows))
            bar.set_postfix_str(f"{_exp(total / (done * (length - 1))):.3f}", refresh=False)
    targets = count * (length - 1)
    loss = total / targets
    return Perplexity(_exp(loss), loss, count, length, targets, time.perf_counter() - began)


def _exp(loss: float) -> float:
    """exp that answers inf or nan instead of raising: a broken model has a perplexity too."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
