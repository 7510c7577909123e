"""How sources are read: their format, their part, and whether they fit in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from adaconvert.data.columns import columns_of
from adaconvert.data.messages import MESSAGES_FIELD, Message, answers, messages_of
from adaconvert.data.rows import TEXT_FIELD, existing, iter_rows
from adaconvert.data.text import text_of
from adaconvert.errors import DataError, OptionError
from adaconvert.io.names import escape, listing
from adaconvert.train.bounds import among, whole

AUTO: Final = "auto"
TEXT: Final = "text"
MESSAGES: Final = "messages"
FORMATS: Final = (AUTO, TEXT, MESSAGES)
#: option -> field of `Reading`.
READING_OPTIONS: Final = {
    "data_format": "formats",
    "data_split": "splits",
    "messages_field": "messages_field",
    "streaming": "streaming",
    "shuffle_buffer": "shuffle_buffer",
    "cache": "cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How sources are read.

    Attributes:
        formats: "text", "messages", or "auto" for whichever of the two fields a source has; one
            for every source or one for all.
        splits: of hub data sets, or words that name the files of folders; one for every source,
            one for all, or none.
        messages_field: field of a row that holds a conversation.
        streaming: read sources while training instead of before it; nothing is cached.
        shuffle_buffer: rows a streamed source is shuffled among.
        cache: keep tokens for the next run with the same data.
    """

    formats: tuple[str, ...] = (AUTO,)
    splits: tuple[str, ...] = ()
    messages_field: str = MESSAGES_FIELD
    streaming: bool = False
    shuffle_buffer: int = 10_000
    cache: bool = True

    def __post_init__(self) -> None:
        for name in self.formats:
            among("--data-format", name, FORMATS)
        whole("shuffle_buffer", self.shuffle_buffer, 1)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Reading:
        """Return what options with the names of `READING_OPTIONS` ask for.

        Raises:
            OptionError: a value is wrong.
        """
        given = {READING_OPTIONS[name]: value for name, value in options.items()}
        for name in ("formats", "splits"):
            given[name] = several(given.get(name, ()))
        return cls(**{**given, "formats": given["formats"] or (AUTO,)})

    def format_of(self, index: int, sources: int) -> str:
        """Return the format asked for of a source.

        Raises:
            OptionError: there are neither as many formats as sources nor one.
        """
        return _each(self.formats, index, sources, "--data-format") or AUTO

    def split_of(self, index: int, sources: int) -> str | None:
        """Return the split asked for of a source.

        Raises:
            OptionError: there are neither as many splits as sources nor one.
        """
        return _each(self.splits, index, sources, "--data-split")

    def to_json(self) -> dict[str, Any]:
        """Return what decides the result."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        del found["cache"]
        if not self.streaming:
            del found["shuffle_buffer"]
        return {**found, "formats": list(self.formats), "splits": list(self.splits)}


def several(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return the values of an option that may be given more than once."""
    return (value,) if isinstance(value, str) else tuple(value)


def _each(given: tuple[str, ...], index: int, sources: int, where: str) -> str | None:
    if len(given) not in (0, 1, sources):
        raise OptionError(
            "is given neither once nor once a source",
            where=where,
            expected=f"1 or {sources}",
            found=len(given),
        )
    if not given:
        return None
    return given[0 if len(given) == 1 else index]


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """One document or conversation as it is stored.

    Attributes:
        name: file and place in it.
        value: a text or messages; None when there is nothing in it to learn.
    """

    name: str
    value: str | list[Message] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A source whose format is known.

    Attributes:
        where: as `data.rows.iter_rows` takes it.
        label: the name outputs may carry.
        format: "text" or "messages".
        field: that holds it.
        split: as `data.rows.iter_rows` takes it.
        streaming: rows are read when they are needed.
        commit: of a hub data set, None when the hub cannot say or the source is no such.
        pinned: the source is no hub data set, or was given with a revision.
    """

    where: str
    label: str
    format: str
    field: str
    split: str | None
    streaming: bool = False
    commit: str | None = None
    pinned: bool = True

    def rows(self) -> Iterator[Raw]:
        """Yield every row in stored order.

        Raises:
            DataError: it is damaged, or a row does not hold what the format asks for.
            ResourceError: it may not be read, or the hub cannot be reached.
        """
        for row in iter_rows(self.where, (self.field,), split=self.split, streaming=self.streaming):
            if self.format == TEXT:
                text = text_of(row, self.field)
                yield Raw(name=row.name, value=text if text.strip() else None)
            else:
                messages = messages_of(row, self.field)
                yield Raw(name=row.name, value=messages if answers(messages) else None)


def open_source(
    where: str,
    label: str,
    *,
    fields: tuple[str, str] = (TEXT_FIELD, MESSAGES_FIELD),
    format_: str = AUTO,
    split: str | None = None,
    streaming: bool = False,
) -> Opened:
    """Return a source with the format its columns say it has, or the one asked for.

    Args:
        where: as `data.rows.iter_rows` takes it; a hub data set is read at its present commit.
        label: the name outputs may carry.
        fields: those that hold text, and conversations.
        format_: "text", "messages" or "auto".
        split: as `data.rows.iter_rows` takes it.
        streaming: rows are read when they are needed.

    Raises:
        DataError: it is missing or damaged, or has both or none of the two fields.
        ResourceError: it may not be read, or the hub cannot be reached.
    """
    commit, pinned = None, True
    if existing(where) is None:
        from adaconvert.data import hub

        pinned = hub.is_pinned(where)
        commit = hub.commit_of(where)
        where = where if commit is None else hub.at_commit(where, commit)
    if format_ == AUTO:
        names = columns_of(where, fields, split=split, streaming=streaming)
        format_ = _format_of(names, fields, label)
    return Opened(
        where=where,
        label=label,
        format=format_,
        field=fields[format_ != TEXT],
        split=split,
        streaming=streaming,
        commit=commit,
        pinned=pinned,
    )


def _format_of(names: tuple[str, ...], fields: tuple[str, str], label: str) -> str:
    has = [name in names for name in fields]
    # an empty source is found out when it is read
    if has == [True, False] or not names:
        return TEXT
    if has == [False, True]:
        return MESSAGES
    shown = listing([f"'{escape(name, 60)}'" for name in names], 12)
    found = f"fields {shown}"
    if all(has):
        raise DataError(
            "holds both text and conversations",
            where=escape(label),
            found=found,
            hint="Say which to train on: --data-format text or --data-format messages.",
        )
    text, messages = (escape(name, 60) for name in fields)
    raise DataError(
        f"there is no field '{text}' and no field '{messages}'",
        where=escape(label),
        found=found,
        hint="Name the field that holds the text (--field) or conversations (--messages-field).",
    )
