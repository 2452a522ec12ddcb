"""EXL3 checkpoints: finding a folder's files, checking what their headers promise, reading single matrices.

Owns Checkpoint and TrellisGroup, the quantized matrix as the headers describe it. Byte ranges are checked in
safetensors_header.py, TrellisTensor lives in trellis.py, modules.py computes, hf.py loads whole models into
transformers. Nothing here imports transformers, unpickles anything, or runs code that a checkpoint brings along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from metal_marlin import _C
from metal_marlin.mapping import MappedFiles
from metal_marlin.safetensors_header import TensorInfo, parse_json, read_header
from metal_marlin.trellis import (
    LEGACY,
    MARKERS,
    SCALES,
    UNMARKED,
    TrellisTensor,
    marker_value,
    rate2_of,
    trellis_problem,
    unpack_signs,
)

__all__ = ["Checkpoint", "TrellisGroup", "TrellisTensor", "raise_problems"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REPORT_FILE = "metal_marlin_quantization.json"  # in folders that `quantize` made
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PROBLEMS_SHOWN = 8


def raise_problems(where: object, problems: Sequence[str]) -> None:
    """If there are any: one ValueError that lists the first of them, one a line."""
    if problems:
        hidden = len(problems) - PROBLEMS_SHOWN
        more = [f"... and {hidden} more"] if hidden > 0 else []
        raise ValueError("\n  ".join([f"{where} can't be loaded:", *problems[:PROBLEMS_SHOWN], *more]))


@dataclass(frozen=True)
class TrellisGroup:
    """One quantized matrix as the headers describe it.

    names  {part: tensor name}, the parts being trellis, suh or su, svh or sv, and bias, mul1 or mcg where present
    """

    prefix: str
    k: int
    n: int
    rate2: int
    codebook: str
    names: dict[str, str]
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales not counted."""
        return self.rate2 / 2

    @property
    def legacy(self) -> bool:
        """Whether a scale is stored as sign bits."""
        return any(old in self.names for old in LEGACY.values())

    @property
    def has_bias(self) -> bool:
        return "bias" in self.names


