"""What `adaconvert recipes` says: lists, checks and the schema, as JSON and as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaconvert.errors import OutputConflictError
from adaconvert.io.fs import FileSystem, reporting
from adaconvert.io.names import escape
from adaconvert.io.regular import read_text
from adaconvert.recipe import shipped, text
from adaconvert.recipe.load import load, locate
from adaconvert.recipe.model import BASES, COST_KEYS, EXACTNESS, SCHEMA, Recipe
from adaconvert.recipe.schema import NAME, REQUIRED, STAGE, TOP
from adaconvert.recipe.values import OPTIONAL_TEXT
from adaconvert.recipe.verbs import VERBS
from adaconvert.recipe.words import unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Recipes with what they are about."""

    recipes: tuple[Recipe, ...]

    def to_json(self) -> dict[str, object]:
        """Return the recipes by name."""
        return {"recipes": {recipe.name: recipe.to_json() for recipe in self.recipes}}

    def lines(self) -> list[str]:
        """Return one line a recipe."""
        width = max((len(recipe.name) for recipe in self.recipes), default=0)
        return [f"{recipe.name:<{width}}  {recipe.title}" for recipe in self.recipes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A recipe as its file has it."""

    name: str
    content: str

    def to_json(self) -> dict[str, object]:
        """Return name and text."""
        return {"name": self.name, "text": self.content}

    def lines(self) -> list[str]:
        """Return the text."""
        return self.content.splitlines()


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A recipe that was copied to where it can be edited."""

    name: str
    path: Path

    def to_json(self) -> dict[str, object]:
        """Return where it is."""
        return {"name": self.name, "file": self.path.name}

    def lines(self) -> list[str]:
        """Return where it is."""
        return [f"wrote {self.path}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """Recipes nothing is wrong with."""

    recipes: tuple[Recipe, ...]

    def to_json(self) -> dict[str, object]:
        """Return the recipes as they were resolved."""
        return {"valid": [recipe.to_json() for recipe in self.recipes]}

    def lines(self) -> list[str]:
        """Return one line a recipe."""
        return [
            f"{recipe.name}: valid, {' -> '.join(stage.name for stage in recipe.stages)}"
            for recipe in self.recipes
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The format of recipes, or of the options of one verb."""

    verb: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return the format as JSON Schema."""
        if self.verb is not None:
            return _verb_schema(self.verb)
        stage = {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": NAME, "description": STAGE["name"]},
                "from": {
                    "description": STAGE["from"],
                    "anyOf": [{"type": "string"}, {**_TEXTS, "minItems": 1}],
                },
                **{verb: _verb_schema(verb) for verb in VERBS},
            },
            "oneOf": [{"required": [verb]} for verb in VERBS],
            "additionalProperties": False,
        }
        kinds: dict[str, dict[str, object]] = {
            "schema": {"const": SCHEMA},
            "exactness": {"enum": list(EXACTNESS)},
            "source": OPTIONAL_TEXT.schema(),
            "revision": OPTIONAL_TEXT.schema(),
            "cost": {
                "type": "object",
                "properties": {
                    k: {"description": v, **({"enum": list(BASES)} if k == "basis" else _TEXT)}
                    for k, v in _COSTS
                },
                "required": list(COST_KEYS),
                "additionalProperties": False,
            },
            "data": {
                "type": "object",
                "propertyNames": {"pattern": NAME},
                "additionalProperties": {"anyOf": [_TEXT, _TEXTS]},
            },
            "stages": {"type": "array", "items": stage, "minItems": 1},
            "set": {"type": "object"},
        }
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "adaconvert recipe",
            "type": "object",
            "properties": {
                key: {"description": words, **kinds.get(key, _TEXT)} for key, words in TOP.items()
            },
            "required": ["schema"],
            "anyOf": [{"required": list(REQUIRED)}, {"required": ["extends"]}],
            "additionalProperties": False,
        }

    def lines(self) -> list[str]:
        """Return the format as text."""
        if self.verb is not None:
            return _verb_lines(self.verb)
        rows = ["keys of a recipe"]
        rows += [
            f"  {key:<10} {words}{' Required.' if key in ('schema', *REQUIRED) else ''}"
            for key, words in TOP.items()
        ]
        rows += ["keys of cost", *(f"  {key:<10} {words}" for key, words in _COSTS)]
        rows += ["keys of a stage", *(f"  {key:<10} {words}" for key, words in STAGE.items())]
        rows.append(
            "verbs of a stage, one each; `adaconvert recipes schema VERB` lists its options"
        )
        return rows + [f"  {name:<10} {verb.summary}" for name, verb in VERBS.items()]


_TEXT: dict[str, object] = {"type": "string"}
_TEXTS: dict[str, object] = {"type": "array", "items": _TEXT}
_COSTS = tuple(COST_KEYS.items())


def _verb_schema(name: str) -> dict[str, object]:
    table = VERBS[name].table()
    return {
        "description": VERBS[name].summary,
        "type": "object" if VERBS[name].needs else ["object", "null"],
        "properties": {
            key: option.kind.schema()
            | ({} if option.default in (None, ()) else {"default": option.default})
            for key, option in table.items()
        },
        "required": list(VERBS[name].needs),
        "additionalProperties": False,
    }


def _verb_lines(name: str) -> list[str]:
    rows = [f"{name}: {VERBS[name].summary}"]
    for key, option in VERBS[name].table().items():
        role = "" if option.role == "value" else f", {option.role}"
        default = f", default {option.default_text()}" if option.default_text() else ""
        rows.append(f"  {key:<18} {option.kind.describe()}{role}{default}")
    return rows


def listing() -> Listing:
    """Return the recipes that come with adaconvert."""
    return Listing(recipes=tuple(load(name) for name in shipped.names()))


def show(recipe: str) -> Text:
    """Return the text of a recipe.

    Raises:
        OptionError: there is none of this name, or it holds an access token.
    """
    path = locate(recipe)
    content = read_text(path, escape(path.name), text.MAX_BYTES)
    text.check_no_token(content, escape(path.name))
    return Text(name=shipped.name_of(path) or path.name, content=content)


def copy(recipe: str, destination: str | None) -> Copied:
    """Return once a copy of a recipe lies where it can be edited; no file is replaced.

    Args:
        recipe: name or file.
        destination: file or folder; the recipe's name in the current folder when None.

    Raises:
        OptionError: there is no such recipe.
        OutputConflictError: the file exists, or its folder does not.
        ResourceError: it cannot be written.
    """
    found = show(recipe)
    name = f"{found.name.removesuffix(shipped.SUFFIX).replace('/', '-')}{shipped.SUFFIX}"
    path = Path(destination or ".")
    path = path / name if path.is_dir() else path
    shown = escape(str(path))
    if os.path.lexists(path):
        raise OutputConflictError("exists", where=shown, hint="Name a new file.")
    if not path.parent.is_dir():
        raise OutputConflictError("lies in a folder that does not exist", where=shown)
    fs = FileSystem()
    with reporting(shown):
        descriptor = fs.create(path)
        try:
            fs.write_at(descriptor, found.content.encode(), 0)
        finally:
            fs.close(descriptor)
    return Copied(name=found.name, path=path)


def validate(recipes: Sequence[str], settings: Sequence[str] = ()) -> Checked:
    """Return the recipes once each is read and checked.

    Raises:
        OptionError: something in one is wrong.
    """
    return Checked(recipes=tuple(load(recipe, settings) for recipe in recipes))


def schema(verb: str | None) -> Schema:
    """Return the format of recipes, or of one verb's options.

    Raises:
        OptionError: there is no such verb.
    """
    if verb is not None and verb not in VERBS:
        raise unknown("verb", verb, VERBS, "VERB")
    return Schema(verb=verb)
