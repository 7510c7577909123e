"""Reads what a compiled kernel needs and does, with the tools in the Triton wheel."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_FLOATS = {"F16", "F16x2", "F32", "F64", "BF16", "BF16x2", "BF16_V2"}


@dataclass(frozen=True)
class Binary:
    """One kernel as one GPU runs it.

    Attributes:
        registers: per thread.
        stack: bytes of local memory per thread, 0 when nothing is spilled.
        counts: how often each SASS instruction occurs.
    """

    registers: int
    stack: int
    counts: Counter[str]

    def count(self, wanted: str) -> int:
        """Return how often an instruction with all parts of `wanted` occurs."""
        opcode, *parts = wanted.split(".")
        return sum(
            number
            for mnemonic, number in self.counts.items()
            if mnemonic.split(".")[0] == opcode and set(parts) <= set(mnemonic.split("."))
        )

    @property
    def spills(self) -> int:
        """How many instructions load from or store to the stack."""
        return self.count("LDL") + self.count("STL")

    @property
    def float_atomics(self) -> list[str]:
        """The instructions whose result depends on the order in which programs run."""
        return sorted(
            mnemonic
            for mnemonic in self.counts
            if mnemonic.startswith(("ATOM", "RED.", "REDG")) and set(mnemonic.split(".")) & _FLOATS
        )


def read(cubins: list[bytes], architecture: str) -> list[Binary]:
    """Return what the one function in each of `cubins` needs and does.

    They are disassembled together, for nvdisasm takes a third of a second to start.

    Args:
        cubins: compiled kernels.
        architecture: the GPU they are for, as nvdisasm names it: "SM90a".
    """
    codes = [_code(cubin) for cubin in cubins]
    ends = list(accumulate(len(code) for code in codes))
    counts: list[Counter[str]] = [Counter() for _ in cubins]
    for address, mnemonic in _INSTRUCTION.findall(_disassembled(b"".join(codes), architecture)):
        counts[bisect_right(ends, int(address, 16))][mnemonic] += 1
    return [Binary(*_usage(cubin), found) for cubin, found in zip(cubins, counts, strict=True)]


def _code(cubin: bytes) -> bytes:
    """Return the instructions of the one function in an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, naming = struct.unpack_from("<HHH", cubin, 0x3A)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = sections[naming][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of local memory that a thread needs."""
    printed = _tool(cubin, "cuobjdump", "--dump-resource-usage")
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


def _disassembled(code: bytes, architecture: str) -> str:
    """Return the instructions of several functions, one after the other."""
    return _tool(code, "nvdisasm", "--binary", architecture) if code else ""


def _tool(content: bytes, name: str, *arguments: str) -> str:
    """Run one of the wheel's programs on a file of `content`; return what it printed."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [str(_TOOLS / name), *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
