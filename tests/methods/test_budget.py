"""Budgets: quantiles of margins, the controller, what can be reached, budgets of layers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adaconvert.errors import OptionError
from adaconvert.methods.budget import (
    BudgetController,
    Quantiles,
    bias_for,
    check_share,
    parse_layers,
    reach_of,
    slope_at,
)

UNIT, SLOTS, REAL, NULL = 2, 6, 8, 16


def margins(tokens: int, *, seed: int = 0, shift: float = 0.0, nulls: int = NULL) -> Tensor:
    """Return the margins of random logits, [tokens, J], as the runtime defines them."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(tokens, REAL, generator=generator) + shift
    null = torch.randn(tokens, nulls, generator=generator)
    real, null = (t.sort(dim=1, descending=True).values for t in (real, null))
    columns = []
    for j in range(min(SLOTS, REAL)):
        left = SLOTS - j - 1
        columns.append(real[:, j] - null[:, left] if left < nulls else torch.full((tokens,), 1e38))
    found = torch.stack(columns, dim=1)
    return found.masked_fill(found > 1e37, math.inf)


@given(share=st.floats(0, 3), tokens=st.integers(1, 50), seed=st.integers(0, 20))
def test_the_bias_spends_the_share_to_half_an_expert(share: float, tokens: int, seed: int) -> None:
    values = margins(tokens, seed=seed)
    bias = bias_for(values, share, UNIT)
    # the count by brute force
    spent = float((values >= bias).sum()) / (tokens * UNIT)
    assert spent == Quantiles(values, UNIT).share(bias)
    assert abs(spent - share) <= 0.5 / (tokens * UNIT) + 1e-12
    assert bias == float(torch.tensor(bias, dtype=torch.float32))


def test_equal_margins_run_together_and_the_nearer_side_is_taken() -> None:
    values = torch.tensor([[3.0], [1.0], [1.0], [1.0], [0.0]])
    assert Quantiles(values, 1).share(bias_for(values, 0.4, 1)) == 0.2
    assert Quantiles(values, 1).share(bias_for(values, 0.6, 1)) == 0.8
    same = torch.ones(4, 1)
    assert Quantiles(same, 1).share(bias_for(same, 0.0, 1)) == 0.0
    assert Quantiles(same, 1).share(bias_for(same, 1.0, 1)) == 1.0


def test_what_runs_whatever_the_bias_is_counts_and_bounds_the_reach() -> None:
    few = margins(100, nulls=5)
    assert torch.isposinf(few[:, 0]).all()
    assert Quantiles(few, UNIT).reach == (0.5, 3.0)
    assert Quantiles(few, UNIT).share(bias_for(few, 0.1, UNIT)) == 0.5
    forced = Quantiles(margins(100), UNIT, min_real=1)
    assert forced.reach == (0.5, 3.0)
    assert forced.share(forced.bias(0.0)) == 0.5
    assert abs(forced.share(forced.bias(0.8)) - 0.8) <= 0.5 / 200


def test_margins_must_be_numbers_of_some_token() -> None:
    for wrong in (torch.empty(0, 3), torch.tensor([[math.nan]])):
        with pytest.raises(ValueError, match="budgets need tokens"):
            Quantiles(wrong, 1)


def test_the_slope_is_the_chord_of_the_quantiles() -> None:
    values = margins(20000)
    found = Quantiles(values, UNIT)
    for share in (0.3, 0.7, 1.0, 2.0):
        chord = (found.bias(share - 0.1) - found.bias(share + 0.1)) / 0.2
        assert float(slope_at(values, share, UNIT)) == pytest.approx(chord, rel=1e-2)
    assert float(slope_at(torch.ones(8, 2), 1.0, 1)) == 0.0
    assert float(slope_at(torch.full((8, 2), math.inf), 1.0, 1)) == 0.0
    assert float(slope_at(torch.ones(8, 1), 1.0, 1, min_real=1)) == 0.0


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_the_controller_holds_a_share_while_logits_drift(rate: float) -> None:
    control = BudgetController(targets=[0.6], rate=rate)
    bias, errors = bias_for(margins(512, seed=1), 0.6, UNIT), []
    for step in range(200):
        values = margins(512, seed=step + 2, shift=step / 400)
        spent = Quantiles(values, UNIT).share(bias)
        bias += control.update([spent], [float(slope_at(values, 0.6, UNIT))])[0]
        errors.append(spent - 0.6)
    last = torch.tensor(errors[50:])
    # logits that rise by a 400th a step leave an error of that over slope and rate
    assert abs(float(last.mean())) < 0.01 / (4 * rate)
    assert float(last.std()) < 0.025


