"""`calibrate` from text to a checkpoint that keeps to what was promised."""

from __future__ import annotations

import errno
import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert import api
from adaconvert.arch.calibration import config_digest
from adaconvert.errors import (
    AdaconvertError,
    DataError,
    OptionError,
    OutputConflictError,
    ResourceError,
    SourceError,
)
from adaconvert.evaluate import calibration
from adaconvert.evaluate.calibration_data import Reading, read_data
from adaconvert.evaluate.calibration_output import stale
from adaconvert.evaluate.calibration_result import CalibrationResult
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.testing_sequence import SHARES
from adaconvert.io import manifest
from adaconvert.io.layout import shard_digest_of_file
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.faults import tree_state
from adaconvert.testing.writing import FailingFileSystem, RecordingFileSystem, tree_digest

WORDS = (
    *("the", "model", "runs", "few", "of", "its", "experts"),
    *("and", "loses", "little", "of", "what", "it", "knows"),
)
OPTIONS: dict[str, Any] = {"length": 32, "max_tokens": None}


def sentence(rng: random.Random) -> str:
    """Return words in an order that their first two give away."""
    start, stride = rng.randrange(14), rng.randrange(1, 6)
    return " ".join(WORDS[(start + stride * n) % 14] for n in range(rng.randrange(6, 14)))


def documents(count: int, seed: int) -> list[str]:
    """Return different documents as lines of JSON."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[json.dumps({"text": sentence(rng)}) + "\n"] = None
    return list(found)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return 200 documents of a language a tiny model can learn."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(documents(200, seed=0)))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adaptive model that knows the language, so that fewer neurons cost it something."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("trained")
    dense = tiny_models.make("llama", folder / "dense", max_shard_size="60KB")
    model = AutoModelForCausalLM.from_pretrained(dense)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    rng = random.Random(1)
    ids = [tokenizer(sentence(rng))["input_ids"][:24] for _ in range(1500)]
    data = torch.tensor([row for row in ids if len(row) == 24])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in data.split(24):
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    model.save_pretrained(dense)
    return make_adaptive(dense, folder / "adaptive", router="gate", experts=64)


@pytest.fixture(scope="module")
def report(
    trained: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, CalibrationResult]:
    """Return a copy certified to lose no more than 0.3 nats, and what was said of it."""
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    said = api.calibrate(trained, text, destination=folder, max_loss_increase=0.3, **OPTIONS)
    return folder, said


@pytest.fixture(scope="module")
def calibrated(report: tuple[Path, CalibrationResult]) -> Path:
    return report[0]


@pytest.fixture
def copy(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "copy"))


def table(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["adaptive"]
    return found


def assert_whole(folder: Path) -> None:
    """Every file is there, listed, and of the hash the manifest gives."""
    import hashlib

    record: dict[str, Any] = manifest.read(folder)
    shards, files = manifest.records(record), record["files"]
    assert manifest.foreign_entries(folder) == []
    for file, shard in shards.items():
        assert shard_digest_of_file(folder / file) == (shard.digest, shard.tensors)
    for file, digest in files.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, file


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
    with pytest.raises(OptionError, match="--max-loss-increase: needs labels"):
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


# -- refusals; nothing is written


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


def test_only_adaptive_causal_models(trained: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not an adaptive checkpoint"):
        api.calibrate(trained.with_name("dense"), text, budget=0.5)
    with pytest.raises(OptionError, match="is no folder"):
        api.calibrate(tmp_path / "nowhere", text, budget=0.5)
    dense = tiny_models.make("bert", tmp_path / "bert", architecture="BertForMaskedLM")
    bert = make_adaptive(dense, tmp_path / "adaptive", experts=4)
    expected = (
        r"AdaptiveBertForMaskedLM: only causal language models and text classifiers can be "
        r"calibrated; expected \.\.\.ForCausalLM, \.\.\.LMHeadModel or "
        r"\.\.\.ForSequenceClassification\. Measure settings of `model\.set_select"
    )
    with pytest.raises(OptionError, match=expected):
        api.calibrate(bert, text, destination=tmp_path / "out", budget=0.5, **OPTIONS)
    images = tmp_path / "images"
    api.convert(
        tiny_models.make("vit", tmp_path / "vit"),
        destination=images,
        method="moefy",
        num_experts=8,
        router="similarity",
        verify=False,
    )
    for call in (api.calibrate, api.evaluate):
        more = {"budget": 0.5} if call is api.calibrate else {}
        given = (images, text) if call is api.calibrate else (images,)
        data = {} if call is api.calibrate else {"data": text}
        with pytest.raises(OptionError, match=r"ForSequenceClassification.*"):
            call(*given, **more, **data)  # type: ignore[operator]


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


# -- faults while writing


def _settings(text: Path) -> CalibrationSettings:
    given = {**OPTIONS, "budget": 0.8, "rules": ("top-k",), "values": (20, 40)}
    return CalibrationSettings.of([str(text)], given)


@pytest.fixture
def measured(text: Path, copy: Path) -> Callable[..., None]:
    """Return what writes a calibration that was measured once."""
    from adaconvert.evaluate import calibration_output as output

    opened = output.open_checkpoint(copy)
    report = calibration.calibrate(copy, _settings(text), destination=copy.with_name("once"))
    shutil.rmtree(copy.with_name("once"))

    def write(fs: Any = None) -> None:
        output.write(opened, report, None, fs=fs)

    return write


def test_a_full_disk_at_any_step_leaves_the_old_checkpoint_or_the_new(
    copy: Path, measured: Callable[..., None], tmp_path: Path
) -> None:
    saved = shutil.copytree(copy, tmp_path / "saved")
    old = tree_digest(copy)
    watch = RecordingFileSystem()
    measured(watch)
    new = tree_digest(copy)
    assert new != old
    for step in watch.steps:
        shutil.rmtree(copy)
        shutil.copytree(saved, copy)
        with suppress(ResourceError):
            measured(FailingFileSystem(step, errno.ENOSPC))
        assert tree_digest(copy) in (old, new), step
        assert_whole(copy)
        for left in copy.parent.glob(".*.adaconvert-*"):
            shutil.rmtree(left)


def test_a_disk_without_hard_links_gets_copies(copy: Path, measured: Callable[..., None]) -> None:
    class NoLinks(RecordingFileSystem):
        def link(self, src: Path, dst: Path) -> bool:
            return False

    before = {f.name: f.stat().st_ino for f in copy.glob("*.safetensors")}
    measured(NoLinks())
    assert_whole(copy)
    after = {f.name: f.stat().st_ino for f in copy.glob("*.safetensors")}
    assert all(after[name] != inode for name, inode in before.items())


def test_a_checkpoint_without_manifest_gets_one_elsewhere(trained: Path, calibrated: Path) -> None:
    record = manifest.read(calibrated)
    assert record["method"] == "calibrate"
    assert not (trained / manifest.MANIFEST_FILE).exists()
    assert any(str(note).startswith("calibrated: ") for note in record["notes"])  # type: ignore[attr-defined]
