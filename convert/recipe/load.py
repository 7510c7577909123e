"""Reading a recipe by file or name, with what it extends and what is set over it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from adaconvert.errors import OptionError, SourceError
from adaconvert.io.names import escape
from adaconvert.io.regular import read_whole
from adaconvert.recipe import overrides, schema, shipped, text, values
from adaconvert.recipe.model import Recipe
from adaconvert.recipe.text import Fields, Items, Node, Scalar
from adaconvert.recipe.words import unknown

MAX_EXTENDS: Final = 8
#: keys a recipe does not take over from the one it extends.
_OWN: Final = ("extends", "set")


def load(recipe: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Return a recipe, checked.

    Args:
        recipe: file, or name of a shipped recipe such as "upcycle/smollm2-135m".
        settings: `path=value` each, see `overrides`.

    Raises:
        OptionError: there is none, or something in it is wrong; says line, path and remedy.
        ResourceError: a file may not be read.
    """
    path = locate(str(recipe))
    root = tree(path)
    for setting in settings:
        root = overrides.apply(root, setting)
    return schema.build(root, shipped.name_of(path) or path.stem)


def locate(recipe: str) -> Path:
    """Return the file of a recipe.

    Raises:
        OptionError: no file and no shipped recipe has this name.
    """
    if "\0" not in recipe and os.path.lexists(recipe):
        return Path(recipe)
    found = shipped.find(recipe)
    if found is None:
        if recipe.endswith((".yaml", ".yml")):
            raise OptionError("no such file", where=escape(recipe))
        raise unknown("recipe", recipe, shipped.names(), "RECIPE")
    return found


def tree(path: Path, chain: tuple[Path, ...] = ()) -> Fields:
    """Return the values of a recipe file over those of what it extends.

    Raises:
        OptionError: as for `load`.
    """
    label = escape(path.name, 80)
    real = Path(os.path.realpath(path))
    if real in chain:
        names = " -> ".join(escape(item.name, 80) for item in (*chain, real))
        raise OptionError("recipes extend each other in a circle", where=label, found=names)
    if len(chain) >= MAX_EXTENDS:
        raise OptionError(f"extends more than {MAX_EXTENDS} recipes", where=label)
    own = _read(path, label)
    schema.check_keys(own, label)
    schema.check_version(own, label)
    if "extends" not in own.fields:
        if "set" in own.fields:
            raise OptionError(
                "only means something with 'extends'", where=f"{own.places['set']}: set"
            )
        return own
    base = tree(_extended(own, path), (*chain, real))
    return _merged(base, own)


def _read(path: Path, label: str) -> Fields:
    try:
        raw = read_whole(path, label, text.MAX_BYTES)
    except SourceError as error:
        raise OptionError(
            error.message, where=label, expected=error.expected, found=error.found, hint=error.hint
        ) from error
    # a recipe keeps the place it was given under, so that files beside a link are found there
    content = text.decode(raw, label)
    text.check_no_token(content, label)
    node = text.parse(content, label, folder=path.parent)
    if node is None or (isinstance(node, Scalar) and node.tag == "null" and node.plain):
        raise OptionError("is empty", where=label, expected="a recipe")
    if not isinstance(node, Fields):
        kind = "a list" if isinstance(node, Items) else "one value"
        raise OptionError("is no recipe", where=label, expected="a mapping", found=kind)
    return node


def _extended(own: Fields, path: Path) -> Path:
    """Return the file a recipe extends: a shipped one, or one beside or below it.

    Raises:
        OptionError: it is missing, a URL, an absolute path, or leads out of the recipe's folder.
    """
    where = f"{own.places['extends']}: extends"
    given = str(values.read(own.fields["extends"], values.TEXT, "extends"))
    shown = escape(given, 120)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", given):
        raise OptionError(
            "is a URL: recipes are not downloaded",
            where=where,
            found=shown,
            hint="Save it beside this one.",
        )
    if not given.endswith((".yaml", ".yml")):
        return _named(given, where)
    parts = Path(given).parts
    found = path.parent / given
    inside = Path(os.path.realpath(found)).is_relative_to(os.path.realpath(path.parent))
    if Path(given).is_absolute() or ".." in parts or given.startswith("~") or not inside:
        raise OptionError(
            "leads out of the recipe's folder",
            where=where,
            found=shown,
            hint="Extend a shipped recipe by name, or a file beside or below this one.",
        )
    if not os.path.isfile(found):
        raise OptionError("no such file", where=where, found=shown)
    return found


def _named(given: str, where: str) -> Path:
    if given.startswith(("/", "~", ".")) or ".." in Path(given).parts:
        raise OptionError(
            "leads out of the recipe's folder",
            where=where,
            found=escape(given, 120),
            hint="Extend a shipped recipe by name, or a .yaml file beside or below this one.",
        )
    found = shipped.find(given)
    if found is None:
        raise unknown("recipe", given, shipped.names(), where)
    return found


def _merged(base: Fields, own: Fields) -> Fields:
    """Return a recipe over the one it extends: data by name, everything else as a whole."""
    keys = [key for key in own.fields if key not in _OWN]
    merged = replace(
        base,
        fields={**base.fields, **{key: own.fields[key] for key in keys}},
        places={**base.places, **{key: own.places[key] for key in keys}},
        place=own.place,
    )
    before, after = base.fields.get("data"), own.fields.get("data")
    if isinstance(before, Fields) and isinstance(after, Fields):
        both = replace(
            after,
            fields={**before.fields, **after.fields},
            places={**before.places, **after.places},
        )
        merged.fields["data"] = both
    return _with_set(merged, own)


def _with_set(root: Fields, own: Fields) -> Fields:
    given: Node | None = own.fields.get("set")
    if given is None:
        return root
    if not isinstance(given, Fields):
        raise OptionError(
            "has the wrong type", where=f"{given.place}: set", expected="a mapping of path: value"
        )
    for path, value in given.fields.items():
        root = overrides.put(root, path, value, f"{given.places[path]}: set {escape(path, 120)}")
    return root
