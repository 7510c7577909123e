"""Learn-then-Test by fixed-sequence testing: which settings keep a promise about their loss.

Three splits that share no unit. On the *ordering* split every setting is measured and the ones
worth having are put in order, from the most careful to the cheapest. On the *testing* split they
are tested in that order until the first fails: because the order was fixed before the testing data
were seen, no correction for the number of tests is needed, and with the stated confidence every
setting that passed keeps its promise, all at once. On the *evaluation* split the numbers that are
reported are measured.

**The unit is a document.** Blocks of one document resemble each other, so they are no independent
draws and a test that took them for such would promise too much. The loss of a document is the mean
of its blocks' clipped losses, weighted by tokens; what is bounded is its mean over documents, the
loss at a random token of a random document. Taking one random block of each document would bound
the same number with less data. For one long text there is the unit "block": blocks are dealt to the
splits at random, and the promise then covers blocks of *these* documents and nothing else.

Source: Angelopoulos, Bates, Candes, Jordan and Lei, "Learn then Test: calibrating predictive
algorithms to achieve risk control" (2110.01052), sections 2 and 3 (fixed sequence testing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from adaconvert.evaluate.risk import Floats, Risk

Integers = NDArray[np.int64]
UNITS: Final = ("document", "block")
#: shares of the units: ordering, testing, evaluation. The test decides how close to the limit one
#: gets: on the synthetic losses of scripts/calibration_check.py with 400 documents the distance to
#: the oracle's compute is 0.029 with 0.6 for the test, 0.031 with 0.5 and 0.039 with 0.35.
SHARES: Final = (0.2, 0.6, 0.2)
#: the same when nothing is tested.
SHARES_WITHOUT_TEST: Final = (0.5, 0.0, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Which units belong to which split; positions in the list of units, in random order."""

    ordering: Integers
    testing: Integers
    evaluation: Integers

    def to_json(self) -> dict[str, int]:
        """Return the sizes."""
        return {
            "ordering": len(self.ordering),
            "testing": len(self.testing),
            "evaluation": len(self.evaluation),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Certified:
    """What a sequence of tests found.

    Attributes:
        order: settings, from the most careful to the cheapest.
        passed: those of the order before the first that failed.
        failed: the first that failed, None when all passed.
        p_values: of every setting that was tested.
    """

    order: tuple[int, ...]
    passed: tuple[int, ...]
    failed: int | None
    p_values: dict[int, float]

    @property
    def cheapest(self) -> int | None:
        """Return the cheapest setting that passed, None when none did."""
        return self.passed[-1] if self.passed else None

    def renamed(self, names: Sequence[int]) -> Certified:
        """Return the same with setting s called names[s]."""
        return Certified(
            order=tuple(names[s] for s in self.order),
            passed=tuple(names[s] for s in self.passed),
            failed=None if self.failed is None else names[self.failed],
            p_values={names[s]: p for s, p in self.p_values.items()},
        )


def split(units: int, *, seed: int, shares: Sequence[float] = SHARES) -> Splits:
    """Return a random division of that many units.

    Args:
        units: how many there are.
        seed: of the division.
        shares: of ordering, testing and evaluation; they add up to 1. A share above zero gets at
            least one unit as long as there are enough.
    """
    order = np.random.default_rng(seed).permutation(units)
    first = round(units * shares[0]) or min(1, units)
    last = round(units * shares[2]) or min(1, units - first)
    if shares[1] == 0:
        last = units - first
    return Splits(
        ordering=order[:first],
        testing=order[first : units - last],
        evaluation=order[units - last :],
    )


def unit_losses(losses: ArrayLike, weights: ArrayLike, members: ArrayLike, units: int) -> Floats:
    """Return the weighted mean loss of each unit, [units]; NaN for a unit without members.

    Args:
        losses: [n] of the blocks.
        weights: [n] tokens of the blocks.
        members: [n] unit of each block.
        units: how many units there are.
    """
    of = np.asarray(members, dtype=np.int64)
    tokens = np.asarray(weights, dtype=np.float64)
    total = np.bincount(of, weights=tokens * np.asarray(losses, dtype=np.float64), minlength=units)
    count = np.bincount(of, weights=tokens, minlength=units)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / count)


def frontier(computes: ArrayLike, risks: ArrayLike) -> tuple[int, ...]:
    """Return the settings nothing cheaper is as good as, from the most expensive to the cheapest.

    Args:
        computes, risks: [settings] cost and mean loss of each.
    """
    cost = np.asarray(computes, dtype=np.float64)
    risk = np.asarray(risks, dtype=np.float64)
    kept: list[int] = []
    # of equal cost the better first, of equal settings the first.
    for setting in sorted(range(len(cost)), key=lambda s: (cost[s], risk[s], s)):
        if not kept or risk[setting] < risk[kept[-1]]:
            kept.append(setting)
    return tuple(reversed(kept))


def certify(
    computes: ArrayLike,
    ordering: Sequence[Floats],
    measure: Callable[[int], Floats],
    risk: Risk,
) -> Certified:
    """Return which settings pass, tested from the most careful to the cheapest.

    Args:
        computes: [settings] cost of each.
        ordering: per setting its clipped unit losses on the ordering split.
        measure: setting -> its clipped unit losses on the testing split, in the split's order; not
            asked for settings after the first that fails.
        risk: what is promised.
    """
    order = frontier(computes, [float(np.mean(losses)) for losses in ordering])
    passed: list[int] = []
    p_values: dict[int, float] = {}
    for setting in order:
        p_values[setting] = risk.p_value(measure(setting), seen=ordering[setting])
        if not p_values[setting] <= risk.level:
            return Certified(order=order, passed=tuple(passed), failed=setting, p_values=p_values)
        passed.append(setting)
    return Certified(order=order, passed=tuple(passed), failed=None, p_values=p_values)


def best_within(computes: ArrayLike, risks: ArrayLike, budget: float) -> int | None:
    """Return the setting of least loss that costs at most `budget`; None when none is so cheap.

    Nothing is promised about its loss.
    """
    cost = np.asarray(computes, dtype=np.float64)
    risk = np.asarray(risks, dtype=np.float64)
    affordable = [s for s in range(len(cost)) if cost[s] <= budget + 1e-9]
    return min(affordable, key=lambda s: (risk[s], cost[s]), default=None)
