"""The output folder while it is being made, and how it becomes one.

Everything is written to OUT.quantizing beside OUT, one file a finished part (decoder layer), each complete before it
gets its name. manifest.json there says what the files belong to. When all are there the folder is renamed to OUT: a
folder of that name is whole, and one that was interrupted is not taken for it (it has no config.json). Owns names, the
manifest, the lock against a second process, and the JSON files of a finished checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metal_marlin import _C
from metal_marlin.safetensors_header import parse_json
from metal_marlin.trellis import MARKERS
from metal_marlin.weights import INDEX_FILE, REPORT_FILE

MANIFEST, LOCK = "manifest.json", "lock"
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "generation_config.json", "preprocessor_config.json", "*.model", "LICENSE*",
)  # fmt: skip
FORMAT_VERSION = "1.6.5"  # of exllamav3, whose files these are like


class Work:
    """OUT.quantizing, opened for one run; a context manager that holds its lock.

    identity  what the files depend on (input, options, calibration); a folder of another identity is refused
    """

    def __init__(self, out: Path, identity: dict[str, Any], parts: int) -> None:
        self.out, self.identity, self.parts = out, identity, parts
        self.folder = out.with_name(f"{out.name}.quantizing")
        self.manifest: dict[str, Any] = {"identity": identity, "rates": None, "files": {}}
        self._lock: Any = None

    def __enter__(self) -> Work:
        check_free(self.out)
        existed = self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder / LOCK)
        try:
            self._take_up(existed)
        except BaseException:
            self.close()
            raise
        return self

    def _take_up(self, existed: bool) -> None:
        """Reads the manifest of an interrupted run. ValueError: it is another run's, or none."""
        file = self.folder / MANIFEST
        if file.is_file():
            found = parse_json(file, file.read_bytes())
            if not isinstance(found, dict) or found.keys() != self.manifest.keys():
                raise ValueError(f"{file}: isn't what an interrupted run writes; expected its manifest, or no folder")
            before, now = found["identity"], self.identity
            differing = sorted(key for key in {**before, **now} if before.get(key) != now.get(key))
            if differing:
                changes = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differing)
                raise ValueError(
                    f"{self.folder} holds an interrupted run with other settings ({changes}): finish it with those, or"
                    " delete the folder"
                )
            self.manifest = found
        elif existed and any(path.name not in (LOCK, f"{MANIFEST}.tmp") for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} exists and has no {MANIFEST}; expected an interrupted run, or nothing")
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # ------------------------------------------------------------------ parts

    def name(self, index: int) -> str:
        return f"model-{index + 1:05}-of-{self.parts:05}.safetensors"

    def done(self, index: int) -> bool:
        """Whether a part is there, whole."""
        entry, file = self.manifest["files"].get(self.name(index)), self.folder / self.name(index)
        return entry is not None and file.is_file() and file.stat().st_size == entry["size"]

    def load(self, index: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = load_file(self.folder / self.name(index))
        return tensors

    def save(self, index: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Writes a part, then says so in the manifest. OSError leaves what was finished before it."""
        file = self.folder / self.name(index)
        temporary = file.with_name(f"{file.name}.tmp")
        try:
            save_file(tensors, temporary, {"format": "pt"})
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            os.replace(temporary, file)
        except Exception as error:  # safetensors has its own class for a full disk
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) or "error" in type(error).__name__.lower():
                raise _unwritten(file, error) from error
            raise
        storage = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        self.manifest["files"][file.name] = {"size": file.stat().st_size, "tensors": storage, "facts": facts}
        self.write_manifest()

    def write_manifest(self) -> None:
        _write(self.folder / MANIFEST, json.dumps(self.manifest))

    # ------------------------------------------------------------------ the end

    def finish(
        self, source: Path, config: dict[str, Any], quantization: dict[str, Any], report: dict[str, Any]
    ) -> None:
        """Adds the JSON files and the tokenizer, and gives the folder its name."""
        weight_map: dict[str, str] = {}
        storage: dict[str, Any] = {}
        total = 0
        for index in range(self.parts):
            for name, (dtype, shape) in self.manifest["files"][self.name(index)]["tensors"].items():
                weight_map[name] = self.name(index)
                n_bytes = getattr(torch, dtype.removeprefix("torch.")).itemsize * _product(shape)
                total += n_bytes
                entry = storage.setdefault(name.rpartition(".")[0], {"stored_tensors": {}})
                entry["stored_tensors"][name] = {"shape": shape, "n_bytes": n_bytes, "dtype": dtype}
                if name.endswith(".trellis"):
                    rate2 = shape[2] // 8
                    entry |= {"quant_format": "exl3", "bits_per_weight": rate2 / 2 if rate2 % 2 else rate2 // 2}
        for name in weight_map:
            prefix, _, leaf = name.rpartition(".")
            if leaf in MARKERS:
                storage[prefix][f"{leaf}_multiplier"] = _C.MULTIPLIERS[leaf]
        index_text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        for pattern in TOKENIZER:
            for file in source.glob(pattern):
                if file.is_file():
                    try:
                        shutil.copyfile(file, self.folder / file.name)
                    except OSError as error:
                        raise _unwritten(self.folder / file.name, error) from error
        _write(self.folder / INDEX_FILE, index_text)
        _write(self.folder / REPORT_FILE, json.dumps(report, indent=1))
        _write(
            self.folder / "quantization_config.json",
            json.dumps({**quantization, "tensor_storage": storage}, indent=4),
        )
        _write(self.folder / "config.json", json.dumps({**config, "quantization_config": quantization}, indent=4))
        check_free(self.out)
        if self.out.is_dir():
            self.out.rmdir()  # empty
        self.folder.rename(self.out)
        for name in (MANIFEST, LOCK):
            (self.out / name).unlink(missing_ok=True)


def check_free(out: Path) -> None:
    """ValueError unless `out`, a resolved path, is absent or an empty folder that another can take the place of."""
    if (out / LOCK).is_file() and (out / REPORT_FILE).is_file():  # killed between finish()'s last steps
        for name in (MANIFEST, LOCK):
            (out / name).unlink(missing_ok=True)
        raise ValueError(f"{out} is whole: the run that made it was ended after its last layer; nothing is left to do")
    if out.is_mount():
        raise ValueError(f"{out} is a mount point, which no folder can take the place of; expected a name inside it")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists and isn't an empty folder; expected a name that is free")


def _product(shape: list[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _locked(file: Path) -> Any:
    """The lock file, held until it is closed or the process ends. ValueError if another process has it, OSError if the
    file system has no locks."""
    import fcntl

    stream = file.open("a")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise ValueError(f"{file.parent} is in use by another process; expected none") from None
    except OSError as error:
        stream.close()
        raise OSError(f"{file}: can't be locked: {error}; expected a file system with locks") from error
    return stream


def _write(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise _unwritten(file, error) from error


def _unwritten(file: Path, error: Exception) -> OSError:
    return OSError(
        f"{file}: can't be written: {error}. Finished layers are kept in {file.parent}: the same command goes on from"
        " there"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
