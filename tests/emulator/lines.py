"""What is read out of shared objects: the line of an address (DWARF 4), what a library needs, what it exports.

Owns nothing else of debug information: functions of our headers are compiled without any, so what is inlined into a
kernel already carries the kernel's line.
"""

from __future__ import annotations

import bisect
import re
import struct
from functools import lru_cache
from pathlib import Path

PLACE = re.compile("\x02([^\x03]*)\x03([0-9a-f]+)\x04")  # as report.c writes it: path, offset


class _Reader:
    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data, self.at = data, at

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return int(value)

    def unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self.data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def signed(self) -> int:
        start = self.at
        value = self.unsigned()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) & 1 else value

    def string(self) -> str:
        end = self.data.index(b"\0", self.at)
        value = self.data[self.at : end].decode()
        self.at = end + 1
        return value


def _section(elf: bytes, name: bytes) -> bytes:
    """One section of a 64-bit little-endian ELF file; empty if there is none."""
    table = struct.unpack_from("<Q", elf, 40)[0]
    size, count, names_index = struct.unpack_from("<3H", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    for header in headers:
        start = names + header[0]
        if elf[start : elf.index(b"\0", start)] == name:
            return elf[header[4] : header[4] + header[5]]
    return b""


def _unit(reader: _Reader) -> list[tuple[int, str, int]]:
    """(address, file, line) of one compilation unit's line program; line 0 ends a sequence."""
    end = reader.number("I") + reader.at
    if (version := reader.number("H")) != 4:
        raise ValueError(f"line table of DWARF version {version}; 4 is expected")
    program = reader.number("I") + reader.at
    step = reader.number("B")
    reader.number("B")  # operations per instruction
    reader.number("B")  # whether lines begin statements
    line_base, line_range, opcode_base = reader.number("b"), reader.number("B"), reader.number("B")
    lengths = [reader.number("B") for _ in range(opcode_base - 1)]
    while reader.string():
        pass  # folders
    files = [""]
    while name := reader.string():
        files.append(name)
        for _ in range(3):
            reader.unsigned()
    reader.at = program
    rows: list[tuple[int, str, int]] = []
    address, file, line = 0, 1, 1
    while reader.at < end:
        opcode = reader.number("B")
        if opcode >= opcode_base:
            address += (opcode - opcode_base) // line_range * step
            line += line_base + (opcode - opcode_base) % line_range
            rows.append((address, files[file], line))
        elif opcode == 0:
            length = reader.unsigned()
            after = reader.at + length
            extended = reader.number("B")
            if extended == 1:
                rows.append((address, files[file], 0))
                address, file, line = 0, 1, 1
            elif extended == 2:
                address = reader.number("Q")
            reader.at = after
        elif opcode == 1:
            rows.append((address, files[file], line))
        elif opcode == 2:
            address += reader.unsigned() * step
        elif opcode == 3:
            line += reader.signed()
        elif opcode == 4:
            file = reader.unsigned()
        elif opcode == 8:
            address += (255 - opcode_base) // line_range * step
        elif opcode == 9:
            address += reader.number("H")
        else:
            for _ in range(lengths[opcode - 1]):
                reader.unsigned()
    return rows


def _strings(elf: bytes, section: bytes, entries: list[int]) -> list[str]:
    table = _section(elf, section)
    return [table[at : table.index(b"\0", at)].decode() for at in entries]


def needed(path: str) -> list[str]:
    """The libraries that a shared object is linked to."""
    elf = Path(path).read_bytes()
    dynamic = struct.iter_unpack("<qQ", _section(elf, b".dynamic"))
    return _strings(elf, b".dynstr", [value for tag, value in dynamic if tag == 1])


def exported(path: str) -> list[str]:
    """The names that a shared object defines for others."""
    elf = Path(path).read_bytes()
    symbols = struct.iter_unpack("<IBBHQQ", _section(elf, b".dynsym"))
    return _strings(elf, b".dynstr", [name for name, info, _, index, _, _ in symbols if index and info >> 4])


@lru_cache(maxsize=64)
def _rows(path: str) -> list[tuple[int, str, int]]:
    table = _section(Path(path).read_bytes(), b".debug_line")
    reader = _Reader(table)
    rows: list[tuple[int, str, int]] = []
    while reader.at < len(table):
        rows += _unit(reader)
    return sorted(rows, key=lambda row: (row[0], row[2] != 0))


def line_of(path: str, offset: int) -> str:
    """file:line of the instruction at `offset` of the shared object `path`."""
    try:
        rows = _rows(path)
    except (OSError, ValueError, IndexError, struct.error) as error:
        return f"offset {offset:#x} of {path} ({error})"
    at = bisect.bisect_right(rows, offset, key=lambda row: row[0]) - 1
    if at < 0 or rows[at][2] == 0:
        return f"offset {offset:#x} of {path}"
    return f"{rows[at][1]}:{rows[at][2]}"


def resolve(text: str) -> str:
    """A report's text with its addresses turned into lines."""
    return PLACE.sub(lambda match: line_of(match[1], int(match[2], 16)), text)
