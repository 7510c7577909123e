"""Which combinations of split, expert width, router and rule are measured, and what each costs.

FLOPs are multiplications by weights per token of one FFN, in units of all its matrices: 1 is the
dense network. Shapes: f neurons, d hidden size, E experts of m neurons, w router width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

LEVELS = (0.7, 0.5, 0.3)
#: routers that run the matrix before the activation in full.
GATES = ("gate", "gate-scaled")
#: width of the contribution routers.
ROUTER_WIDTH = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One setting of the table.

    Attributes:
        split: "none" for single neurons, which need none; "static" is the baseline without experts.
        width: neurons of an expert.
        router, rule: as in config.json; the thresholds of a rule are found on training text.
            "gate-scaled" multiplies the activated gate of each neuron by its mean |up x| ||down||.
        level: FFN FLOPs per token, router included; an oracle's own cost is not counted.
    """

    split: str
    width: int
    router: str
    rule: str
    level: float

    @property
    def name(self) -> str:
        """Return what tells the cell from all others."""
        return f"{self.split}/{self.width}/{self.router}/{self.rule}/{self.level:g}"

    @property
    def partition(self) -> tuple[str, int]:
        """Return what the experts of the cell are."""
        return self.split, self.width


DENSE = Cell(split="dense", width=0, router="none", rule="all", level=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of an FFN that costs depend on."""

    hidden: int
    neurons: int
    gated: bool

    @property
    def matrices(self) -> int:
        """Return how many matrices it has."""
        return 3 if self.gated else 2

    def router_cost(self, cell: Cell) -> float:
        """Return the FLOPs of scoring, paid whatever is chosen."""
        experts = self.neurons / max(cell.width, 1)
        whole = self.matrices * self.hidden * self.neurons
        if cell.router == "contribution":
            return ROUTER_WIDTH * (self.hidden + experts) / whole
        if cell.router == "param-center":
            return experts * self.hidden / whole
        return 1 / self.matrices if cell.router in GATES else 0.0

    def chosen_cost(self, cell: Cell) -> float:
        """Return the FLOPs of running every expert."""
        # the first matrix has been run to choose
        return 1 - 1 / self.matrices if cell.router in GATES else 1.0

    def share(self, cell: Cell) -> float:
        """Return the share of neurons that may run at the cell's level; not positive when none."""
        return min((cell.level - self.router_cost(cell)) / self.chosen_cost(cell), 1.0)

    def flops(self, cell: Cell, share: float) -> float:
        """Return what running a share of the neurons costs in all."""
        return self.router_cost(cell) + self.chosen_cost(cell) * share


def cells(shape: Shape, *, full: bool = False) -> Iterator[Cell]:
    """Yield the cells that divide the FFN and can reach their level.

    Args:
        shape: of the model's FFNs.
        full: all combinations instead of those the table needs.
    """
    yield DENSE
    for cell in _all() if full else _chosen():
        if shape.neurons % cell.width:
            continue
        if cell.split == "static" or shape.share(cell) > 0.02:
            yield cell


def _levels(cell: Cell, levels: tuple[float, ...] = LEVELS) -> Iterator[Cell]:
    for level in levels:
        yield replace(cell, level=level)


def _cell(split: str, width: int, router: str, rule: str = "top-k") -> Cell:
    return Cell(split=split, width=width, router=router, rule=rule, level=0.5)


def _chosen() -> Iterator[Cell]:
    half = (0.5,)
    yield from _levels(_cell("static", 1, "none", "fixed"), (0.8, *LEVELS))
    # single neurons: how well each router and rule does without any grouping
    yield from _levels(_cell("none", 1, "oracle"))
    yield from _levels(_cell("none", 1, "gate"), (0.8, 0.7, 0.5))
    yield from _levels(_cell("none", 1, "gate-scaled"), (0.8, 0.7))
    yield from _levels(_cell("none", 1, "gate", "threshold"), (0.7, 0.5))
    for router, rule in (("gate", "dynamic-k"), ("oracle", "threshold"), ("oracle", "dynamic-k")):
        yield from _levels(_cell("none", 1, router, rule), half)
    yield from _levels(_cell("none", 1, "contribution"), half)
    for width in (6, 12, 48):
        levels = half if width == 12 else LEVELS
        # what grouping costs an oracle, by width and split, and what a router loses against it
        yield from _levels(_cell("balanced-kmeans", width, "oracle"), levels)
        yield from _levels(_cell("random", width, "oracle"), half)
        yield from _levels(_cell("balanced-kmeans", width, "contribution"), levels)
    yield from _levels(_cell("contiguous", 48, "oracle"), half)
    yield from _levels(_cell("balanced-kmeans", 48, "param-center"), half)
    yield from _levels(_cell("balanced-kmeans", 48, "gate"), half)
    for rule in ("threshold", "dynamic-k"):
        yield from _levels(_cell("balanced-kmeans", 48, "contribution", rule), half)
    # the second baseline of the issue
    yield from _levels(_cell("random", 48, "contribution"))


def _all() -> Iterator[Cell]:
    yield from _levels(_cell("static", 1, "none", "fixed"))
    splits = [("none", 1)]
    splits += [(s, w) for w in (6, 12, 48) for s in ("balanced-kmeans", "random", "contiguous")]
    for split, width in splits:
        for router in ("oracle", "param-center", "contribution", *GATES):
            for rule in ("top-k", "threshold", "dynamic-k"):
                yield from _levels(_cell(split, width, router, rule))
