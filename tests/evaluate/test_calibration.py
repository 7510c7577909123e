"""`calibrate` from text to a checkpoint that keeps to what was promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert import api
from adaconvert.arch.calibration import config_digest
from adaconvert.errors import DataError, OptionError
from adaconvert.evaluate.calibration_data import Reading, read_data
from adaconvert.evaluate.calibration_output import stale
from adaconvert.evaluate.calibration_result import CalibrationResult
from adaconvert.evaluate.testing_sequence import SHARES
from adaconvert.io import manifest
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.calibrating import OPTIONS, WORDS, assert_whole, table
from adaconvert.testing.writing import tree_digest


def test_the_chosen_row_is_certified_cheaper_and_the_default(calibrated: Path) -> None:
    adaptive = table(calibrated)
    found = adaptive["calibration"]
    row = found["rows"][found["chosen"]]
    assert row["guaranteed"]
    assert row["p_value"] <= 0.05
    assert row["compute"] < 1
    # the promise is about a mean over all documents; these are 40 of them
    assert row["loss_increase"] <= 0.3
    for path, slots in adaptive["sites"].items():
        assert slots["ffn"]["select"] == (row["select"].get(path) or row["select"]["*"])
    computes = [row["compute"] for row in found["rows"]]
    assert computes == sorted(computes)
    assert found["rows"][-1]["select"] == {"*": {"rule": "all"}}
    assert found["phase"] == "prefill"
    assert found["risk"] == {
        "kind": "loss-increase",
        "limit": 0.3,
        "confidence": 0.95,
        "range": [-1.5, 1.5],
        "bound": "betting",
    }
    split = found["split"]
    assert (split["ordering"], split["testing"], split["evaluation"]) == (40, 120, 40)
    assert set(found["digests"]) == {"weights", "config", "data"}
    assert_whole(calibrated)


def test_every_guaranteed_row_is_cheaper_the_further_the_test_went(calibrated: Path) -> None:
    rows = table(calibrated)["calibration"]["rows"]
    sure = [row for row in rows if row["guaranteed"]]
    assert len(sure) >= 3
    assert table(calibrated)["calibration"]["chosen"] == rows.index(sure[0])
    failed = [row for row in rows if not row["guaranteed"] and "p_value" in row]
    assert len(failed) <= 1


def test_the_model_does_what_the_table_says(calibrated: Path, trained: Path) -> None:
    model, plain = load_model(calibrated), load_model(trained)
    ids = torch.arange(40)[None] % 300
    found = table(calibrated)["calibration"]
    row = found["rows"][found["chosen"]]
    with torch.no_grad():
        default = model(input_ids=ids).logits
        with model.set_compute(row["compute"]):
            assert torch.equal(model(input_ids=ids).logits, default)
        with model.set_compute(1.0):
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        with model.set_compute(row["compute"] - 0.01):
            assert not torch.equal(model(input_ids=ids).logits, default)
        with pytest.raises(
            ValueError, match=r"compute 0\.1 is below what this model was calibrated"
        ):
            model.set_compute(0.1)


def test_a_choice_by_budget_keeps_to_it_and_promises_nothing(copy: Path, text: Path) -> None:
    before = (copy / "README.md").read_text()
    shards = {f.name: f.stat().st_ino for f in copy.glob("*.safetensors")}
    report = api.calibrate(copy, text, budget=0.8, rules=("top-k",), **OPTIONS)
    assert report.chosen is not None
    rows = report.rows
    assert 0.7 < rows[report.chosen].compute <= 0.8
    assert rows[report.chosen].loss == min(r.loss for r in rows if r.compute <= 0.8)
    assert not any(row.guaranteed for row in rows)
    assert report.risk is None
    assert "no promise" in report.promise()
    assert_whole(copy)
    # weights were not even copied
    assert {f.name: f.stat().st_ino for f in copy.glob("*.safetensors")} == shards
    after = (copy / "README.md").read_text()
    assert after.count("## Compute and loss") == before.count("## Compute and loss") == 1
    assert after != before
    assert not list(copy.parent.glob(".*"))


def test_calibrating_again_gives_the_same_bytes(
    trained: Path, calibrated: Path, text: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name / "out"
        options = {**OPTIONS, "budget": 0.8, "rules": ("dynamic-k",), "max_tokens": 2000}
        api.calibrate(trained, text, destination=folder, **options)
    assert tree_digest(tmp_path / "one") == tree_digest(tmp_path / "two")


def test_without_a_choice_the_default_is_the_conversions_again(text: Path, tmp_path: Path) -> None:
    dense = tiny_models.make("llama", tmp_path / "dense")
    select = {"rule": "top-k", "k": 5}
    source = make_adaptive(dense, tmp_path / "source", router="gate", select=select)
    options = {**OPTIONS, "rules": ("top-k",), "values": (4,)}

    def defaults(folder: Path) -> list[dict[str, Any]]:
        return [slots["ffn"]["select"] for slots in table(folder)["sites"].values()]

    out = tmp_path / "out"
    first = api.calibrate(source, text, destination=out, **options)
    assert defaults(out) == [select, select]
    assert first.notes == ()
    for _ in range(2):
        api.calibrate(out, text, budget=0.9, **options)
        assert defaults(out) == [{"rule": "top-k", "k": 4}] * 2
    again = api.calibrate(out, text, **options)
    assert again.chosen is None
    assert defaults(out) == [select, select]
    assert again.notes == ("no setting was asked for: the default is the conversion's again",)
    assert api.calibrate(out, text, **options).notes == ()
    # a table of an older adaconvert, which did not keep what was before
    api.calibrate(out, text, budget=0.9, **options)
    config = json.loads((out / "config.json").read_text())
    del config["adaptive"]["calibration"]["configured"]
    (out / "config.json").write_text(json.dumps(config))
    (out / manifest.MANIFEST_FILE).unlink()
    old = api.calibrate(out, text, destination=tmp_path / "old", **options)
    assert defaults(tmp_path / "old") == [{"rule": "all"}] * 2
    assert old.notes[0].endswith("is not recorded: every expert runs")


def test_disagreement_per_layer_values_and_other_rules(copy: Path, text: Path) -> None:
    report = api.calibrate(
        copy, text, max_disagreement=0.4, per_layer=True, rules=("threshold",), **OPTIONS
    )
    assert report.risk is not None
    assert report.risk["kind"] == "disagreement"
    assert report.chosen is not None
    assert report.rows[report.chosen].changed <= 0.4
    report = api.calibrate(copy, text, rules=("dynamic-k",), values=(0.5, 0.1), **OPTIONS)
    assert report.chosen is None
    assert [row.name for row in report.rows] == [
        "dynamic-k, tau 0.5",
        "dynamic-k, tau 0.1",
        "all experts",
    ]
    # without a choice the default stays
    assert json.dumps(report.to_json())
    assert table(copy)["calibration"]["chosen"] is None
    report = api.calibrate(copy, text, rules=("top-p",), unit="block", **OPTIONS)
    assert report.split["unit"] == "block"
    assert_whole(copy)


def test_the_report_reads_well(report: tuple[Path, CalibrationResult]) -> None:
    calibrated, said = report
    lines = said.lines()
    assert lines[0].startswith("out: ")
    assert sum(line.startswith("*") for line in lines) == 1
    assert "with a confidence of 0.95 over the draw of the calibration data" in lines[-1]
    assert (
        "rises by at most 0.3 nats per token on average over documents drawn like these"
        in (lines[-1])
    )
    assert json.loads(json.dumps(said.to_json()))["chosen"] == said.chosen
    card = (calibrated / "README.md").read_text()
    assert "| compute | loss |" in card
    assert "(default)" in card


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_is_held_to_its_own_choices(family: str, text: Path, tmp_path: Path) -> None:
    name = {"bert": "Bert", "llama": "Llama"}[family] + "ForSequenceClassification"
    dense = tiny_models.make(family, tmp_path / "dense", architecture=name)
    source = make_adaptive(dense, tmp_path / "adaptive", router="gate", experts=8)
    options = {**OPTIONS, "rules": ("top-k",), "values": (7, 6), "destination": tmp_path / "out"}
    with pytest.raises(OptionError, match="--max-loss-increase: is for language models"):
        api.calibrate(source, text, max_loss_increase=0.1, **options)
    report = api.calibrate(source, text, max_disagreement=0.5, **options)
    assert report.risk is not None
    assert report.risk["bound"] == "hoeffding-bentkus"
    assert report.split["blocks"] == 200
    assert "loss is that of the class the model chooses with every expert on" in report.notes
    for row in report.rows:
        # each of the 40 texts counts as one, right or wrong
        assert row.changed * 40 == pytest.approx(round(row.changed * 40), abs=1e-9)
    assert_whole(tmp_path / "out")


# -- what makes a table stale


def test_a_table_is_stale_once_weights_or_config_change(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert stale(copy) == []
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert stale(copy) == ["config.json has changed since"]
    changed = {**config, "transformers_version": "6.0.0"}
    (copy / "config.json").write_text(json.dumps(changed))
    assert stale(copy) == []
    shard = next(copy.glob("*.safetensors"))
    tensors = load_file(shard)
    save_file({k: v + 1 for k, v in tensors.items()}, shard, metadata={"format": "pt"})
    assert stale(copy) == ["the weights have changed since"]


def test_the_digest_of_a_config_leaves_defaults_and_the_table_out(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())
    digest = config_digest(config)
    config["adaptive"]["calibration"] = {"rows": []}
    site = next(iter(config["adaptive"]["sites"].values()))
    site["ffn"]["select"] = {"rule": "top-k", "k": 1}
    assert config_digest(config) == digest
    site["ffn"]["experts"]["count"] = 1
    assert config_digest(config) != digest


def test_an_uncalibrated_checkpoint_is_not_called_fresh(trained: Path) -> None:
    with pytest.raises(OptionError, match="holds no calibration"):
        stale(trained)


# -- data


def test_splits_share_no_document_and_blocks_are_spread(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    lines = [f"{n} " + " ".join(WORDS) * 6 for n in range(30)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    reading = Reading(data=(str(path),), length=8, max_tokens=60 * 8)
    data = read_data(reading, trained, SHARES)
    parts = (data.ordering, data.testing, data.evaluation)
    documents = [set(data.blocks.document[part.blocks].tolist()) for part in parts]
    assert sum(len(d) for d in documents) == len(set.union(*documents)) == 30
    assert [part.units for part in parts] == [6, 18, 6]
    for part in parts:
        # two blocks of each document, not thirty of a few
        assert set(np.bincount(part.members)) == {2}
    same = read_data(reading, trained, SHARES)
    assert same.digest == data.digest
    assert (same.testing.blocks == data.testing.blocks).all()


def test_equal_documents_count_once(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "same.jsonl"
    path.write_text((json.dumps({"text": "the same words again"}) + "\n") * 500)
    with pytest.raises(DataError, match=r"3 splits need at least as many documents.*found 1"):
        api.calibrate(trained, path, destination=tmp_path / "out", max_loss_increase=0.02)
