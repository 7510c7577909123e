"""Bounds against brute force, by their properties, and by Monte Carlo with fixed seeds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from adaconvert.evaluate.risk import Floats, Risk, betting, binomial_tail, hoeffding_bentkus

INCREASE = Risk(kind="loss-increase", limit=0.02, confidence=0.95, low=-0.25, high=0.25)
WRONG = Risk(
    kind="disagreement", limit=0.1, confidence=0.95, low=0, high=1, bound="hoeffding-bentkus"
)


@pytest.mark.parametrize(("trials", "probability"), [(1, 0.3), (7, 0.02), (10, 0.5), (12, 0.97)])
def test_binomial_tail_is_the_sum_over_all_outcomes(trials: int, probability: float) -> None:
    for successes in range(-1, trials + 1):
        brute = sum(
            math.prod(probability if hit else 1 - probability for hit in outcome)
            for outcome in itertools.product((0, 1), repeat=trials)
            if sum(outcome) <= successes
        )
        # sums of at most 4096 products of doubles: 1e-12 relative is 4096 roundings
        assert binomial_tail(successes, trials, probability) == pytest.approx(brute, rel=1e-12)


def test_binomial_tail_at_its_ends() -> None:
    assert binomial_tail(3, 3, 0.4) == 1
    assert binomial_tail(0, 5, 0.0) == 1
    assert binomial_tail(4, 5, 1.0) == 0
    # 0.98 ** 100_000 underflows unless the sum is taken in logarithms
    assert 0.5 < binomial_tail(2_000, 100_000, 0.02) < 0.51


@pytest.mark.parametrize(("limit", "count"), [(0.02, 149), (0.05, 59), (0.10, 29), (0.25, 11)])
def test_hoeffding_bentkus_needs_the_published_number_of_faultless_losses(
    limit: float, count: int
) -> None:
    assert hoeffding_bentkus(np.zeros(count), limit) <= 0.05
    assert hoeffding_bentkus(np.zeros(count - 1), limit) > 0.05
    assert WRONG.at(limit).smallest() == count


def test_hoeffding_bentkus_is_the_smaller_of_its_two_bounds() -> None:
    losses = np.array([1.0] * 3 + [0.0] * 97)
    kl = 0.03 * math.log(0.03 / 0.1) + 0.97 * math.log(0.97 / 0.9)
    bentkus = math.e * sum(math.comb(100, k) * 0.1**k * 0.9 ** (100 - k) for k in range(4))
    expected = min(math.exp(-100 * kl), bentkus)
    assert hoeffding_bentkus(losses, 0.1) == pytest.approx(expected, rel=1e-12)


def test_betting_is_the_product_it_says() -> None:
    losses = [0.01, -0.02, 0.05, 0.0]
    seen = [0.0, 0.04]
    known, capital, best = list(seen), 1.0, 1.0
    for loss in losses:
        spread = np.var(known)
        bet = min(math.sqrt(2 * math.log(20) / (4 * spread)), 0.9 / (0.25 - 0.02))
        capital *= 1 + bet * (0.02 - loss)
        best = max(best, capital)
        known.append(loss)
    found = betting(losses, 0.02, low=-0.25, high=0.25, seen=seen)
    assert found == pytest.approx(1 / best, rel=1e-12)


def test_nothing_certifies_without_data_or_below_its_mean() -> None:
    for risk in (INCREASE, WRONG):
        assert risk.p_value([]) == 1
        assert risk.p_value(np.full(500, risk.limit)) == 1
        assert risk.p_value(np.full(500, risk.high)) == 1


@pytest.mark.parametrize("risk", [INCREASE, WRONG], ids=lambda risk: risk.bound)
def test_p_values_fall_with_the_limit_and_with_faultless_data(risk: Risk) -> None:
    rng = np.random.default_rng(0)
    losses = risk.clip(rng.normal(0.4 * risk.limit, 0.02, 300))
    limits = np.linspace(0.001, 0.2, 60)
    by_limit = [risk.at(float(limit)).p_value(losses) for limit in limits]
    assert all(a >= b for a, b in itertools.pairwise(by_limit))
    by_count = [risk.p_value(np.zeros(count), seen=np.zeros(9)) for count in range(1, 200, 7)]
    assert all(a >= b for a, b in itertools.pairwise(by_count))


@pytest.mark.parametrize("risk", [INCREASE, WRONG], ids=lambda risk: risk.bound)
def test_smallest_is_the_number_of_zero_losses_that_certify(risk: Risk) -> None:
    count = risk.smallest()
    assert risk.p_value(np.zeros(count), seen=np.zeros(9)) <= risk.level
    assert risk.p_value(np.zeros(count - 1), seen=np.zeros(9)) > risk.level


def test_upper_bound_is_where_the_p_value_crosses_the_level() -> None:
    losses = np.random.default_rng(1).normal(0.005, 0.02, 400).clip(-0.25, 0.25)
    bound = INCREASE.upper_bound(losses)
    assert 0.005 < bound < 0.02
    assert INCREASE.at(bound + 1e-6).p_value(losses) <= 0.05
    assert INCREASE.at(bound - 1e-6).p_value(losses) > 0.05


def _gauss(rng: np.random.Generator, n: int) -> Floats:
    return np.asarray(rng.normal(0, 0.05, n).clip(-0.2, 0.2))


def _rare(rng: np.random.Generator, n: int) -> Floats:
    # mostly nothing, now and then the worst there is: where a bound by variance is tempted
    return np.asarray(np.where(rng.random(n) < 0.04, 0.23, -0.23 * 0.04 / 0.96))


def _coin(rng: np.random.Generator, n: int) -> Floats:
    return np.asarray((rng.random(n) < 0.1).astype(float) - 0.1)


@pytest.mark.parametrize(
    ("risk", "centred"),
    [(INCREASE, _gauss), (INCREASE, _rare), (WRONG, _coin)],
    ids=["betting-gauss", "betting-rare", "hoeffding-bentkus-coin"],
)
@pytest.mark.parametrize("count", [60, 300])
def test_a_mean_at_the_limit_is_certified_no_more_often_than_the_level(
    risk: Risk, centred: Callable[[np.random.Generator, int], Floats], count: int
) -> None:
    rng = np.random.default_rng(2)
    false = 0
    for _ in range(1000):
        seen = risk.limit + centred(rng, 30)
        losses = risk.limit + centred(rng, count)
        false += risk.p_value(losses, seen=seen) <= risk.level
    # level plus two standard errors of 1000 draws; the seed is fixed
    assert false / 1000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)


def test_a_misleading_ordering_split_costs_power_and_not_validity() -> None:
    rng = np.random.default_rng(3)
    seen = np.zeros(100)
    false = sum(
        INCREASE.p_value(0.02 + _gauss(rng, 200), seen=seen) <= INCREASE.level for _ in range(1000)
    )
    assert false / 1000 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("mean", [0.0, 0.01, 0.015])
def test_needed_is_about_what_it_takes(mean: float) -> None:
    rng = np.random.default_rng(4)
    count = INCREASE.needed(mean, 0.03)
    assert count is not None

    def share(n: int) -> float:
        def one() -> bool:
            seen = rng.normal(mean, 0.03, n // 2).clip(-0.25, 0.25)
            losses = rng.normal(mean, 0.03, n).clip(-0.25, 0.25)
            return INCREASE.p_value(losses, seen=seen) <= 0.05

        return sum(one() for _ in range(200)) / 200

    assert share(count) >= 0.7
    assert share(count // 3) <= 0.5


def test_needed_is_none_when_no_data_would_do() -> None:
    assert INCREASE.needed(0.02, 0.01) is None
    assert WRONG.needed(0.2, 0.01) is None


def test_needed_without_spread_is_the_smallest() -> None:
    assert INCREASE.needed(0.0, 0.0) == INCREASE.smallest()
    assert WRONG.needed(0.0, 0.0) == WRONG.smallest()


@pytest.mark.parametrize("losses", [[0.3], [float("nan")], [[0.0]]])
def test_losses_outside_the_range_are_a_bug(losses: object) -> None:
    with pytest.raises(ValueError, match=r"losses must be a row of numbers in \[-0.25, 0.25\]"):
        INCREASE.p_value(losses)  # type: ignore[arg-type]
