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
#: shares of the data on which offspring are selected; those of EvoPress, rounded.
_SHARES = (1 / 16, 1 / 4, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What levels each thing may have.

    Attributes:
        low, high: smallest and largest level of each thing; equal for one that stays as it is.
        groups: levels move between things of one number only, such as those whose levels cost the
            same; empty where all are alike.
    """

    low: Vector
    high: Vector
    groups: Vector = ()

    @property
    def room(self) -> int:
        """Return how many levels there are above the lowest, in all."""
        return sum(self.high) - sum(self.low)

    def group(self, thing: int) -> int:
        """Return the number of the group of a thing."""
        return self.groups[thing] if self.groups else 0

    def switched(self, vector: Vector, chance: random.Random) -> Vector:
        """Return a vector of the same total, with one level or a few moved; the same vector where
        none can be."""
        found = list(vector)
        for _ in range(min(chance.randint(1, _MOST_SWITCHES), chance.randint(1, _MOST_SWITCHES))):
            up = [n for n, level in enumerate(found) if level < self.high[n]]
            down = [n for n, level in enumerate(found) if level > self.low[n]]
            if not up or not down:
                break
            to = chance.choice(up)
            like = [n for n in down if self.group(n) == self.group(to)]
            of = chance.choice(like) if like else to
            if to != of:
                found[to] += 1
                found[of] -= 1
        return tuple(found)

    def even(self, spent: int) -> Vector:
        """Return levels as even as can be, of which `spent` in all lie above the lowest.

        Each group gets its share of them, rounded down; what does not divide is spread over the
        things of a group.
        """
        found = list(self.low)
        for group in {self.group(n) for n in range(len(found))}:
            members = [n for n in range(len(found)) if self.group(n) == group]
            room = sum(self.high[n] - self.low[n] for n in members)
            given, before = room * spent // max(self.room, 1), 0
            for n in members:
                after = before + self.high[n] - self.low[n]
                found[n] += after * given // max(room, 1) - before * given // max(room, 1)
                before = after
        return tuple(found)

    def nearest(self, wanted: Sequence[float], like: Vector) -> Vector:
        """Return levels near those that are wanted, of the same total in each group as `like`."""
        found = [
            min(max(round(level), low), high)
            for level, low, high in zip(wanted, self.low, self.high, strict=True)
        ]
        for group in {self.group(n) for n in range(len(found))}:
            members = [n for n in range(len(found)) if self.group(n) == group]
            missing = sum(like[n] - found[n] for n in members)
            step = 1 if missing > 0 else -1
            for _ in range(abs(missing)):
                end = self.high if missing > 0 else self.low
                open_ = [n for n in members if found[n] != end[n]]
                found[max(open_, key=lambda n: step * (wanted[n] - found[n]))] += step
        return tuple(found)

    def lowered(self, vector: Vector, count: int) -> Vector:
        """Return a vector with `count` levels less in all, or the lowest one; each is taken where
        there is most above the lowest."""
        found = list(vector)
        for _ in range(min(count, sum(vector) - sum(self.low))):
            room = [level - low for level, low in zip(found, self.low, strict=True)]
            found[room.index(max(room))] -= 1
        return tuple(found)

    def raised(self, vector: Vector, count: int) -> Vector:
        """Return a vector with `count` levels more in all, or the highest one; each is added where
        there is most below the highest."""
        found = list(vector)
        for _ in range(min(count, sum(self.high) - sum(vector))):
            room = [high - level for level, high in zip(found, self.high, strict=True)]
            found[room.index(max(room))] += 1
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


def stages_of(offspring: int, amount: int) -> list[Stage]:
    """Return the rounds of selection on so much data: on a sixteenth, on a quarter, on all of it; a
    quarter of the offspring survives each. Little data have fewer rounds."""
    amounts = sorted({max(1, round(share * amount)) for share in _SHARES})
    left = [max(1, offspring // 4**number) for number in range(1, len(amounts))]
    return [Stage(amount=a, survivors=s) for a, s in zip(amounts, [*left, 1], strict=True)]


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
