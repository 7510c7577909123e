"""YAML text as a tree of scalars, lists and mappings that know the line they stand on.

Only the event stream of PyYAML's safe loader is used, within limits, and nothing is constructed
from it: what a scalar means is decided where it is known what it is for, see `values`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import yaml

from adaconvert.errors import OptionError
from adaconvert.export.hub_secrets import holds_login
from adaconvert.io.names import escape

MAX_BYTES: Final = 128 << 10
MAX_DEPTH: Final = 16
MAX_NODES: Final = 5000
MAX_ALIASES: Final = 32
_CORE: Final = "tag:yaml.org,2002:"
_BOMS: Final = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalar:
    """One value that is neither list nor mapping.

    Attributes:
        text: as written, without quotes.
        tag: what YAML 1.1 takes it for: "str", "int", "float", "bool", "null", "timestamp", ...
        plain: written without quotes and not as a block.
        place: file and line.
        folder: of the file it stands in, None when it was given on the command line.
    """

    text: str
    tag: str
    plain: bool
    place: str
    folder: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    place: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """A mapping.

    Attributes:
        fields: by key, in the order written.
        places: where each key stands.
    """

    fields: dict[str, Node]
    places: dict[str, str]
    place: str


Node = Scalar | Items | Fields


@dataclass(slots=True, kw_only=True)
class _Reader:
    """The state of one reading: where it stands, and what counts towards the limits."""

    label: str
    folder: Path | None
    events: Iterator[yaml.Event]
    line_known: bool = True
    anchors: dict[str, tuple[Node, int]] = field(default_factory=dict)
    aliases: int = 0
    nodes: int = 0

    def place(self, event: yaml.Event) -> str:
        """Return where an event starts."""
        return f"{self.label} line {event.start_mark.line + 1}" if self.line_known else self.label


def parse(
    text: str, label: str, *, folder: Path | None = None, line_known: bool = True
) -> Node | None:
    """Return the one document of a YAML text, None when there is none.

    Args:
        text: the YAML.
        label: how messages name it.
        folder: of the file it stands in.
        line_known: say lines in messages.

    Raises:
        OptionError: it is no YAML, holds tags, duplicate keys, several documents or merge keys, or
            is larger, deeper or more often aliased than a recipe needs to be.
    """
    reader = _Reader(
        label=label,
        folder=folder,
        events=iter(yaml.parse(text, Loader=yaml.SafeLoader)),
        line_known=line_known,
    )
    try:
        return _document(reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{label} line {mark.line + 1}" if mark and line_known else label
        problem = escape(error.problem or error.context or "cannot be read", 120)
        raise OptionError(f"is no YAML: {problem}", where=place) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        shown = escape(str(error).splitlines()[0], 120)
        raise OptionError(f"is no YAML: {shown}", where=label) from None


def decode(raw: bytes, label: str) -> str:
    """Return the text of a recipe file.

    Raises:
        OptionError: it is too large, not UTF-8, starts with a byte order mark, or is binary.
    """
    if len(raw) > MAX_BYTES:
        raise _too_large(label, len(raw))
    if raw.startswith(_BOMS):
        raise OptionError(
            "starts with a byte order mark", where=label, hint="Save it as UTF-8 without one."
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise OptionError("is not UTF-8 text", where=label, found=found) from None
    if "\0" in text:
        raise OptionError("is a binary file, not a recipe", where=label)
    return text


def check_no_token(text: str, label: str) -> None:
    """Return only when a text holds no access token and no login inside a URL.

    Raises:
        OptionError: it does; the line is named and not repeated.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if holds_login(line):
            raise OptionError(
                "holds an access token or a password, and a recipe goes along with its result",
                where=f"{label} line {number}",
                hint="Log in with `hf auth login`, or set HF_TOKEN; and replace this token by a "
                "new one.",
            )


def _too_large(label: str, nbytes: int) -> OptionError:
    return OptionError(
        "is too large for a recipe",
        where=label,
        expected=f"at most {MAX_BYTES} bytes",
        found=nbytes,
    )


