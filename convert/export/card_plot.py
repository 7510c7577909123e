"""Loss against compute as a small drawing that says in words what it shows.

Units: FLOPs as a fraction of the reference's, loss in nats per token. Coordinates are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final

from adaconvert.export.card_calibration import Calibration, Row

_WIDTH: Final = 720
_HEIGHT: Final = 400
_LEFT: Final = 80
_RIGHT: Final = 24
_TOP: Final = 48
_BOTTOM: Final = 64
_TICKS: Final = 6
_TITLE: Final = "Loss against compute"
#: blue and vermilion are told apart by the colour-blind; the default is a ring as well.
_LINE: Final = "#0072b2"
_MARK: Final = "#d55e00"
_INK: Final = "#24292f"
_GRID: Final = "#d0d7de"


def plot(found: Calibration) -> bytes | None:
    """Return an SVG of the table, None when there are not two points to compare."""
    if len(found.rows) < 2:
        return None
    return ("\n".join(_lines(found)) + "\n").encode("ascii", "xmlcharrefreplace")


def _lines(found: Calibration) -> Iterator[str]:
    rows = sorted(found.rows, key=lambda row: (row.compute, row.loss))
    across = _ticks([row.compute for row in rows])
    up = _ticks([row.loss for row in rows])
    yield from _head(_description(found, rows))
    yield from _axes(across, up)
    best = [(_x(row.compute, across), _y(row.loss, up)) for row in _frontier(rows)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in best)
    yield f'<polyline points="{path}" fill="none" stroke="{_LINE}" stroke-width="2"/>'
    for row in rows:
        yield _dot(row, _x(row.compute, across), _y(row.loss, up))
    if found.chosen is not None:
        row = found.rows[found.chosen]
        yield from _ring(row, _x(row.compute, across), _y(row.loss, up))
    yield "</svg>"


def _head(description: str) -> Iterator[str]:
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="title description" '
        'font-family="sans-serif" font-size="13">'
    )
    yield f'<title id="title">{_TITLE}</title>'
    yield f'<desc id="description">{escape(description)}</desc>'
    yield f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>'
    yield f'<text x="{_LEFT}" y="28" font-size="16" fill="{_INK}">{_TITLE}</text>'


def _axes(across: Sequence[float], up: Sequence[float]) -> Iterator[str]:
    for value in across:
        yield from _vertical(_x(value, across), f"{value:g}")
    for value in up:
        yield from _horizontal(_y(value, up), f"{value:g}")
    middle, center = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    yield _label(middle, _HEIGHT - 16, "compute (routed FLOPs per token over the reference's)")
    turn = f' transform="rotate(-90 20 {center:g})"'
    yield _label(20, center, "loss (nats per token)", turn=turn)


def _frontier(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the settings that no other beats in both compute and loss, by rising compute."""
    least = math.inf
    for row in rows:
        if row.loss < least:
            least = row.loss
            yield row


def _description(found: Calibration, rows: Sequence[Row]) -> str:
    points = "; ".join(f"compute {row.compute:.3f}, loss {row.loss:.3f}" for row in rows)
    text = (
        f"{len(rows)} measured settings: {points}. The line joins those that no other beats in "
        "both compute and loss."
    )
    if found.chosen is not None:
        text += f" The default is at compute {found.rows[found.chosen].compute:.3f}."
    return text


def _ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers that enclose the values, evenly spaced."""
    low, high = min(values), max(values)
    wide = (high - low) or max(abs(high), 1.0) * 0.1
    power = 10.0 ** math.floor(math.log10(wide / _TICKS))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * _TICKS >= wide)
    first, last = math.floor(low / step), math.ceil(high / step)
    # a line of equal values still gets a scale
    last += first == last
    return [float(f"{number * step:.6g}") for number in range(first, last + 1)]


def _x(value: float, ticks: Sequence[float]) -> float:
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(value: float, ticks: Sequence[float]) -> float:
    share = (value - ticks[0]) / (ticks[-1] - ticks[0])
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _vertical(x: float, text: str) -> Iterator[str]:
    bottom = _HEIGHT - _BOTTOM
    yield f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="{_GRID}"/>'
    yield _label(x, bottom + 20, text)


def _horizontal(y: float, text: str) -> Iterator[str]:
    yield f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{_GRID}"/>'
    yield (
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{_INK}">'
        f"{escape(text)}</text>"
    )


def _label(x: float, y: float, text: str, *, turn: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{_INK}"{turn}>'
        f"{escape(text)}</text>"
    )


def _dot(row: Row, x: float, y: float) -> str:
    said = f"compute {row.compute:.4f}, loss {row.loss:.4f}: {row.name}"[:200]
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_LINE}">'
        f"<title>{_xml(said)}</title></circle>"
    )


def _ring(row: Row, x: float, y: float) -> Iterator[str]:
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="{_MARK}" stroke-width="3"/>'
    # on the side where there is room
    left = x > _WIDTH / 2
    anchor, away = ("end", -14) if left else ("start", 14)
    yield (
        f'<text x="{x + away:.1f}" y="{y - 10:.1f}" text-anchor="{anchor}" fill="{_MARK}">'
        f"default: {row.compute:.3f}, {row.loss:.3f}</text>"
    )


def _xml(text: str) -> str:
    """Return text without what XML cannot hold."""
    return escape("".join(character if character.isprintable() else "?" for character in text))
