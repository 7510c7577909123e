"""From a tree of YAML values to a checked `Recipe`; every error says line, path and remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from adaconvert import __version__
from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.recipe import values
from adaconvert.recipe.checks import check_options, check_pushed, check_recorded
from adaconvert.recipe.model import BASES, COST_KEYS, EXACTNESS, SCHEMA, SOURCE, Recipe, Stage
from adaconvert.recipe.options import TEXT_SOURCES, VALUE, Option
from adaconvert.recipe.text import Fields, Items, Node, Scalar
from adaconvert.recipe.verbs import MAKES_CHECKPOINT, VERBS
from adaconvert.recipe.words import unknown

#: key of a recipe -> what it says.
TOP: Final = {
    "schema": f"Version of this format: {SCHEMA}.",
    "extends": "Recipe to start from: a shipped one by name, or a file beside this one.",
    "title": "What it makes, in a line.",
    "method": "Name of the method.",
    "paper": "Where the method is described.",
    "exactness": f"Of the result, compared with the source: {', '.join(EXACTNESS)}.",
    "cost": "What it takes.",
    "source": "Checkpoint to start from: hub id or folder.",
    "revision": "Branch, tag or commit of a hub id.",
    "data": "Texts by name; stages refer to them as $name.",
    "stages": "What is done, in order.",
    "set": "Values to change of the recipe this one extends, as for --set.",
}
REQUIRED: Final = ("title", "method", "paper", "exactness", "cost", "stages")
STAGE: Final = {
    "name": "What other stages call it; its verb when it is not given.",
    "from": "What it goes on from: names of earlier stages or 'source'; the stage before by "
    "default.",
}
#: what stages and texts may be called, as a regular expression of Python and of JSON Schema.
NAME: Final = "^[A-Za-z][A-Za-z0-9_-]{0,39}$"
#: names of stages that would meet another file of the work folder.
_TAKEN: Final = {"run": "is what the record of a run is called"}


def check_version(root: Fields, label: str) -> None:
    """Return only for a recipe this adaconvert can read.

    Raises:
        OptionError: it states no version, or a newer one.
    """
    if "schema" not in root.fields:
        raise OptionError(
            "is missing", where=f"{label}: schema", hint=f"Write 'schema: {SCHEMA}' at the top."
        )
    whole = values.Kind(scalars=frozenset({"a whole number"}))
    found = values.read(root.fields["schema"], whole, "schema")
    where = f"{root.places['schema']}: schema"
    if found > SCHEMA:
        raise OptionError(
            f"needs adaconvert >= {_needed(found)}: the recipe is of a newer schema",
            where=where,
            expected=f"{SCHEMA} at most",
            found=f"{found}; this is adaconvert {__version__}",
            hint="Upgrade adaconvert.",
        )
    if found != SCHEMA:
        raise OptionError("is no version", where=where, expected=SCHEMA, found=found)


def _needed(schema: int) -> str:
    """Return the first version that may read a schema: each comes with a minor version."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    return f"{major}.{minor + schema - SCHEMA}"


def check_keys(root: Fields, label: str) -> None:
    """Return only when a recipe has no key that means nothing.

    Raises:
        OptionError: a key is unknown.
    """
    for key in root.fields:
        if key not in TOP:
            raise unknown("key", key, TOP, root.places[key] or label)


def build(root: Fields, name: str) -> Recipe:
    """Return the recipe a tree holds, checked.

    Args:
        root: with everything it extends and is overridden by.
        name: of the recipe.

    Raises:
        OptionError: a key is missing or unknown, a value is wrong, or stages do not fit together.
    """
    for key in REQUIRED:
        if key not in root.fields:
            raise OptionError("is missing", where=f"{root.place}: {key}", expected=TOP[key])
    data = _data(root.fields.get("data"))
    texts = {key: _text(root, key) for key in ("title", "method", "paper", "exactness")}
    if texts["exactness"] not in EXACTNESS:
        raise unknown("class", texts["exactness"], EXACTNESS, f"{root.places['exactness']}")
    return Recipe(
        name=name,
        **texts,
        cost=_cost(root.fields["cost"]),
        source=_optional(root, "source"),
        revision=_optional(root, "revision"),
        data=data,
        stages=_stages(root.fields["stages"], data),
    )


def _text(root: Fields, key: str) -> str:
    return str(values.read(root.fields[key], values.TEXT, key))


def _optional(root: Fields, key: str) -> str | None:
    if key not in root.fields:
        return None
    node = root.fields[key]
    found = values.read(node, values.OPTIONAL_TEXT, key)
    return None if found is None else _beside(str(found), node)


def _mapping(node: Node, where: str) -> Fields:
    if isinstance(node, Fields):
        return node
    found = "a list" if isinstance(node, Items) else f"'{escape(node.text, 60)}'"
    raise OptionError(
        "has the wrong type", where=f"{node.place}: {where}", expected="a mapping", found=found
    )


def _cost(node: Node) -> dict[str, str]:
    given = _mapping(node, "cost")
    found = {}
    for key, value in given.fields.items():
        if key not in COST_KEYS:
            raise unknown("key", key, COST_KEYS, f"{given.places[key]}: cost")
        found[key] = str(values.read(value, values.TEXT, f"cost.{key}"))
    for key in COST_KEYS:
        if key not in found:
            raise OptionError(
                "is missing", where=f"{given.place}: cost.{key}", expected=COST_KEYS[key]
            )
    if found["basis"] not in BASES:
        raise OptionError(
            "is unknown",
            where=f"{given.places['basis']}: cost.basis",
            expected=" or ".join(BASES),
            found=f"'{escape(found['basis'], 60)}'",
        )
    return found