def _document(reader: _Reader) -> Node | None:
    root: Node | None = None
    documents = 0
    for event in reader.events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise OptionError("holds more than one document", where=reader.place(event))
        elif isinstance(event, yaml.NodeEvent):
            root = _node(reader, event, 1)[0]
    return root


def _node(reader: _Reader, event: yaml.Event, depth: int) -> tuple[Node, int]:
    """Return the node that starts with an event, and how many nodes it stands for."""
    place = reader.place(event)
    if depth > MAX_DEPTH:
        raise OptionError(f"is nested deeper than {MAX_DEPTH} levels", where=place)
    if isinstance(event, yaml.AliasEvent):
        return _alias(reader, event, place)
    anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
    if tag is not None and tag != "!":
        raise OptionError(
            f"tag '{escape(tag, 60)}' is not allowed: a recipe holds plain values", where=place
        )
    found = _plain_node(reader, event, depth, place)
    if anchor is not None:
        if anchor in reader.anchors:
            raise OptionError(f"anchor '{escape(anchor, 60)}' is defined twice", where=place)
        reader.anchors[anchor] = found
    return found


def _plain_node(reader: _Reader, event: yaml.Event, depth: int, place: str) -> tuple[Node, int]:
    _count(reader, 1, place)
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(reader, event, place), 1
    if isinstance(event, yaml.SequenceStartEvent):
        return _items(reader, depth, place)
    return _fields(reader, depth, place)


def _alias(reader: _Reader, event: yaml.AliasEvent, place: str) -> tuple[Node, int]:
    reader.aliases += 1
    if reader.aliases > MAX_ALIASES:
        raise OptionError(f"uses more than {MAX_ALIASES} aliases", where=place)
    name = escape(event.anchor, 60)
    if event.anchor not in reader.anchors:
        raise OptionError(f"alias '{name}' names no anchor before it", where=place)
    node, count = reader.anchors[event.anchor]
    _count(reader, count, place)
    return node, count


def _count(reader: _Reader, count: int, place: str) -> None:
    reader.nodes += count
    if reader.nodes > MAX_NODES:
        raise OptionError(f"holds more than {MAX_NODES} values", where=place)


def _scalar(reader: _Reader, event: yaml.ScalarEvent, place: str) -> Scalar:
    plain = event.style is None
    tag = "str"
    if plain:
        tag = str(_RESOLVER.resolve(yaml.ScalarNode, event.value, (True, False)))
    return Scalar(
        text=event.value,
        tag=tag.removeprefix(_CORE),
        plain=plain,
        place=place,
        folder=reader.folder,
    )


def _items(reader: _Reader, depth: int, place: str) -> tuple[Node, int]:
    items, total = [], 1
    for event in reader.events:
        if isinstance(event, yaml.SequenceEndEvent):
            break
        node, count = _node(reader, event, depth + 1)
        items.append(node)
        total += count
    return Items(items=tuple(items), place=place), total


def _fields(reader: _Reader, depth: int, place: str) -> tuple[Node, int]:
    fields: dict[str, Node] = {}
    places: dict[str, str] = {}
    total = 1
    for event in reader.events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        key = _key(reader, event)
        if key in fields:
            raise OptionError(
                f"key '{escape(key, 60)}' is given twice",
                where=reader.place(event),
                found=f"the first one at {places[key]}",
            )
        places[key] = reader.place(event)
        fields[key], count = _node(reader, next(reader.events), depth + 1)
        total += 1 + count
    return Fields(fields=fields, places=places, place=place), total


def _key(reader: _Reader, event: yaml.Event) -> str:
    place = reader.place(event)
    if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
        raise OptionError("a key must be a word", where=place)
    scalar = _scalar(reader, event, place)
    if scalar.tag == "merge":
        raise OptionError(
            "merge keys ('<<') are not allowed", where=place, hint="Use 'extends' instead."
        )
    if scalar.tag != "str":
        raise OptionError(
            f"key '{escape(scalar.text, 60)}' is no word: YAML reads it as {scalar.tag}",
            where=place,
            hint="Put it in quotes if it is meant as a name.",
        )
    return scalar.text


_RESOLVER: Final = yaml.SafeLoader("")