def test_a_target_that_moves_is_fed_forward() -> None:
    control = BudgetController(targets=[1.0, math.nan], rate=0.2)
    bias = bias_for(margins(4096, seed=1), 1.0, UNIT)
    for step in range(50):
        values = margins(4096, seed=step + 2)
        spent = Quantiles(values, UNIT).share(bias)
        # without it the error would be the step of the target over the rate, 0.05
        assert abs(spent - control.targets[0]) < 0.02
        control.aim([1.0 - 0.01 * (step + 1), math.nan])
        slope = float(slope_at(values, spent, UNIT))
        moved, left = control.update([spent, 0.3], [slope, 1.0])
        assert left == 0.0
        bias += moved


def test_rate_zero_unknown_shares_and_unknown_slopes() -> None:
    assert BudgetController(targets=[0.5], rate=0.0).update([0.9], [3.0]) == [0.0]
    control = BudgetController(targets=[0.5, 0.5], rate=0.5, clip=0.1)
    assert control.update([math.nan, 0.9], [1.0, 0.0]) == [0.0, pytest.approx(0.05)]


def test_the_rate_decays_and_the_state_goes_on() -> None:
    control = BudgetController(targets=[0.5], rate=0.4, decay=1.0)
    steps = [control.update([0.6], [1.0])[0] for _ in range(3)]
    assert steps == pytest.approx([0.04, 0.02, 0.04 / 3])
    control.aim([0.4])
    again = BudgetController(targets=[0.5], rate=0.4, decay=1.0)
    again.restore(control.state())
    assert again.update([0.6], [2.0]) == control.update([0.6], [2.0])
    assert again.state() == control.state()


def test_what_can_be_reached_is_said() -> None:
    assert reach_of(2, 6, 16, 8) == (0.0, 3.0)
    assert reach_of(2, 6, 5, 8, min_real=1) == (0.5, 3.0)
    assert reach_of(2, 6, 16, 4, min_real=1) == (0.5, 2.0)
    check_share("--target-compute", 0.5, (0.5, 2.0))
    with pytest.raises(OptionError, match=r"--target-compute: cannot .* 0\.5 to 2, found 0\.4"):
        check_share("--target-compute", 0.4, (0.5, 2.0))


def test_budgets_of_layers_are_read() -> None:
    layers = [0, 1, 2, 4]
    assert parse_layers("0-1=0.9, 2-=0.6", layers) == {0: 0.9, 1: 0.9, 2: 0.6, 4: 0.6}
    assert parse_layers("4=1", layers) == {4: 1.0}
    assert parse_layers("0-3=0.5", layers) == {0: 0.5, 1: 0.5, 2: 0.5}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "is no budget of layers"),
        ("0=x", "is no budget of layers"),
        ("0=nan", "is no budget of layers"),
        ("0=-1", "is no budget of layers"),
        ("a-b=1", "is no budget of layers"),
        ("0=0.5,", "is no budget of layers"),
        ("3=0.5", "names no layer with null experts"),
        ("7-=0.5", "names no layer with null experts"),
        ("0-1=0.5,1-=0.7", "names layer 1 twice"),
    ],
)
def test_wrong_budgets_of_layers_are_refused(text: str, what: str) -> None:
    with pytest.raises(OptionError, match=what):
        parse_layers(text, [0, 1, 2, 4])


def test_what_single_steps_would_have_set_is_averaged() -> None:
    control = BudgetController(targets=[0.7, 0.5, math.nan])
    assert all(map(math.isnan, control.settled()))
    control.note([1.0, 2.0, 3.0], [0.75, math.nan, 0.9], [2.0, 1.0, 1.0])
    control.note([2.0, 2.0, 3.0], [0.1, 0.5, 0.9], [2.0, 1.0, 1.0])
    # the second error of the first block counts as the clip
    first, second, third = control.settled()
    assert first == pytest.approx((1.0 + 2 * 0.05 + 2.0 - 2 * 0.1) / 2)
    assert second == 2.0
    assert math.isnan(third)
    again = BudgetController(targets=[0.7, 0.5, math.nan])
    again.restore(json.loads(json.dumps(control.state())))
    assert again.settled()[:2] == [first, second]


def test_a_drift_leaves_the_controller_behind_and_the_average_not() -> None:
    rng = torch.Generator().manual_seed(0)
    control = BudgetController(targets=[0.7], rate=0.2)
    bias, last = 0.0, 0.0
    for step in range(200):
        drift = 0.02 * min(step, 150)
        margins = torch.randn(2000, 2, generator=rng) - drift
        share = float((margins >= bias).float().mean())
        slopes = [float(slope_at(margins, 0.7, 2))]
        if step >= 150:
            control.note([bias], [share], slopes)
        elif step >= 100:
            last += share / 50
        bias += control.update([share], slopes)[0]
    assert last < 0.68
    (settled,) = control.settled()
    fresh = torch.randn(200_000, 2, generator=rng) - drift
    assert abs(float((fresh >= settled).float().mean()) - 0.7) < 0.01
