"""Loss against compute as a small drawing that says in words what it shows.

Units: FLOPs as a fraction of the reference's, loss in nats per token. Coordinates are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

from adaconvert.export.card_calibration import Calibration, Row
from adaconvert.export.card_svg import BOTTOM, HEIGHT, TOP, WIDTH, Frame, head, ticks, turned, xml

_TITLE: Final = "Loss against compute"
#: blue and vermilion are told apart by the colour-blind; the default is a ring as well.
_LINE: Final = "#0072b2"
_MARK: Final = "#d55e00"


def plot(found: Calibration) -> bytes | None:
    """Return an SVG of the table, None when there are not two points to compare."""
    if len(found.rows) < 2:
        return None
    return ("\n".join(_lines(found)) + "\n").encode("ascii", "xmlcharrefreplace")


def _lines(found: Calibration) -> Iterator[str]:
    rows = sorted(found.rows, key=lambda row: (row.compute, row.loss))
    across, up = ticks([row.compute for row in rows]), ticks([row.loss for row in rows])
    frame = Frame(across=across, up=up)
    yield from head(_TITLE, _description(found, rows))
    yield from _axes(frame)
    best = [(frame.x(row.compute), frame.y(row.loss)) for row in _frontier(rows)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in best)
    yield f'<polyline points="{path}" fill="none" stroke="{_LINE}" stroke-width="2"/>'
    for row in rows:
        yield _dot(row, frame.x(row.compute), frame.y(row.loss))
    if found.chosen is not None:
        row = found.rows[found.chosen]
        yield from _ring(row, frame.x(row.compute), frame.y(row.loss))
    yield "</svg>"


def _axes(frame: Frame) -> Iterator[str]:
    for value in frame.across:
        yield from frame.vertical(value, f"{value:g}")
    for value in frame.up:
        yield from frame.horizontal(value, f"{value:g}")
    yield frame.below("compute (routed FLOPs per token over the reference's)")
    yield turned(20, (TOP + HEIGHT - BOTTOM) / 2, "loss (nats per token)")


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


def _dot(row: Row, x: float, y: float) -> str:
    said = f"compute {row.compute:.4f}, loss {row.loss:.4f}: {row.name}"[:200]
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_LINE}">'
        f"<title>{xml(said)}</title></circle>"
    )


def _ring(row: Row, x: float, y: float) -> Iterator[str]:
    yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="{_MARK}" stroke-width="3"/>'
    # on the side where there is room
    left = x > WIDTH / 2
    anchor, away = ("end", -14) if left else ("start", 14)
    yield (
        f'<text x="{x + away:.1f}" y="{y - 10:.1f}" text-anchor="{anchor}" fill="{_MARK}">'
        f"default: {row.compute:.3f}, {row.loss:.3f}</text>"
    )
