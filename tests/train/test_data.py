"""Packing: order by seed, shares by weight, and data that will not do."""

from __future__ import annotations

import json
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
