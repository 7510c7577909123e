"""Options of `d2dmoe` that mean nothing, or do not fit the source, are refused with a reason."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click
import pytest

from adaconvert.cli.d2dmoe import d2dmoe, plan_d2dmoe
from adaconvert.errors import OptionError
from adaconvert.methods.d2dmoe.config import D2dmoeConfig
from adaconvert.testing.tiny_models import config_values

DATA = {"data": "text.jsonl"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--data: is missing: routers are fitted on text"),
        ({"stages": "1,2"}, r"--stages: names no stages.*'1,2'.*Stage 1 trains"),
        ({"stages": "2,6", **DATA}, r"--stages: names no stages.*5 \(projections\), ascending"),
        ({"stages": "5"}, "--data: is missing: networks in place of projections are fitted"),
        ({"projections": "q", **DATA}, "--projections: only means something with stage 5"),
        ({"stages": "5", "projections": "q,x", **DATA}, "--projections: names no projections"),
        ({"stages": "5", "projections": "q,q", **DATA}, "--projections: names no projections"),
        ({"stages": "5", "projection_experts": 0, **DATA}, "--projection-experts: out of range"),
        ({"stages": "5", "projection_lr": 0.0, **DATA}, "--projection-lr: out of range"),
        ({"stages": "5", "projection_sparsity": -1.0, **DATA}, "--projection-sparsity: out of"),
        ({"stages": "3,2", **DATA}, "--stages: names no stages"),
        ({"stages": "", **DATA}, "--stages: names no stages"),
        ({"stages": "2", **DATA}, "--data: only means something with stage 3"),
        ({"stages": "2,4"}, "stage 4 selects by the routers of stage 3"),
        ({"stages": "3", "tau": 0.1, **DATA}, "--tau: only means something with stage 4"),
        ({"stages": "3", "num_experts": 4, **DATA}, "--num-experts: only means something"),
        ({"tau": 1.5, **DATA}, r"--tau: out of range; expected 0\.0 to 1\.0, found 1\.5"),
        ({"tau": float("nan"), **DATA}, "--tau: out of range"),
        ({"router_steps": 0, **DATA}, "--router-steps: out of range"),
        ({"router_lr": 0.0, **DATA}, "--router-lr: out of range"),
        ({"router_loss": "l1", **DATA}, "--router-loss: unknown choice"),
        ({"router_width": "wide", **DATA}, "--router-width: wrong type"),
        ({"data_tokens": 1, **DATA}, "--data-tokens: out of range"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        D2dmoeConfig(**options)


def spec(hidden: int) -> Any:
    from adaconvert.arch.registry import describe

    values = {**config_values("llama"), "model_type": "llama", "hidden_size": hidden}
    return describe(values)


@pytest.mark.parametrize(("hidden", "width"), [(32, 128), (1536, 128), (2048, 512)])
def test_router_width_follows_the_hidden_size(hidden: int, width: int) -> None:
    assert D2dmoeConfig(**DATA).width(spec(hidden)) == width
    assert D2dmoeConfig(router_width=7, **DATA).width(spec(hidden)) == 7


def test_sizes_that_do_not_divide_name_those_that_do() -> None:
    with pytest.raises(OptionError, match=r"--num-experts: does not divide the 64.*such as .*4"):
        D2dmoeConfig(num_experts=5, **DATA).sizes(spec(32))


def test_tau_is_the_paper_s() -> None:
    assert D2dmoeConfig(**DATA).select() == {"rule": "dynamic-k", "tau": 0.0}
    assert D2dmoeConfig(tau=0.1, **DATA).select() == {"rule": "dynamic-k", "tau": 0.1}
    assert D2dmoeConfig(stages="2,3", **DATA).select() == {"rule": "all"}


@pytest.mark.parametrize("command", [d2dmoe, plan_d2dmoe], ids=["run", "plan"])
def test_the_command_line_has_every_option_with_its_default(command: click.Command) -> None:
    options = {p.name: p for p in command.params if isinstance(p, click.Option)}
    given = command.make_context(
        "d2dmoe", ["source", "destination"], help_option_names=["-h", "--help"]
    ).params
    for field in fields(D2dmoeConfig):
        assert given[field.name] == field.default, field.name
    loss = options["router_loss"].type
    assert isinstance(loss, click.Choice)
    assert tuple(loss.choices) == ("relative", "mse")
