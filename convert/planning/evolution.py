"""Search over vectors of levels at a fixed total: which of many like things to give less.

A vector holds one level for each thing: 0 or 1 for a block that runs or is dropped, a number for a
site that may run more or fewer experts. What a vector is worth is a callback that may look at more
or less data; nothing here knows what a level means.

Source: EvoPress, Sieberling et al. 2024, 2410.14649, algorithm 1: a mutation takes a level from one
thing and gives it to another, so the total stays; each generation makes several offspring of one
parent and selects among them in stages, fewer and fewer on more and more data.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Vector = tuple[int, ...]
#: what a vector is worth on so much data; less is better.
Fitness = Callable[[Vector, int], float]

#: most switches of one mutation; the smaller of two numbers drawn up to it is taken, as the
#: published code of EvoPress does.
_MOST_SWITCHES = 3
_TRIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What levels each thing may have.

    Attributes:
        low, high: smallest and largest level of each thing; equal for one that stays as it is.
    """

    low: Vector
    high: Vector

    def switched(self, vector: Vector, chance: random.Random) -> Vector:
        """Return a vector of the same total, with one level or a few moved; the same vector where
        none can be."""
        found = list(vector)
        for _ in range(min(chance.randint(1, _MOST_SWITCHES), chance.randint(1, _MOST_SWITCHES))):
            up = [n for n, level in enumerate(found) if level < self.high[n]]
            down = [n for n, level in enumerate(found) if level > self.low[n]]
            if not up or not down:
                break
            to, of = chance.choice(up), chance.choice(down)
            if to != of:
                found[to] += 1
                found[of] -= 1
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One round of selection.

    Attributes:
        amount: how much data vectors are measured on.
        survivors: how many go on.
    """

    amount: int
    survivors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Best:
    """What a search found.

    Attributes:
        vector: the best one.
        fitness: of it, on the most data.
        measured: vectors measured, each amount of data counted by itself.
        history: fitness of the best vector after each step.
    """

    vector: Vector
    fitness: float
    measured: int
    history: tuple[float, ...] = ()


@dataclass(slots=True)
class _Known:
    """A fitness that measures nothing twice."""

    fitness: Fitness
    found: dict[tuple[Vector, int], float] = field(default_factory=dict)

    def __call__(self, vector: Vector, amount: int) -> float:
        key = (vector, amount)
        if key not in self.found:
            self.found[key] = self.fitness(vector, amount)
        return self.found[key]

    def best(self, vectors: Sequence[Vector], stage: Stage) -> list[Vector]:
        """Return the survivors of a stage, best first; of equals the one that came first."""
        order = sorted(range(len(vectors)), key=lambda n: (self(vectors[n], stage.amount), n))
        return [vectors[n] for n in order[: stage.survivors]]


def evolve(
    start: Vector,
    levels: Levels,
    fitness: Fitness,
    *,
    generations: int,
    offspring: int,
    stages: Sequence[Stage],
    seed: int,
    step: Callable[[], object] = lambda: None,
) -> Best:
    """Return the best vector found at the total of `start`.

    Args:
        start: first parent.
        levels: what each thing may have.
        fitness: what a vector is worth.
        generations: how many times offspring are made.
        offspring: of each generation, before selection.
        stages: amounts ascending, survivors falling; the last has one survivor, for which the
            parent stands too, so that the best one never gets worse.
        seed: of the mutations.
        step: called after each generation.
    """
    chance, known = random.Random(seed), _Known(fitness)
    parent, history = start, []
    for _ in range(generations):
        alive = _children(parent, levels, chance, offspring)
        for stage in stages[:-1]:
            alive = known.best(alive, stage)
        parent = known.best([parent, *alive], stages[-1])[0]
        history.append(known(parent, stages[-1].amount))
        step()
    return Best(
        vector=parent,
        fitness=known(parent, stages[-1].amount),
        measured=len(known.found),
        history=tuple(history),
    )


def _children(parent: Vector, levels: Levels, chance: random.Random, count: int) -> list[Vector]:
    """Return different mutations of a parent, as many as are wanted or as are easily found."""
    found: dict[Vector, None] = {}
    for _ in range(count * _TRIES):
        if len(found) == count:
            break
        made = levels.switched(parent, chance)
        if made != parent:
            found[made] = None
    return list(found)


def greedy(
    start: Vector,
    levels: Levels,
    fitness: Fitness,
    *,
    steps: int,
    amount: int,
    step: Callable[[], object] = lambda: None,
) -> Best:
    """Return the vector after `steps` times raising the level that is worth raising most.

    Args:
        start: where to begin.
        levels: what each thing may have; `high` leaves room for `steps`.
        fitness: what a vector is worth.
        steps: levels to raise, one at a time.
        amount: how much data vectors are measured on.
        step: called after each of `steps`.
    """
    known, history = _Known(fitness), []
    vector = start
    for _ in range(steps):
        open_ = [n for n, level in enumerate(vector) if level < levels.high[n]]
        raised = [(*vector[:n], vector[n] + 1, *vector[n + 1 :]) for n in open_]
        vector = known.best(raised, Stage(amount=amount, survivors=1))[0]
        history.append(known(vector, amount))
        step()
    return Best(
        vector=vector,
        fitness=known(vector, amount),
        measured=len(known.found),
        history=tuple(history),
    )
