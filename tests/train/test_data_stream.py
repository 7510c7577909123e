"""Streamed data are the same whenever they are read, and fit in little memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from adaconvert.data.tokens import load_tokenizer
from adaconvert.errors import DataError, InterruptedRunError
from adaconvert.train import sources
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data_reader import shuffled
from adaconvert.train.data_stream import Data, Streamed, data_of
from adaconvert.train.result import FinetuneResult
from adaconvert.train.sources import Raw

Tune = Callable[..., FinetuneResult]


def streamed(folder: Path, data: list[str], **options: Any) -> Data:
    given = {"steps": 6, "seq_len": 16, "batch_size": 4, "streaming": True, **options}
    return data_of(FinetuneConfig.of(data, given), folder)


def sequences(data: Data) -> list[list[int]]:
    return [data[index]["input_ids"].tolist() for index in range(len(data))]


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of rows in the order they are read."""
    names: list[str] = []
    plain = sources.iter_rows

    def counting(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for row in plain(*args, **kwargs):
            names.append(row.name)
            yield row

    monkeypatch.setattr(sources, "iter_rows", counting)
    return names


def test_order_is_the_seeds_and_the_same_from_anywhere(dense: Path, text: Path) -> None:
    one, again, other = (streamed(dense, [str(text)], seed=seed) for seed in (1, 1, 2))
    expected = sequences(one)
    assert len(expected) == 24
    assert isinstance(again, Streamed)
    # as a resumed run asks for them
    assert again[17]["input_ids"].tolist() == expected[17]
    assert again[18]["input_ids"].tolist() == expected[18]
    assert again[4]["input_ids"].tolist() == expected[4]
    assert sequences(again) == expected != sequences(other)
    with pytest.raises(IndexError):
        one[24]


def test_first_sequence_does_not_read_everything(
    dense: Path, text: Path, rows_read: list[str]
) -> None:
    data = streamed(dense, [str(text)], shuffle_buffer=3)
    data[0]
    assert len(rows_read) < 8
    data[0]
    assert len(rows_read) < 8


def test_all_documents_are_read_once_a_pass(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [f"text number {number} of nine." for number in range(9)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    data = streamed(dense, [str(path)], shuffle_buffer=4)
    tokenizer = load_tokenizer(dense)
    stream = tokenizer.decode([token for row in sequences(data) for token in row])
    documents = [part for part in stream.split(tokenizer.eos_token) if part]
    passes = [documents[start : start + 9] for start in range(0, len(documents) - 9, 9)]
    assert len(passes) >= 2
    assert all(set(part) == set(texts) for part in passes)
    assert passes[0] != passes[1]
    (tally,) = data.sources
    assert tally.documents == 9
    assert tally.passes == pytest.approx(len(documents) / 9, abs=0.12)


def test_length_that_is_not_known_is_not_claimed(dense: Path, text: Path) -> None:
    (tally,) = streamed(dense, [str(text)], steps=1, shuffle_buffer=2).sources
    assert tally.passes is None
    assert 1 <= tally.documents < 8
    assert tally.tokens == 64


def test_conversations_and_text_stream_together(dense: Path, tmp_path: Path, text: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text("\n".join([json.dumps({"messages": turns})] * 9))
    data = streamed(dense, [str(path), str(text)], seq_len=64, steps=2)
    assert data[0]["attention_mask"].sum() < 64
    assert data[1]["attention_mask"].all()
    batch = torch.utils.data.default_collate([data[index] for index in range(4)])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


@pytest.mark.parametrize("size", [1, 3, 50])
def test_shuffling_loses_nothing(size: int) -> None:
    raws = [Raw(name=str(number), value="x") for number in range(20)]
    held = 0

    def counted() -> Iterator[Raw]:
        nonlocal held
        for raw in raws:
            held += 1
            yield raw

    generator = numpy.random.Generator(numpy.random.Philox(0))
    found = []
    for raw in shuffled(counted(), size, generator):
        assert held - len(found) <= size + 1
        found.append(raw.name)
    assert sorted(found, key=int) == [raw.name for raw in raws]
    assert (found == [raw.name for raw in raws]) == (size == 1)


def test_bad_data_are_found_before_training(dense: Path, tmp_path: Path, tune: Tune) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "short"}\n{"text": "  "}\n')
    message = r"a\.jsonl: is shorter than one sequence; expected 32 tokens"
    with pytest.raises(DataError, match=message):
        tune(dense, data=[str(path)], streaming=True)
    path.write_text('{"text": "  "}\n')
    with pytest.raises(DataError, match=r"a\.jsonl: holds no text; found 1 blank documents"):
        tune(dense, data=[str(path)], streaming=True)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_row_further_on_is_named_and_nothing_is_written(
    dense: Path, tmp_path: Path, tune: Tune
) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"document {i} is good. " * 4}) for i in range(30)]
    path.write_text("\n".join([*rows, '{"text": 7}']))
    with pytest.raises(DataError, match=r"a\.jsonl:31 field 'text': is not text"):
        tune(dense, data=[str(path)], streaming=True, shuffle_buffer=2, steps=40)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_resumed_run_goes_on_at_the_same_sequence(dense: Path, tmp_path: Path, tune: Tune) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 7/"):
            raise KeyboardInterrupt

    options = {"streaming": True, "shuffle_buffer": 5, "save_every": 4, "log_every": 1}
    with pytest.raises(InterruptedRunError, match="--resume"):
        tune(dense, "out", report=stop, **options)
    resumed = tune(dense, "out", resume=True, **options)
    whole = tune(dense, "whole", **options)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert resumed.summary["sources"] == whole.summary["sources"]
    assert whole.summary["sources"][0]["tokens"] == 12 * 4 * 32


def test_parquet_streams(dense: Path, tmp_path: Path, text: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=7)
    found = streamed(dense, [str(path)], shuffle_buffer=4)
    assert sequences(found) == sequences(streamed(dense, [str(text)], shuffle_buffer=4))
