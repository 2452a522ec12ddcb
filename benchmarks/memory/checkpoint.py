"""A checkpoint of about a given size, of random bits, laid out as exllamav3 does: written, never held in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metal_marlin.trellis import marker_value

# The sizes of Qwen3-30B-A3B, but for the vocabulary.
HIDDEN, WIDTH, EXPERTS, HEADS, VOCABULARY = 2048, 768, 128, 32, 4096
BYTES = {"F16": 2, "I16": 2, "BF16": 2, "I32": 4}
Entry = tuple[str, str, tuple[int, ...]]


def config(layers: int) -> dict[str, Any]:
    """config.json of a Qwen3-MoE model with so many layers."""
    return {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "bfloat16",
        "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_experts": EXPERTS,
        "num_experts_per_tok": 8, "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": VOCABULARY, "tie_word_embeddings": False, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "norm_topk_prob": True, "max_position_embeddings": 4096,
        "quantization_config": {"quant_method": "exl3", "version": "1.6.5", "bits": 2.0, "head_bits": 6},
    }  # fmt: skip


def _matrix(prefix: str, k: int, n: int, bits: int) -> Iterator[Entry]:
    yield f"{prefix}.suh", "F16", (k,)
    yield f"{prefix}.svh", "F16", (n,)
    yield f"{prefix}.mul1", "I32", ()
    yield f"{prefix}.trellis", "I16", (k // 16, n // 16, 16 * bits)


def _entries(layers: int) -> Iterator[Entry]:
    yield "model.embed_tokens.weight", "BF16", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        p = f"model.layers.{layer}"
        for e in range(EXPERTS):
            for name, k, n in (("down", WIDTH, HIDDEN), ("gate", HIDDEN, WIDTH), ("up", HIDDEN, WIDTH)):
                yield from _matrix(f"{p}.mlp.experts.{e}.{name}_proj", k, n, 2)
        for name, k, n in (("q", HIDDEN, 4096), ("k", HIDDEN, 512), ("v", HIDDEN, 512), ("o", 4096, HIDDEN)):
            yield from _matrix(f"{p}.self_attn.{name}_proj", k, n, 4)
        yield f"{p}.mlp.gate.weight", "BF16", (EXPERTS, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{p}.{norm}.weight", "BF16", (HIDDEN,)
        for norm in ("q_norm", "k_norm"):
            yield f"{p}.self_attn.{norm}.weight", "BF16", (128,)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield from _matrix("lm_head", HIDDEN, VOCABULARY, 6)


def _size(entry: Entry) -> int:
    size = BYTES[entry[1]]
    for extent in entry[2]:
        size *= extent
    return size


def layers_for(nbytes: int) -> int:
    """Layers of a checkpoint of about `nbytes`, at least 1."""
    one, two = (sum(map(_size, _entries(layers))) for layers in (1, 2))
    return max(1, round((nbytes - one) / (two - one)) + 1)


def write(directory: Path, layers: int) -> Path:
    """Writes the folder's two files; returns the one with the weights. Scales and dense weights are small numbers."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(layers)))
    header, position = dict[str, Any](), 0
    entries = list(_entries(layers))
    for entry in entries:
        header[entry[0]] = {"dtype": entry[1], "shape": entry[2], "data_offsets": [position, position + _size(entry)]}
        position += _size(entry)
    text = json.dumps(header).encode()
    text += b" " * ((len(text) + 1) % 2)  # an odd length, as files of exllamav3 may have: the worst case
    file = directory / "model.safetensors"
    marker = (marker_value("mul1") & 0xFFFFFFFF).to_bytes(4, "little")
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in entries:
            size = _size((name, dtype, shape))
            if dtype == "I16":
                stream.write(os.urandom(size))
            elif dtype == "I32":
                stream.write(marker)
            else:
                # bfloat16 and float16 of about 0.02, signs at random
                low, high = (0xA3, 0x3C) if dtype == "BF16" else (0x1F, 0x25)
                signs = os.urandom(size // 2)
                pair = bytearray(size)
                pair[::2] = bytes([low]) * (size // 2)
                pair[1::2] = bytes(high | (s & 0x80) for s in signs)
                stream.write(pair)
        stream.flush()
        os.fsync(stream.fileno())
    return file
