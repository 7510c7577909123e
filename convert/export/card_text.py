"""Text for a card: whatever a file said becomes words on one line, never markup.

A manifest may come from anywhere, so every string in it is treated as hostile: control characters
are spelled out, and what Markdown, HTML or YAML would take for structure is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Final, TypeGuard

from adaconvert.io.names import escape

_LONGEST: Final = 2000
#: what begins or ends a construct inside a line.
_INLINE = re.compile(r"[\\*\[\]|~$!]|(?<!\w)_|_(?!\w)")
#: what begins a block at the start of a line.
_BLOCK = re.compile(r"^(\s*)([#+=-]|\d+(?=[.)](?:\s|$)))")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_PLAIN_YAML = re.compile(r"[a-z][a-z0-9._/-]*", re.ASCII)
_WORDS_OF_YAML = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def plain(text: object) -> str:
    """Return text that reads as it is wherever it stands in a line; `code` in it stays code."""
    pieces = escape(text, _LONGEST).split("`")
    if len(pieces) % 2 == 0:
        # a backtick without a partner
        return _words("'".join(pieces))
    shown = [
        code(piece) if number % 2 else _words(piece, start=number == 0)
        for number, piece in enumerate(pieces)
    ]
    return "".join(shown)


def _words(text: str, *, start: bool = True) -> str:
    text = re.sub("[&<>]", lambda match: _ENTITIES[match[0]], text)
    text = _INLINE.sub(lambda match: f"\\{match[0]}", text)
    # or a reader would make links of them
    text = text.replace("://", "\\://").replace("www.", "www\\.").replace("@", "&#64;")
    return _BLOCK.sub(_blunted, text) if start else text


def _blunted(match: re.Match[str]) -> str:
    return f"{match[0]}\\" if match[2].isdigit() else f"{match[1]}\\{match[2]}"


def code(text: object, limit: int = 200) -> str:
    """Return text as a code span."""
    shown = escape(text, limit).replace("`", "'").replace("|", "\\|").strip()
    return f"`{shown or '?'}`"


def sentence(text: object) -> str:
    """Return text with a capital letter at its start and a full stop at its end."""
    said = str(text)
    # a number with a stop is escaped as a whole, or it would begin a list
    shown = plain(said if said.endswith((".", "!", "?")) else f"{said}.")
    return shown[:1].upper() + shown[1:]


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return words as people list them."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a JSON value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def percent(share: float) -> str:
    """Return a share of one to three digits, such as "62.5 %"."""
    value = 100 * share
    return f"{value:.1f} %" if 99.5 <= value < 100 else f"{value:.3g} %"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a Markdown table of cells that are escaped already."""
    lines = [list(columns), ["---"] * len(columns), *map(list, rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def fenced(lines: Sequence[str], language: str) -> list[str]:
    """Return lines as a code block that nothing inside can end; each stays one line, control
    characters are spelled out."""
    shown = ["".join(map(_visible, line)).rstrip() for line in lines]
    longest = max((len(run) for run in re.findall("`+", "\n".join(shown))), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *shown, fence]


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def is_hub_id(text: object) -> TypeGuard[str]:
    """Return whether text is the name of a repository, such as "org/name"."""
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None


def yaml_text(text: str) -> str:
    """Return text as a YAML scalar that is read as a string."""
    bare = _PLAIN_YAML.fullmatch(text) and text not in _WORDS_OF_YAML
    return text if bare or is_hub_id(text) else json.dumps(text)
