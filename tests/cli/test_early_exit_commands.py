"""`early-exit` and `plan early-exit` hand their options to the API by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from adaconvert.arch.exits import KINDS
from adaconvert.cli.early_exit import early_exit
from adaconvert.cli.plan import _RUN_ONLY, plan_early_exit
from adaconvert.methods.early_exit.config import EarlyExitOptions
from adaconvert.modeling.adaptive_exit_schema import KV, MEASURES
from adaconvert.testing.tiny_models import make

Run = Callable[..., tuple[int, str, str]]


def _defaults(command: click.Command) -> dict[str, Any]:
    # click keeps the help option of the first context it sees
    names = {"help_option_names": ["-h", "--help"]}
    given = command.make_context(str(command.name), ["SRC", "DST"], **names).params
    return {name: given[name] for name in given if name not in ("source", "destination")}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def test_early_exit_hands_over_every_option(api: Any, run: Run) -> None:
    given = {
        "exits": "8,16",
        "every": "L/8",
        "head": "norm",
        "measure": "entropy",
        "threshold": 0.5,
        "patience": 2,
        "decay_length": 64,
        "kv": "propagate",
        "draft_exit": 8,
        "draft_tokens": 4,
        "draft_threshold": 0.3,
        "draft_vocab": "8k",
        "draft_data": "a.txt",
        "draft_data_field": "body",
        "max_shard_size": "1GB",
        "revision": "main",
        "memory": "2GB",
    }
    flags = ("--tie-heads", "--confidence", "--adaptive")
    names = {field.name for field in fields(EarlyExitOptions)}
    assert names - set(given) <= {_name(flag) for flag in flags}
    flags += ("--overwrite", "--resume", "--ignore-unindexed", "--allow-nonfinite")
    words = [word for name, value in given.items() for word in (_flag(name), str(value))]
    code, _, err = run("early-exit", "a", "out", *words, *flags)
    assert (code, err) == (0, "")
    name, args, kwargs = api.calls.pop()
    assert (name, args) == ("convert", ("a",))
    assert kwargs == {
        **given,
        **dict.fromkeys(map(_name, flags), True),
        "destination": "out",
        "method": "early-exit",
        "keep_config": (),
        "verify": True,
        "probe": None,
        "progress": True,
    }


@pytest.mark.parametrize("destination", [(), ("out",)])
def test_plan_takes_the_arguments_of_early_exit(
    destination: tuple[str, ...], api: Any, run: Run
) -> None:
    given = ("plan", "early-exit", "a", *destination, "--exits", "4", "--no-verify")
    assert run(*given)[0] == 0
    name, args, kwargs = api.calls.pop()
    assert (name, args) == ("plan", ("a",))
    assert (kwargs["method"], kwargs["exits"]) == ("early-exit", "4")
    assert not set(kwargs) & set(_RUN_ONLY)


def test_defaults_and_choices_are_those_of_the_method() -> None:
    given = _defaults(early_exit)
    for field in fields(EarlyExitOptions):
        assert given[field.name] == field.default, field.name
    choices = {
        param.name: tuple(param.type.choices)
        for param in early_exit.params
        if isinstance(param.type, click.Choice)
    }
    assert {name: set(found) for name, found in choices.items()} == {
        "head": set(KINDS),
        "measure": set(MEASURES),
        "kv": set(KV),
    }


@pytest.mark.parametrize("command", [early_exit, plan_early_exit])
def test_every_option_is_a_keyword_of_the_api(command: click.Command) -> None:
    from adaconvert.api import converting

    known = {field.name for field in fields(EarlyExitOptions)} | {"as_json"}
    assert set(_defaults(command)) - known <= set(inspect.signature(converting.convert).parameters)


@pytest.mark.smoke
def test_from_dense_to_exits_and_proof(run: Run, tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense", layers=4), tmp_path / "out"
    given = ("--every", "L/2", "--draft-tokens", "4")
    code, text, err = run("plan", "early-exit", str(source), *given)
    assert (code, err) == (0, "")
    assert "to adaptive_llama: exact (no exit is taken as written)" in text
    assert "drafting one at a time is faster than plain decoding only where it is" in text
    assert not out.exists()
    code, text, _ = run("early-exit", str(source), str(out), *given, "--json", "-q")
    assert code == 0
    found = json.loads(text)
    assert found["verification"]["ok"] is True
    assert found["plan"]["options"]["exits"] == "2"
    code, text, _ = run("inspect", str(out))
    assert code == 0
    assert "exits after 2 of 4 blocks, head mlp, none taken as configured, drafts from 2" in text
    code, text, _ = run("verify", str(source), str(out))
    assert code == 0
    assert "verdict      ok" in text
    text = (out / "README.md").read_text()
    assert "early exits after 2 blocks, with a norm, an output matrix and a branch" in text
    assert "generate(**inputs, draft_exit=2)" in text


def test_the_stock_form_says_how_it_drafts(run: Run, tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense"), tmp_path / "out"
    code, text, err = run("early-exit", str(source), str(out), "--exits", "1", "--head", "shared")
    assert (code, err) == (0, "")
    assert "early-exit to llama: exact" in text
    text = (out / "README.md").read_text()
    assert "assistant_early_exit=1)   # stock transformers, one sequence at a time" in text
    assert "trust_remote_code" not in text
    # what is trained further keeps how it drafts
    assert run("card", str(out))[0] == 0
    assert (out / "README.md").read_text() == text


def test_refusals_name_the_option(run: Run, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    for words, said in (
        (("--exits", "3"), "--exits: the model has 2 blocks"),
        (("--exits", "1", "--threshold", "2"), "--threshold: out of range; expected 0"),
        ((), "--exits: say where the exits lie, in one way"),
    ):
        code, _, err = run("early-exit", str(source), str(tmp_path / "out"), *words)
        assert code == 2
        assert said in err
    bare = make("bert", tmp_path / "bare", architecture="BertModel")
    code, _, err = run("early-exit", str(bare), str(tmp_path / "out"), "--exits", "1")
    assert code == 3
    assert "cannot have exits: BertModel has no head whose result an exit could give early" in err
    assert not (tmp_path / "out").exists()
