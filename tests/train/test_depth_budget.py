"""What holds the budget of blocks that tokens may skip: thresholds, shares, prices, costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.train.depth_budget import (
    Price,
    share_above,
    share_for,
    spread,
    threshold_for,
    tilted,
    within,
)

from .conftest import reach

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("values", "share", "run"),
    [
        ([1.0, 2.0, 3.0, 4.0], 0.5, 2),
        ([1.0, 2.0, 3.0, 4.0], 1.0, 4),
        ([1.0, 2.0, 3.0, 4.0], 0.0, 0),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 4),
        ([1.0, 2.0, 2.0, 4.0], 0.5, 3),
    ],
)
def test_thresholds_leave_a_share_and_never_part_equals(
    values: list[float], share: float, run: int
) -> None:
    logits = torch.tensor(values)
    threshold = threshold_for(logits, share)
    assert int((logits > threshold).sum()) == run
    assert share_above({"a": logits}, {"a": threshold}) == run / 4


@pytest.mark.parametrize(
    ("shares", "target", "found"),
    [
        ([0.2, 0.4], 0.5, [0.4, 0.6]),
        ([0.2, 0.9], 0.8, [0.6, 1.0]),
        ([0.1, 0.6], 0.2, [0.0, 0.4]),
        ([1.0, 1.0], 0.5, [0.5, 0.5]),
        ([0.3, 0.3], 1.0, [1.0, 1.0]),
    ],
)
def test_shares_are_moved_alike_to_a_mean(
    shares: list[float], target: float, found: list[float]
) -> None:
    moved = spread({"a": shares[0], "b": shares[1]}, target)
    assert list(moved.values()) == pytest.approx(found, abs=1e-6)


def test_a_share_of_a_sequence_runs_in_training_as_elsewhere(routed: Make) -> None:
    model: Any = load_model(routed(start=False), dtype="float64")
    ids = torch.arange(40).reshape(2, 20)
    with model.set_depth("capacity", capacity=0.4), model.collect("depth") as seen:
        model.eval()
        expected = model(input_ids=ids).logits
        model.train()
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-9, atol=1e-9)
    for path in model.adaptive_depth():
        before, after = seen[path]
        assert before.soft is None
        assert int(after.run.sum()) == 16
        # those that run are on or above the edge of the sigmoid, the others below
        assert torch.equal(after.soft >= 0.5, after.run)


@pytest.mark.parametrize("kind", ["skip", "mod"])
def test_autocast_rounds_no_logit(kind: str, routed: Make) -> None:
    model: Any = load_model(routed(kind, start=False))
    block = next(iter(model.adaptive_depth().values()))
    x = torch.randn(2, 9, 32)
    for router in filter(None, (block.depth.router, block.depth.router.predictor)):
        expected = router(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(x), expected)


def test_the_price_is_what_running_is_worth_where_it_is_in_doubt() -> None:
    price = Price()
    for _ in range(400):
        logits = torch.zeros(2, 8, requires_grad=True)
        soft = torch.sigmoid(logits)
        slopes = (soft * (1 - soft)).detach().flatten() / soft.numel()
        share = torch.tensor(1.0)
        price.watch(logits, slopes, share)
        # each pair's running lowers the loss by 0.3 nats, and costs what is known so far
        loss = -0.3 * soft.mean() + price.value * soft.mean()
        loss.backward()
        price.step_done()
    assert price.value == pytest.approx(0.3, rel=1e-6)


def test_a_share_follows_from_what_the_model_says_it_costs(routed: Make) -> None:
    for kind in ("skip", "skip-kv", "mod"):
        model: Any = load_model(routed(kind, kind))
        low, high = reach(model)
        paths = list(model.adaptive_depth())
        assert share_for(model, paths, low + 1e-9)[0] == pytest.approx(0.0, abs=1e-4)
        assert share_for(model, paths, high - 1e-9)[0] == pytest.approx(1.0, abs=1e-4)
        found = [share_for(model, paths, low + (high - low) * part / 8)[0] for part in range(1, 8)]
        assert found == sorted(found)
        if kind == "skip":
            assert found == pytest.approx([part / 8 for part in range(1, 8)], rel=1e-6)


def test_budgets_out_of_reach_say_which_way(routed: Make) -> None:
    model: Any = load_model(routed()).train()
    low, high = reach(model)
    with pytest.raises(OptionError, match="reaches less"):
        share_for(model, list(model.adaptive_depth()), low / 2)
    with pytest.raises(OptionError, match="costs no more"):
        share_for(model, list(model.adaptive_depth()), high + 1)
    assert model.training


def test_shares_move_to_where_running_is_worth_more() -> None:
    shares = dict.fromkeys("abc", 0.5)
    found = tilted(shares, {"a": 0.0, "b": 1.0, "c": 9.0}, 0.1)
    assert found["a"] < 0.5 == found["b"] < found["c"] == pytest.approx(0.6)
    assert tilted(shares, dict.fromkeys("abc", 1.0), 0.1) == shares
    assert tilted({"a": 1.0, "b": 0.0}, {"a": 2.0, "b": 1.0}, 0.5) == {"a": 1.0, "b": 0.0}


def test_uneven_shares_cost_what_even_ones_do() -> None:
    shares = {"a": 0.0, "b": 1.0, "c": 0.9}
    for bend in (0.0, 0.1, 0.5):
        found = within(shares, 0.6, bend)
        cost = sum(share + bend * share**2 for share in found.values()) / 3
        assert cost == pytest.approx(0.6 + bend * 0.36, rel=1e-6)
        assert (sum(found.values()) / 3 < 0.6 - 1e-3) == bool(bend)


def test_attention_among_fewer_tokens_bends_the_cost(routed: Make) -> None:
    for kind, bends in (("skip", False), ("skip-kv", True), ("mod", True)):
        model: Any = load_model(routed(kind, kind))
        low, high = reach(model)
        _, bend = share_for(model, list(model.adaptive_depth()), (low + high) / 2)
        assert (bend > 1e-6) == bends
