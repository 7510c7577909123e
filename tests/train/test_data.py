"""Packing: order by seed, shares by weight, and data that will not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaconvert.data.tokens import load_tokenizer
from adaconvert.errors import DataError, OptionError
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed, pack


def packed(folder: Path, data: list[str], **options: Any) -> Packed:
    given = {"steps": 6, "seq_len": 16, "batch_size": 4, **options}
    return pack(FinetuneConfig.of(data, given), folder)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


def test_sequences_are_the_documents_in_an_order_of_the_seed(dense: Path, tmp_path: Path) -> None:
    texts = [f"text number {number} of nine." for number in range(9)]
    data = [write(tmp_path / "a.jsonl", texts)]
    one, again, other = (packed(dense, data, seed=seed) for seed in (1, 1, 2))
    assert one.digest == again.digest != other.digest
    tokenizer = load_tokenizer(dense)
    first_pass = int(len(one) / one.passes[0])
    stream = tokenizer.decode(one.ids[:first_pass].reshape(-1).tolist())
    documents = [part for part in stream.split(tokenizer.eos_token) if part]
    # the last one of the pass may be cut
    assert len(documents) >= 8
    assert set(documents[:-1]) <= set(texts)
    assert len(set(documents[:-1])) == len(documents) - 1


def test_sources_are_mixed_by_weight(dense: Path, tmp_path: Path) -> None:
    data = [
        f"{write(tmp_path / 'a.jsonl', ['aaaa ' * 50])},3",
        f"{write(tmp_path / 'b.jsonl', ['bbbb ' * 50])},1",
    ]
    tokenizer = load_tokenizer(dense)
    found = packed(dense, data)
    owners = ["b" if "bb" in tokenizer.decode(row.tolist()) else "a" for row in found.ids]
    assert owners.count("b") == 6
    # evenly, not in blocks
    assert all(owners[i : i + 4].count("b") == 1 for i in range(0, 24, 4))


def test_labels_leave_out_what_nothing_predicts(dense: Path, text: Path) -> None:
    row = packed(dense, [str(text)])[0]
    assert row["labels"][0] == -100
    assert row["labels"][1:].equal(row["input_ids"][1:])


def test_data_shorter_than_a_sequence_is_refused(dense: Path, tmp_path: Path) -> None:
    data = [write(tmp_path / "a.jsonl", ["one short line"])]
    message = r"a\.jsonl: is shorter than one sequence; expected 64 tokens \(--seq-len\), found"
    with pytest.raises(DataError, match=message):
        packed(dense, data, seq_len=64)


def test_sequences_longer_than_the_model_reads_are_refused(dense: Path, text: Path) -> None:
    with pytest.raises(OptionError, match="--seq-len: is longer than the model can read; expected"):
        packed(dense, [str(text)], seq_len=512)


def test_missing_field_is_named(dense: Path, text: Path) -> None:
    with pytest.raises(DataError, match="there is no field 'body'"):
        packed(dense, [str(text)], text_field="body")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"a\.jsonl: holds no text; found no document"),
        (b'{"text": " \\t\\n"}', r"a\.jsonl: holds no text; found 1 blank documents"),
        (b'{"text": "a"}\n{"text": ["a"]}', r"a\.jsonl:2 field 'text': is not text"),
        (b'{"text": "caf\xe9"}', r"a\.jsonl line 1: is not UTF-8 text; found byte 0xe9"),
        (b'{"text": "a"}\n{"text', r"a\.jsonl line 2: is not valid JSON"),
        (b'{"text": "a"}\n{"body": "a"}', r"a\.jsonl line 2: there is no field 'text'"),
    ],
)
def test_bad_data_are_refused_by_file_and_line(
    dense: Path, tmp_path: Path, raw: bytes, message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        packed(dense, [str(tmp_path / "a.jsonl")])


def test_missing_and_empty_places_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such\.jsonl: no such file or folder"):
        packed(dense, ["no-such.jsonl"])
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match=r"texts: holds no data; expected a \.jsonl"):
        packed(dense, [str(tmp_path / "texts")])


def test_blank_documents_are_counted(dense: Path, tmp_path: Path) -> None:
    data = [write(tmp_path / "a.jsonl", ["words " * 20, "  ", "", "more " * 20])]
    (tally,) = packed(dense, data).sources
    assert (tally.documents, tally.left_out) == (2, 2)


@pytest.mark.parametrize("key", ["text", "messages"])
def test_tokenizer_of_another_model_is_refused(dense: Path, tmp_path: Path, key: str) -> None:
    model = shutil.copytree(dense, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 40}
    (model / "config.json").write_text(json.dumps(config))
    turns = [{"role": "user", "content": "z"}, {"role": "assistant", "content": "z"}]
    value = {"text": "zzz", "messages": turns}[key]
    (tmp_path / "a.jsonl").write_text(json.dumps({key: value}))
    message = r"a\.jsonl:1: the tokenizer of the checkpoint does not fit its model; expected token"
    with pytest.raises(DataError, match=message):
        packed(model, [str(tmp_path / "a.jsonl")])
