"""Calibrating classifiers against labels: what is measured, promised, told and refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert import api
from adaconvert.data.labelled import read_labelled_documents
from adaconvert.data.tokens import encode, load_tokenizer
from adaconvert.errors import AdaconvertError, DataError, OptionError
from adaconvert.evaluate import calibration_output
from adaconvert.evaluate.calibration_data import Reading, read_data
from adaconvert.evaluate.exit_records import ExitMeasurer
from adaconvert.evaluate.risk import Floats, Risk, label_error_increase_risk, label_error_risk
from adaconvert.evaluate.sweep import ALL, REFERENCE, Measurer, Setting
from adaconvert.evaluate.testing_sequence import SHARES, certify, split
from adaconvert.export.card_calibration import calibration_of, section
from adaconvert.io import manifest
from adaconvert.modeling.adaptive_knobs import EXITS
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import OPTIONS, documents, table
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.testing.faults import tree_state
from adaconvert.testing.tiny_images import save_images

CLASSES = ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of a classifier of texts with exits, and texts labelled by its own choice,
    every eighth of them wrongly, so that the whole model is wrong about 1 in 8."""
    root = tmp_path_factory.mktemp("labels")
    dense = tiny_models.make(
        "bert",
        root / "dense",
        layers=3,
        max_shard_size="1GB",
        architecture="BertForSequenceClassification",
        num_labels=3,
    )
    exits = by_hand(dense, root / "exits", (1, 2), "norm")
    model, tokenizer = load_model(exits), load_tokenizer(exits)
    rows = []
    for number, line in enumerate(documents(240, seed=4)):
        text = json.loads(line)["text"]
        ids = torch.tensor([encode(tokenizer, text)[:32]])
        with torch.no_grad():
            label = int(model(input_ids=ids).logits.argmax())
        label = (label + (number % 8 == 0)) % 3
        # by number and by name
        rows.append({"text": text, "label": label if number % 2 else CLASSES[label]})
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def rule_of(level: float) -> Any:
    return {
        "measure": "max",
        "thresholds": [level, level],
        "decay": None,
        "patience": None,
        "kv": "recompute",
    }


def setting_of(level: float) -> Setting:
    return Setting(rule="exits", name="exits", select={**ALL, EXITS: rule_of(level)})


def test_wrong_is_what_the_model_chooses_against_the_label(root: Path) -> None:
    model = load_model(root / "exits")
    reading = Reading(data=(str(root / "data.jsonl"),), label_field="label", **OPTIONS)
    data = read_data(reading, root / "exits", SHARES, whole=True, config=model.config)
    assert data.labels is not None
    chosen = np.arange(0, len(data.blocks), 3)
    plain = Measurer(model, data.blocks, labels=data.labels)
    exits = ExitMeasurer(model, data.blocks, measure="max", labels=data.labels)
    sure = np.concatenate([record.sure[0] for record in exits.records(chosen)])
    setting = setting_of(float(np.median(sure)))
    found, run = exits.measure(setting, chosen), plain.measure(setting, chosen)
    assert found.wrong is not None
    assert run.wrong is not None
    np.testing.assert_array_equal(found.wrong, run.wrong)
    np.testing.assert_allclose(found.loss, run.loss, rtol=1e-5)
    assert run.compute == pytest.approx(found.compute, rel=1e-12)
    whole = plain.measure(REFERENCE, chosen)
    for at, block in enumerate(chosen):
        ids = torch.from_numpy(data.blocks.ids[block][data.blocks.weights[block]])[None]
        label = data.labels[data.blocks.document[block]]
        with torch.no_grad(), model.set_exits(None):
            logits = model(input_ids=ids).logits[0].double()
        assert whole.wrong is not None
        assert whole.wrong[at] == float(int(logits.argmax()) != label)
        assert whole.loss[at] == pytest.approx(
            float(logits.logsumexp(-1) - logits[label]), abs=1e-5
        )
        with torch.no_grad(), model.set_exits(**rule_of(setting.select[EXITS]["thresholds"][0])):
            early = model(input_ids=ids).logits[0]
        assert found.wrong[at] == float(int(early.argmax()) != label)
    # the same texts without labels are other data
    unlabelled = Reading(data=reading.data, **OPTIONS)
    assert read_data(unlabelled, root / "exits", SHARES, whole=True).digest != data.digest


