"""Data sets of the hub, and those `datasets` wrote to disk; neither runs code of a repository."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.data.rows import Row, missing_field
from adaconvert.errors import AdaconvertError, DataError, ResourceError
from adaconvert.io.names import escape, listing

_HUB_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<config>[\w.-]+))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """A data set of the hub, as `org/name`, `org/name:config` or `org/name@revision:config`.

    Attributes:
        text: as given.
        name: the repository.
        config: of its configurations, None when there is one.
        revision: branch, tag or commit, None for the newest.
    """

    text: str
    name: str
    config: str | None
    revision: str | None

    @classmethod
    def parse(cls, where: str) -> HubId:
        """Return the data set `where` names.

        Raises:
            DataError: it has not the form of one.
        """
        match = _HUB_ID.fullmatch(where)
        if match is None:
            raise DataError(
                "no such file or folder",
                where=escape(where) or "''",
                hint="Give an existing file or folder, or a hub data set of the form org/name.",
            )
        return cls(text=where, **match.groupdict())

    @property
    def pinned(self) -> dict[str, str]:
        """Return what asks `datasets` for the revision."""
        return {} if self.revision is None else {"revision": self.revision}


def iter_rows(
    where: str, fields: Sequence[str], split: str | None, *, streaming: bool
) -> Iterator[Row]:
    """Yield the rows of a hub data set, read as they arrive or after it was downloaded whole.

    Raises:
        DataError: no such file, folder, data set, configuration, split or field.
        ResourceError: the hub cannot be reached.
    """
    table, label = _table(HubId.parse(where), split, streaming)
    yield from _table_rows(table, label, fields)


def columns(where: str, split: str | None, *, streaming: bool) -> list[str]:
    """Return the names of the columns of a hub data set.

    Raises:
        DataError, ResourceError: as for `iter_rows`.
    """
    table, _ = _table(HubId.parse(where), split, streaming)
    return list(table.column_names or next(iter(table), {}))


def commit_of(where: str) -> str | None:
    """Return the commit a hub data set is at, None when the hub cannot say."""
    from huggingface_hub import HfApi

    found = HubId.parse(where)
    try:
        info = HfApi().dataset_info(found.name, revision=found.revision, timeout=10)
    # offline, gated, gone: reading the data says which
    except Exception:
        return None
    return info.sha


def at_commit(where: str, commit: str) -> str:
    """Return the name of a hub data set with the commit it is to be read at."""
    found = HubId.parse(where)
    return f"{found.name}@{commit}" + (f":{found.config}" if found.config else "")


def is_pinned(where: str) -> bool:
    """Return whether the name of a hub data set has a revision."""
    return HubId.parse(where).revision is not None


def _table(hub: HubId, split: str | None, streaming: bool) -> tuple[Any, str]:
    """Return the rows of a split, and what to call it."""
    import datasets

    try:
        found = datasets.get_dataset_split_names(hub.name, hub.config, **hub.pinned)
        chosen = _choose(split, found, hub.text)
        table = datasets.load_dataset(
            hub.name, hub.config, split=chosen, streaming=streaming, **hub.pinned
        )
    except AdaconvertError:
        raise
    # what the client raises differs between its versions, and all of it is about this data set
    except Exception as error:
        raise _hub_error(error, hub.text) from error
    return table, f"{hub.text}[{chosen}]"


def saved_rows(folder: Path, fields: Sequence[str], split: str | None) -> Iterator[Row]:
    """Yield the rows of a folder written by `Dataset.save_to_disk`.

    Raises:
        DataError: it is damaged, or has no such split or field.
    """
    yield from _table_rows(_saved(folder, split), escape(folder.name), fields)


def saved_columns(folder: Path, split: str | None) -> list[str]:
    """Return the names of the columns of a folder written by `Dataset.save_to_disk`.

    Raises:
        DataError: it is damaged, or has no such split.
    """
    return list(_saved(folder, split).column_names)


def _saved(folder: Path, split: str | None) -> Any:
    import datasets

    label = escape(folder.name)
    try:
        table = datasets.load_from_disk(str(folder))
    # files of foreign origin go to several parsers, which raise what they like
    except Exception as error:
        raise DataError("is no readable data set", where=label) from error
    if isinstance(table, Mapping):
        return table[_choose(split, list(table), label)]
    if split is not None:
        raise DataError("has no splits", where=label, found=f"split '{escape(split)}'")
    return table


def _table_rows(table: Any, label: str, fields: Sequence[str]) -> Iterator[Row]:
    columns = table.column_names
    for number, row in enumerate(table, 1):
        for field in fields:
            if field not in row:
                raise missing_field(field, list(columns or row), label)
        yield Row(name=f"{label}:{number}", values=tuple(row[field] for field in fields))


def _choose(split: str | None, found: Sequence[str], where: str) -> str:
    """Return the split to read: the one asked for, or the only one."""
    if split is None and len(found) == 1:
        return found[0]
    if split in found:
        return str(split)
    raise DataError(
        "has several splits" if split is None else f"has no split '{escape(split)}'",
        where=escape(where),
        found=listing(list(found), 12),
        hint="Choose one with --split or --data-split.",
    )


def _hub_error(error: Exception, where: str) -> AdaconvertError:
    """Return one line for what `datasets` raised; its own text can hold URLs and headers."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    at = escape(where)
    if "GatedRepoError" in kinds:
        hint = "Accept its terms on the hub and log in with `hf auth login`."
        return DataError("the data set is gated", where=at, hint=hint)
    if isinstance(error, ConnectionError | TimeoutError) or "OfflineModeIsEnabled" in kinds:
        hint = "Check the network and HF_HUB_OFFLINE, or give a file or folder."
        return ResourceError(
            "no such file or folder, and the hub cannot be reached", where=at, hint=hint
        )
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "HFValidationError"}:
        return DataError("no such file or folder, and no such hub data set", where=at)
    if isinstance(error, ValueError) and "onfig" in str(error):
        hint = "Name it after a colon, as in org/name:config."
        return DataError("the data set needs the name of a configuration", where=at, hint=hint)
    return DataError(f"the data set cannot be loaded ({type(error).__name__})", where=at)
