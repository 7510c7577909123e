"""The options a stage may have: the fields of the config classes the API itself checks.

Nothing is listed twice: a field added to a config class is an option of recipes at once.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Final

from adaconvert.recipe.values import COUNT, OPTIONAL_TEXT, TEXTS, Kind, kind_of

#: what the value of an option names, where it is more than a value.
VALUE: Final = "value"
TEXT_SOURCE: Final = "text source"
TEXT_SOURCES: Final = "text sources"
CHECKPOINT: Final = "checkpoint"
FILE: Final = "file"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a verb.

    Attributes:
        kind: what values it takes.
        default: what the API takes when it is not given, None where that is required or open.
        role: what its value names.
    """

    kind: Kind
    default: object = None
    role: str = VALUE

    def default_text(self) -> str:
        """Return the default as a recipe would say it, '' for none."""
        if self.default is None or self.default == ():
            return ""
        if isinstance(self.default, bool):
            return str(self.default).lower()
        if isinstance(self.default, tuple):
            return ", ".join(map(str, self.default))
        return str(self.default)


#: keyword arguments of `api.convert` that a recipe may set; where it writes is the run's own.
CONVERT: Final[dict[str, Option]] = {
    "verify": Option(kind=kind_of(bool), default=True),
    "max_shard_size": Option(kind=kind_of(str | int), default="5GB"),
    "memory": Option(kind=kind_of(str | int | None)),
    "probe": Option(kind=OPTIONAL_TEXT, role=FILE),
    "allow_nonfinite": Option(kind=kind_of(bool), default=False),
    "keep_config": Option(kind=TEXTS, default=()),
    "ignore_unindexed": Option(kind=kind_of(bool), default=False),
}
FINETUNE: Final[dict[str, Option]] = {
    "base": Option(kind=OPTIONAL_TEXT, role=CHECKPOINT),
    "device": Option(kind=kind_of(str), default="auto"),
    "max_shard_size": Option(kind=kind_of(str | int), default="5GB"),
    "memory": Option(kind=kind_of(str | int | None)),
}
EVALUATE: Final[dict[str, Option]] = {"base": Option(kind=OPTIONAL_TEXT, role=CHECKPOINT)}
PUSH: Final[dict[str, Option]] = {"repo": Option(kind=OPTIONAL_TEXT)}


def options_of(
    config: type[Any],
    *,
    without: Collection[str] = (),
    roles: Mapping[str, str] | None = None,
    counts: Collection[str] = (),
    more: Mapping[str, Option] | None = None,
) -> dict[str, Option]:
    """Return the options that are fields of a config class, those of classes it holds included.

    Args:
        config: the class.
        without: fields that are the run's own.
        roles: of fields that name a text, a checkpoint or a file.
        counts: fields that take text with a unit beside a number.
        more: options that are no fields.
    """
    hints = typing.get_type_hints(config)
    found: dict[str, Option] = {}
    for item in fields(config):
        hint = hints[item.name]
        if item.name in without:
            continue
        if is_dataclass(hint):
            found |= _nested(hint, roles or {})  # type: ignore[arg-type]
            continue
        role = (roles or {}).get(item.name, VALUE)
        found[item.name] = Option(kind=_kind(hint, item.name in counts, role), role=role)
        if item.default is not MISSING:
            found[item.name] = Option(kind=found[item.name].kind, default=item.default, role=role)
    return {**found, **(more or {})}


def _kind(hint: Any, is_count: bool, role: str) -> Kind:
    if is_count:
        return COUNT
    if role == TEXT_SOURCES:
        return TEXTS
    found = kind_of(hint)
    # a selection may be a mapping to the API; in a recipe it is written as on the command line
    return found if found.scalars else OPTIONAL_TEXT


def _nested(config: type[Any], roles: Mapping[str, str]) -> dict[str, Option]:
    """Return the options of a config class that another one holds, under their own names.

    Args:
        config: the class.
        roles: of options.
    """
    names = names_of(config)
    own = {field: roles[name] for name, field in names.items() if name in roles}
    inner = options_of(config, roles=own)
    return {name: inner[field] for name, field in names.items()}


def names_of(config: type[Any]) -> dict[str, str]:
    """Return option -> field of a config class that another one holds.

    The map stands beside the class: the dictionary of its module whose values are its fields.
    """
    own = {item.name for item in fields(config)}
    for name, value in vars(sys.modules[config.__module__]).items():
        is_map = name.endswith("OPTIONS") and isinstance(value, dict)
        if is_map and value and set(value.values()) <= own:
            return dict(value)
    return {name: name for name in own}
