"""Real experts by class of token, over all layers and layer by layer, as one small drawing.

Coordinates are pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from adaconvert.export.card_classes import Classes
from adaconvert.export.card_svg import (
    BOTTOM,
    HEIGHT,
    INK,
    TOP,
    WIDTH,
    Frame,
    head,
    label,
    ticks,
    turned,
    xml,
)

_TITLE: Final = "Real experts per token"
#: after Okabe and Ito (2008), for the colour-blind; darker, so that white text can be read on them.
_COLOURS: Final = (
    *("#0072b2", "#d55e00", "#007a5a", "#b35c8e", "#946300", "#2b83b8"),
    *("#6e6e6e", "#000000"),
)
_BARS: Final = 330
_LINES: Final = 400
#: width of a bar that its number fits into.
_ROOM: Final = 44
#: numbers that fit below the lines.
_NUMBERS: Final = 8


def plot_classes(found: Classes) -> bytes:
    """Return an SVG: bars of the classes over all layers, and a line by layer for each."""
    return ("\n".join(_lines(found)) + "\n").encode("ascii", "xmlcharrefreplace")


def _lines(found: Classes) -> Iterator[str]:
    yield from head(_TITLE, _description(found))
    yield from _bars(found)
    yield from _by_layer(found)
    yield "</svg>"


def _description(found: Classes) -> str:
    said = "; ".join(f"{n} {real:.3f}" for n, real in zip(found.names, found.real, strict=True))
    return (
        f"Left: mean number of real experts a token of each class runs in a layer, of "
        f"{found.of:g}: {said}. Right: the same layer by layer, for {len(found.layers)} layers, a "
        "line for each class in the colour of its bar."
    )


def _bars(found: Classes) -> Iterator[str]:
    """Yield one bar for each class, with its name and number."""
    frame = Frame(across=ticks([0.0, *found.real]), up=(0, 1), left=120, right=_BARS)
    for value in frame.across:
        yield from frame.vertical(value, f"{value:g}")
    yield frame.below("all layers")
    room = (frame.bottom - frame.top) / len(found.names)
    for at, (name, real) in enumerate(zip(found.names, found.real, strict=True)):
        y = frame.top + at * room
        wide = frame.x(real) - frame.left
        yield (
            f'<rect x="{frame.left:g}" y="{y + 0.2 * room:.1f}" width="{wide:.1f}" '
            f'height="{0.6 * room:.1f}" fill="{_colour(at)}">'
            f"<title>{xml(f'{name}: {real:.4f}'[:200])}</title></rect>"
        )
        yield _beside(frame.left - 8, y + 0.5 * room + 4, xml(name[:20]), "end")
        inside = wide > _ROOM
        x, anchor = (frame.x(real) - 5, "end") if inside else (frame.x(real) + 5, "start")
        colour = "#ffffff" if inside else INK
        yield _beside(x, y + 0.5 * room + 4, f"{real:.2f}", anchor, colour)


def _beside(x: float, y: float, text: str, anchor: str, colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def _by_layer(found: Classes) -> Iterator[str]:
    """Yield a line for each class."""
    values = [real for layer in found.layers for real in layer.real]
    numbers = [layer.number for layer in found.layers]
    last = max(max(numbers), min(numbers) + 1)
    frame = Frame(across=(min(numbers), last), up=ticks(values), left=_LINES, right=WIDTH - 16)
    for value in frame.up:
        yield from frame.horizontal(value, f"{value:g}")
    for number in numbers[:: (len(numbers) - 1) // _NUMBERS + 1]:
        yield label(frame.x(number), HEIGHT - BOTTOM + 20, str(number))
    yield frame.below("layer")
    yield turned(_LINES - 44, (TOP + HEIGHT - BOTTOM) / 2, "real experts per token")
    for at, name in enumerate(found.names):
        yield from _line(
            frame, [(layer.number, layer.real[at]) for layer in found.layers], name, at
        )


def _line(frame: Frame, values: Sequence[tuple[int, float]], name: str, at: int) -> Iterator[str]:
    """Yield the line of one class: (layer, real experts)."""
    colour = _colour(at)
    points = [(frame.x(number), frame.y(value)) for number, value in values]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
    for (x, y), (layer, value) in zip(points, values, strict=True):
        yield (
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
            f"<title>{xml(f'{name}, layer {layer}: {value:.4f}'[:200])}</title></circle>"
        )


def _colour(at: int) -> str:
    return _COLOURS[at % len(_COLOURS)]