def _data(node: Node | None) -> dict[str, tuple[str, ...]]:
    if node is None:
        return {}
    given = _mapping(node, "data")
    found = {}
    for name, value in given.fields.items():
        _check_name(name, given.places[name], f"data.{name}")
        found[name] = _texts(value, f"data.{name}")
    return found


def _texts(node: Node, where: str) -> tuple[str, ...]:
    """Return names of texts; those beside the recipe are found from anywhere."""
    texts = values.read(node, values.TEXTS, where)
    nodes = node.items if isinstance(node, Items) else (node,)
    return tuple(_beside(text, item) for text, item in zip(texts, nodes, strict=True))


def _beside(text: str, node: Node) -> str:
    """Return a path that lies beside the recipe as one that holds from everywhere."""
    folder = node.folder if isinstance(node, Scalar) else None
    if folder is None or text.startswith("$") or Path(text).is_absolute():
        return text
    path, comma, weight = text.rpartition(",")
    for name, tail in ((text, ""), (path, comma + weight)):
        # a name that is too long for a file is none
        if name and os.path.exists(folder / name):
            return f"{(folder / name).resolve()}{tail}"
    return text


def _check_name(name: str, place: str, where: str) -> None:
    if not re.fullmatch(NAME, name):
        raise OptionError(
            "is no name",
            where=f"{place}: {where}",
            expected="a letter, then at most 39 letters, digits, - and _",
            found=f"'{escape(name, 60)}'",
        )


def _stages(node: Node, data: Mapping[str, tuple[str, ...]]) -> tuple[Stage, ...]:
    if not isinstance(node, Items) or not node.items:
        raise OptionError(
            "has the wrong type" if not isinstance(node, Items) else "is empty",
            where=f"{node.place}: stages",
            expected="a list of stages",
        )
    found: list[Stage] = []
    for item in node.items:
        found.append(_stage(_mapping(item, f"stages.{len(found)}"), found, data))
    check_recorded(found)
    check_pushed(found)
    return tuple(found)


def verb_of(given: Fields, where: str) -> str:
    """Return the one verb of a stage.

    Raises:
        OptionError: it has none, several, or a key that is no verb.
    """
    for key in given.fields:
        if key not in STAGE and key not in VERBS:
            raise unknown("verb or key", key, (*VERBS, *STAGE), f"{given.places[key]}: {where}")
    verbs = [key for key in given.fields if key in VERBS]
    if len(verbs) != 1:
        raise OptionError(
            "must have exactly one verb",
            where=f"{given.place}: {where}",
            expected=" or ".join(VERBS),
            found=" and ".join(verbs) or "none",
        )
    return verbs[0]


def _stage(given: Fields, before: list[Stage], data: Mapping[str, tuple[str, ...]]) -> Stage:
    where = f"stages.{len(before)}"
    verb = verb_of(given, where)
    name = verb
    if "name" in given.fields:
        name = str(values.read(given.fields["name"], values.TEXT, f"{where}.name"))
        _check_name(name, given.places["name"], f"{where}.name")
    place = given.places.get("name", given.places[verb])
    _check_new(name, before, place, where)
    options, places = _options(given, verb, f"stages.{name}.{verb}")
    made = Stage(
        name=name,
        verb=verb,
        inputs=_inputs(given, verb, before, f"stages.{name}.from"),
        options=options,
        places=places,
        place=given.places[verb],
    )
    check_options(made, data, before)
    return made


def _check_new(name: str, before: list[Stage], place: str, where: str) -> None:
    taken = "is a key of recipes" if name in TOP else _TAKEN.get(name)
    if taken is not None:
        raise OptionError(
            f"a stage cannot be called '{name}', which {taken}", where=f"{place}: {where}"
        )
    for stage in before:
        if stage.name == name:
            raise OptionError(
                f"two stages are called '{name}'",
                where=f"{place}: {where}",
                found=f"the first one at {stage.place}",
                hint="Give one of them a 'name'.",
            )


def _options(given: Fields, verb: str, where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a stage's options and where they stand; null ones are left out."""
    node = given.fields[verb]
    if isinstance(node, Scalar) and node.plain and node.tag == "null":
        return {}, {}
    table = VERBS[verb].table()
    written = _mapping(node, where)
    found: dict[str, Any] = {}
    for name, value in written.fields.items():
        if name not in table:
            raise unknown("option", name, table, f"{written.places[name]}: {where}")
        read = _value(value, table[name], f"{where}.{name}")
        if read is not None:
            found[name] = read
    return found, dict(written.places)


def _value(node: Node, option: Option, where: str) -> Any:
    if option.role == TEXT_SOURCES:
        return _texts(node, where)
    read = values.read(node, option.kind, where)
    if option.role == VALUE or not isinstance(read, str):
        return read
    return _beside(read, node)


def _inputs(given: Fields, verb: str, before: list[Stage], where: str) -> tuple[str, ...]:
    known = [SOURCE, *(stage.name for stage in before if stage.does.makes == MAKES_CHECKPOINT)]
    node = given.fields.get("from")
    if node is None:
        return (known[-1],)
    names: tuple[str, ...] = values.read(node, values.TEXTS, where)
    for name in names:
        if name not in known:
            raise unknown("earlier stage", name, known, f"{node.place}: {where}")
    several = VERBS[verb].several
    if not names or (len(names) > 1 and not several):
        raise OptionError(
            f"{verb} goes on from one checkpoint",
            where=f"{node.place}: {where}",
            found=f"{len(names)} of them",
        )
    return names
