"""Finds products in 32 bits in Triton's IR, where an address could pass 2^31."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

#: operations whose result holds the same numbers in another shape
_SHAPES = {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans"}
_LINE = re.compile(r"\s*(%[\w$.-]+) = ([\w.]+) (.*)")


def complaints(ttir: str, names: tuple[str, ...], constants: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the products of the named arguments and constants.

    A number that a loop carries along is not followed.
    """
    for name in names:
        if not re.search(rf"%{name}: ", ttir) and not isinstance(constants.get(name), int):
            yield f"{name}: the compiled kernel has no such number; give it one other than 1"
            continue
        narrow, wide = _products(ttir, name, constants.get(name))
        yield from (f"{name}: a product in 32 bits: {line}" for line in narrow)
        if not narrow and not wide:
            yield f"{name}: never multiplied in 64 bits"


def _products(ttir: str, name: str, value: int | None) -> tuple[list[str], list[str]]:
    """Return the lines that multiply by one number, in 32 bits and in 64."""
    same = {f"%{name}"} if value is None else set()
    found: dict[bool, list[str]] = {True: [], False: []}
    for line in ttir.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        result, operation, rest = match.groups()
        operands = set(re.findall(r"%[\w$.-]+", rest))
        if value is not None and operation == "arith.constant":
            if re.match(rf"(dense<{value}>|{value}) : \S*i(32|64)\b", rest):
                same.add(result)
        elif operands & same and (operation in _SHAPES or operation == "arith.extsi"):
            same.add(result)
        elif operands & same and operation == "arith.muli":
            text = f"{result} = {operation} {rest}"
            found["i64" in rest].append(re.sub(r" loc\(.*", "", text))
    return found[False], found[True]
