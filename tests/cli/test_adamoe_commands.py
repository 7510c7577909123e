"""`adamoe` and `plan adamoe` hand their options to the API by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from adaconvert.arch.null_experts import KINDS
from adaconvert.cli.adamoe import adamoe
from adaconvert.cli.plan import _RUN_ONLY, plan_adamoe
from adaconvert.methods.adamoe import config
from adaconvert.testing.tiny_models import make

Run = Callable[..., tuple[int, str, str]]


def _defaults(command: click.Command) -> dict[str, Any]:
    # click keeps the help option of the first context it sees
    names = {"help_option_names": ["-h", "--help"]}
    given = command.make_context(str(command.name), ["SRC", "DST"], **names).params
    return {name: given[name] for name in given if name not in ("sources", "destination")}


def test_adamoe_hands_over_every_option(api: Any, run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("words")
    given = {
        "null_experts": 16,
        "top_k": 5,
        "null_kind": "constant",
        "null_init": "bias",
        "null_weights": "selected",
        "min_real": 1,
        "target_compute": 0.7,
        "layer_budget": "0-4=0.9,5-=0.6",
        "data": "text.jsonl",
        "data_field": "body",
        "data_split": "valid",
        "data_tokens": 999,
        "device": "cpu",
        "layers": "1-3",
        "via": "upcycle",
        "experts": 4,
        "base_top_k": 1,
        "granularity": 2,
        "shared_experts": "split",
        "shared_width": 8,
        "noise": 0.1,
        "drop": 0.5,
        "drop_index": "per-matrix",
        "router_init": "hidden",
        "router_prompts": str(prompts),
        "base": "a",
        "dtype": "bfloat16",
        "aux_loss_coef": 0.02,
        "num_experts": 8,
        "expert_width": 16,
        "split": "random",
        "matrices": "up",
        "target": "mixtral",
        "seed": 7,
        "max_shard_size": "1GB",
        "revision": "main",
        "memory": "2GB",
    }
    assert {field.name for field in fields(config.AdamoeConfig)} - set(given) == {"materialize"}
    words = [word for name, value in given.items() for word in (_flag(name), str(value))]
    flags = ("--materialize", "--overwrite", "--resume", "--ignore-unindexed", "--allow-nonfinite")
    code, _, err = run("adamoe", "a", "b", "out", *words, *flags, "--keep-config", "kept")
    assert (code, err) == (0, "")
    name, args, kwargs = api.calls.pop()
    assert (name, args) == ("convert", ("a", "b"))
    switched = dict.fromkeys(_name(flag) for flag in flags)
    assert kwargs == {
        **given,
        **dict.fromkeys(switched, True),
        "destination": "out",
        "method": "adamoe",
        "keep_config": ("kept",),
        "verify": True,
        "probe": None,
        "progress": True,
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@pytest.mark.parametrize("destination", [(), ("out",)])
def test_plan_takes_the_arguments_of_adamoe(
    destination: tuple[str, ...], api: Any, run: Run
) -> None:
    given = ("plan", "adamoe", "a", *destination, "--target-compute", "0.5", "--no-verify")
    assert run(*given)[0] == 0
    name, args, kwargs = api.calls.pop()
    assert (name, args) == ("plan", ("a",))
    assert (kwargs["method"], kwargs["target_compute"]) == ("adamoe", 0.5)
    assert not set(kwargs) & set(_RUN_ONLY)


def test_defaults_and_choices_are_those_of_the_method() -> None:
    given = _defaults(adamoe)
    for field in fields(config.AdamoeConfig):
        assert given[field.name] == field.default, field.name
    choices = {
        param.name: tuple(param.type.choices)
        for param in adamoe.params
        if isinstance(param.type, click.Choice)
    }
    assert choices == {"null_kind": KINDS, **config._CHOICES}


@pytest.mark.parametrize("command", [adamoe, plan_adamoe])
def test_every_option_is_a_keyword_of_the_api(command: click.Command) -> None:
    from adaconvert.api import converting

    known = {field.name for field in fields(config.AdamoeConfig)} | {"as_json"}
    assert set(_defaults(command)) - known <= set(inspect.signature(converting.convert).parameters)


def test_no_option_is_taken_that_another_makes_meaningless(api: Any, run: Run) -> None:
    code, _, err = run("adamoe", "a", "b", "--no-verify", "--memory", "1GB")
    assert code == 2
    assert "--memory does nothing with --no-verify" in err


@pytest.mark.smoke
def test_from_source_to_checkpoint_and_back_to_stock(run: Run, tmp_path: Path) -> None:
    source, out, stock, again = (str(tmp_path / n) for n in ("moe", "out", "stock", "again"))
    make("mixtral", Path(source))
    code, text, _ = run("adamoe", source, out, "--null-weights", "selected", "--json", "-q")
    assert code == 0
    assert json.loads(text)["plan"]["exactness"]["kind"] == "exact"
    code, text, _ = run("adamoe", out, stock, "--materialize")
    assert code == 0
    assert "verdict      ok" in text
    assert json.loads((Path(stock) / "config.json").read_text())["num_local_experts"] == 8
    code, text, _ = run("inspect", out)
    assert code == 0
    assert "2 blocks of 4 experts top-2 and 4 null ones" in text
    assert run("verify", source, out)[0] == 0
    code, _, err = run("adamoe", out, again)
    assert code == 3
    assert "has null experts already" in err
    code, _, err = run("adamoe", source, again, "--target-compute", "9")
    assert code == 2
    assert "expected 0.5 to 2, found 9" in err
    code, _, err = run("unmoefy", out, again)
    assert code == 3
    assert "is a mixture with null experts" in err


def test_help_says_what_it_is(run: Run) -> None:
    code, text, _ = run("adamoe", "--help")
    assert code == 0
    assert "null experts, so that easy tokens run fewer real" in " ".join(text.split())
