"""What a scalar means, decided by what it is for; the traps of YAML 1.1 are refused by name."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.recipe.text import Fields, Items, Node, Scalar

_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)", re.ASCII)
_FLOAT: Final = re.compile(
    r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", re.ASCII
)
#: what some YAML reader takes for a number, or a person may mean as one.
_NUMERIC: Final = re.compile(r"[-+]?(?:\.?[0-9][0-9_.:]*(?:[eE][-+]?[0-9]+)?|0[xob][0-9a-fA-F_]+)")
_SCALARS: Final[dict[Any, str]] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What values an option takes.

    Attributes:
        scalars: words of `_SCALARS` for a single value.
        items: the same for the entries of a list; empty when no list is taken.
        optional: it may be null, which means its default.
    """

    scalars: frozenset[str]
    items: frozenset[str] = frozenset()
    optional: bool = False

    def describe(self) -> str:
        """Return the kind in words."""
        single = [word for word in dict.fromkeys(_SCALARS.values()) if word in self.scalars]
        if self.items:
            words = [word for word in dict.fromkeys(_SCALARS.values()) if word in self.items]
            single.append(f"a list of {' or '.join(words)}")
        return " or ".join(dict.fromkeys(single))

    def schema(self) -> dict[str, object]:
        """Return the kind as JSON Schema."""
        names = {"true or false": "boolean", "a whole number": "integer", "a number": "number"}
        found: list[dict[str, object]] = [
            {"type": names.get(word, "string")} for word in sorted(self.scalars)
        ]
        if self.items:
            inner = [{"type": names.get(word, "string")} for word in sorted(self.items)]
            entry = inner[0] if len(inner) == 1 else {"anyOf": inner}
            found.append({"type": "array", "items": entry})
        if self.optional:
            found.append({"type": "null"})
        return found[0] if len(found) == 1 else {"anyOf": found}


TEXT: Final = Kind(scalars=frozenset({"text"}))
OPTIONAL_TEXT: Final = Kind(scalars=frozenset({"text"}), optional=True)
TEXTS: Final = Kind(scalars=frozenset({"text"}), items=frozenset({"text"}))
#: a number, or text with a unit such as 20M.
COUNT: Final = Kind(scalars=frozenset({"a whole number", "text"}), optional=True)


def kind_of(hint: Any) -> Kind:
    """Return the kind of values an annotation stands for; parts that no YAML holds are left out."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    scalars: set[str] = set()
    items: set[str] = set()
    optional = False
    for part in typing.get_args(hint) if union else (hint,):
        if part is type(None):
            optional = True
        elif part in _SCALARS:
            scalars.add(_SCALARS[part])
        elif typing.get_origin(part) in (tuple, list, Sequence):
            items.add(_SCALARS[typing.get_args(part)[0]])
    # a number may be written as a whole one, and a list of one as its entry
    if items:
        scalars |= items
    return Kind(scalars=frozenset(scalars), items=frozenset(items), optional=optional)


def read(node: Node, kind: Kind, where: str) -> Any:
    """Return the value of a node: bool, int, float, str, a tuple of those, or None.

    Args:
        node: what was written; where a list is taken, a single value is a list of one.
        kind: what is taken.
        where: how messages name it, after its place.

    Raises:
        OptionError: it is of another kind, or a value that YAML readers take for different things.
    """
    if isinstance(node, Items) and kind.items:
        single = Kind(scalars=kind.items)
        return tuple(read(item, single, f"{where}.{n}") for n, item in enumerate(node.items))
    if isinstance(node, Items | Fields):
        found = "a list" if isinstance(node, Items) else "a mapping"
        raise _wrong(node, kind, where, found)
    if node.plain and node.tag == "null":
        if kind.optional:
            return None
        raise _wrong(node, kind, where, "nothing")
    value = _scalar(node, kind, where)
    return (value,) if kind.items else value


def _scalar(node: Scalar, kind: Kind, where: str) -> Any:
    number = _number(node, kind.scalars, where)
    if number is not None:
        return number
    if "true or false" in kind.scalars and node.plain and node.tag == "bool":
        return node.text.lower() in ("true", "yes", "on")
    if "text" not in kind.scalars:
        raise _wrong(node, kind, where, _shown(node))
    if node.plain and (node.tag != "str" or _NUMERIC.fullmatch(node.text)):
        raise OptionError(
            _trap(node) or "is not text to YAML",
            where=f"{node.place}: {where}",
            expected=kind.describe(),
            found=escape(node.text, 60),
            hint=f"Put it in quotes if it is meant as text: '{escape(node.text, 60)}'.",
        )
    if not node.text.isprintable():
        raise OptionError(
            "holds control characters",
            where=f"{node.place}: {where}",
            found=f"'{escape(node.text, 60)}'",
        )
    return node.text


def _number(node: Scalar, scalars: frozenset[str], where: str) -> int | float | None:
    """Return the number a plain scalar is, None when it is none or none is asked for."""
    if not node.plain or not scalars & {"a whole number", "a number"}:
        return None
    if _INT.fullmatch(node.text) and len(node.text) <= 20:
        number = int(node.text)
        return number if "a whole number" in scalars else float(number)
    if "a number" in scalars and _FLOAT.fullmatch(node.text):
        found = float(node.text)
        if not math.isfinite(found):
            raise OptionError(
                "is too large for a number", where=f"{node.place}: {where}", found=node.text[:40]
            )
        return found
    return None


def _wrong(node: Node, kind: Kind, where: str, found: str) -> OptionError:
    trap = _trap(node) if isinstance(node, Scalar) and node.plain else None
    return OptionError(
        trap or "has the wrong type",
        where=f"{node.place}: {where}",
        expected=kind.describe(),
        found=found,
    )


def _shown(node: Scalar) -> str:
    shown = escape(node.text, 60)
    return shown if node.plain else f"'{shown}' (text, because it is quoted)"


def _trap(node: Scalar) -> str | None:
    """Return which trap of YAML a plain scalar is, None for an ordinary one."""
    text = node.text
    if node.tag == "bool":
        return "is read as true or false by YAML 1.1"
    if node.tag == "timestamp":
        return "is read as a date by YAML 1.1"
    if ":" in text and _NUMERIC.fullmatch(text):
        return "is read as a number of base 60 by YAML 1.1"
    if re.fullmatch(r"[-+]?0[0-9_]+", text):
        return "starts with 0, which some YAML readers take for octal"
    if re.fullmatch(r"[-+]?0[xob].*", text):
        return "is not a decimal number"
    if node.tag == "float" and not _FLOAT.fullmatch(text):
        return "is not a finite number"
    if node.tag in ("int", "float"):
        return "is a number to YAML"
    if _NUMERIC.fullmatch(text):
        return "is text to YAML 1.1 and a number to YAML 1.2"
    return None
