"""Splits, order and tests of a sequence of settings, on tables of losses."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from adaconvert.evaluate.risk import Floats, Risk, loss_increase_risk
from adaconvert.evaluate.testing_sequence import (
    SHARES,
    SHARES_WITHOUT_TEST,
    best_within,
    certify,
    frontier,
    split,
    unit_losses,
)

RISK = loss_increase_risk(0.02)


@pytest.mark.parametrize("units", [3, 4, 7, 100, 1001])
@pytest.mark.parametrize("shares", [SHARES, SHARES_WITHOUT_TEST])
def test_splits_are_disjoint_and_hold_every_unit(
    units: int, shares: tuple[float, float, float]
) -> None:
    parts = split(units, seed=5, shares=shares)
    together = np.concatenate([parts.ordering, parts.testing, parts.evaluation])
    assert sorted(together) == list(range(units))
    sizes = parts.to_json()
    for share, size in zip(shares, sizes.values(), strict=True):
        assert size == 0 if share == 0 else size >= 1
        assert abs(size - share * units) <= 1


def test_splits_depend_on_the_seed_alone() -> None:
    first, same, other = (split(50, seed=seed) for seed in (1, 1, 2))
    assert (first.testing == same.testing).all()
    assert sorted(first.testing) != sorted(other.testing)


def test_the_loss_of_a_unit_is_the_mean_over_its_tokens() -> None:
    found = unit_losses([1.0, 2.0, 5.0], [10, 30, 7], [1, 1, 0], 3)
    assert found[:2] == pytest.approx([5.0, (10 + 60) / 40], abs=0)
    assert math.isnan(found[2])


def test_the_frontier_runs_from_the_most_careful_to_the_cheapest() -> None:
    computes = [0.9, 0.8, 0.7, 0.7, 0.5, 0.4]
    risks = [0.01, 0.02, 0.05, 0.04, 0.03, 0.30]
    # 0.8 beats nothing cheaper; both at 0.7 lose to the one at 0.5
    assert frontier(computes, risks) == (0, 1, 4, 5)


def test_of_equal_settings_the_first_is_kept() -> None:
    assert frontier([0.5, 0.5], [0.1, 0.1]) == (0,)
    assert frontier([], []) == ()


def test_testing_stops_at_the_first_failure() -> None:
    computes = [0.9, 0.8, 0.7, 0.6]
    ordering = [np.full(40, mean) for mean in (0.0, 0.002, 0.004, 0.006)]
    truth = [0.0, 0.002, 0.05, 0.0]
    asked = []

    def measure(setting: int) -> Floats:
        asked.append(setting)
        return np.full(200, truth[setting])

    found = certify(computes, ordering, measure, RISK)
    assert (found.order, found.passed, found.failed) == ((0, 1, 2, 3), (0, 1), 2)
    assert asked == [0, 1, 2]
    assert found.cheapest == 1
    assert found.p_values[0] <= 0.05 < found.p_values[2]


def test_nothing_is_certified_on_adversarial_losses() -> None:
    ordering = [np.zeros(40), np.zeros(40)]
    found = certify([0.9, 0.5], ordering, lambda setting: np.full(500, 0.25), RISK)
    assert found.passed == ()
    assert found.cheapest is None


def _population(settings: int, units: int, seed: int) -> tuple[Floats, Floats]:
    """Return computes and losses of settings whose mean crosses the limit half-way."""
    rng = np.random.default_rng(seed)
    computes = np.linspace(0.95, 0.45, settings)
    mean = 0.04 * np.arange(1, settings + 1) / settings
    share = rng.gamma(2.0, 0.5, units)
    noise = rng.normal(0, 0.02, (settings, units))
    return computes, RISK.clip(mean[:, None] * share + noise)


def _chosen(computes: Floats, losses: Floats, seed: int, risk: Risk) -> int | None:
    parts = split(losses.shape[1], seed=seed)
    ordering = [row[parts.ordering] for row in losses]
    return certify(computes, ordering, lambda s: losses[s][parts.testing], risk).cheapest


def test_choices_break_the_promise_no_more_often_than_said_and_are_near_the_oracle() -> None:
    computes, losses = _population(16, 4000, seed=0)
    true = losses.mean(axis=1)
    oracle = computes[np.flatnonzero(true <= RISK.limit).max()]
    rng = np.random.default_rng(1)
    broken, gaps = 0, []
    for draw in range(300):
        at = _chosen(computes, losses[:, rng.integers(4000, size=500)], draw, RISK)
        assert at is not None
        broken += true[at] > RISK.limit
        gaps.append(abs(computes[at] - oracle))
    assert broken / 300 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 300)
    assert np.mean(gaps) <= 0.05
    # always running everything keeps the promise, and is nowhere near
    assert 1 - oracle > 0.05


def test_the_best_within_a_budget_is_not_the_dearest_but_the_one_of_least_loss() -> None:
    computes, losses = [0.3, 0.45, 0.5, 0.8], [0.9, 0.1, 0.2, 0.0]
    assert best_within(computes, losses, 0.5) == 1
    assert best_within(computes, losses, 0.3) == 0
    assert best_within(computes, losses, 1.0) == 3
    assert best_within(computes, losses, 0.2) is None


def test_rising_limits_never_certify_less() -> None:
    computes, losses = _population(16, 600, seed=3)
    found = [_chosen(computes, losses, 0, RISK.at(limit)) for limit in (0.01, 0.02, 0.03, 0.05)]
    cheapest = [-1 if at is None else at for at in found]
    assert all(a <= b for a, b in pairwise(cheapest))
    assert cheapest[-1] > cheapest[0]
