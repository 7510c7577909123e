"""`moefy`, `unmoefy` and `plan moefy` hand their options to the API by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from adaconvert.cli.moefy import moefy
from adaconvert.cli.plan import _RUN_ONLY, plan_moefy
from adaconvert.cli.unmoefy import unmoefy
from adaconvert.methods.moefy import config

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stub(api: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import sys

    monkeypatch.setattr(sys.modules["adaconvert.api"], "unmoefy", api.function("unmoefy"), False)
    return api


def _defaults(command: click.Command) -> dict[str, Any]:
    # click keeps the help option of the first context it sees
    names = {"help_option_names": ["-h", "--help"]}
    given = command.make_context(str(command.name), ["SRC", "DST"], **names).params
    return {name: given[name] for name in given if name not in ("source", "destination")}


def test_moefy_hands_over_every_option(stub: Any, run: Run, tmp_path: Path) -> None:
    probe = tmp_path / "probe.txt"
    probe.write_text("words")
    code, _, err = run(
        *("moefy", "a", "out", "--num-experts", "48", "--expert-width", "28", "--layers", "1-3"),
        *("--split", "shared+routed", "--shared-neurons", "192", "--matrices", "up"),
        *("--router", "gate", "--rule", "threshold", "--top-k", "4", "--tau", "0.1"),
        *("--threshold", "0.5", "--keep", "0.3", "--top-p", "0.9", "--data", "text.jsonl"),
        *("--data-field", "body", "--data-split", "valid", "--data-tokens", "999", "--seed", "7"),
        *("--native", "--target", "mixtral", "--max-shard-size", "1GB", "--revision", "main"),
        *("--ignore-unindexed", "--overwrite", "--resume", "--memory", "2GB", "--probe"),
        *(str(probe), "--allow-nonfinite"),
    )
    assert (code, err) == (0, "")
    name, args, kwargs = stub.calls.pop()
    assert (name, args) == ("convert", ("a",))
    assert kwargs == {
        "destination": "out",
        "method": "moefy",
        "num_experts": 48,
        "expert_width": 28,
        "layers": "1-3",
        "split": "shared+routed",
        "shared_neurons": 192,
        "matrices": "up",
        "router": "gate",
        "rule": "threshold",
        "top_k": 4,
        "tau": 0.1,
        "threshold": 0.5,
        "keep": 0.3,
        "top_p": 0.9,
        "data": "text.jsonl",
        "data_field": "body",
        "data_split": "valid",
        "data_tokens": 999,
        "seed": 7,
        "native": True,
        "target": "mixtral",
        "max_shard_size": "1GB",
        "revision": "main",
        "ignore_unindexed": True,
        "overwrite": True,
        "resume": True,
        "verify": True,
        "memory": "2GB",
        "probe": str(probe),
        "allow_nonfinite": True,
        "progress": True,
    }


def test_unmoefy_hands_over_how_it_runs(stub: Any, run: Run) -> None:
    assert run("unmoefy", "a", "out", "--no-verify", "--max-shard-size", "1GB", "-q")[0] == 0
    name, args, kwargs = stub.calls.pop()
    assert (name, args) == ("unmoefy", ("a", "out"))
    assert kwargs["verify"] is False
    assert kwargs["max_shard_size"] == "1GB"
    assert kwargs["progress"] is False


@pytest.mark.parametrize("destination", [(), ("out",)])
def test_plan_takes_the_arguments_of_moefy(
    destination: tuple[str, ...], stub: Any, run: Run
) -> None:
    given = ("plan", "moefy", "a", *destination, "--num-experts", "4", "--no-verify")
    assert run(*given)[0] == 0
    name, args, kwargs = stub.calls.pop()
    assert (name, args) == ("plan", ("a",))
    assert (kwargs["method"], kwargs["num_experts"]) == ("moefy", 4)
    assert not set(kwargs) & set(_RUN_ONLY)


def test_defaults_and_choices_are_those_of_the_method() -> None:
    given = _defaults(moefy)
    for field in fields(config.MoefyConfig):
        assert given[field.name] == field.default, field.name
    choices = {
        param.name: tuple(param.type.choices)
        for param in moefy.params
        if isinstance(param.type, click.Choice)
    }
    assert choices == {
        "split": config.SPLITS,
        "matrices": config.MATRICES,
        "router": config.ROUTERS,
        "rule": config.RULES,
    }


@pytest.mark.parametrize("command", [moefy, plan_moefy, unmoefy])
def test_every_option_is_a_keyword_of_the_api(command: click.Command) -> None:
    from adaconvert import api

    known = {field.name for field in fields(config.MoefyConfig)} | {"as_json"}
    assert set(_defaults(command)) - known <= set(inspect.signature(api.convert).parameters)


def test_no_option_is_taken_that_another_makes_meaningless(stub: Any, run: Run) -> None:
    code, _, err = run("moefy", "a", "b", "--no-verify", "--memory", "1GB")
    assert code == 2
    assert "--memory does nothing with --no-verify" in err
