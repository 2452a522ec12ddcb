"""`generate` and `perplexity`, and loading a model folder for them and for the demo.

Owns everything on the command line that needs transformers; what is measured is in perplexity.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from metal_marlin import perplexity as metrics
from metal_marlin.mps import mps_problem
from metal_marlin.weights import Checkpoint


def load(
    directory: str | Path, dtype: str, device: str = "cpu", *, cache_gb: float | None = None, check: bool = True
) -> tuple[Any, Any]:
    """(model, tokenizer) of a local folder, quantized or not. Nothing is fetched, and no code of the folder's is run.

    cache_gb and check are those of metal_marlin.hf.loading, in GB. FileNotFoundError: no folder, or one without
    config.json. ImportError: no transformers. ValueError: what the loaders refuse, and "mps" where its backend is off.
    MemoryError: the model doesn't fit.
    """
    if cache_gb is not None and not 1e-9 <= cache_gb < 1e9:
        raise ValueError(f"--cache-gb is {cache_gb:g}; expected more than 0, and less than 1e9")
    if cache_gb is not None and device == "mps":
        raise ValueError("--cache-gb is set and --device is mps; experts are cached on the CPU only")
    if device == "mps" and (problem := mps_problem()):
        raise ValueError(f"--device is mps, which is off: {problem}")
    path = Path(directory)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a directory")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has no config.json: not a model folder")
    try:
        import transformers

        import metal_marlin.hf
        import metal_marlin.hf_memory
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("metal_marlin"):
            raise
        raise ImportError(
            f"{error.name} is not installed; this command needs it: pip install 'metal_marlin[hf]'"
        ) from None
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path), **options)
    cache_bytes = None if cache_gb is None else round(cache_gb * 1e9)
    straight = device == "mps" and importlib.util.find_spec("accelerate") is not None  # device maps want it
    if straight:  # where tiles can stay in the file (mps_mapped.py)
        options["device_map"] = device
    with metal_marlin.hf.loading(cache_bytes=cache_bytes, check=check):
        model = transformers.AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, **options)
    if device == "mps" and not straight and check and model.config.to_dict().get("quantization_config"):
        with Checkpoint(path) as checkpoint:
            metal_marlin.hf_memory.check_fit(checkpoint, model.config.to_dict(), model.dtype, gpu=True)
    return model.eval().to(device), tokenizer


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    return load(
        arguments.directory,
        arguments.dtype,
        arguments.device,
        cache_gb=arguments.cache_gb,
        check=not arguments.no_check,
    )


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers; memory that several of them show, as views of a file do, counts once."""
    ranges = []
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    total, end = 0, 0
    for first, last in sorted(ranges):
        total += max(0, last - max(first, end))
        end = max(end, last)
    return total


def windows_of(text: str, tokenizer: Any, length: int, limit: int | None) -> torch.Tensor:
    """`text` as int64 [windows, length], each document ended by the tokenizer's end-of-text id."""
    ids = metrics.token_ids(
        text, lambda part: tokenizer.encode(part, add_special_tokens=False, verbose=False), tokenizer.eos_token_id
    )
    return metrics.cut_windows(ids, length, limit)


def write(model: Any, tokenizer: Any, prompt: str, **options: Any) -> torch.Tensor:
    """Streams `prompt` and its continuation to stdout; returns the ids, int64 [1, tokens]. ValueError: empty prompt."""
    import transformers

    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    if encoded["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty")
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    with torch.inference_mode():
        ids: torch.Tensor = model.generate(
            encoded["input_ids"],
            attention_mask=torch.ones_like(encoded["input_ids"]),
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **options,
        )
    return ids


def generate(arguments: argparse.Namespace) -> None:
    """`generate DIR PROMPT`."""
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {arguments.max_new_tokens}; expected at least 1")
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature is {arguments.temperature:g}; expected 0 or more")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p is {arguments.top_p:g}; expected more than 0 and at most 1")
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise ValueError("the prompt is empty")
    model, tokenizer = _load(arguments)
    torch.manual_seed(arguments.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p, "top_k": 0}
    write(model, tokenizer, prompt, max_new_tokens=arguments.max_new_tokens, **sampling)


def perplexity(arguments: argparse.Namespace) -> None:
    """`perplexity DIR TEXT`."""
    if arguments.batch is not None and arguments.batch < 1:
        raise ValueError(f"--batch is {arguments.batch}; expected at least 1")
    file = Path(arguments.text)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file")
    text = file.read_text(encoding="utf-8")
    model, tokenizer = _load(arguments)
    windows = windows_of(text, tokenizer, arguments.length, arguments.windows)
    result = metrics.perplexity(model, windows, batch=arguments.batch)
    if arguments.json:
        facts = {
            "directory": arguments.directory,
            "text": arguments.text,
            "dtype": arguments.dtype,
            **dataclasses.asdict(result),
        }
        print(json.dumps(facts, indent=2))
        return
    what = f"{result.windows} windows of {result.length} tokens, {result.targets:,} targets, {arguments.dtype}"
    speed = f"{result.seconds:.1f} s, {result.tokens_per_second:,.0f} tokens/s"
    print(f"perplexity {result.perplexity:.4f}  ({what}; {speed})")
