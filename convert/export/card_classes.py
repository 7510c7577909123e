"""Real experts by class of token and by layer, as `evaluate --record` left them in a manifest."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from adaconvert.export.card_facts import entries_of
from adaconvert.export.card_text import code, is_number, percent, plain, table
from adaconvert.io.card_file import CLASSES_PLOT

#: more than these are not drawn.
_MOST_CLASSES: Final = 12
_MOST_LAYERS: Final = 500
_LAYER: Final = re.compile(r"\.(\d{1,4})\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One block with null experts.

    Attributes:
        number: of the layer, by its path.
        of: experts a token of the source runs there.
        real: mean number of real experts of each class's tokens.
    """

    number: int
    of: float
    real: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Classes:
    """Real experts by class of token, at one setting on one text.

    Attributes:
        names: of the classes, as many as there are entries in what follows.
        tokens: of each class.
        real, none: over all layers: mean number of real experts, share of tokens without one.
        layers: by their numbers.
        rare: how often a rare word occurs at most.
        setting: what it was measured at.
        data: name of the text.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    real: tuple[float, ...]
    none: tuple[float, ...]
    layers: tuple[Layer, ...]
    rare: int
    setting: str
    data: str

    @property
    def mean(self) -> float:
        """Return the mean number of real experts over all tokens and layers."""
        weighted = zip(self.real, self.tokens, strict=True)
        return sum(real * count for real, count in weighted) / sum(self.tokens)

    @property
    def of(self) -> float:
        """Return the mean number of experts a token of the source runs in a layer."""
        return sum(layer.of for layer in self.layers) / len(self.layers)


def classes_of(record: Mapping[str, Any]) -> Classes | None:
    """Return what the newest evaluation that tells of classes says, None when none does.

    Of several settings it is the first at which classes differ.
    """
    for entry in reversed(entries_of(record)):
        settings = entry.get("settings")
        rows = settings if isinstance(settings, list) else []
        known = [
            row
            for row in rows
            if isinstance(row, dict) and isinstance(row.get("token_classes"), dict)
        ]
        if known:
            try:
                found = [_parsed(row, str(entry.get("data"))) for row in known]
            except (KeyError, TypeError, ValueError):
                return None
            return next((one for one in found if len(set(one.real)) > 1), found[0])
    return None


def _parsed(row: Mapping[str, Any], data: str) -> Classes:
    found = row["token_classes"]
    names = tuple(str(name) for name in _listed(found["classes"]))
    layers = tuple(
        Layer(
            number=_layer(layer["site"], at),
            of=_number(layer["of"]),
            real=_numbers(layer["real"], len(names)),
        )
        for at, layer in enumerate(_listed(found["layers"]))
    )
    tokens = tuple(int(count) for count in _numbers(found["tokens"], len(names)))
    if not 0 < len(names) <= _MOST_CLASSES or not 0 < len(layers) <= _MOST_LAYERS:
        raise ValueError(len(names), len(layers))
    if min(tokens) < 1 or min(layer.of for layer in layers) < 1:
        raise ValueError(tokens)
    return Classes(
        names=names,
        tokens=tokens,
        real=_numbers(found["real"], len(names)),
        none=_numbers(found["none"], len(names)),
        layers=tuple(sorted(layers, key=lambda layer: layer.number)),
        rare=int(_number(found["rare_at_most"])),
        setting=str(row.get("label")),
        data=data,
    )


def _layer(site: object, at: int) -> int:
    """Return the number of a layer by the path of its block, such as "model.layers.3.mlp"."""
    known = _LAYER.search(str(site))
    return at if known is None else int(known[1])


def _number(value: object) -> float:
    if not is_number(value) or not math.isfinite(value) or value < 0:
        raise ValueError(value)
    return float(value)


def _listed(values: object) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError(values)
    return values


def _numbers(values: object, count: int) -> tuple[float, ...]:
    found = tuple(_number(value) for value in _listed(values))
    if len(found) != count:
        raise ValueError(values)
    return found


def section(found: Classes | None) -> Iterator[str]:
    """Yield the section of the card; nothing where nothing was measured."""
    if found is None:
        return
    yield from ("## Real experts by class of token", "")
    yield (
        f"Null experts take slots of the router, and a token runs the real experts it has left: "
        f"{found.mean:.3f} of {found.of:g} per layer on average, {percent(found.mean / found.of)}. "
        f"Counted by `adaconvert evaluate` on {code(found.data)}, {plain(found.setting)}."
    )
    yield ""
    yield f"![Real experts per token by class of token, and by layer]({CLASSES_PLOT})"
    yield ""
    total = sum(found.tokens)
    columns = ("class", "share of tokens", "real experts per token", "of the source's", "none for")
    rows = [
        (
            plain(name),
            percent(found.tokens[at] / total),
            f"{found.real[at]:.3f}",
            percent(found.real[at] / found.of),
            percent(found.none[at]),
        )
        for at, name in enumerate(found.names)
    ]
    yield from table(columns, rows)
    yield ""
    yield (
        "Classes follow from the text alone: all pieces of a word go with it; function words are "
        "those of a short English list that adaconvert ships; a rare word is any other word that "
        f"occurs at most {found.rare} time{'' if found.rare == 1 else 's'} in this text, a number "
        "chosen so that rare words are no more than a quarter of the words that are no function "
        "words (1 at least)."
    )
    yield ""
