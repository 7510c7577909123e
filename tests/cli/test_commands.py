"""Each verb hands its options to the API by name, and prints what comes back."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from adaconvert.cli import plan as plan_module
from adaconvert.cli.main import VERBS, cli
from adaconvert.cli.upcycle import upcycle
from adaconvert.errors import SourceError, VerificationError

Run = Callable[..., tuple[int, str, str]]


def test_inspect_prints_lines(api: Any, run: Run) -> None:
    assert run("inspect", "org/name", "--revision", "abc") == (0, "first line\nsecond line\n", "")
    assert api.calls == [("inspect", ("org/name",), {"revision": "abc", "base": None})]


def test_json_is_one_sorted_document(api: Any, run: Run) -> None:
    code, out, err = run("inspect", "x", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"a": [2], "b": 1}
    assert out.index('"a"') < out.index('"b"')


def test_upcycle_hands_over_every_option(api: Any, run: Run, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("words")
    code, _, err = run(
        *("upcycle", "a", "b", "out", "--experts", "16", "--top-k", "4", "--target", "mixtral"),
        *("--granularity", "2", "--shared-experts", "split", "--shared-width", "96"),
        *("--layers", "4-20,22", "--noise", "0.1", "--drop", "0.5", "--drop-index", "per-matrix"),
        *("--router-init", "hidden", "--router-prompts", str(text), "--base", "a"),
        *("--dtype", "float32", "--aux-loss-coef", "0.001", "--seed", "7"),
        *("--max-shard-size", "1GB", "--revision", "main", "--overwrite", "--resume"),
        *("--verify", "--memory", "2GB", "--probe", str(text), "--allow-nonfinite"),
        *("--keep-config", "one", "--keep-config", "two", "--ignore-unindexed"),
    )
    assert (code, err) == (0, "")
    name, args, kwargs = api.calls.pop()
    assert (name, args) == ("convert", ("a", "b"))
    assert kwargs == {
        "destination": "out",
        "method": "upcycle",
        "experts": 16,
        "top_k": 4,
        "target": "mixtral",
        "granularity": 2,
        "shared_experts": "split",
        "shared_width": 96,
        "layers": "4-20,22",
        "noise": 0.1,
        "drop": 0.5,
        "drop_index": "per-matrix",
        "router_init": "hidden",
        "router_prompts": str(text),
        "base": "a",
        "dtype": "float32",
        "aux_loss_coef": 0.001,
        "seed": 7,
        "max_shard_size": "1GB",
        "revision": "main",
        "overwrite": True,
        "resume": True,
        "verify": True,
        "memory": "2GB",
        "probe": str(text),
        "allow_nonfinite": True,
        "keep_config": ("one", "two"),
        "ignore_unindexed": True,
        "progress": True,
    }


def test_verification_can_be_skipped(api: Any, run: Run) -> None:
    assert run("upcycle", "a", "b", "--no-verify")[0] == 0
    assert api.calls[0][2]["verify"] is False


def test_plan_takes_the_arguments_of_the_conversion(
    api: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    options = ("--experts", "4", "--overwrite", "--no-verify", "--memory", "1GB")
    assert run("plan", "upcycle", "src", "dst", *options)[0] == 0
    name, args, kwargs = api.calls.pop()
    assert (name, args, kwargs["experts"]) == ("plan", ("src",), 4)
    assert not set(kwargs) & {"overwrite", "resume", "verify", "memory", "probe", "destination"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (("src",), 1),
        (("missing",), 1),
        (("src", "other"), 2),
        (("src", "output"), 1),
        (("src", "empty"), 1),
        (("src", "src/moe"), 1),
        (("src", "org/name"), 2),
        (("src", "new"), 1),
        (("src", "./new/folder"), 1),
        (("src", "deep/er/new"), 1),
    ],
)
def test_plan_knows_a_destination_from_a_source(
    given: tuple[str, ...], kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    for name in ("other", "output", "empty"):
        (tmp_path / name).mkdir()
    for name in ("other", "output"):
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "output" / "adaconvert.json").write_text("{}")
    assert plan_module._without_destination(given) == given[:kept]


def test_verify_takes_sources_then_the_result(api: Any, run: Run) -> None:
    assert run("verify", "a", "b", "out", "--memory", "1GB", "-q")[0] == 0
    expected = {"memory": "1GB", "probe": None, "progress": False, "revision": None}
    assert api.calls == [("verify", ("a", "b", "out"), expected)]


def test_failed_verification_still_prints_its_report(api: Any, run: Run) -> None:
    api.error = VerificationError("logits differ from layer 3 on")
    api.error.report = api.result
    code, out, err = run("verify", "a", "out")
    assert (code, out) == (5, "first line\nsecond line\n")
    assert err == "error: logits differ from layer 3 on\n"


def test_failed_verification_without_a_report_is_one_line(api: Any, run: Run) -> None:
    api.error = VerificationError("no manifest", where="out")
    assert run("verify", "a", "out", "--json") == (5, "", "error: out: no manifest\n")


@pytest.mark.parametrize("place", ["before", "after"])
def test_quiet_stands_before_or_after_the_verb(api: Any, run: Run, place: str) -> None:
    arguments = ("-q", "upcycle", "a", "b") if place == "before" else ("upcycle", "a", "b", "-q")
    assert run(*arguments) == (0, "", "")
    assert api.calls[0][2]["progress"] is False


def test_quiet_keeps_what_was_asked_for(api: Any, run: Run) -> None:
    assert json.loads(run("upcycle", "a", "b", "-q", "--json")[1]) == api.result.data
    assert run("inspect", "a", "-q")[1] == "first line\nsecond line\n"


def test_hostile_text_is_shown_not_obeyed(api: Any, run: Run) -> None:
    api.result.text = ["a\x1b[31mred\x07", "b\u202eright to left", "tab\tstays"]
    assert run("inspect", "x")[1] == "a\\x1b[31mred\\x07\nb\\u202eright to left\ntab\tstays\n"
    api.error = SourceError("bad \x1b]0;title\x07", where="f")
    assert run("inspect", "x")[2] == "error: f: bad \\x1b]0;title\\x07\n"


def _defaults(command: click.Command) -> dict[str, Any]:
    """Return what the API gets when no option is given."""
    given = command.make_context(str(command.name), ["SRC", "DST"]).params
    return {name: given[name] for name in given if name not in ("sources", "destination")}


def test_defaults_are_those_of_the_method() -> None:
    from adaconvert.methods.upcycle.config import UpcycleConfig

    given = _defaults(upcycle)
    for field in fields(UpcycleConfig):
        assert field.name in given, f"no option for {field.name}"
        assert given[field.name] == field.default, field.name


def test_choices_are_those_of_the_method() -> None:
    from adaconvert.methods.upcycle import config

    choices = {
        param.name: tuple(param.type.choices)
        for param in upcycle.params
        if isinstance(param.type, click.Choice)
    }
    assert choices == {
        "shared_experts": config.SHARED,
        "drop_index": config.DROP_INDEX,
        "router_init": config.ROUTER_INITS,
        "dtype": tuple(config.DTYPES),
    }


def test_every_option_is_a_keyword_of_the_api() -> None:
    from adaconvert import api
    from adaconvert.methods.upcycle.config import UpcycleConfig

    own = {field.name for field in fields(UpcycleConfig)}
    names = set(_defaults(upcycle)) - {"as_json"}
    assert names - own <= set(inspect.signature(api.convert).parameters)
    planned = names - own - set(plan_module._RUN_ONLY)
    assert planned <= set(inspect.signature(api.plan).parameters)


def test_run_options_have_the_defaults_of_the_api() -> None:
    from adaconvert import api

    given = _defaults(upcycle)
    for name, parameter in inspect.signature(api.convert).parameters.items():
        if name in given and parameter.default is not inspect.Parameter.empty:
            assert (given[name] or None) == (parameter.default or None), name


def test_lists_of_commands_say_what_the_commands_say() -> None:
    context = click.Context(cli)
    for name, verb in VERBS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert verb.summary.endswith(".")
        assert command.help, f"{name} has no help"
