"""Read a cubin: an ELF file with a section of code, of constants and of attributes for each kernel.

NVIDIA documents neither the sections nor the attributes. The names and numbers here are those that ``cuobjdump -elf``
prints; the tests compare them with what ``cuobjdump --dump-resource-usage`` says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from ..errors import UserError

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_CUDA = 190  # the machine in an ELF header
_NO_BITS = 8  # a section without bytes in the file
_FUNCTION = 2

_PARAMETER_BANK, _PARAMETER, _REGISTERS, _BARRIERS = 0x0A, 0x17, 0x2F, 0x4C
"""Attributes: (symbol, offset, bytes) of a kernel's parameters in bank 0; one parameter; (symbol, registers), of all
kernels; named barriers. Toolkits up to 12 keep the last two in the header of the code's section instead."""


class Section(NamedTuple):
    """One section of an ELF file."""

    name: str
    kind: int
    flags: int
    start: int
    size: int
    info: int


class Requirements(NamedTuple):
    """What a kernel needs of a launch: see :class:`.kernel.Kernel`."""

    registers: int
    shared: int
    barriers: int
    parameter_base: int
    parameters: tuple[tuple[int, int], ...]
    constants: tuple[tuple[int, bytes], ...]
    routines: tuple[tuple[int, str], ...]


class CubinFile:
    """The sections of a cubin.

    Attributes:
        arch: compute capability times ten.
        kernels: names of its kernels.
    """

    def __init__(self, binary: bytes) -> None:
        if len(binary) < _HEADER.size or binary[:4] != b"\x7fELF" or binary[4] != 2:
            raise UserError("a cubin, which is an ELF file", repr(binary[:16]), "pass compiled.asm['cubin']")
        self._binary = binary
        identity, _, machine, _, _, _, sections, flags, _, _, _, _, count, names = _HEADER.unpack_from(binary)
        if machine != _CUDA:
            raise UserError(f"an ELF file for CUDA ({_CUDA})", f"one for machine {machine}", "pass a cubin")
        # Toolkits up to 12 keep the capability in the lowest byte, later ones in the next.
        self.arch = flags >> 8 & 0xFF if identity[8] >= 8 else flags & 0xFF
        raw = [_SECTION.unpack_from(binary, sections + n * _SECTION.size) for n in range(count)]
        text = self._bytes(raw[names][4], raw[names][5])
        self._sections = [Section(_string(text, r[0]), r[1], r[2], r[4], r[5], r[7]) for r in raw]
        self._by_name = {s.name: s for s in self._sections}
        self.kernels = [s.name.removeprefix(".text.") for s in self._sections if s.name.startswith(".text.")]

    def _bytes(self, start: int, size: int) -> bytes:
        return self._binary[start : start + size]

    def _content(self, name: str) -> bytes:
        section = self._by_name.get(name)
        return b"" if section is None or section.kind == _NO_BITS else self._bytes(section.start, section.size)

    def about(self, kernel: str) -> Requirements:
        """Return what one kernel needs of a launch."""
        code = self._by_name[f".text.{kernel}"]
        shared = self._by_name.get(f".nv.shared.{kernel}")
        base, parameters, barriers, registers = 0, [], code.flags >> 20 & 0x7F, code.info >> 24
        for kind, content in self._attributes(f".nv.info.{kernel}"):
            if kind == _PARAMETER_BANK:
                base = struct.unpack_from("<IHH", content)[1]
            elif kind == _PARAMETER:
                _, _, offset, rest = struct.unpack_from("<IHHI", content)
                parameters.append((offset, rest >> 18))
            elif kind == _BARRIERS:
                barriers = content[0]
        for kind, content in self._attributes(".nv.info"):
            if kind == _REGISTERS and self._symbol(struct.unpack_from("<I", content)[0]) == kernel:
                registers = struct.unpack_from("<II", content)[1]
        banks = [(bank, self._content(f".nv.constant{bank}.{kernel}")) for bank in (2,)]
        banks.append((3, self._content(".nv.constant3")))
        return Requirements(
            registers=registers,
            shared=shared.size if shared else 0,
            barriers=barriers,
            parameter_base=base,
            parameters=tuple(sorted(parameters)),
            constants=tuple((bank, content) for bank, content in banks if content),
            routines=tuple(self._routines(kernel)),
        )

    def _attributes(self, section: str) -> Iterator[tuple[int, bytes]]:
        content, at = self._content(section), 0
        while at + 4 <= len(content):
            form, kind, size = struct.unpack_from("<BBH", content, at)
            at += 4
            length = size if form == 4 else 0  # of the others, the value is in place of the size
            yield kind, content[at : at + length] if form == 4 else struct.pack("<H", size)
            at += length

    def _symbol(self, number: int) -> str:
        name = _SYMBOL.unpack_from(self._content(".symtab"), number * _SYMBOL.size)[0]
        return _string(self._content(".strtab"), name)

    def _routines(self, kernel: str) -> Iterator[tuple[int, str]]:
        """Yield address and name of each function in the kernel's section other than the kernel itself."""
        place = next(n for n, s in enumerate(self._sections) if s.name == f".text.{kernel}")
        text, symbols = self._content(".strtab"), self._content(".symtab")
        for at in range(0, len(symbols) - _SYMBOL.size + 1, _SYMBOL.size):
            name, info, _, section, value, _ = _SYMBOL.unpack_from(symbols, at)
            if section == place and info & 15 == _FUNCTION and _string(text, name) != kernel:
                yield value, _string(text, name)


def _string(text: bytes, at: int) -> str:
    return text[at : text.index(b"\0", at)].decode()
