"""Parts of a small drawing that says in words what it shows. Coordinates are pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH: Final = 720
HEIGHT: Final = 400
LEFT: Final = 80
RIGHT: Final = 24
TOP: Final = 48
BOTTOM: Final = 64
INK: Final = "#24292f"
_TICKS: Final = 6
_GRID: Final = "#d0d7de"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The rectangle that values are drawn in, and the round numbers along its sides.

    Attributes:
        across, up: rising, at least two of each.
        left, right, top, bottom: sides.
    """

    across: Sequence[float]
    up: Sequence[float]
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM

    def x(self, value: float) -> float:
        """Return where a value lies across."""
        share = (value - self.across[0]) / (self.across[-1] - self.across[0])
        return self.left + share * (self.right - self.left)

    def y(self, value: float) -> float:
        """Return where a value lies upwards."""
        share = (value - self.up[0]) / (self.up[-1] - self.up[0])
        return self.bottom - share * (self.bottom - self.top)

    def vertical(self, value: float, text: str) -> Iterator[str]:
        """Yield a line up from a value on the lower side, with its text."""
        x = self.x(value)
        yield f'<path d="M{x:.1f} {self.top:g}V{self.bottom:g}" stroke="{_GRID}"/>'
        yield label(x, self.bottom + 20, text)

    def horizontal(self, value: float, text: str) -> Iterator[str]:
        """Yield a line across from a value on the left side, with its text."""
        y = self.y(value)
        yield f'<path d="M{self.left:g} {y:.1f}H{self.right:g}" stroke="{_GRID}"/>'
        yield (
            f'<text x="{self.left - 8:g}" y="{y + 4:.1f}" text-anchor="end" fill="{INK}">'
            f"{escape(text)}</text>"
        )

    def below(self, text: str) -> str:
        """Return what the values across are."""
        return label((self.left + self.right) / 2, HEIGHT - 16, text)


def head(title: str, description: str) -> Iterator[str]:
    """Yield the beginning: size, title, what is to be seen, in words."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title description" '
        'font-family="sans-serif" font-size="13">'
    )
    yield f'<title id="title">{title}</title>'
    yield f'<desc id="description">{xml(description)}</desc>'
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    yield f'<text x="{LEFT}" y="28" font-size="16" fill="{INK}">{title}</text>'


def ticks(values: Sequence[float]) -> list[float]:
    """Return round numbers that enclose the values, evenly spaced."""
    low, high = min(values), max(values)
    wide = (high - low) or max(abs(high), 1.0) * 0.1
    power = 10.0 ** math.floor(math.log10(wide / _TICKS))
    step = next(power * m for m in (1, 2, 5, 10) if power * m * _TICKS >= wide)
    first, last = math.floor(low / step), math.ceil(high / step)
    # a line of equal values still gets a scale
    last += first == last
    return [float(f"{number * step:.6g}") for number in range(first, last + 1)]


def label(x: float, y: float, text: str, *, turn: str = "") -> str:
    """Return text around a point."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{INK}"{turn}>'
        f"{escape(text)}</text>"
    )


def turned(x: float, y: float, text: str) -> str:
    """Return text around a point, read upwards."""
    return label(x, y, text, turn=f' transform="rotate(-90 {x:g} {y:g})"')


def xml(text: str) -> str:
    """Return text without what XML cannot hold."""
    return escape("".join(character if character.isprintable() else "?" for character in text))
