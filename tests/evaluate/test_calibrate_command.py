"""`adaconvert calibrate` hands its options to the API by name, and refuses malformed ones."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import click
import pytest

from adaconvert import api
from adaconvert.cli.calibrate import calibrate
from adaconvert.cli.main import run
from adaconvert.evaluate.calibration_data import Reading
from adaconvert.evaluate.calibration_settings import SEARCHES, CalibrationSettings
from adaconvert.evaluate.knob_groups import KNOBS


class Said:
    """What the API returns."""

    def to_json(self) -> dict[str, object]:
        return {"chosen": 1}

    def lines(self) -> list[str]:
        return ["a table"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stub(*args: Any, **kwargs: Any) -> Said:
        found.append((args, kwargs))
        return Said()

    monkeypatch.setattr(api, "calibrate", stub)
    return found


def test_every_option_arrives_under_its_name(
    calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        [
            *("calibrate", "ckpt", "--data", "a.jsonl", "--data", "b", "--field", "body"),
            *("--label-field", "class"),
            *("--split", "valid", "--max-documents", "9", "--max-tokens", "50", "--length", "16"),
            *("--seed", "3", "--max-loss-increase", "0.02", "--confidence", "0.9", "--clip", "1"),
            *("--unit", "block", "--rule", "dynamic-k", "--values", "1,0.1", "--per-layer"),
            *("--search", "evolve", "--generations", "5", "--offspring", "4", "--knob", "depth"),
            *("--measure", "entropy"),
            *("--device", "cpu", "--dtype", "float32", "--batch-size", "2"),
            *("--out", "dst", "--overwrite", "-q"),
        ]
    )
    assert (code, capsys.readouterr().out) == (0, "a table\n")
    ((args, kwargs),) = calls
    assert args == ("ckpt", "a.jsonl", "b")
    assert kwargs == {
        "field": "body",
        "label_field": "class",
        "split": "valid",
        "max_documents": 9,
        "max_tokens": 50,
        "length": 16,
        "seed": 3,
        "budget": None,
        "max_loss_increase": 0.02,
        "max_disagreement": None,
        "max_label_error": None,
        "max_label_error_increase": None,
        "confidence": 0.9,
        "clip": 1.0,
        "unit": "block",
        "rules": ("dynamic-k",),
        "values": (1.0, 0.1),
        "per_layer": True,
        "search": "evolve",
        "generations": 5,
        "offspring": 4,
        "knob": "depth",
        "measure": "entropy",
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 2,
        "destination": "dst",
        "overwrite": True,
        "progress": False,
    }


@pytest.mark.parametrize("name", ["max_label_error", "max_label_error_increase"])
def test_limits_on_labels_arrive(calls: list[Any], name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert run(["calibrate", "ckpt", "--data", "a", flag, "0.1", "-q"]) == 0
    given = calls[0][1]
    assert (given[name], given["label_field"]) == (0.1, None)
    own = {key: value for key, value in given.items() if key not in {"destination", "overwrite"}}
    settings = CalibrationSettings.of(["a"], own)
    assert settings.of_labels == flag
    assert settings.reading.label_field == "label"


def test_json(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", "ckpt", "--data", "a", "--budget", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"chosen": 1}
    assert calls[0][1]["budget"] == 0.5


def test_choices_are_those_of_the_settings() -> None:
    choices = {p.name: p.type.choices for p in calibrate.params if isinstance(p.type, click.Choice)}
    assert tuple(choices["search"]) == SEARCHES
    assert tuple(choices["knob"]) == KNOBS


def test_options_and_defaults_are_those_of_the_settings() -> None:
    known = {
        field.name: field.default for field in (*fields(CalibrationSettings), *fields(Reading))
    }
    for option in calibrate.params:
        name = option.name
        if name in {
            "checkpoint",
            "data",
            "destination",
            "overwrite",
            "as_json",
            "verbose",
            "quiet",
        }:
            continue
        assert name in known
        if name not in {"rules", "values", "per_layer"}:
            assert option.default == known[name] or known[name] is None, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0.5"], "Missing option '--data'"),
        (["--data", "a", "--rule", "best"], "'best' is not one of"),
        (["--data", "a", "--values", "1,x"], "'1,x' is no list of numbers"),
        (["--data", "a", "--rule", "top-p", "--values", ""], "'' is no list of numbers"),
        (["--data", "a", "--unit", "word"], "'word' is not one of"),
    ],
)
def test_malformed_options(
    calls: list[Any], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["calibrate", "ckpt", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert calls == []
