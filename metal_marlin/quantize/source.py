"""The unquantized model: which matrices there are, what files call them, and one decoder layer of it at a time.

Owns the skeleton (transformers' own classes; weights on the meta device until a layer is loaded) and the mapping
between names in files and places in the model. Nothing is unpickled and no code of the folder's is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import dot_natural_key

from metal_marlin.hf_plan import (
    EXPERT,
    EXPERT_NAMES,
    PROJECTIONS,
    ExpertsShape,
    _experts_shape,
    _ignored,
    _is_stack,
    _renamer,
    _with_and_without_prefix,
)
from metal_marlin.trellis import pad128
from metal_marlin.weights import Checkpoint, raise_problems

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# linear layers that exllamav3 keeps in float16: routers, and projections too narrow for blocks of 128
KEPT = ("gate", "router", "shared_expert_gate", "in_proj_a", "in_proj_b", "in_proj_ba")
HEAD = "lm_head"
ExpertFiles = dict[tuple[int, str], tuple[str, str]]  # see Source._find


@dataclass(frozen=True)
class Matrix:
    """One matrix to quantize.

    name    as the output calls it: model.layers.3.mlp.experts.17.up_proj
    group   what shares a rate: model.layers.3.mlp.experts.gate_up
    tensor  where it is in the input, and in `part` what to take of that: "", or of a fused one such as "3.gate_proj"
    """

    name: str
    path: str
    group: str
    tensor: str
    part: str
    in_features: int
    out_features: int
    bias: str | None = None

    @property
    def k(self) -> int:
        return pad128(self.in_features)

    @property
    def n(self) -> int:
        return pad128(self.out_features)

    @property
    def weights(self) -> int:
        """Coded weights, padding included."""
        return self.k * self.n

    @property
    def tiles(self) -> int:
        return self.weights // 256

    @property
    def seed(self) -> int:
        """Of the random signs: from the name, so that it is the same in every run."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6], "little")


@dataclass
class Experts:
    """The experts of a layer: matrices by (expert, one of PROJECTIONS), and the module's own description."""

    path: str
    shape: ExpertsShape
    matrices: dict[tuple[int, str], Matrix] = field(default_factory=dict)


@dataclass
class Part:
    """What one output file holds: a decoder layer, or what lies before or after them (then `path` is empty).

    plain  {name of an unquantized tensor: its path in the model}
    """

    name: str
    path: str = ""
    matrices: list[Matrix] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    plain: dict[str, str] = field(default_factory=dict)

    def everything(self) -> list[Matrix]:
        return [*self.matrices, *(m for e in self.experts for m in e.matrices.values())]


