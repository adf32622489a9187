"""What a cubin says of a kernel: registers, and the bytes of stack, which a kernel has only where something spills.

A cubin is an ELF file. Its sections ".nv.info" hold attributes: one byte for the format, one for the name, two for the
size of the value (or the value itself), then the value; those of a function begin with the index of its symbol.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

#: Attributes, and the format of those that have a size.
FRAME_SIZE, REGISTERS, SIZED = 0x11, 0x2F, 0x04


class Usage(NamedTuple):
    registers: int
    stack_bytes: int


def usage(cubin: bytes) -> Usage:
    """Of the one kernel of a cubin. Raises ValueError for what is no cubin, or says nothing of its kernel."""
    if cubin[:4] != b"\x7fELF":
        raise ValueError(f"not an ELF file: begins with {cubin[:4]!r}")
    registers, stack = [], []
    for name, content in _sections(cubin):
        if name != ".nv.info":
            continue
        for attribute, value in _attributes(content):
            if attribute == REGISTERS:
                registers.append(struct.unpack("<II", value)[1])
            elif attribute == FRAME_SIZE:
                stack.append(struct.unpack("<II", value)[1])
    if not registers or not stack:
        raise ValueError("says nothing of the registers or the stack of its kernel")
    return Usage(max(registers), max(stack))


def _sections(elf: bytes) -> list[tuple[str, bytes]]:
    """(name, content) of each."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    names = headers[names_index][4]
    found = []
    for name, kind, _, _, offset, length in headers:
        end = elf.index(b"\0", names + name)
        content = b"" if kind == 8 else elf[offset : offset + length]  # SHT_NOBITS takes no room
        found.append((elf[names + name : end].decode(), content))
    return found


def _attributes(content: bytes) -> list[tuple[int, bytes]]:
    found, place = [], 0
    while place + 4 <= len(content):
        form, attribute, value = struct.unpack_from("<BBH", content, place)
        place += 4
        if form == SIZED:
            found.append((attribute, content[place : place + value]))
            place += value
    return found
