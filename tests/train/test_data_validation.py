"""Held-out loss: what `evaluate` measures, at the steps asked for, whatever interrupts the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from adaconvert import api
from adaconvert.errors import DataError, InterruptedRunError, OptionError, TrainingError
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]


@pytest.fixture
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    texts = [f"document {i}: the dog number {i % 5} sat. " * (1 + i % 3) for i in range(8)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    turns = [{"role": "user", "content": "cat?"}, {"role": "assistant", "content": "It sat."}]
    path.write_text("\n".join([json.dumps({"messages": turns})] * 5))
    return path


def losses(result: FinetuneResult) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in result.summary["validation"]]


def test_loss_before_and_after_is_that_of_evaluate(
    dense: Path, tmp_path: Path, tune: Tune, held: Path
) -> None:
    said: list[str] = []
    result = tune(dense, valid=[str(held)], report=said.append)
    first, last = losses(result)
    assert (first[0], last[0]) == (0, 12)
    assert last[1] < first[1]
    for folder, loss in ((dense, first[1]), (tmp_path / "out", last[1])):
        (row,) = api.evaluate(folder, data=held, length=32).results
        assert row.loss is not None
        # the same blocks, in batches of other sizes
        assert row.loss.value == pytest.approx(loss, rel=1e-5)
    stored = json.loads((tmp_path / "out" / "adaconvert.json").read_text())
    assert stored["training"]["validation"] == result.summary["validation"]
    assert [line for line in said if "validation" in line] == [
        f"step 0/12: validation {first[1]:.4f}",
        f"step 12/12: validation {last[1]:.4f}",
    ]
    assert f"validation  loss {first[1]:.4f} at first, {last[1]:.4f} at the end" in result.lines()


def test_measuring_changes_nothing_else(
    dense: Path, tmp_path: Path, tune: Tune, held: Path
) -> None:
    plain = tune(dense, "plain")
    watched = tune(dense, "watched", valid=[str(held)], eval_every=1)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "watched"))
    assert a == b
    assert [e["loss"] for e in plain.curve] == [e["loss"] for e in watched.curve]
    assert [step for step, _ in losses(watched)] == list(range(13))
    assert plain.summary["validation"] == []


def test_each_source_has_a_loss(dense: Path, tune: Tune, held: Path, chats: Path) -> None:
    result = tune(dense, valid=[str(held), str(chats)], eval_every=5)
    entries = result.summary["validation"]
    assert [entry["step"] for entry in entries] == [0, 5, 10, 12]
    assert entries[0]["names"] == ["held.jsonl", "chats.jsonl"]
    assert min(entries[0]["losses"]) < entries[0]["loss"] < max(entries[0]["losses"])
    assert any(line.strip().startswith("chats.jsonl: ") for line in result.lines())


def test_only_answers_of_conversations_count(dense: Path, tmp_path: Path, chats: Path) -> None:
    from adaconvert.train.validation import hold_out

    config = FinetuneConfig.of(["x"], {"steps": 1, "seq_len": 64, "valid": str(chats)})
    (found,) = hold_out(config, dense)
    assert 0 < found.counted.sum() < found.real.sum() < found.real.size
    assert len(found.ids) == 5
    few = FinetuneConfig.of(
        ["x"], {"steps": 1, "seq_len": 64, "valid": str(chats), "valid_tokens": 30}
    )
    assert len(hold_out(few, dense)[0].ids) == 2


def test_resumed_run_has_the_same_measurements(
    dense: Path, tmp_path: Path, tune: Tune, held: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 7/12: lm"):
            raise KeyboardInterrupt

    options = {"valid": [str(held)], "eval_every": 3, "save_every": 4, "log_every": 1}
    with pytest.raises(InterruptedRunError, match="--resume"):
        tune(dense, "out", report=stop, **options)
    resumed = tune(dense, "out", resume=True, **options)
    whole = tune(dense, "whole", **options)
    assert [loss for _, loss in losses(resumed)] == pytest.approx([x for _, x in losses(whole)])
    assert [step for step, _ in losses(resumed)] == [0, 3, 6, 9, 12]
    again = tune(dense, "out", resume=True, **options)
    assert again.summary["validation"] == resumed.summary["validation"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ('{"text": " "}', r"held\.jsonl: holds no text"),
        ('{"body": "x"}', r"held\.jsonl: there is no field 'text' and no field 'messages'"),
        ('{"text": "a"}\n{"text": 1}', r"held\.jsonl:2 field 'text': is not text"),
    ],
)
def test_bad_held_out_data_stop_the_run_before_it_begins(
    dense: Path, tmp_path: Path, tune: Tune, raw: str, message: str
) -> None:
    path = tmp_path / "held.jsonl"
    path.write_text(raw)
    with pytest.raises(DataError, match=message):
        tune(dense, valid=[str(path)])
    assert [file.name for file in tmp_path.iterdir()] == ["held.jsonl"]


def test_options_without_held_out_data_are_refused() -> None:
    for name, flag in (("valid_split", "--valid-split"), ("eval_every", "--eval-every")):
        with pytest.raises(OptionError, match=f"{flag}: does nothing without --valid"):
            FinetuneConfig.of(["x"], {"steps": 1, name: 3})
    with pytest.raises(OptionError, match="--valid-tokens: is out of range; expected 2 or more"):
        FinetuneConfig.of(["x"], {"steps": 1, "valid": "y", "valid_tokens": 1})


def test_source_that_is_read_often_is_warned_of(
    dense: Path, tmp_path: Path, tune: Tune, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "the cat sat on the mat. " * 12}))
    with caplog.at_level(logging.WARNING, "adaconvert"):
        result = tune(dense, data=[str(path)])
    (note,) = [note for note in result.summary["notes"] if "a.jsonl" in note]
    assert "beyond about 4 the same text teaches little" in note
    assert note in caplog.text
    assert result.summary["sources"][0]["passes"] > 4
    assert any(
        line.startswith("data        a.jsonl: 1 documents, 1536 tok") for line in result.lines()
    )


def test_loss_that_is_no_number_ends_with_code_five(dense: Path, tune: Tune, held: Path) -> None:
    # the weights of the first step are finite, what they predict is not
    with pytest.raises(TrainingError, match=r"step \d: the validation loss is nan; ") as caught:
        tune(dense, lr=1e30, warmup=0.0, valid=[str(held)], eval_every=1, save_every=1)
    assert caught.value.exit_code == 5
    assert "is kept in .out.adaconvert-training/checkpoint-1" in caught.value.describe()
