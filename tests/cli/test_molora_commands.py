"""`molora` and `plan molora` hand their options to the API by name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from adaconvert.cli.molora import molora
from adaconvert.cli.plan import _RUN_ONLY, plan_molora
from adaconvert.methods.molora.config import READS, RULES, MoloraOptions
from adaconvert.testing.tiny_models import make

Run = Callable[..., tuple[int, str, str]]
#: options that have a list of values.
SEVERAL = {"adapters": "--from", "data": "--data"}


def _defaults(command: click.Command) -> dict[str, Any]:
    # click keeps the help option of the first context it sees
    names = {"help_option_names": ["-h", "--help"]}
    given = command.make_context(str(command.name), ["SRC", "DST"], **names).params
    return {name: given[name] for name in given if name not in ("source", "destination")}


def test_molora_hands_over_every_option(api: Any, run: Run, tmp_path: Path) -> None:
    given = {
        "experts": 4,
        "rank": 2,
        "alpha": 8.0,
        "target_modules": "q_proj,v_proj",
        "routing": "topk",
        "k": 3,
        "p": 0.5,
        "router": "per-layer",
        "experts_kind": "ia3",
        "share": "a",
        "dropout": 0.1,
        "data_field": "body",
        "gate_steps": 7,
        "target": "mixtral",
        "top_k": 2,
        "base": "org/name",
        "device": "cpu",
        "work": "kept",
        "seed": 7,
        "max_shard_size": "1GB",
        "revision": "main",
        "memory": "2GB",
    }
    flags = ("--renormalize", "--subtract-mean", "--standalone", "--as-plain-lora", "--as-moe")
    flags += ("--overwrite", "--resume", "--ignore-unindexed", "--allow-nonfinite")
    names = {field.name for field in fields(MoloraOptions)}
    assert names - set(given) - set(SEVERAL) <= {_name(flag) for flag in flags}
    words = [word for name, value in given.items() for word in (_flag(name), str(value))]
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        words += ["--from", str(tmp_path / folder), "--data", f"{folder}.txt"]
    code, _, err = run("molora", "a", "out", *words, *flags)
    assert (code, err) == (0, "")
    name, args, kwargs = api.calls.pop()
    assert (name, args) == ("convert", ("a",))
    assert kwargs == {
        **given,
        **dict.fromkeys(map(_name, flags), True),
        "adapters": (str(tmp_path / "x"), str(tmp_path / "y")),
        "data": ("x.txt", "y.txt"),
        "destination": "out",
        "method": "molora",
        "keep_config": (),
        "verify": True,
        "probe": None,
        "progress": True,
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


@pytest.mark.parametrize("destination", [(), ("out",)])
def test_plan_takes_the_arguments_of_molora(
    destination: tuple[str, ...], api: Any, run: Run
) -> None:
    given = ("plan", "molora", "a", *destination, "--rank", "4", "--no-verify")
    assert run(*given)[0] == 0
    name, args, kwargs = api.calls.pop()
    assert (name, args) == ("plan", ("a",))
    assert (kwargs["method"], kwargs["rank"]) == ("molora", 4)
    assert not set(kwargs) & set(_RUN_ONLY)


def test_defaults_and_choices_are_those_of_the_method() -> None:
    given = _defaults(molora)
    for field in fields(MoloraOptions):
        assert given[field.name] == field.default, field.name
    choices = {
        param.name: tuple(param.type.choices)
        for param in molora.params
        if isinstance(param.type, click.Choice)
    }
    assert choices == {
        "routing": tuple(RULES),
        "router": tuple(READS),
        "experts_kind": ("lora", "ia3"),
        "share": ("a",),
    }


@pytest.mark.parametrize("command", [molora, plan_molora])
def test_every_option_is_a_keyword_of_the_api(command: click.Command) -> None:
    from adaconvert.api import converting

    known = {field.name for field in fields(MoloraOptions)} | {"as_json"}
    assert set(_defaults(command)) - known <= set(inspect.signature(converting.convert).parameters)


@pytest.mark.smoke
def test_from_source_to_folder_to_checkpoint(run: Run, tmp_path: Path) -> None:
    source, out, whole = make("llama", tmp_path / "dense"), tmp_path / "out", tmp_path / "whole"
    given = ("--experts", "2", "--rank", "2", "--target-modules", "q_proj,v_proj")
    code, text, err = run("plan", "molora", str(source), *given)
    assert (code, err) == (0, "")
    assert "to a PEFT folder, MOLORA: exact" in text
    assert not out.exists()
    code, text, _ = run("molora", str(source), str(out), *given, "--json", "-q")
    assert code == 0
    assert json.loads(text)["verification"]["ok"] is True
    names = {"README.md", "adaconvert.json", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    code, text, _ = run("verify", str(source), str(out))
    assert code == 0
    code, text, err = run("molora", str(out), str(whole), "--standalone")
    assert (code, err) == (0, "")
    assert "verdict      ok" in text
    assert run("verify", str(out), str(whole))[0] == 0


def test_refusals_name_the_option(run: Run, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    code, _, err = run("molora", str(source), str(tmp_path / "out"), "--target-modules", "q_porj")
    assert code == 2
    assert "--target-modules: 'q_porj' is the end of no linear's path" in err
    assert "Did you mean q_proj" in err
    code, _, err = run("molora", str(source), str(tmp_path / "out"), "--rank", "0")
    assert code == 2
    assert "--rank: out of range; expected 1 to" in err
    assert not (tmp_path / "out").exists()


def test_what_is_read_is_not_replaced(run: Run, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    assert run("moefy", str(make("llama", tmp_path / "dense")), str(base), "-q")[0] == 0
    given = ("--experts", "2", "--rank", "2", "--target-modules", "q_proj", "-q")
    assert run("molora", str(base), str(out), *given)[0] == 0
    plain = tmp_path / "plain"
    assert run("molora", str(out), str(plain), "--as-plain-lora", "-q")[0] == 0
    kept = {path: path.read_bytes() for folder in (base, plain) for path in folder.iterdir()}
    for words in (
        ("molora", str(out), str(base), "--standalone", "--overwrite"),
        ("molora", str(out), str(base / "inside"), "--standalone"),
        ("molora", str(base), str(plain), "--from", str(plain), "--overwrite"),
        ("molora", str(base), str(plain / "inside"), "--from", str(plain)),
    ):
        code, _, err = run(*words)
        assert code == 4
        assert "the source" in err
    assert {
        path: path.read_bytes() for folder in (base, plain) for path in folder.iterdir()
    } == kept
