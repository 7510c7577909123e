"""Vectors of levels: even ones, near ones, and switches within groups."""

from __future__ import annotations

import random

import pytest

from adaconvert.planning.evolution import Levels, Stage, evolve, stages_of

ALIKE = Levels(low=(0, 0, 1, 0), high=(4, 4, 4, 4))
GROUPED = Levels(low=(1, 1, 0, 0, 0), high=(6, 6, 3, 3, 3), groups=(1, 1, 0, 0, 0))


@pytest.mark.parametrize("levels", [ALIKE, GROUPED])
def test_even_levels(levels: Levels) -> None:
    assert levels.even(0) == levels.low
    assert levels.even(levels.room) == levels.high
    for spent in range(levels.room + 1):
        found = levels.even(spent)
        bounds = zip(levels.low, found, levels.high, strict=True)
        assert all(low <= level <= high for low, level, high in bounds)
        # what does not divide is at most one level of each group
        assert 0 <= sum(levels.low) + spent - sum(found) < 2
    assert Levels(low=(0,) * 5, high=(4,) * 5).even(12) == (2, 2, 3, 2, 3)


def test_each_group_gets_its_share() -> None:
    # 10 levels above the lowest in one group, 9 in the other
    for spent in range(GROUPED.room + 1):
        found = GROUPED.even(spent)
        assert sum(found[:2]) - 2 == 10 * spent // 19
        assert sum(found[2:]) == 9 * spent // 19


def test_the_nearest_levels_have_the_same_totals() -> None:
    assert ALIKE.nearest((0.2, 3.9, 1.0, 2.4), (2, 2, 2, 2)) == (0, 4, 1, 3)
    # what cannot be is cut off
    assert ALIKE.nearest((9.0, 9.0, -3.0, -1.0), (2, 2, 2, 2)) == (3, 4, 1, 0)
    assert GROUPED.nearest((6, 6, 3, 3, 3), (2, 3, 1, 0, 2)) == (2, 3, 1, 1, 1)
    assert ALIKE.nearest((2, 1, 1, 0), (2, 1, 1, 0)) == (2, 1, 1, 0)


def test_levels_are_taken_where_most_is_left() -> None:
    assert ALIKE.lowered((4, 1, 4, 2), 3) == (2, 1, 3, 2)
    assert ALIKE.lowered((1, 0, 1, 0), 9) == ALIKE.low


def test_levels_are_added_where_most_is_missing() -> None:
    assert ALIKE.raised((4, 1, 3, 2), 3) == (4, 3, 3, 3)
    assert ALIKE.raised((4, 4, 3, 4), 9) == ALIKE.high


def test_switches_stay_within_groups() -> None:
    chance, seen = random.Random(0), set()
    vector = (3, 2, 1, 2, 0)
    for _ in range(200):
        vector = GROUPED.switched(vector, chance)
        assert (sum(vector[:2]), sum(vector[2:])) == (5, 3)
        seen.add(vector)
    assert len(seen) > 10
    alone = Levels(low=(0, 0), high=(2, 2), groups=(0, 1))
    assert all(alone.switched((1, 1), chance) == (1, 1) for _ in range(20))


def test_rounds_of_selection() -> None:
    assert stages_of(16, 64) == [
        Stage(amount=4, survivors=4),
        Stage(amount=16, survivors=1),
        Stage(amount=64, survivors=1),
    ]
    assert stages_of(8, 1) == [Stage(amount=1, survivors=1)]
    assert stages_of(1, 3) == [Stage(amount=1, survivors=1), Stage(amount=3, survivors=1)]


def test_evolution_in_groups_finds_the_best_of_each() -> None:
    best = (1, 4, 3, 0, 1)

    def far(vector: tuple[int, ...], amount: int) -> float:
        assert (sum(vector[:2]), sum(vector[2:])) == (5, 4)
        return float(sum(abs(a - b) for a, b in zip(vector, best, strict=True)))

    given = {"generations": 40, "offspring": 8, "seed": 1, "stages": stages_of(8, 16)}
    found = evolve((3, 2, 1, 1, 2), GROUPED, far, **given)  # type: ignore[arg-type]
    assert found.vector == best
    assert found == evolve((3, 2, 1, 1, 2), GROUPED, far, **given)  # type: ignore[arg-type]
