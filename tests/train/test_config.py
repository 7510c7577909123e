"""Options are checked before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import OptionError
from adaconvert.train.config import DataSource, FinetuneConfig, Sparsity, parse_count


@pytest.mark.parametrize(
    ("text", "count"), [("2M", 2_000_000), ("1.5b", 1_500_000_000), ("500k", 500_000), (7, 7)]
)
def test_counts_have_units(text: str | int, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "M", "-3", "0", "1e6", "2 Mi", "1.5", "9" * 400])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"--tokens: is no count; expected a number such as 20M"):
        parse_count(text)


def test_weights_follow_the_last_comma() -> None:
    assert DataSource.parse("a.jsonl,2.5") == DataSource(where="a.jsonl", weight=2.5)
    assert DataSource.parse("a,b.jsonl") == DataSource(where="a,b.jsonl")
    with pytest.raises(OptionError, match="is no weight; expected a number above 0"):
        DataSource.parse("a.jsonl,0")


def test_paths_stay_out_of_what_is_recorded(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("")
    config = FinetuneConfig.of([str(file)], {"steps": 1, "teacher": str(tmp_path), "distill": 1.0})
    assert str(tmp_path.parent) not in str(config.to_json())


def test_home_folder_stays_out_of_what_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.jsonl").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert DataSource(where="~/mine/a.jsonl").label == "a.jsonl"
    assert DataSource(where="org/name").label == "org/name"


def test_one_text_is_a_list_of_one() -> None:
    given = {"steps": 1, "train": "router", "lr_of": "router=1e-3", "report_to": "tensorboard"}
    config = FinetuneConfig.of(["a"], given)
    assert (config.train, config.lr_of, config.report_to) == (
        *(("router",), ("router=1e-3",)),
        ("tensorboard",),
    )


def test_selections_are_those_of_evaluate() -> None:
    config = FinetuneConfig.of(["a"], {"steps": 1, "select": "rule=top-k,k=24"})
    assert config.select == {"rule": "top-k", "k": 24}
    with pytest.raises(OptionError, match="--select 'rule=best': has no known rule"):
        FinetuneConfig.of(["a"], {"steps": 1, "select": "rule=best"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tokens: give either tokens or steps"),
        ({"tokens": 1, "steps": 1}, "--tokens: give either tokens or steps"),
        ({"steps": 1, "seq_len": 1}, "--seq-len: is out of range; expected 2 or more, found 1"),
        ({"steps": 1, "lr": 0.0}, "--lr: is out of range; expected above 0"),
        ({"steps": 1, "lr": float("nan")}, "--lr: is out of range"),
        ({"steps": 1, "warmup": 1.5}, "--warmup: is out of range; expected 0 to 1"),
        ({"steps": 1, "schedule": "wsd"}, "expected cosine or linear or constant, found wsd"),
        ({"steps": 1, "lm": 0.0}, "with --lm 0 there must be --distill"),
        ({"steps": 1, "teacher": "x"}, "a teacher does nothing without --distill"),
        ({"steps": 1, "train": ("(",)}, "is no regular expression"),
        ({"steps": 1, "sparsity": -1.0}, "--sparsity: is out of range; expected 0 or more"),
        ({"steps": 1, "activation": "gelu"}, "--activation: is unknown; expected keep or relu"),
        ({"steps": 1, "select": "rule=all", "compute": 0.5}, "cannot be combined with --select"),
        ({"steps": 1, "speed": 1}, "speed: is no option of a fine-tune; expected accumulate"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        FinetuneConfig.of(["a.jsonl"], options)
    assert message in str(caught.value)


def test_budget_is_rounded_up_to_whole_steps() -> None:
    config = FinetuneConfig.of(["a"], {"tokens": "10k", "seq_len": 64, "batch_size": 4})
    assert config.total_steps == 40
    # a fifth, on a log step
    assert config.save_steps == 10


def test_penalty_grows_as_its_ramp_says() -> None:
    at = {
        ramp: [Sparsity(coefficient=2.0, ramp=ramp).at(step, 4) for step in range(4)]
        for ramp in ("constant", "linear", "warm-up")
    }
    assert at["constant"] == [2, 2, 2, 2]
    assert at["linear"] == [0.5, 1, 1.5, 2]
    assert at["warm-up"] == [1, 2, 2, 2]
