"""`repack`: the same checkpoint with its tensors in another order, so that packed tiles begin at multiples of 64 bytes.

Files of exllamav3 have headers of any length and 4-byte markers between matrices, so that tiles begin at any address of
the mapped file. The kernels take that, but a tile then lies in two cache lines where one would do. In the files that
this writes, tiles come first and everything else after them; names, values and metadata are the same, and every reader
of safetensors reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metal_marlin.safetensors_header import TensorInfo, parse_json
from metal_marlin.weights import PICKLES, Checkpoint

ALIGNMENT = 64  # a cache line; a trellis is a multiple of 2048 bytes, so that all of a file's follow from the first
PIECE = 16 << 20


def order(tensors: dict[str, TensorInfo]) -> list[str]:
    """Trellises, then the others by falling size of their elements, so that those are aligned too; each as before."""

    def place(name: str) -> tuple[bool, int, int]:
        info = tensors[name]
        elements = max(1, info.nbytes // max(1, _count(info)))
        return not (name.endswith(".trellis") and info.dtype == "I16"), -elements, info.begin

    return sorted(tensors, key=place)


def _count(info: TensorInfo) -> int:
    count = 1
    for size in info.shape:
        count *= size
    return count


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header: dict[str, Any] = parse_json(file, stream.read(int.from_bytes(stream.read(8), "little")))
    return header


def _copy(source: BinaryIO, target: BinaryIO, begin: int, nbytes: int) -> None:
    source.seek(begin)
    while nbytes:
        try:
            piece = source.read(min(PIECE, nbytes))
        except OSError as error:
            raise OSError(f"{source.name} could not be read: {error.strerror}") from error
        if not piece:
            raise OSError(f"{source.name} ends too early; it was longer when it was opened")
        target.write(piece)
        nbytes -= len(piece)


def rewrite(source: Path, target: Path, tensors: dict[str, TensorInfo]) -> None:
    """One file, whose tensors are `tensors`. The target appears when it is whole."""
    old, entries, position = _header(source), dict[str, Any](), 0
    if "__metadata__" in old:
        entries["__metadata__"] = old["__metadata__"]
    names = order(tensors)
    for name in names:
        info = tensors[name]
        entries[name] = {**old[name], "data_offsets": [position, position + info.nbytes]}
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with source.open("rb") as reader, _written(target) as partial, partial.open("wb") as writer:
        writer.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _copy(reader, writer, tensors[name].begin, tensors[name].nbytes)
        writer.flush()
        os.fsync(writer.fileno())


@contextlib.contextmanager
def _written(target: Path) -> Iterator[Path]:
    """Where to write a file, which gets its name when it is whole and is gone otherwise. OSErrors name it: those of
    writing say what, such as a full disk, but not where."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        yield partial
        partial.replace(target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(f"{target} could not be written: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _removing() -> Iterator[list[Path]]:
    """with _removing() as made: what is put into the list, a folder before what lies in it, is removed if the block
    does not come to its end; nothing else is."""
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _make_folder(folder: Path, made: list[Path]) -> None:
    made.extend(reversed([path for path in (folder, *folder.parents) if not path.exists()]))
    folder.mkdir(parents=True, exist_ok=True)


def repack(arguments: argparse.Namespace) -> None:
    """`repack DIR OUT`. ValueError: OUT is there, or isn't elsewhere. OSError: no room, a file that can't be written,
    or one that changes; then nothing of what was written is left."""
    source, target = Path(arguments.directory), Path(arguments.out)
    with Checkpoint(source) as checkpoint:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target} is there and not an empty folder; expected a new one")
        if source.resolve() in (target.resolve(), *target.resolve().parents):
            raise ValueError(f"{target} lies in {source}; expected another folder")
        with _removing() as made:
            _make_folder(target, made)
            _repack(checkpoint, source, target, made)
    with Checkpoint(target) as checkpoint:
        mapping = checkpoint.mapping
        tiles = [mapping.place(i) for name, i in checkpoint.tensors.items() if name.endswith(".trellis")]
        aligned = sum(place % ALIGNMENT == 0 for place in tiles)
        print(f"{target}: {checkpoint.nbytes / 1e6:,.3f} MB; {aligned} of {len(tiles)} matrices begin at cache lines")


def _repack(checkpoint: Checkpoint, source: Path, target: Path, made: list[Path]) -> None:
    free = shutil.disk_usage(target).free
    if free < checkpoint.nbytes * 1.01:
        raise OSError(f"{target}: {free} bytes are free; expected at least {int(checkpoint.nbytes * 1.01)}")
    mapping = checkpoint.mapping  # remembers what the files were
    for file in checkpoint.files:
        place = target / file.relative_to(source)
        _make_folder(place.parent, made)
        made.append(place)
        rewrite(file, place, {name: info for name, info in checkpoint.tensors.items() if info.file == file})
    mapping.check()
    for other in sorted(source.iterdir()):
        if other.is_file() and other.suffix not in (".safetensors", *PICKLES):
            made.append(target / other.name)
            with _written(made[-1]) as partial:
                shutil.copy2(other, partial)