def test_label_error_is_certified_shown_and_stored(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = api.calibrate(
        root / "exits", root / "data.jsonl", destination=out, max_label_error=0.4, **OPTIONS
    )
    assert said.chosen is not None
    row = said.rows[said.chosen]
    assert row.guaranteed
    assert row.label_error is not None
    assert all(one.label_error is not None for one in said.rows)
    assert said.risk is not None
    assert (said.risk["kind"], said.risk["range"]) == ("label-error", [0.0, 1.0])
    assert "the label is wrong for at most 40.00%" in said.promise()
    assert "loss is that of the label" in said.notes
    assert "changed    wrong  setting" in said.lines()[1]
    stored = table(out)["calibration"]
    assert stored["rows"][said.chosen]["label_error"] == row.label_error
    assert calibration_output.stale(out) == []
    config, record = json.loads((out / "config.json").read_text()), manifest.read(out)
    found, _ = calibration_of(config, record)
    assert found is not None
    assert any("| labels wrong |" in line for line in section(found))
    assert "labels wrong" in (out / "README.md").read_text()


def test_the_whole_model_is_tested_too(root: Path, tmp_path: Path) -> None:
    """A promise about labels is not kept by the whole model because it is the whole model."""
    before = tree_state(root / "exits")
    with pytest.raises(OptionError, match=r"--max-label-error: nothing is certain to keep to 5"):
        api.calibrate(
            root / "exits",
            root / "data.jsonl",
            destination=tmp_path / "never",
            max_label_error=0.05,
            **OPTIONS,
        )
    assert not (tmp_path / "never").exists()
    assert tree_state(root / "exits") == before
    out = tmp_path / "out"
    said = api.calibrate(
        root / "exits", root / "data.jsonl", destination=out, max_label_error=0.25, **OPTIONS
    )
    whole = next(row for row in said.rows if row.name == "no early exit")
    assert whole.guaranteed is (whole.p_value is not None and whole.p_value <= 0.05)
    assert any(row.guaranteed for row in said.rows)


def test_the_rise_in_label_error_compares_with_the_whole_model(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = api.calibrate(
        root / "exits",
        root / "data.jsonl",
        destination=out,
        max_label_error_increase=0.3,
        **OPTIONS,
    )
    assert said.chosen is not None
    whole = next(row for row in said.rows if row.name == "no early exit")
    # it is what the promise compares with
    assert (whole.guaranteed, whole.p_value) == (True, None)
    assert whole.label_error == pytest.approx(1 / 8, abs=0.08)
    assert "the share of wrong labels rises by at most 30.00%" in said.promise()
    with pytest.raises(DataError, match="too little data to certify anything"):
        api.calibrate(
            root / "exits",
            root / "data.jsonl",
            destination=tmp_path / "never",
            max_label_error_increase=0.001,
            **OPTIONS,
        )


def test_labels_may_be_shown_beside_another_promise(root: Path, tmp_path: Path) -> None:
    given = {**OPTIONS, "max_disagreement": 0.4}
    data = root / "data.jsonl"
    said = api.calibrate(root / "exits", data, destination=tmp_path / "a", **given)
    assert all(row.label_error is None for row in said.rows)
    said = api.calibrate(
        root / "exits", data, destination=tmp_path / "b", label_field="label", **given
    )
    assert all(row.label_error is not None for row in said.rows)
    assert said.risk is not None
    assert said.risk["kind"] == "disagreement"


def test_images_have_labels_by_folder_and_by_row(tmp_path: Path) -> None:
    dense = tiny_models.make("vit", tmp_path / "dense", layers=3, max_shard_size="1GB")
    made = by_hand(dense, tmp_path / "exits", (1, 2), "norm")
    images = save_images(tmp_path / "images", CLASSES, 30)
    said = api.calibrate(
        made, images, destination=tmp_path / "a", max_label_error_increase=0.4, **OPTIONS
    )
    assert all(row.label_error is not None for row in said.rows)
    paths = [(name, p) for name in CLASSES for p in sorted((images / name).iterdir())]
    rows = [{"image": str(p.relative_to(tmp_path)), "class": name} for name, p in paths]
    listed = tmp_path / "list.jsonl"
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = api.calibrate(
        made,
        listed,
        destination=tmp_path / "b",
        max_label_error_increase=0.4,
        label_field="class",
        **OPTIONS,
    )
    assert [row.label_error is None for row in again.rows] == [False] * len(again.rows)
    with pytest.raises(DataError, match="there is no field 'label'"):
        api.calibrate(made, listed, destination=tmp_path / "c", max_label_error=0.9, **OPTIONS)


def written(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"text": "a"}, DataError, r"there is no field 'label'.*\(--label-field\)"),
        ({"text": "a", "label": 3}, DataError, "is no label of the model; expected 0 to 2"),
        ({"text": "a", "label": -1}, DataError, "is no label of the model"),
        ({"text": "a", "label": "good"}, DataError, "is no label of the model"),
        ({"text": " ", "label": 1}, DataError, "holds no labelled text"),
    ],
)
def test_labels_that_cannot_be_used(
    root: Path,
    tmp_path: Path,
    row: dict[str, object],
    error: type[AdaconvertError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        api.calibrate(
            root / "exits",
            written(tmp_path, row),
            destination=tmp_path / "out",
            max_label_error=0.5,
            **OPTIONS,
        )
    assert not (tmp_path / "out").exists()


def test_language_models_have_no_labels(text: Path, tmp_path: Path) -> None:
    dense = tiny_models.make("llama", tmp_path / "dense", layers=3, max_shard_size="1GB")
    made = by_hand(dense, tmp_path / "exits", (1, 2), "norm")
    for name in ("max_label_error", "max_label_error_increase", "label_field"):
        flag = f"--{name.replace('_', '-')}"
        given: dict[str, Any] = {name: "label" if name == "label_field" else 0.1}
        with pytest.raises(OptionError, match=f"{flag}: is for classifiers"):
            api.calibrate(made, text, destination=tmp_path / "out", **given, **OPTIONS)


def test_options_that_do_not_fit(root: Path, tmp_path: Path) -> None:
    data, out = root / "data.jsonl", tmp_path / "out"
    with pytest.raises(
        OptionError, match=r"only one of --budget, .*--max-label-error-increase can"
    ):
        api.calibrate(
            root / "exits", data, destination=out, max_label_error=0.1, budget=0.5, **OPTIONS
        )
    with pytest.raises(OptionError, match="--max-label-error: is out of range"):
        api.calibrate(root / "exits", data, destination=out, max_label_error=1.0, **OPTIONS)
    with pytest.raises(OptionError, match="with labelled data --max-label-error-increase"):
        api.calibrate(root / "exits", data, destination=out, max_loss_increase=0.1, **OPTIONS)


def test_of_equal_texts_the_first_counts(root: Path, tmp_path: Path) -> None:
    config = load_model(root / "exits").config
    rows = [{"t": "a", "c": 1}, {"t": "a", "c": 2}, {"t": "b", "c": "LABEL_2"}, {"t": "", "c": 0}]
    where = written(tmp_path, *rows)
    found, labels = read_labelled_documents([str(where)], config, field="t", label_field="c")
    assert (found.texts, labels) == (("a", "b"), (1, 2))
    assert found.names == ("rows.jsonl:1", "rows.jsonl:3")
    few = {"field": "t", "label_field": "c", "max_documents": 1}
    assert read_labelled_documents([str(where)], config, **few)[1] == (1,)


RISKS = [label_error_risk(0.25), label_error_increase_risk(0.05)]


@pytest.mark.parametrize("risk", RISKS, ids=lambda risk: str(risk.kind))
def test_promises_about_labels_break_no_oftener_than_allowed(risk: Risk) -> None:
    rng, draws = np.random.default_rng(0), 300
    own = 0.2 if risk.compares else 0.0
    true = np.linspace(0.15, 0.4, 12)

    def losses(count: int) -> Floats:
        """Return what settings of rising error lose on units drawn anew, less the reference."""
        uniform = rng.random(count)
        found = (uniform[None] < true[:, None]).astype(np.float64)
        # the reference errs on other units, as exits that know something else do
        return found - (uniform > 1 - own)[None] if own else found

    broken, passed = 0, 0
    for draw in range(draws):
        risks = losses(500)
        parts = split(500, seed=draw)
        found = certify(
            np.linspace(1, 0.3, 12),
            [row[parts.ordering] for row in risks],
            lambda s, risks=risks, parts=parts: risks[s][parts.testing],  # type: ignore[misc]
            risk,
        )
        passed += bool(found.passed)
        broken += any(true[setting] - own > risk.limit for setting in found.passed)
    assert passed > draws / 2
    allowed = risk.level + 3 * math.sqrt(risk.level * (1 - risk.level) / draws)
    assert broken / draws <= allowed
