"""`finetune` of classifiers with exits: what is refused, and what a run that fails leaves."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import (
    AdaconvertError,
    DataError,
    InterruptedRunError,
    OptionError,
    OutputConflictError,
    SourceError,
    TrainingError,
)
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.testing.labelled import written

from .conftest import tune_exits

UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"lm": 0.5}, "--lm"),
    ({"distill": 1.0}, "--distill"),
    ({"temperature": 2.0}, "--temperature"),
    ({"select": "rule=all"}, "--select"),
    ({"compute": 0.5}, "--compute"),
    ({"checkpointing": True}, "--checkpointing"),
    ({"router_lr": 1e-3}, "--router-lr"),
    ({"sparsity": 0.1}, "--sparsity"),
    ({"balance": 0.1}, "--balance"),
    ({"lora": 2}, "--lora"),
    ({"compile": True}, "--compile"),
    ({"streaming": True}, "--streaming"),
    ({"messages_field": "talk"}, "--messages-field"),
    ({"data_format": "messages"}, "--data-format messages"),
    ({"exit_loss": "kd"}, "--exit-loss"),
    ({"exit_weights": "linear"}, "--exit-weights"),
    ({"exit_layers": "1"}, "--exit-layers"),
    ({"layer_dropout": 0.1}, "--layer-dropout"),
    ({"save_every": 2}, "--save-every"),
    ({"precision": "fp64"}, "--precision fp64"),
    ({"dry_run": True}, "--dry-run"),
    ({"memory": "1GB"}, "--memory"),
    ({"log_dir": "logs"}, "--log-dir"),
]


@pytest.mark.parametrize(("options", "where"), UNFIT, ids=lambda value: str(value)[:30])
def test_options_of_language_models_are_refused_by_name(
    options: dict[str, Any], where: str, exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    message = f"{where}: cannot be used to train the exits of a classifier"
    with pytest.raises(OptionError, match=message):
        tune_exits(exits, tmp_path / "out", data=data[0], **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"exit_objective": "ponder"}, OptionError, "no classifier of confidence, which it trains"),
        ({"exit_objective": "act"}, OptionError, "--exit-objective: is unknown"),
        ({"halting_prior": 0.5}, OptionError, "does nothing without --exit-objective ponder"),
        (
            {"exit_objective": "ponder", "halting_cost": 0.5},
            OptionError,
            "--halting-cost: does nothing without --exit-objective geometric",
        ),
        ({"objective_factor": -1.0}, OptionError, "--objective-factor: is out of range"),
        ({"train": "router"}, OptionError, "--train router: matches no parameter"),
        ({"train": r"confidence"}, OptionError, "--train confidence: matches no parameter"),
        ({"lr_of": "router=1e-3"}, OptionError, "matches nothing that is trained"),
        ({"label_field": "kind"}, DataError, "there is no field 'kind'"),
        ({"text_field": "kind"}, DataError, "there is no field 'kind'"),
        ({"lr": 1e30}, TrainingError, "is nan|is inf"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_is_said(
    options: dict[str, Any],
    error: type[AdaconvertError],
    message: str,
    exits: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        tune_exits(exits, tmp_path / "out", data=data[0], **options)
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_used(exits: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="shares of the data are for language models"):
        tune_exits(exits, out, data=f"{data[0]},2")
    strange = written(tmp_path / "strange.jsonl", [{"text": "a", "label": 2}])
    with pytest.raises(DataError, match="is no label of the model; expected 0 to 1"):
        tune_exits(exits, out, data=strange)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no labelled text"):
        tune_exits(exits, out, data=tmp_path / "empty.jsonl")
    assert not out.exists()


def test_other_models(data: tuple[Path, Path], tmp_path: Path, text: Path) -> None:
    bert = tiny_models.make(
        *("bert", tmp_path / "bert"), architecture="BertForSequenceClassification", num_labels=2
    )
    with pytest.raises(SourceError, match=r"no causal language model.*`adaconvert early-exit` has"):
        tune_exits(bert, tmp_path / "out", data=data[0], train="all")
    llama = tiny_models.make("llama", tmp_path / "llama", layers=3, max_shard_size="1GB")
    made = by_hand(llama, tmp_path / "exits", (1, 2), "norm")
    asked: list[tuple[str, object]] = [("exit_objective", "weighted"), ("label_field", "label")]
    for name, value in asked:
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(OptionError, match=f"{flag}: is for classifiers with exits"):
            tune_exits(made, tmp_path / "out", data=text, **{name: value})


def test_destinations_are_all_or_nothing(
    exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tune_exits(exits, out, data=data[0], steps=1)
    with pytest.raises(OutputConflictError, match="exists"):
        tune_exits(exits, out, data=data[0], steps=1)
    with pytest.raises(OutputConflictError, match="--resume: training of a classifier's exits"):
        tune_exits(exits, out, data=data[0], steps=1, resume=True)
    before = hashlib.sha256((out / "model.safetensors").read_bytes()).digest()
    tune_exits(exits, out, data=data[0], steps=2, overwrite=True)
    assert hashlib.sha256((out / "model.safetensors").read_bytes()).digest() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_it_leaves_nothing(
    exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    def interrupt(line: str) -> None:
        if line.startswith("step 10/"):
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="interrupted"):
        tune_exits(exits, tmp_path / "out", data=data[0], report=interrupt)
    assert list(tmp_path.iterdir()) == []