def _identity(file: Path) -> tuple[int, int, int, int]:
    """What tells a file from another one, or from itself after it was written to. OSError as stat's."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Checkpoint:
    """A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`; usually with `config.json`.

    directory  the folder
    files      its safetensors files, instead of the names above; they must lie inside the folder
    copy       read tensors into memory of their own: for files that may change while the model is in use

    Opening reads and checks every header and every codebook marker, and no weights. ValueError lists what is wrong:
    nothing but pickles, malformed or truncated files, shards that are missing or outside the folder, groups with
    missing, extra or misshapen tensors, rates or markers that the format doesn't have. FileNotFoundError: no such
    folder.

    .tensors {name: TensorInfo}, .groups {prefix: TrellisGroup}, .config (a dict), .nbytes, .files
    """

    def __init__(self, directory: str | Path, files: Iterable[str | Path] | None = None, *, copy: bool = False) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} is not a directory")
        self._mapping: MappedFiles | None = None
        self.copy = copy
        self.config = self._read_config()
        listed: dict[str, Path] = {}
        if files is None:
            self.files, listed = self._find_files()
        else:
            self.files = self._inside(self.directory, [Path(file) for file in files])
        self.tensors: dict[str, TensorInfo] = {}
        self._found = {file: _identity(file) for file in self.files}
        for file in self.files:
            header = read_header(file)
            for name in self.tensors.keys() & header.keys():
                raise ValueError(f"{file}: {name} is also in {self.tensors[name].file.name}; expected it once")
            self.tensors.update(header)
        for name, file in listed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise ValueError(f"{self.directory / INDEX_FILE}: expected {name} in {file.name}, which lacks it")
        try:
            self.groups = self._find_groups()
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ what the folder says

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of config.json. ValueError if it is missing or of another method than exl3."""
        text = self.config.get("text_config")
        found = self.config.get("quantization_config")
        if found is None and isinstance(text, dict):
            found = text.get("quantization_config")
        where = f"{self.directory / 'config.json'}: quantization_config"
        if not isinstance(found, dict):
            raise ValueError(
                f"{where} is {'missing' if found is None else repr(found)}; expected one with quant_method 'exl3'"
            )
        if found.get("quant_method") != "exl3":
            raise ValueError(f"{where}.quant_method is {found.get('quant_method')!r}; expected 'exl3'")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def __repr__(self) -> str:
        return (
            f"Checkpoint({str(self.directory)!r}: {len(self.tensors)} tensors, {len(self.groups)} quantized matrices)"
        )

    # ------------------------------------------------------------------ loading

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, as stored, on the CPU: a view of the mapped file. ValueError if there is none of this name."""
        if name not in self.tensors:
            raise ValueError(f"{self.directory} has no tensor {name}")
        loaded = self.mapping.tensor(self.tensors[name])
        if self.copy:
            loaded = loaded.clone()
            self.mapping.check(self.tensors[name])
        return loaded

    @property
    def mapping(self) -> MappedFiles:
        """The files in memory. OSError if one has changed since its header was read."""
        if self._mapping is None:
            mapping = MappedFiles(self.files)
            self.check_files()
            self._mapping = mapping
        return self._mapping

    def check_files(self) -> None:
        """OSError if a path no longer leads to the file whose header was read, as it was then: to be called by whoever
        opens a file anew, afterwards."""
        for file in self.files:
            if _identity(file) != self._found[file]:
                raise OSError(f"{file} was replaced or written to after its header was read; open the folder again")

    def check(self) -> None:
        """OSError if a file has changed since it was opened. The ops ask for what they read; for what torch computes
        with tensors that are views, call it afterwards."""
        self.mapping.check()

    def linear(self, prefix: str) -> TrellisTensor:
        """The matrix stored under `prefix`, such as model.layers.0.self_attn.q_proj. ValueError if there is none."""
        if prefix not in self.groups:
            raise ValueError(f"{self.directory} has no quantized matrix {prefix}")
        names = self.groups[prefix].names
        suh, svh = (
            self.tensor(names[part]) if part in names else unpack_signs(self.tensor(names[LEGACY[part]]))
            for part in SCALES
        )
        bias = self.tensor(names["bias"]) if "bias" in names else None
        place = None if self.copy else (self.mapping, self.mapping.place(self.tensors[names["trellis"]]))
        return TrellisTensor(
            self.tensor(names["trellis"]), suh, svh, self.groups[prefix].codebook, bias, prefix, place
        ).validate()

    def count_experts(self, prefix: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> int:
        """How many experts `prefix`.E.`name` there are.

        ValueError if there is no expert 0, or if a projection lacks an expert that another one has.
        """
        counts = [0] * len(names)
        for i, name in enumerate(names):
            while f"{prefix}.{counts[i]}.{name}" in self.groups:
                counts[i] += 1
        for name, count in zip(names, counts, strict=True):
            if not count or count < max(counts):
                others = f"; another projection has {max(counts)} experts" if max(counts) else ""
                raise ValueError(f"{self.directory} has no quantized matrix {prefix}.{count}.{name}{others}")
        return counts[0]

    def experts(
        self,
        prefix: str,
        names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
        only: Sequence[int] | None = None,
    ) -> tuple[list[TrellisTensor], ...]:
        """The matrices `prefix`.E.`name` of experts E = 0, 1, ..., or of those in `only`: one list for each of `names`.

        ValueError as for count_experts, or if there is no such expert.
        """
        every = range(self.count_experts(prefix, names))
        return tuple([self.linear(f"{prefix}.{e}.{name}") for e in (every if only is None else only)] for name in names)

    def close(self) -> None:
        """Lets go of the files; tensors that were loaded stay valid. Loading again opens them again."""
        self._mapping = None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ opening

    def _read_config(self) -> dict[str, Any]:
        file = self.directory / "config.json"
        if not file.is_file():
            return {}
        config = parse_json(file, file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"{file}: is a {type(config).__name__}; expected an object")
        return config

    def _find_files(self) -> tuple[list[Path], dict[str, Path]]:
        """The files, and which tensor the index expects in which of them."""
        single, index = self.directory / SINGLE_FILE, self.directory / INDEX_FILE
        if single.is_file():
            return [single], {}
        if not index.is_file():
            pickles = sorted(path.name for path in self.directory.iterdir() if path.suffix in PICKLES)
            found = f"only pickles ({', '.join(pickles[:3])}), which are never read" if pickles else "no weights"
            raise ValueError(f"{self.directory} holds {found}; expected {SINGLE_FILE} or {INDEX_FILE}")
        content = parse_json(index, index.read_bytes())
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{index}: expected an object with weight_map {{tensor: file}}")
        listed = {name: self.directory / shard for name, shard in weight_map.items()}
        return self._inside(index, list(dict.fromkeys(listed.values()))), listed

    def _inside(self, source: Path, files: list[Path]) -> list[Path]:
        """`files`, if each exists and its name lies in the folder; links, as of download caches, may lead elsewhere."""
        if not files:
            raise ValueError(f"{source}: names no files; expected .safetensors files")
        for file in files:
            if not file.is_relative_to(self.directory) or ".." in file.relative_to(self.directory).parts:
                raise ValueError(f"{source}: names {file}, which is outside of {self.directory}")
            if file.suffix != ".safetensors":
                raise ValueError(f"{source}: names {file.name}; expected a .safetensors file (pickles are never read)")
            if not file.is_file():
                raise ValueError(f"{source}: names {file.name}, which is missing")
        return files

    def _find_groups(self) -> dict[str, TrellisGroup]:
        parts: dict[str, dict[str, str]] = {}
        leaves = {"trellis", *SCALES, *LEGACY.values(), *MARKERS}
        for name in self.tensors:
            prefix, _, leaf = name.rpartition(".")
            if leaf in leaves:
                parts.setdefault(prefix, {})[leaf] = name
        problems: list[str] = []
        groups: dict[str, TrellisGroup] = {}
        for prefix, names in parts.items():
            if f"{prefix}.bias" in self.tensors:
                names["bias"] = f"{prefix}.bias"
            found = self._check_parts(prefix, names)
            if not found:
                groups[prefix], found = self._describe(prefix, names)
            problems += found
        raise_problems(self.directory, problems)
        return groups

    def _check_parts(self, prefix: str, names: Mapping[str, str]) -> list[str]:
        """What is missing from a group, or too much."""
        present = f"the group has {', '.join(sorted(names))}"
        missing = [] if "trellis" in names else ["trellis"]
        missing += [part for part in SCALES if part not in names and LEGACY[part] not in names]
        extra = [old for new, old in LEGACY.items() if new in names and old in names]
        extra += [leaf for leaf in ("weight", "scale") if f"{prefix}.{leaf}" in self.tensors]
        problems = [f"{prefix}.{part} is missing; {present}" for part in missing]
        problems += [f"{prefix}.{leaf} is extra; {present}" for leaf in extra]
        markers = [marker for marker in MARKERS if marker in names]
        if len(markers) > 1:
            problems.append(f"{prefix} has the markers {' and '.join(markers)}; expected at most one of them")
        return problems

    def _describe(self, prefix: str, names: dict[str, str]) -> tuple[TrellisGroup, list[str]]:
        """A group whose parts are all there, and what is wrong with their shapes, dtypes and values."""
        codebook = next((marker for marker in MARKERS if marker in names), UNMARKED)
        shape = self.tensors[names["trellis"]].shape
        problem = trellis_problem(shape, codebook)
        if problem:
            return TrellisGroup(prefix, 0, 0, 0, codebook, names, 0), [f"{names['trellis']}: {problem}"]
        k, n = shape[0] * _C.TILE, shape[1] * _C.TILE
        expected: dict[str, tuple[str, tuple[int, ...]]] = {"trellis": ("I16", shape), "bias": ("F16", (n,))}
        for part, size in zip(SCALES, (k, n), strict=True):
            expected |= {part: ("F16", (size,)), LEGACY[part]: ("I16", (size // 16,))}
        expected |= dict.fromkeys(MARKERS, ("I32", ()))
        problems = []
        for part, name in names.items():
            info, (dtype, want) = self.tensors[name], expected[part]
            if (info.dtype, info.shape) != (dtype, want):
                problems.append(f"{name}: is {info.dtype} {list(info.shape)}; expected {dtype} {list(want)}")
        if codebook in names and not problems:
            stored, multiplier = self.mapping.read(self.tensors[names[codebook]]), marker_value(codebook)
            value = int.from_bytes(stored, "little", signed=True)
            if value != multiplier:
                problems.append(f"{names[codebook]}: is {value}; expected {multiplier}, the multiplier of {codebook}")
        nbytes = sum(self.tensors[name].nbytes for name in names.values())
        return TrellisGroup(prefix, k, n, rate2_of(shape[2]), codebook, names, nbytes), problems
