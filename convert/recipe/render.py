"""A recipe as it was resolved, in the form that is kept with a result: no path of this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from adaconvert import __version__
from adaconvert.recipe.model import Recipe, Stage
from adaconvert.recipe.options import CHECKPOINT, FILE, TEXT_SOURCE, TEXT_SOURCES


def resolved(recipe: Recipe, source: str, revision: str | None) -> str:
    """Return the YAML of a recipe with everything extended and set, for the same run elsewhere.

    Args:
        recipe: the recipe.
        source: hub id or folder name of the checkpoint it started from.
        revision: of a hub id.
    """
    bare = replace(
        recipe,
        source=source,
        revision=revision,
        data={name: tuple(map(label, texts)) for name, texts in recipe.data.items()},
        stages=tuple(_bare(stage) for stage in recipe.stages),
    )
    head = f"# {recipe.name}, as adaconvert {__version__} resolved it; local files by name only.\n"
    body: str = yaml.safe_dump(
        bare.to_json(), sort_keys=False, default_flow_style=None, width=100, allow_unicode=False
    )
    return head + body


def _bare(stage: Stage) -> Stage:
    table = stage.does.table()
    options = {name: _plain(table[name].role, value) for name, value in stage.options.items()}
    return replace(stage, options=options)


def _plain(role: str, value: Any) -> Any:
    if role == TEXT_SOURCES:
        return tuple(label(text) for text in value)
    if role in (TEXT_SOURCE, CHECKPOINT, FILE) and isinstance(value, str):
        return label(value)
    return value


def label(where: str) -> str:
    """Return the name of a text or checkpoint that outputs may carry: paths lose their folders."""
    if where.startswith("$"):
        return where
    path, comma, weight = where.rpartition(",")
    name, tail = (path, comma + weight) if path and _is_number(weight) else (where, "")
    local = os.path.lexists(name) or name.startswith(("/", "~", "."))
    return f"{Path(name).resolve().name if local else name}{tail}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def options_line(options: Mapping[str, Any]) -> str:
    """Return options as a person would write them on one line, local files by name."""
    shown = []
    for name, value in options.items():
        words = [label(str(v)) for v in value] if isinstance(value, tuple) else [label(str(value))]
        shown.append(f"{name} {','.join(words)}")
    return ", ".join(shown)
