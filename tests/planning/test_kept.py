"""Arrays that several tensors are parts of are made once, and one at a time."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest

from adaconvert.planning.estimate import working_memory
from adaconvert.planning.evaluate import Kept, evaluate
from adaconvert.planning.functions import FUNCTIONS
from adaconvert.planning.ops import Apply, Exactness, Init, Plan, TargetTensor

ROWS, COLUMNS, RANK = 6, 9, 2


def both(value: float) -> Apply:
    """Return the factors of a constant matrix less one of zeros."""
    own, other = (
        Init(kind="constant", shape=(ROWS, COLUMNS), params=(("value", number),))
        for number in (value, 0.0)
    )
    params = (("rank", RANK), ("transposed", False))
    size = RANK * (ROWS + COLUMNS)
    return Apply(fn="residual", shape=(size,), args=(own, other), params=params)


def part(whole: Apply, first: int, shape: tuple[int, ...]) -> Apply:
    """Return numbers of an array as a matrix."""
    params = (("first", first), ("size", shape[0] * shape[1]))
    return Apply(fn="part", shape=shape, args=(whole,), params=params)


def factors(value: float) -> tuple[Apply, Apply]:
    """Return up and down of a constant matrix, each with an expression of its own."""
    return part(both(value), 0, (ROWS, RANK)), part(both(value), ROWS * RANK, (RANK, COLUMNS))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the first number of each matrix that is decomposed."""
    found: list[float] = []
    stock = FUNCTIONS["residual"]

    def counted(args: Any, params: Any, seed: int) -> Any:
        found.append(float(args[0][0, 0]))
        return stock(args, params, seed)

    monkeypatch.setitem(FUNCTIONS, "residual", counted)
    return found


def test_parts_of_one_array_are_made_together(calls: list[float]) -> None:
    kept = Kept()
    for value in (1.0, 3.0):
        up, down = (evaluate(expr, [], {}, kept) for expr in factors(value))
        assert up.shape == (ROWS, RANK)
        np.testing.assert_allclose(up @ down, np.full((ROWS, COLUMNS), value), rtol=1e-6)
    assert calls == [1.0, 3.0]


def test_one_is_kept_and_values_are_those_without(calls: list[float]) -> None:
    kept = Kept()
    first, second = factors(1.0), factors(3.0)
    for expr in (first[0], second[0], first[1]):
        assert np.array_equal(evaluate(expr, [], {}, kept), evaluate(expr, [], {}))
    # what was kept is gone once there is another, and without it nothing is kept
    assert calls == [1.0, 1.0, 3.0, 3.0, 1.0, 1.0]


def test_what_was_kept_is_gone_before_the_next_is_made() -> None:
    kept = Kept()
    gone = weakref.ref(kept.value(both(1.0), lambda: np.zeros(4)))
    assert gone() is not None

    def compute() -> Any:
        assert gone() is None
        return np.ones(4)

    assert kept.value(both(2.0), compute).sum() == 4


def test_memory_of_what_is_kept_is_counted() -> None:
    def memory(*exprs: Apply | Init) -> int:
        targets = tuple(
            TargetTensor(name=str(at), dtype="F32", shape=expr.shape, expr=expr, group=str(at))
            for at, expr in enumerate(exprs)
        )
        exactness = Exactness(kind="exact", why="")
        given: dict[str, Any] = {"method": "m", "options": {}, "sources": (), "drops": ()}
        return working_memory(
            Plan(**given, targets=targets, config={}, exactness=exactness, notes=())
        )

    large = Init(kind="constant", shape=(10**6,), params=(("value", 1.0),))
    assert memory(large, *factors(1.0)) == memory(large) + 4 * RANK * (ROWS + COLUMNS)
