"""Shares per site or block at one compute, found by evolution: what `--search evolve` does.

Every site has a level, a share of what it can run. The start gives all the same level, the highest
that keeps to the budget, or another division of the same total where that is better; then levels
move from one site to another, so that the total stays, and what loses least is kept. What a total
of levels costs depends a little on where they are, because what one layer leaves out changes what
the routers of the next ones see, so compute is measured: what is above the budget is never kept,
and what is left of it in the end is given back.

Source: EvoPress, Sieberling et al. 2024, 2410.14649; see `planning.evolution`. There the divergence
from the dense model is made small, here the loss that `calibrate` compares all settings by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from adaconvert.planning.evolution import Levels, Vector, evolve, stages_of
from adaconvert.progress import Bar, Silent

#: levels of a site of which any share can be run.
STEPS: Final = 20
#: shares of the levels to do without as well: what was found may cost a little more than the budget
#: on other text, and these then cost less.
_LESS: Final = (0.01, 0.03)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a vector of levels does.

    Attributes:
        loss: less is better.
        compute: as a fraction of the reference's.
    """

    loss: float
    compute: float


#: levels, and how much of the data -> what they do; None where they cannot be had.
Measure = Callable[[Vector, int], Cost | None]
#: even levels -> another division of the same total, None where there is none.
Way = Callable[[Vector], Vector | None]
_NEVER: Final = Cost(loss=math.inf, compute=math.inf)


@dataclass(slots=True, kw_only=True)
class Allotment:
    """Levels that are to be found.

    Attributes:
        levels: what each site may have.
        measure: what levels do.
        amount: of all the data.
        budget: largest compute.
        ways: of dividing levels, to start from besides the even one.
        shown: told of progress, see `steps`.
    """

    levels: Levels
    measure: Measure
    amount: int
    budget: float
    ways: Sequence[Way] = ()
    shown: Bar = field(default_factory=Silent)
    _known: dict[tuple[Vector, int], Cost] = field(default_factory=dict)

    def steps(self, generations: int) -> int:
        """Return how often `shown` is told at most."""
        looks = (2 + len(self.ways)) * (self.levels.room + 2).bit_length()
        return looks + generations + len(_LESS) * _fewer(generations)

    def find(self, *, generations: int, offspring: int, seed: int) -> list[Vector]:
        """Return the best levels within the budget, and the best of a few less of them; none where
        the lowest ones cost more.

        Args:
            generations: see `evolve`; a quarter of them for each of the lower totals.
            offspring, seed: see `evolve`.
        """
        starts = self.starts()
        if not starts:
            return []
        first = min(starts, key=lambda vector: self._cost(vector, self.amount).loss)

        def fitness(vector: Vector, amount: int) -> float:
            return self._fitness(vector, amount, first)

        def evolved(start: Vector, generations: int) -> Vector:
            return evolve(
                start,
                self.levels,
                fitness,
                generations=generations,
                offspring=offspring,
                stages=stages_of(offspring, self.amount),
                seed=seed,
                step=self.shown.update,
            ).vector

        found = evolved(first, generations)
        fuller = self._most(lambda spent: self.levels.raised(found, spent)) or found
        found = min(found, fuller, key=lambda vector: fitness(vector, self.amount))
        total = sum(found)
        less = [max(n + 1, round(share * total)) for n, share in enumerate(_LESS)]
        lower = [self.levels.lowered(found, count) for count in less]
        return [found, *(evolved(vector, _fewer(generations)) for vector in lower)]

    def starts(self) -> list[Vector]:
        """Return the highest levels within the budget, even ones first, then those of each way of
        dividing them; none where the lowest cost more."""
        found = [self._most(self.levels.even), *map(self._most_by, self.ways)]
        return [vector for vector in found if vector is not None]

    def _most_by(self, way: Way) -> Vector | None:
        return self._most(lambda spent: way(self.levels.even(spent)))

    def _most(self, made: Callable[[int], Vector | None]) -> Vector | None:
        """Return what the most levels make within the budget, None where none do.

        A way may not know how to divide few levels; more are tried then.
        """
        best, least, most = None, -1, self.levels.room + 1
        while most - least > 1:
            middle = (least + most) // 2
            vector = made(middle)
            self.shown.update()
            if vector is None or self._cost(vector, self.amount).compute <= self.budget:
                best, least = vector or best, middle
            else:
                most = middle
        return best

    def _fitness(self, vector: Vector, amount: int, first: Vector) -> float:
        """Return the loss of levels, infinite where they cost too much.

        Some of the data may cost more than all of them do, or less; the start says how much.
        """
        limit = self.budget
        if amount < self.amount:
            whole = self._cost(first, self.amount).compute
            limit *= self._cost(first, amount).compute / whole
        found = self._cost(vector, amount)
        return found.loss if found.compute <= limit else math.inf

    def _cost(self, vector: Vector, amount: int) -> Cost:
        key = (vector, amount)
        if key not in self._known:
            self._known[key] = self.measure(vector, amount) or _NEVER
        return self._known[key]


def _fewer(generations: int) -> int:
    return max(1, generations // 4)
