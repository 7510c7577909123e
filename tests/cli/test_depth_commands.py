"""`depth` and `plan depth` hand their options to the API by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from adaconvert.cli.depth import depth
from adaconvert.cli.plan import _RUN_ONLY, plan_depth
from adaconvert.methods.depth.config import (
    FITNESS,
    KINDS,
    SEARCHES,
    SHARINGS,
    STARTS,
    DepthOptions,
)
from adaconvert.testing.tiny_models import make

Run = Callable[..., tuple[int, str, str]]


def _defaults(command: click.Command) -> dict[str, Any]:
    names = {"help_option_names": ["-h", "--help"]}
    given = command.make_context(str(command.name), ["SRC", "DST"], **names).params
    return {name: given[name] for name in given if name not in ("source", "destination")}


def test_depth_hands_over_every_option(api: Any, run: Run) -> None:
    given = {
        "kind": "recursive",
        "keep": 24,
        "compute": 0.5,
        "drop": "1,2",
        "search": "evolve",
        "fitness": "loss",
        "generations": 3,
        "offspring": 4,
        "layers": "3,5",
        "every": 2,
        "kv": "skip",
        "adapter_width": 8,
        "router_width": 16,
        "capacity": 0.25,
        "predictor": "router",
        "gate": 0.5,
        "loops": 3,
        "sharing": "middle-sequence",
        "start": "stepwise",
        "rank": "full",
        "seed": 5,
        "device": "cpu",
        "data": "a.txt",
        "data_field": "body",
        "data_split": "train",
        "data_tokens": 64,
        "data_length": 32,
    }
    words = [w for name, value in given.items() for w in (f"--{name.replace('_', '-')}", value)]
    code, _, _ = run("depth", "SRC", "DST", *map(str, words))
    assert code == 0
    (name, sources, settings) = api.calls[0]
    assert (name, sources) == ("convert", ("SRC",))
    assert settings["method"] == "depth"
    assert {name: settings[name] for name in given} == given
    assert set(given) == {field.name for field in fields(DepthOptions)} - {"found"}


@pytest.mark.parametrize("command", [depth, plan_depth])
def test_defaults_and_choices_are_those_of_the_method(command: click.Command) -> None:
    own = {field.name: field.default for field in fields(DepthOptions) if field.name != "found"}
    said = _defaults(command)
    assert {name: said[name] for name in own} == own
    choices = {p.name: tuple(p.type.choices) for p in command.params if hasattr(p.type, "choices")}
    assert choices["kind"] == KINDS
    assert choices["search"] == SEARCHES
    assert choices["fitness"] == FITNESS
    assert choices["sharing"] == SHARINGS
    assert choices["start"] == STARTS


def test_plan_takes_the_options_of_the_run(api: Any, run: Run) -> None:
    code, _, _ = run("plan", "depth", "SRC", "DST", "--drop", "1", "--overwrite")
    assert code == 0
    assert api.calls[0][:2] == ("plan", ("SRC",))
    assert not set(_RUN_ONLY) & set(api.calls[0][2])


def test_from_the_command_line_to_a_checkpoint(run: Run, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "src", layers=4)
    code, out, _ = run("plan", "depth", str(source), "--compute", "0.8")
    assert code == 0
    assert "drops block 2 of 0 to 3" in out
    code, out, _ = run("depth", str(source), str(tmp_path / "out"), "--drop", "0,3", "--json")
    assert code == 0
    assert json.loads(out)["plan"]["options"]["blocks"] == [0, 3]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_blocks_share_matrices_from_the_command_line(run: Run, tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "src", layers=4), tmp_path / "out"
    asked = ("--kind", "recursive", "--loops", "2", "--rank", "4", "--sharing", "sequence")
    code, planned, _ = run("plan", "depth", str(source), *asked)
    assert code == 0
    assert "2 groups of 2 blocks share their matrices" in planned
    code, said, _ = run("depth", str(source), str(out), *asked, "--start", "upper", "--json")
    assert code == 0
    options = json.loads(said)["plan"]["options"]
    assert {name: options[name] for name in ("loops", "rank", "sharing", "start")} == {
        "loops": 2,
        "rank": "4",
        "sharing": "sequence",
        "start": "upper",
    }
    recursion = json.loads((out / "config.json").read_text())["adaptive"]["model"]["recursion"]
    assert recursion["base"] == [0, 0, 2, 2]
    assert recursion["rank"] == 4
    code, said, _ = run("verify", str(source), str(out))
    assert code == 0
    assert "needs-training (measured)" in said
    code, said, _ = run("inspect", str(out))
    assert code == 0
    assert "blocks share matrices (0 and 1; 2 and 3), with residuals of rank 4" in said


def test_loops_that_do_not_divide_are_refused(run: Run, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "src", layers=4)
    asked = ("--kind", "recursive", "--loops", "3")
    code, _, err = run("depth", str(source), str(tmp_path / "out"), *asked)
    assert code == 2
    assert "--loops" in err
    assert "2 or 4" in err
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said(run: Run, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "src", layers=4)
    code, _, err = run("depth", str(source), str(tmp_path / "out"), "--drop", "4")
    assert code == 2
    assert "blocks 0 to 3" in err
    assert not (tmp_path / "out").exists()
