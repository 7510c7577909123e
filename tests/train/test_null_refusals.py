"""Budgets of null experts that a fine-tune refuses before it begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import OptionError
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]


@pytest.fixture
def train(tune: Tune, tmp_path: Path) -> Tune:
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat on the mat " * 40}))
    return lambda source, **options: tune(source, "out", data=[str(text)], **options)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"target_compute": 2.5}, r"--target-compute: cannot be reached .* 0 to 2, found 2\.5"),
        ({"layer_budget": "0=2.1"}, r"--layer-budget, layer 0: cannot be reached .* 0 to 2"),
        ({"layer_budget": "5=0.5"}, r"--layer-budget: names no layer with null experts"),
        ({"layer_budget": "half"}, r"--layer-budget: is no budget of layers"),
        ({"target_compute": -0.1}, r"--target-compute: is out of range"),
        ({"target_compute": 0.7, "compute": 0.5}, r"--target-compute: cannot .* with --compute"),
        (
            {"layer_budget": "0=0.5", "select": "rule=all"},
            r"--layer-budget: cannot be combined with --select",
        ),
        ({"compute_ramp": 0.5}, r"--compute-ramp: does nothing without --target-compute"),
        ({"target_compute": 0.7, "compute_ramp": 2}, r"--compute-ramp: is out of range"),
        ({"target_compute": 0.7, "null_rate": -1}, r"--null-rate: is out of range"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    options: dict[str, Any], what: str, nulled: Path, train: Tune, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=what):
        train(nulled, **options)
    assert not (tmp_path / "out").exists()


def test_the_least_share_is_said_too(stock: Path, train: Tune, tmp_path: Path) -> None:
    source = make_nulled(stock, tmp_path / "forced", min_real=1)
    with pytest.raises(OptionError, match=r"cannot be reached .* 0\.5 to 2, found 0\.3"):
        train(source, target_compute=0.3)


def test_models_without_null_experts_have_no_budget(
    stock: Path, dense: Path, adaptive: Path, train: Tune
) -> None:
    for source in (stock, dense, adaptive):
        for options in ({"target_compute": 0.7}, {"layer_budget": "0=0.5"}):
            with pytest.raises(OptionError, match="the checkpoint has no null experts"):
                train(source, **options)
