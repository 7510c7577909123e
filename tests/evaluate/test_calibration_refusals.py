"""What cannot be calibrated, or not as asked, is said clearly, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.errors import (
    AdaconvertError,
    DataError,
    OptionError,
    OutputConflictError,
    SourceError,
)
from adaconvert.io import manifest
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import OPTIONS, assert_whole, documents, table
from adaconvert.testing.faults import tree_state


def _few(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "few.jsonl"
    path.write_text("".join(text.read_text().splitlines(keepends=True)[:30]))
    return path


def _blank(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "blank.jsonl"
    path.write_text('{"text": "  "}\n')
    return path


def _given(text: Path, tmp_path: Path) -> Path:
    return text


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (
            _few,
            {"max_loss_increase": 0.02},
            DataError,
            r"takes about 40 documents in the testing split, 67 in all; expected about 67 "
            r"documents, found 30 \(18 of them for testing\)",
        ),
        (
            _few,
            {"max_loss_increase": 0.02, "confidence": 0.999},
            DataError,
            "takes about 92 documents in the testing split",
        ),
        (_blank, {"budget": 0.5}, DataError, "holds no text"),
        (_given, {"budget": 0.5, "field": "body"}, DataError, "body"),
        (_given, {"budget": 0.5, "max_loss_increase": 0.1}, OptionError, "only one of --budget"),
        (_given, {"budget": 1.5}, OptionError, "--budget: is out of range; expected above 0 and"),
        (_given, {"max_loss_increase": -0.1}, OptionError, "--max-loss-increase: is out of range"),
        (_given, {"budget": 0.9, "clip": 0.5}, OptionError, "--clip: does nothing without"),
        (_given, {"max_loss_increase": 0.1, "clip": 0.05}, OptionError, "--clip: is out of range"),
        (_given, {"confidence": 1.0}, OptionError, "--confidence: is out of range"),
        (_given, {"rules": ("best",)}, OptionError, "--rule: unknown rule"),
        (_given, {"values": (0.5,)}, OptionError, "--values: needs exactly one --rule"),
        (
            _given,
            {"rules": ("dynamic-k",), "values": (2.0,)},
            OptionError,
            "tau above 1 would select nothing",
        ),
        (_given, {"unit": "word"}, OptionError, "--unit: unknown unit"),
        (
            _given,
            {"budget": 0.05, "rules": ("top-k",), "values": (1,)},
            OptionError,
            r"--budget: nothing this model can do is that cheap; expected 0\.\d+ or more",
        ),
        (_given, {"batch_size": 0}, OptionError, "--batch-size: is out of range"),
        (_given, {"device": "nowhere"}, OptionError, "--device: cannot be used"),
    ],
)
def test_bad_input_is_a_clear_error_and_nothing_is_written(
    calibrated: Path,
    text: Path,
    tmp_path: Path,
    data: Callable[[Path, Path], Path],
    options: dict[str, Any],
    error: type[AdaconvertError],
    message: str,
) -> None:
    before = tree_state(calibrated)
    given = data(text, tmp_path)
    with pytest.raises(error, match=message):
        api.calibrate(calibrated, given, **{**OPTIONS, **options})
    assert tree_state(calibrated) == before


def test_an_unknown_option_is_a_mistake_of_the_caller(calibrated: Path, text: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        api.calibrate(calibrated, text, colour="red")


def test_more_data_are_asked_for_when_they_would_help(
    copy: Path, text: Path, tmp_path: Path
) -> None:
    path = tmp_path / "small.jsonl"
    path.write_text("".join(documents(44, seed=5)))
    # it loses about 0.03 nats, give or take twice as much from one document to the next
    values = {"rules": ("top-k",), "values": (19,)}
    with pytest.raises(
        DataError,
        match=r"the most careful setting within a limit of 0\.045 takes about \d+ documents",
    ):
        api.calibrate(copy, path, max_loss_increase=0.045, **values, **OPTIONS)
    assert_whole(copy)


def test_a_limit_no_setting_keeps_leaves_every_expert_on(copy: Path, text: Path) -> None:
    values = {"rules": ("top-k",), "values": (1, 2)}
    report = api.calibrate(copy, text, max_loss_increase=0.1, **values, **OPTIONS)
    assert report.chosen is not None
    assert report.rows[report.chosen].name == "all experts"
    assert report.notes == (
        "no setting below full compute could be certified: the default runs every expert",
    )
    site = next(iter(table(copy)["sites"].values()))
    assert site["ffn"]["select"] == {"rule": "all"}


def test_weights_that_compute_nan_are_refused(copy: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (copy / manifest.MANIFEST_FILE).unlink()
    for shard in copy.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in tensors:
            if name.endswith("down_proj.weight"):
                tensors[name][0, 0] = float("nan")
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"nan with all experts; found first in text\.jsonl:\d"):
        api.calibrate(copy, text, destination=tmp_path / "out", budget=0.5, **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_only_adaptive_models_that_predict_or_classify(
    trained: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="is not an adaptive checkpoint"):
        api.calibrate(trained.with_name("dense"), text, budget=0.5)
    with pytest.raises(OptionError, match="is no folder"):
        api.calibrate(tmp_path / "nowhere", text, budget=0.5)
    classes = tmp_path / "classes"
    source = tiny_models.make(
        "bert", tmp_path / "bert", architecture="BertForTokenClassification", num_labels=3
    )
    api.convert(
        source,
        destination=classes,
        method="moefy",
        num_experts=8,
        router="similarity",
        verify=False,
    )
    expected = (
        r"AdaptiveBertForTokenClassification: only language models and classifiers can be "
        r"calibrated; expected \.\.\.ForCausalLM, \.\.\.LMHeadModel, \.\.\.ForMaskedLM, "
        r"\.\.\.ForSequenceClassification or \.\.\.ForImageClassification\. Measure settings of "
        r"`model\.set_select"
    )
    with pytest.raises(OptionError, match=expected):
        api.calibrate(classes, text, destination=tmp_path / "out", budget=0.5, **OPTIONS)
    with pytest.raises(OptionError, match=r"ForSequenceClassification.*"):
        api.evaluate(classes, data=text)


def test_destinations_that_may_not_be_written(
    copy: Path, trained: Path, text: Path, tmp_path: Path
) -> None:
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(OutputConflictError, match=r"'notes.txt'.* name another folder with --out"):
        api.calibrate(copy, text, budget=0.8, **OPTIONS)
    (copy / "notes.txt").unlink()
    with pytest.raises(OutputConflictError, match=r"holds no adaconvert\.json"):
        api.calibrate(trained, text, budget=0.8, **OPTIONS)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(OutputConflictError, match="exists and is not empty"):
        api.calibrate(copy, text, destination=taken, budget=0.8, **OPTIONS)
    with pytest.raises(OutputConflictError, match="is the source itself"):
        api.calibrate(copy, text, destination=copy, overwrite=True, budget=0.8, **OPTIONS)


def test_weights_other_than_the_manifest_lists_are_refused(copy: Path, text: Path) -> None:
    shard = next(copy.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(SourceError, match=r"the weights are not those adaconvert.json lists"):
        api.calibrate(copy, text, budget=0.8, **OPTIONS)
