"""What is said of routers and weights, and what stops a run."""

from __future__ import annotations

import pytest
import torch

from adaconvert.errors import TrainingError
from adaconvert.train import health
from adaconvert.train.health import LayerHealth


def layer(*counts: int, k: int = 1, index: int = 3) -> LayerHealth:
    return LayerHealth(layer=index, counts=counts, tokens=sum(counts) // k, entropy=0.5)


def test_load_dead_experts_and_crowding_are_read_off_the_counts() -> None:
    found = layer(6, 2, 0, 0, k=2)
    assert found.load == 3.0
    assert found.dead == (2, 3)
    # two experts a token: the two busiest have everything
    assert found.crowding == 1.0
    assert layer(2, 2, 2, 2).load == 1.0
    assert layer(2, 2, 2, 2, k=2).crowding == 0.5


def test_running_every_expert_is_no_crowding() -> None:
    assert layer(4, 4, k=2).crowding == 0.0


def test_collapse_stops_with_layer_and_share() -> None:
    layers = [layer(5, 5, 5, 5, index=0), layer(97, 3, 0, 0, index=1)]
    health.check_routers(layers, 0.98, 7)
    health.check_routers(layers, 0.0, 7)
    with pytest.raises(
        TrainingError, match=r"layer 1: the router collapsed: over the last 7 steps"
    ) as e:
        health.check_routers(layers, 0.95, 7)
    assert "97.0% of the choices, 2 of 4 got none (1 of 2 layers" in str(e.value)
    assert "expected less than 95%" in str(e.value)
    assert e.value.exit_code == 5
    assert "collapsed in layer 1" in health.warnings(layers, 0.95)[0]
    assert health.warnings(layers, 0.0) == []


def test_dead_experts_are_reported_with_their_names() -> None:
    summary = {"steps": 9, "layers": [layer(5, 0, 5, 0).to_json(), layer(1, 1).to_json()]}
    assert health.notes(summary) == [
        "layer 3: 2 of 4 experts got no token over the last 9 steps (1, 3)"
    ]


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("loss", float("nan"), "step 4: the loss is nan; training stops"),
        ("loss", float("inf"), "step 4: the loss is inf"),
        ("gradient norm", float("inf"), "step 4: the gradient norm is inf"),
        ("gradient norm", 1e11, r"step 4: the gradient norm is 1e\+11"),
    ],
)
def test_numbers_that_cannot_be_trained_on_name_their_step(
    what: str, value: float, message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        health.check_number(what, 4, torch.tensor(value))
    health.check_number("loss", 4, torch.tensor(1e11))


def test_weights_that_are_no_numbers_are_named() -> None:
    parameters = [("a", torch.ones(2)), ("b.weight", torch.tensor([1.0, float("nan")]))]
    health.check_weights(parameters[:1], 5)
    with pytest.raises(TrainingError, match=r"step 5: tensor 'b.weight' is not finite"):
        health.check_weights(parameters, 5)


def test_the_last_fifth_is_judged_but_no_more_than_fifty_steps() -> None:
    assert [health.last_steps(n) for n in (1, 12, 100, 1000)] == [1, 2, 20, 50]
