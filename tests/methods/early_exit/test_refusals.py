"""What `early-exit` refuses, with the exit code and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.errors import AdaconvertError, OptionError, SourceError
from adaconvert.methods.early_exit.config import EarlyExitOptions
from adaconvert.testing.tiny_models import make


def refused(source: Path, folder: Path, **options: Any) -> AdaconvertError:
    """Return what converting raises; nothing is left behind."""
    with pytest.raises(AdaconvertError) as caught:
        api.convert(source, destination=folder / "out", method="early-exit", **options)
    assert not (folder / "out").exists()
    return caught.value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--exits: say where the exits lie"),
        ({"exits": "1", "every": "2"}, "--exits: say where the exits lie"),
        ({"exits": "1;2"}, "--exits: cannot be read"),
        ({"every": "L/x"}, "--every: cannot be read"),
        ({"every": "0"}, "--every: cannot be read"),
        ({"exits": "1", "head": "none"}, "--head: unknown choice"),
        ({"exits": "1", "threshold": 1.5}, "--threshold: out of range"),
        ({"exits": "1", "threshold": -0.1}, "--threshold: out of range"),
        ({"exits": "1", "measure": "state", "threshold": -1.5}, "--threshold: out of range"),
        ({"exits": "1", "threshold": float("nan")}, "--threshold: out of range"),
        ({"exits": "1", "measure": "classifier"}, "--measure: classifiers decide"),
        ({"exits": "1", "patience": 2}, "--patience: does nothing with --measure max"),
        ({"exits": "1", "decay_length": 8}, "--decay-length: does nothing with no --threshold"),
        ({"exits": "1", "head": "affine", "tie_heads": True}, "--tie-heads: does nothing"),
        ({"exits": "1", "adaptive": True}, "--adaptive: does nothing with --head mlp"),
        ({"exits": "1", "draft_data": "x.txt"}, "--draft-data: does nothing"),
        ({"exits": "1", "draft_data_field": "body"}, "--draft-data-field: does nothing"),
        ({"exits": "1", "draft_tokens": 0}, "--draft-tokens: out of range"),
        ({"exits": "1", "draft_vocab": "8q"}, "--draft-vocab: cannot be read"),
        ({"exits": "1", "draft_threshold": 2.0}, "--draft-threshold: out of range"),
    ],
)
def test_options_that_mean_nothing(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        EarlyExitOptions(**given)
    assert caught.value.describe().startswith(said)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"exits": "3"}, "--exits: the model has 2 blocks"),
        ({"exits": "2"}, "--exits: the model has 2 blocks, and an exit lies between two of them"),
        ({"exits": "0"}, "--exits: the model has 2 blocks"),
        ({"exits": "1,1"}, "--exits: names an exit twice"),
        ({"every": "2"}, "--every: leaves no exit in a model of 2 blocks"),
        ({"exits": "1", "draft_exit": 2}, "--draft-exit: is no exit; expected 1"),
        ({"exits": "1", "draft_vocab": 400}, "--draft-vocab: is more tokens than the model has"),
        ({"exits": "1", "measure": "patience", "patience": 2}, "--patience: more exits must"),
    ],
)
def test_options_that_do_not_fit_the_model(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    error = refused(make("llama", tmp_path / "dense"), tmp_path, **given)
    assert isinstance(error, OptionError)
    assert error.describe().startswith(said)


def test_a_plan_refuses_what_a_run_refuses(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    with pytest.raises(OptionError, match="an exit lies between two of them"):
        api.plan(source, method="early-exit", exits="1,2")
    single = make("llama", tmp_path / "single", layers=1)
    with pytest.raises(OptionError, match="a model of several blocks"):
        api.plan(single, method="early-exit", exits="1")


def test_places_of_every_kind() -> None:
    def at(blocks: int, **given: str) -> tuple[int, ...]:
        return EarlyExitOptions(**given).places(blocks)  # type: ignore[arg-type]

    assert at(30, exits="8,4,29") == (4, 8, 29)
    assert at(32, every="L/8") == (4, 8, 12, 16, 20, 24, 28)
    assert at(30, every="L/4") == (8, 15, 22)
    assert at(30, every="10") == (10, 20)
    assert at(3, every="L/8") == (1, 2)
    assert EarlyExitOptions(exits=[8, 4]).exits == "8,4"  # type: ignore[arg-type]


def test_models_without_an_end_to_leave_by(tmp_path: Path) -> None:
    for name, said in (("BertModel", "no head whose result"), ("BertForMaskedLM", "has no head")):
        source = make("bert", tmp_path / name, architecture=name)
        error = refused(source, tmp_path, exits="1")
        assert isinstance(error, SourceError)
        assert "cannot have exits" in str(error)
        assert said in str(error)


def test_stock_classes_that_cannot_draft_are_named(tmp_path: Path) -> None:
    error = refused(make("gpt2", tmp_path / "dense"), tmp_path, exits="1", head="shared")
    assert "stock `assistant_early_exit` fails with gpt2" in str(error)
    assert "--adaptive" in str(error)


def test_networks_that_are_no_module_or_a_mixture_get_no_copy(tmp_path: Path) -> None:
    bert = make("bert", tmp_path / "bert", architecture="BertForSequenceClassification")
    error = refused(bert, tmp_path, exits="1")
    assert "have no feed-forward network of one module" in str(error)
    assert "or layer" in str(error)
    error = refused(make("mixtral", tmp_path / "moe"), tmp_path, exits="1", head="layer")
    assert "--head: block 1 is a mixture of experts" in str(error)
    # its first block is dense, so an exit there has a network to copy
    plan = api.plan(
        make("deepseek_v2", tmp_path / "dense-first"), method="early-exit", exits="1", head="mlp"
    )
    assert plan.exactness.kind == "exact"


@pytest.mark.parametrize(
    ("given", "where"),
    [({"draft_tokens": 4}, "--draft-tokens"), ({"kv": "propagate"}, "--kv")],
)
def test_classifiers_generate_nothing(given: dict[str, Any], where: str, tmp_path: Path) -> None:
    source = make("vit", tmp_path / "dense")
    error = refused(source, tmp_path, exits="1", **given)
    assert error.describe().startswith(f"{where}: does nothing: a ViTForImageClassification")


def test_one_source_at_a_time(tmp_path: Path) -> None:
    source = str(make("llama", tmp_path / "dense"))
    with pytest.raises(OptionError, match="takes one checkpoint"):
        api.convert(source, source, destination=tmp_path / "out", method="early-exit", exits="1")


def test_an_exit_alone_has_no_state_to_compare_with(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    with pytest.raises(OptionError, match="one alone"):
        api.convert(
            source,
            destination=tmp_path / "out",
            method="early-exit",
            exits="1",
            head="norm",
            measure="state",
        )