class Source:
    """A folder with an unquantized Hugging Face model.

    ValueError or NotImplementedError names the tensor or module that can't be quantized: already quantized, pickles,
    an architecture unknown to transformers, layers of a layout that the loader doesn't have, tensors missing or extra.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.checkpoint = Checkpoint(self.directory)
        raw = self.checkpoint.config
        if not raw:
            raise ValueError(f"{self.directory} has no config.json: not a model folder")
        nested = raw.get("text_config") or {}
        found = raw.get("quantization_config") or nested.get("quantization_config")
        if found or self.checkpoint.groups:
            method = (found or {}).get("quant_method", "exl3")
            raise ValueError(
                f"{self.directory}: is already quantized ({method}); expected a model in bf16, fp16 or fp32"
            )
        try:
            config = AutoConfig.from_pretrained(str(self.directory), local_files_only=True, trust_remote_code=False)
            with _parameters_on_meta():
                self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{self.directory}: transformers has no causal language model for model_type"
                f" {raw.get('model_type')!r}: {error}"
            ) from None
        self.config = self.model.config.get_text_config()
        self.modules: dict[str, nn.Module] = dict(self.model.named_modules())
        layers = getattr(self.model.base_model, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise NotImplementedError(f"{type(self.model).__name__} has no list of decoder layers; it isn't supported")
        self.layers_path = next(path for path, module in self.modules.items() if module is layers)
        self.parts = self._make_parts(len(layers))

    @property
    def layers(self) -> list[Part]:
        return self.parts[1:-1]

    @property
    def head(self) -> Part:
        return self.parts[-1]

    def everything(self) -> list[Matrix]:
        return [matrix for part in self.parts for matrix in part.everything()]

    def fingerprint(self) -> str:
        """Of config.json, every header, and the first and last MiB of every file: what a resumed run is bound to."""
        total = hashlib.sha256((self.directory / "config.json").read_bytes())
        for file in sorted(self.checkpoint.files):
            size = file.stat().st_size
            total.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                total.update(stream.read(8 + int.from_bytes(stream.read(8), "little") + 2**20))
                stream.seek(max(0, size - 2**20))
                total.update(stream.read())
        return total.hexdigest()

    # ------------------------------------------------------------------ weights

    def tensor(self, name: str, expert: int | None = None) -> Tensor:
        """One tensor as stored, or what a fused one has of one expert. ValueError names it if it isn't finite."""
        value = self.checkpoint.tensor(name)
        if expert is not None:
            name, value = f"{name}[{expert}]", value[expert]
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(f"{name}: holds {bad} NaN or infinite values of {value.numel()}; expected finite weights")
        return value

    def weight(self, matrix: Matrix) -> Tensor:
        """W of one matrix, float32 [in_features, out_features]."""
        e, _, what = matrix.part.partition(".")
        value = self.tensor(matrix.tensor, int(e) if what else None)
        if what:
            transposed = value.shape[0] == matrix.in_features and self._transposed(matrix)
            value = value if transposed else value.T
            if what != "down_proj":
                half = value.shape[1] // 2
                first = what == "gate_proj"
                if self._interleaved(matrix):
                    value = value[:, 0 if first else 1 :: 2]
                else:
                    value = value[:, :half] if first else value[:, half:]
        else:
            value = value.T
        value = value.float().contiguous()
        if tuple(value.shape) != (matrix.in_features, matrix.out_features):
            raise ValueError(
                f"{matrix.tensor}: is a matrix of {list(value.shape)} inputs and outputs; expected"
                f" {[matrix.in_features, matrix.out_features]}"
            )
        return value

    def bias(self, matrix: Matrix) -> Tensor | None:
        """Float16 [n], padded with zeros, or None."""
        if matrix.bias is None:
            return None
        e, _, what = matrix.part.partition(".")
        value = self.tensor(matrix.bias, int(e) if what else None)
        if what and what != "down_proj":
            up = what == "up_proj"
            value = value[up::2] if self._interleaved(matrix) else value.chunk(2)[up]
        padded = torch.zeros(matrix.n, dtype=torch.float16)
        padded[: matrix.out_features] = to_half(value, matrix.bias)
        return padded

    def plain(self, name: str, path: str) -> Tensor:
        """An unquantized tensor as the output stores it: routers and kept projections in float16, as exllamav3 does."""
        value = self.tensor(name)
        leaf = path.split(".")[-2] if "." in path else path
        if leaf in KEPT and path.endswith((".weight", ".bias")):
            return to_half(value, name)
        if value.dtype == torch.float32 and ("embed" in path or "norm" in path):
            return to_half(value, name)
        return value

    def _transposed(self, matrix: Matrix) -> bool:
        return bool(getattr(self.modules[matrix.path], "is_transposed", False))

    def _interleaved(self, matrix: Matrix) -> bool:
        """gpt-oss's order of gate and up. find_activation has tried both out; only that module gates in turns."""
        module: Any = self.modules[matrix.path]
        return not getattr(module, "is_concatenated", True) or type(module).__name__.startswith("GptOss")

    # ------------------------------------------------------------------ names

    def _find(self, expected: dict[str, Any]) -> tuple[dict[str, str], dict[str, ExpertFiles], list[str]]:
        """Where the files' tensors belong: {key of `expected`: name in a file}, of experts that are stored one by one
        {path: {(expert, "down_proj.weight"): (name, its prefix)}}, and what is wrong with them."""
        renamed = _renamer(self.model, get_model_conversion_mapping(self.model), {})
        ignored, problems = _ignored(self.model), list[str]()
        found: dict[str, str] = {}
        separate: dict[str, ExpertFiles] = {}
        for name in sorted(self.checkpoint.tensors, key=dot_natural_key):
            prefix, _, leaf = name.rpartition(".")
            path = renamed(f"{prefix}.trellis")[0].removesuffix(".trellis")
            for candidate in _with_and_without_prefix(self.model, path):
                expert = EXPERT.fullmatch(candidate)
                if expert and _is_stack(self.modules.get(expert[1])):
                    separate.setdefault(expert[1], {})[int(expert[2]), f"{expert[3]}.{leaf}"] = (name, prefix)
                    break
                if f"{candidate}.{leaf}" in expected:
                    found[f"{candidate}.{leaf}"] = name
                    break
            else:
                key, pattern = renamed(name)
                key = next((k for k in _with_and_without_prefix(self.model, key) if k in expected), key)
                if pattern is not None and key in expected:
                    problems.append(f"{name}: goes into {key} by a conversion that the quantizer doesn't know")
                elif key in expected:
                    found[key] = name
                elif not ignored(key) and not ignored(name):
                    problems.append(f"{name}: is extra; {type(self.model).__name__} has no {key}")
        for key, name in found.items():
            info = self.checkpoint.tensors[name]
            if tuple(expected[key].shape) != info.shape:
                problems.append(f"{name}: has shape {list(info.shape)}; expected {list(expected[key].shape)}")
            elif expected[key].is_floating_point() and info.dtype not in FLOATS:
                problems.append(f"{name}: is {info.dtype}; expected {', '.join(FLOATS)}")
        return found, separate, problems

    def _make_parts(self, count: int) -> list[Part]:
        parts = [Part("before"), *(Part(f"layer {i}", f"{self.layers_path}.{i}") for i in range(count)), Part("after")]
        by_path = {part.path: part for part in parts[1:-1]}
        expected: dict[str, Any] = self.model.state_dict()
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        found, separate, problems = self._find(expected)
        stacks: dict[str, Experts] = {}
        done: set[str] = set()
        for path, module in self.modules.items():
            part = next((by_path[p] for p in by_path if path == p or path.startswith(f"{p}.")), None)
            if part is not None and _is_stack(module):
                try:
                    stacks[path] = Experts(path, _experts_shape(module))
                except ValueError as error:
                    problems.append(f"{path}: {error}")
                    continue
                part.experts.append(stacks[path])
                problems += self._place_experts(stacks[path], separate.get(path, {}), found, done)
            elif isinstance(module, nn.Linear) and self._quantized(path, part):
                weight = f"{path}.weight"
                stored = found.get(weight) or found.get(tied.get(weight, ""))
                if stored is None:
                    problems.append(f"{weight}: is missing; {type(self.model).__name__} needs it")
                    continue
                own = stored.removesuffix(".weight") if weight in found else path
                bias = found.get(f"{path}.bias") if module.bias is not None else None
                matrix = Matrix(
                    own, path, self._group(path), stored, "", module.in_features, module.out_features, bias
                )  # fmt: skip
                (parts[-1] if part is None else part).matrices.append(matrix)
                done |= {weight, f"{path}.bias"} if bias else {weight}
        for key, name in found.items():
            if key in done:
                continue
            part = next((p for p in parts[1:-1] if key.startswith(f"{p.path}.")), None)
            first = "embed" in key
            (part or parts[0 if first else -1]).plain[name] = key
        missing = [
            key for key in expected
            if key not in found and key not in done and tied.get(key) not in found
            and not any(key.startswith(f"{path}.") for path in stacks)
        ]  # fmt: skip
        optional = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        problems += [
            f"{key}: is missing; {type(self.model).__name__} needs it"
            for key in missing
            if not any(p.search(key) for p in optional)
        ]
        raise_problems(self.directory, problems)
        return parts

    def _quantized(self, path: str, part: Part | None) -> bool:
        leaf = path.rpartition(".")[2]
        if part is None:
            return self.modules[path] is self.model.get_output_embeddings()
        return leaf not in KEPT

    def _group(self, path: str) -> str:
        """Layers that read the same input share a rate: exllamav3 reads some of them with one kernel."""
        parent, _, leaf = path.rpartition(".")
        for together, name in ((("q_proj", "k_proj", "v_proj"), "qkv"), (("gate_proj", "up_proj"), "gate_up")):
            if leaf in together:
                return f"{parent}.{name}"
        return path

    def _place_experts(
        self,
        experts: Experts,
        files: ExpertFiles,
        found: dict[str, str],
        done: set[str],
    ) -> list[str]:
        """Fills in where each expert's matrices are: one by one in the files, or fused in one tensor."""
        shape, path, problems = experts.shape, experts.path, list[str]()
        names = {name.split(".")[0] for _, name in files}
        known = next((own for own in EXPERT_NAMES if names <= set(own)), PROJECTIONS)
        for e in range(shape.experts):
            for projection, own in zip(PROJECTIONS, known, strict=True):
                down = projection == "down_proj"
                sizes = (shape.intermediate, shape.hidden) if down else (shape.hidden, shape.intermediate)
                group = f"{path}.{'down' if down else 'gate_up'}"
                fused = f"{path}.{'down_proj' if down else 'gate_up_proj'}"
                if (e, f"{own}.weight") in files:
                    tensor, prefix = files.pop((e, f"{own}.weight"))
                    bias = files.pop((e, f"{own}.bias"), (None,))[0]
                    matrix = Matrix(prefix, path, group, tensor, "", *sizes, bias)
                    if shape.bias != (bias is not None):
                        problems.append(f"{prefix}.bias: is {'missing' if shape.bias else 'extra'}")
                    if self.checkpoint.tensors[tensor].shape != (sizes[1], sizes[0]):
                        actual = list(self.checkpoint.tensors[tensor].shape)
                        problems.append(f"{tensor}: has shape {actual}; expected {[sizes[1], sizes[0]]}")
                    if self.checkpoint.tensors[tensor].dtype not in FLOATS:
                        problems.append(f"{tensor}: is {self.checkpoint.tensors[tensor].dtype}; expected a float")
                elif fused in found:
                    done |= {fused, f"{fused}_bias"}
                    if e == 0 and shape.bias and f"{fused}_bias" not in found:
                        problems.append(f"{fused}_bias: is missing; {type(self.modules[path]).__name__} needs it")
                    root = found[fused].rpartition(".")[0]
                    matrix = Matrix(
                        f"{root}.{e}.{projection}", path, group, found[fused], f"{e}.{projection}", *sizes,
                        found.get(f"{fused}_bias") if shape.bias else None,
                    )  # fmt: skip
                else:
                    problems.append(f"{path}.{e}.{own}.weight: is missing; the layer has {shape.experts} experts")
                    continue
                experts.matrices[e, projection] = matrix
        problems += [f"{name}: is extra; the layer has {shape.experts} experts" for name, _ in files.values()]
        return problems


def to_half(value: Tensor, name: str) -> Tensor:
    """float16. ValueError names the tensor if its values don't fit."""
    result = value.to(torch.float16)
    if not bool(torch.isfinite(result).all()):
        largest = float(value.abs().max())
        raise ValueError(f"{name}: reaches {largest:g}; expected at most 65504, the most that float16 holds")
    return result


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules made inside have their parameters on the meta device, but real buffers (rotary frequencies)."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
