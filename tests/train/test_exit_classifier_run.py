"""`finetune` of classifiers with exits: what learns, what is measured and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.cli import main
from adaconvert.evaluate.classify import read_labelled
from adaconvert.io import manifest
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.calibrating import assert_whole
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.testing.labelled import rows_of, texts_with_exits, written
from adaconvert.testing.stored import tensors_of
from adaconvert.testing.tiny_images import save_images
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.exit_classifier_data import Drawn, Source, steps_of

from .conftest import tune_exits


def test_exits_learn_the_trunk_stays_and_all_of_it_is_told(
    exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    out = tmp_path / "out"
    result = tune_exits(exits, out, data=data[0], valid=str(data[1]), report=said.append)
    before, after = tensors_of(exits), tensors_of(out)
    assert sorted(before) == sorted(after)
    for name, value in before.items():
        assert torch.equal(value, after[name]) != name.startswith("exits."), name
    assert_whole(out)
    first, last = result.summary["validation"]
    assert (first["step"], last["step"]) == (0, 30)
    # the whole model is as it was, the exits are better
    assert first["loss"] == last["loss"]
    for at in ("1", "2"):
        assert last["exits"][at]["loss"] < first["exits"][at]["loss"]
        assert last["exits"][at]["accuracy"] >= first["exits"][at]["accuracy"]
    assert last["exits"]["2"]["accuracy"] > 0.9
    record = manifest.read(out)
    assert record["method"] == "finetune"
    assert record["training"]["examples"] == {"unit": "texts", "seen": 240, "read": 60}
    assert record["training"]["sources"][0]["passes"] == pytest.approx(4.0)
    assert record["training"]["validation"] == result.summary["validation"]
    card = (out / "README.md").read_text()
    assert "held-out accuracy of the exit after 2 blocks" in card
    assert [entry["step"] for entry in result.curve] == [1, 10, 20, 30]
    assert result.curve[-1]["exit_1"] < result.curve[0]["exit_1"]
    lines = result.lines()
    assert any("30 of 8 x 1 texts, 240 in all" in line for line in lines)
    assert any(line.strip().startswith("exit 2: ") and "right at first" in line for line in lines)
    assert any("step 30/30: exit after 2 blocks: validation" in line for line in said)


def test_the_measurement_is_the_one_of_evaluate(
    exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    result = tune_exits(exits, tmp_path / "out", data=data[0], valid=str(data[1]), steps=2)
    found = api.evaluate(exits, data=data[1], speed=False).results[0]
    entry = result.summary["validation"][0]
    assert found.accuracy is not None
    assert found.loss is not None
    assert entry["accuracy"] == pytest.approx(found.accuracy.value)
    assert entry["loss"] == pytest.approx(found.loss.value, rel=1e-5)
    model = load_model(exits)
    read = read_labelled(data[1], exits, model.config)
    right = 0
    for ids, label in zip(read.ids, read.labels, strict=True):
        with torch.no_grad(), model.set_exits([0.0, None], measure="max"):
            right += int(model(input_ids=torch.tensor([ids])).logits.argmax()) == label
    assert entry["exits"]["1"]["accuracy"] == pytest.approx(right / 20)


def test_a_run_repeats_itself(exits: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": data[0], "steps": 5, "train": "all"}
    for name in ("a", "b"):
        tune_exits(exits, tmp_path / name, **given)
    other = tune_exits(exits, tmp_path / "c", **given, seed=1)
    a, b, c = (tensors_of(tmp_path / name) for name in ("a", "b", "c"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert not all(torch.equal(value, c[name]) for name, value in a.items())
    before = tensors_of(exits)
    changed = [name for name, value in a.items() if not torch.equal(value, before[name])]
    assert any(not name.startswith("exits.") for name in changed)
    assert other.summary["trained"] == sum(value.numel() for value in a.values())


def test_accumulated_batches_are_one_large_one(tmp_path: Path, data: tuple[Path, Path]) -> None:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    still = texts_with_exits(tmp_path, **quiet)
    for name, size, count in (("one", 8, 1), ("many", 2, 4)):
        tune_exits(
            *(still, tmp_path / name),
            data=data[0],
            steps=3,
            batch_size=size,
            accumulate=count,
            optimizer="sgd",
        )
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    for name, value in one.items():
        torch.testing.assert_close(value, many[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["geometric", "ponder"])
def test_classifiers_of_confidence_learn_when_to_halt(
    kind: str, confident: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    given = {"halting_prior": 0.5} if kind == "ponder" else {"halting_cost": 0.1}
    out = tmp_path / "out"
    result = tune_exits(
        *(confident, out),
        data=data[0],
        steps=10,
        exit_objective=kind,
        objective_factor=0.5,
        **given,
    )
    after = tensors_of(out)
    assert all(after[f"exits.{at}.confidence.weight"].any() for at in (1, 2))
    assert result.summary["options"]["exits"]["objective"] == kind
    assert load_model(out).adaptive_runtime.exits["heads"][0]["confidence"] is True


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bf16_keeps_trained_weights_exact_and_the_stored_dtype(
    stored: str, data: tuple[Path, Path], tmp_path: Path
) -> None:
    source = texts_with_exits(tmp_path, dtype=stored)
    out = tmp_path / "out"
    tune_exits(source, out, data=data[0], valid=str(data[1]), steps=4, precision="bf16")
    before, after = tensors_of(source), tensors_of(out)
    for name, value in before.items():
        assert value.dtype == after[name].dtype == getattr(torch, stored)
        assert torch.equal(value, after[name]) or name.startswith("exits."), name
    wide = tmp_path / "wide"
    tune_exits(source, wide, data=data[0], steps=2, dtype="float32")
    assert {value.dtype for value in tensors_of(wide).values()} == {torch.float32}


def test_images_by_folder_and_by_row(tmp_path: Path) -> None:
    dense = tiny_models.make("vit", tmp_path / "dense", layers=3, max_shard_size="1GB")
    source = by_hand(dense, tmp_path / "exits", (1, 2), "norm")
    images = save_images(tmp_path / "images", ("LABEL_0", "LABEL_1", "LABEL_2"), 8)
    paths = sorted(images.rglob("*.png"))
    listed = written(
        tmp_path / "list.jsonl",
        [{"image": str(path.relative_to(tmp_path)), "class": path.parent.name} for path in paths],
    )
    result = tune_exits(source, tmp_path / "a", data=images, valid=str(images))
    entry = result.summary["validation"]
    assert entry[-1]["exits"]["1"]["loss"] < entry[0]["exits"]["1"]["loss"]
    assert result.summary["examples"] == {"unit": "images", "seen": 240, "read": 24}
    assert any("images: 24 images, 1200 tokens" in line for line in result.lines())
    assert_whole(tmp_path / "a")
    again = tune_exits(source, tmp_path / "b", data=listed, label_field="class", steps=2)
    assert again.summary["steps"] == 2


def test_tokens_are_those_of_the_texts(
    exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    config = FinetuneConfig.of(["x"], {"tokens": 1000, "batch_size": 4})
    read = read_labelled(data[0], exits, load_model(exits).config)
    source = Source(name="x", examples=read, rows=tuple(range(60)))
    mean = sum(map(len, read.ids)) / 60
    steps = steps_of(config, [source])
    assert (steps - 1) * 4 * mean < 1000 <= steps * 4 * mean
    result = tune_exits(
        exits, tmp_path / "out", data=data[0], steps=None, tokens="1k", batch_size=4
    )
    assert result.summary["steps"] == steps
    assert result.summary["tokens"] == pytest.approx(1000, rel=0.1)


def test_every_pass_reads_every_example_once(exits: Path, data: tuple[Path, Path]) -> None:
    config = load_model(exits).config
    read = [read_labelled(where, exits, config) for where in data]
    sources = [
        Source(name="a", examples=read[0], rows=tuple(range(7))),
        Source(name="b", examples=read[1], rows=(3, 5)),
    ]
    drawn = Drawn.of(sources, 3, 0, "cpu")
    stream = iter(drawn)
    batches = [next(stream) for _ in range(6)]
    assert (drawn.seen, len(drawn)) == ([14, 4], 9)
    seen = []
    for batch in batches:
        for ids, mask, label in zip(*batch.values(), strict=True):
            seen.append((tuple(ids[mask.bool()].tolist()), int(label)))
    wanted = [(read[0].ids[row], read[0].labels[row]) for row in range(7)]
    wanted += [(read[1].ids[row], read[1].labels[row]) for row in (3, 5)]
    assert sorted(seen[:9]) == sorted(seen[9:]) == sorted(wanted)
    assert seen[:9] != seen[9:]
    assert [tally.passes for tally in drawn.tallies()] == [2.0, 2.0]


def test_measured_on_the_way_and_rates_of_parts(
    exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = tune_exits(
        *(exits, out),
        data=[data[0], data[1]],
        valid=[str(data[0]), str(data[1])],
        valid_tokens=60,
        eval_every=2,
        steps=5,
        lr_of=r"exits\.1\.=1e-9",
        weight_decay=0.0,
    )
    history = result.summary["validation"]
    assert [entry["step"] for entry in history] == [0, 2, 4, 5]
    assert history[0]["names"] == ["train.jsonl", "valid.jsonl"]
    before, after = tensors_of(exits), tensors_of(out)
    moved = {name: float((after[name] - value).abs().max()) for name, value in before.items()}
    assert max(v for n, v in moved.items() if n.startswith("exits.1.")) < 1e-6
    assert max(v for n, v in moved.items() if n.startswith("exits.2.")) > 1e-4


def test_a_calibration_is_dropped_and_a_later_one_holds(
    exits: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    tune_exits(exits, tuned, data=data[0])
    rows = written(tmp_path / "more.jsonl", rows_of(150, seed=2))
    said = api.calibrate(tuned, rows, max_label_error=0.2, length=32)
    assert said.chosen is not None
    assert said.rows[said.chosen].compute < 1
    assert_whole(tuned)
    again = tune_exits(tuned, tmp_path / "again", data=data[0], steps=1)
    assert any("calibration table was dropped" in note for note in again.summary["notes"])
    assert any("thresholds of exits stay" in note for note in again.summary["notes"])
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["adaptive"]["calibration"] is None


def test_as_a_user_runs_it(
    exits: Path,
    data: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command = ["finetune", str(exits), str(out), "--data", str(data[0]), "--valid", str(data[1])]
    command += ["--train", "exits", "--steps", "4", "--batch-size", "4", "--device", "cpu"]
    assert main.run([*command, "--exit-objective", "weighted", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["options"]["train"] == ["exits"]
    assert found["validation"][-1]["exits"]["2"]["agreement"] <= 1
    assert "step 4/4: loss" in said.err
    assert main.run([*command[:2], str(tmp_path / "b"), *command[3:], "--exit-loss", "kd"]) == 2
    assert "--exit-loss: cannot be used" in capsys.readouterr().err


def test_from_a_dense_classifier_by_commands_alone(
    data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_models.make(
        *("bert", tmp_path / "dense"),
        layers=3,
        architecture="BertForSequenceClassification",
        num_labels=2,
    )
    made, tuned = str(tmp_path / "made"), str(tmp_path / "tuned")
    words = ["--exits", "1,2", "--head", "norm", "--confidence", "-q"]
    assert main.run(["early-exit", str(dense), made, *words]) == 0
    words = ["--train", "exits", "--steps", "3", "--exit-objective", "geometric", "--device", "cpu"]
    assert main.run(["finetune", made, tuned, "--data", str(data[0]), *words, "-q"]) == 0
    assert_whole(Path(tuned))
    assert main.run(["card", tuned]) == 0
    assert [entry["method"] for entry in manifest.read(Path(tuned))["history"]] == ["early-exit"]
    capsys.readouterr()
