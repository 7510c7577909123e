"""What a card and `inspect` tell of early exits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.export.card_exits import exit_words, found_exits, stock_draft
from adaconvert.export.card_stages import Stage
from adaconvert.testing.exits_by_hand import exits_of
from adaconvert.testing.tiny_models import make


def config_with(content: Any) -> dict[str, Any]:
    """Return a config.json with these exits."""
    return {"adaptive": {"sites": {}, "model": {"exits": content}}}


def stage(method: str, **options: Any) -> Stage:
    """Return a stage of a card."""
    return Stage(method=method, options=options, sources=({"label": "dense"},), training={})


@pytest.mark.parametrize(
    ("kind", "tie", "words"),
    [
        ("shared", False, "nothing of their own"),
        ("affine", False, "an affine map"),
        ("norm", True, "a norm"),
        ("norm", False, "a norm and an output matrix"),
        (
            "full",
            False,
            "a norm, an output matrix, a branch of its block's feed-forward network and a block",
        ),
    ],
)
def test_words_of_every_kind(kind: str, tie: bool, words: str) -> None:
    found = exit_words(config_with(exits_of("llama", [1, 2], kind, tie=tie)))
    assert found == f"early exits after 1 and 2 blocks, with {words}"


def test_what_cannot_be_read_is_left_out() -> None:
    assert found_exits({}) is None
    assert found_exits(config_with({"heads": 3})) is None
    assert exit_words(config_with(None)) == ""


def test_a_stock_draft_outlives_training_alone() -> None:
    made = stage("early-exit", exits="8,16", draft_exit=None)
    assert stock_draft([made]) == 8
    assert stock_draft([stage("early-exit", exits="8,16", draft_exit=16)]) == 16
    assert stock_draft([made, stage("finetune")]) == 8
    assert stock_draft([made, stage("upcycle")]) is None
    assert stock_draft([stage("upcycle")]) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "As configured no exit is taken"),
        (
            {"threshold": 0.9, "measure": "difference"},
            "As configured it leaves where `difference` is above 0.9, by exit.",
        ),
        (
            {"every": "1", "exits": None, "measure": "patience", "patience": 1},
            "As configured a text leaves once 1 exits in a row agree.",
        ),
    ],
)
def test_a_card_says_when_tokens_leave(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense", layers=3), tmp_path / "out"
    options: dict[str, Any] = {"method": "early-exit", "exits": "1", "verify": False, **given}
    api.convert(source, destination=out, **options)
    text = (out / "README.md").read_text()
    assert said in text
    assert "- early-exit\n- adaptive-compute\n" in text
    assert "## Leaving early" in text
    assert "model.set_exits(thresholds=None)" in text
    # made again from the folder alone
    api.card(out)
    assert (out / "README.md").read_text() == text


def test_inspect_names_them(tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense", layers=3), tmp_path / "out"
    given: dict[str, Any] = {"method": "early-exit", "exits": "1,2", "verify": False}
    api.convert(source, destination=out, head="affine", threshold=0.5, draft_tokens=4, **given)
    line = api.inspect(out).lines()[0]
    assert line.endswith(
        "adaptive: exits after 1, 2 of 3 blocks, head affine, taken by max, drafts from 1"
    )
    found: Any = api.inspect(out).to_json()
    assert found["adaptive"] is True
    assert found["problems"] == []
    # one tensor of an exit is gone
    config = json.loads((out / "config.json").read_text())
    config["adaptive"]["model"]["exits"]["heads"][0]["confidence"] = True
    (out / "config.json").write_text(json.dumps(config))
    problems = api.inspect(out).problems
    assert "exits.1.confidence.weight" in problems[0]
