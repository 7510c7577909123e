"""Documents out of every kind of file, and a clear refusal of everything that is none."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert.data import rows
from adaconvert.data.text import documents_of, read_documents
from adaconvert.errors import DataError, OptionError, ResourceError

TEXTS = ("first text", "zwei Worte \N{LATIN SMALL LETTER U WITH DIAERESIS}", "three\nlines\n")


def jsonl(path: Path) -> None:
    rows = [json.dumps({"source": "a", "text": text}) for text in TEXTS]
    path.write_text("\ufeff" + rows[0] + "\n\n" + rows[1] + "\r\n" + rows[2])


def json_list(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS]))


def json_around_list(path: Path) -> None:
    path.write_text(json.dumps({"version": 1, "data": [{"text": text} for text in TEXTS]}))


def json_lines_under_another_name(path: Path) -> None:
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))


def parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": list(TEXTS), "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)


def folder_of_text(path: Path) -> None:
    path.mkdir()
    for number, text in enumerate(TEXTS):
        (path / f"{number}.txt").write_text(text)
    (path / ".hidden.txt").write_text("not this")
    (path / "README.md").write_text("nor this")


def mixed_folder(path: Path) -> None:
    (path / "deeper").mkdir(parents=True)
    (path / "a.txt").write_text(TEXTS[0])
    (path / "b.jsonl").write_text(json.dumps({"text": TEXTS[1]}))
    (path / "deeper" / "c.json").write_text(json.dumps({"text": TEXTS[2]}))


def saved_data_set(path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": list(TEXTS)}).save_to_disk(str(path))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("data.jsonl", jsonl),
        ("data.json", json_list),
        ("data.json", json_around_list),
        ("data.json", json_lines_under_another_name),
        ("data.parquet", parquet),
        ("texts", folder_of_text),
        ("mixed", mixed_folder),
        ("saved", saved_data_set),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_kind_gives_the_same_documents(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    read = read_documents(tmp_path / name)
    assert read.texts == TEXTS
    assert read.digest == documents_of(TEXTS).digest
    assert len(set(read.names)) == len(read) == 3


def test_names_say_where_a_document_is(tmp_path: Path) -> None:
    jsonl(tmp_path / "data.jsonl")
    # the second line is blank
    assert read_documents(tmp_path / "data.jsonl").names == (
        "data.jsonl:1",
        "data.jsonl:3",
        "data.jsonl:4",
    )


def test_another_field_and_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"body": "a"}\n{"body": "  "}\n{"body": "b"}\n{"nothing": 1}\n')
    assert read_documents(str(path), field="body", max_documents=2).texts == ("a", "b")


def test_digest_depends_on_texts_their_order_and_their_borders() -> None:
    digests = {
        documents_of(texts).digest
        for texts in (("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab",), ("ab", "c", "c"))
    }
    assert len(digests) == 5
    raw = b"\2\0\0\0\0\0\0\0ab\1\0\0\0\0\0\0\0c"
    assert documents_of(("ab", "c")).digest == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: holds no text; found no document"),
        ("a.txt", b" \n\t", r"a\.txt: holds no text; found 1 blank documents"),
        ("a.json", b"[]", r"a\.json: holds no text; found no document"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": 1, "source": "x"}',
            r"a\.jsonl line 2: there is no field 'text'; found fields 'body', 'source'\. "
            r"Name the field that holds the text \(--field or --data-field\) or the label "
            r"\(--label-field\)\.",
        ),
        ("a.jsonl", b"{}", r"line 1: there is no field 'text'; found none"),
        ("a.json", b'{"body": "x"}', r"a\.json item 1: there is no field 'text'; found .* 'body'"),
        ("a.jsonl", b'{"text": 1}', r"a\.jsonl:1 field 'text': is not text; .* found a number"),
        ("a.jsonl", b'{"text": null}', r"is not text; expected a string, found null"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"line 2: is not valid JSON; found .* at column"),
        ("a.jsonl", b"[1]", r"line 1: is not a JSON object; found an array"),
        ("a.jsonl", b'"text"', r"line 1: is not a JSON object; found a string"),
        ("a.jsonl", b"[" * 100_000, r"line 1: is not valid JSON; found too many levels"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"is not valid JSON; found a number too"),
        ("a.jsonl", b'{"text": "a"}\n\xff\xfe', r"line 2: is not UTF-8 text; found byte 0xff at"),
        ("a.txt", b"caf\xe9", r"a\.txt: is not UTF-8 text; found byte 0xe9 at offset 3\. Save it"),
        ("a.json", b'{"text": "caf\xe9"}', r"a\.json: is not UTF-8 text; found byte 0xe9"),
        ("a.json", b'{"text": ', r"a\.json: is not valid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"half a surrogate pair; found \\ud800 at character 0"),
        ("a.parquet", b"PAR1 not really PAR1", r"a\.parquet: is no readable Parquet file"),
        ("a.parquet", b"", r"a\.parquet: is no readable Parquet file"),
        ("a.csv", b"text\na", r"a\.csv: is no data file by its name; expected a \.jsonl, \.json"),
        ("evil\x1b[2J.csv", b"", r"^evil\\x1b\[2J\.csv: is no data file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as caught:
        read_documents(tmp_path / name)
    assert caught.value.exit_code == 2
    assert str(tmp_path) not in str(caught.value)


def test_a_line_of_any_length_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE", 40)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "a" * 40}))
    with pytest.raises(DataError, match=r"line 2: is too long to be read; expected at most 40"):
        read_documents(path)


def test_a_file_too_large_to_be_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_WHOLE", 40)
    (tmp_path / "a.txt").write_text("a" * 41)
    with pytest.raises(DataError, match=r"a\.txt: is too large to be read whole.*JSON lines"):
        read_documents(tmp_path / "a.txt")


def test_parquet_without_the_field_names_its_columns(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no field 'body'; found fields 'text', 'other'"):
        read_documents(tmp_path / "a.parquet", field="body")
    with pytest.raises(DataError, match=r"a\.parquet:1 field 'other': is not text"):
        read_documents(tmp_path / "a.parquet", field="other")


def test_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet(path)
    raw = bytearray(path.read_bytes())
    raw[4:40] = bytes(36)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet: is no readable Parquet file"):
        read_documents(path)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("no/such/file.jsonl", r"no/such/file\.jsonl: no such file or folder\. Give an existing"),
        ("missing.txt", r"missing\.txt: no such file or folder"),
        ("", r"'': no such file or folder"),
        ("a\0b", r"a\\x00b: no such file or folder"),
        ("~no-such-user/x", r"no such file or folder"),
        ("x" * 5000, r"^x+\.\.\.: no such file or folder"),
        ("https://token@host/data.jsonl", r"^a URL is not data\. Give a file"),
    ],
)
def test_missing_data(where: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_documents(where)


def test_unknown_hub_data_set_without_a_network() -> None:
    # offline, whether it exists cannot be known
    with pytest.raises((DataError, ResourceError), match=r"org/no-such-data: no such file or fold"):
        read_documents("org/no-such-data")


def test_empty_folder_and_folder_of_other_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no data; expected a \.jsonl.* found no file"):
        read_documents(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"found model\.safetensors"):
        read_documents(tmp_path)


def test_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl: is not a regular file; found a FIFO"):
        read_documents(tmp_path / "a.jsonl")


def test_split_takes_files_by_their_names(tmp_path: Path) -> None:
    for name in ("prose.train.jsonl", "prose.valid.jsonl", "tech-valid-0.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}))
    found = read_documents(tmp_path, split="valid").texts
    assert found == ("prose.valid.jsonl", "tech-valid-0.jsonl")
    with pytest.raises(DataError, match=r"no file of split 'test'; found prose\.train\.jsonl"):
        read_documents(tmp_path, split="test")
    with pytest.raises(DataError, match=r"a split selects part of a folder.*found split 'valid'"):
        read_documents(tmp_path / "prose.train.jsonl", split="valid")


def test_limit_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"max_documents: is out of range; expected 1 or more"):
        read_documents(tmp_path, max_documents=0)


class Hub:
    """Stands in for the two functions of `datasets` that reach the hub."""

    def __init__(self, splits: dict[str, list[dict[str, object]]]) -> None:
        self.splits = splits
        self.calls: list[tuple[Any, ...]] = []

    def get_dataset_split_names(self, name: str, config: str | None) -> list[str]:
        self.calls.append(("splits", name, config))
        return list(self.splits)

    def load_dataset(self, name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        import datasets

        self.calls.append(("load", name, config, split, streaming))
        table = datasets.Dataset.from_list(self.splits[split])
        return table.to_iterable_dataset() if streaming else table


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import datasets

    hub = Hub({"train": [{"text": "a"}], "test": [{"text": "b"}, {"text": "c"}]})
    for name in ("get_dataset_split_names", "load_dataset"):
        monkeypatch.setattr(datasets, name, getattr(hub, name))
    return hub


def test_hub_data_set(hub: Hub) -> None:
    read = read_documents("org/name:config", split="test")
    assert read.texts == ("b", "c")
    assert read.names == ("org/name:config[test]:1", "org/name:config[test]:2")
    assert hub.calls[-1] == ("load", "org/name", "config", "test", False)
    assert read_documents("org/name", split="test", max_documents=1).texts == ("b",)
    assert hub.calls[-1] == ("load", "org/name", None, "test", True)


def test_hub_split_is_chosen_by_the_user_unless_there_is_one(hub: Hub) -> None:
    with pytest.raises(DataError, match=r"org/name: has several splits; found train, test\. Choo"):
        read_documents("org/name")
    with pytest.raises(DataError, match=r"org/name: has no split 'dev'; found train, test"):
        read_documents("org/name", split="dev")
    del hub.splits["test"]
    assert read_documents("org/name").texts == ("a",)


def test_hub_field(hub: Hub) -> None:
    with pytest.raises(DataError, match=r"no field 'body'; found fields 'text'\. Name the field"):
        read_documents("org/name", split="test", field="body")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConnectionError("secret url"), ResourceError, "the hub cannot be reached. Check the net"),
        (ValueError("Config name is missing"), DataError, "needs the name of a configuration"),
        (RuntimeError("secret url"), DataError, r"cannot be loaded \(RuntimeError\)"),
    ],
)
def test_hub_errors_are_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, message: str
) -> None:
    import datasets

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind, match=message) as caught:
        read_documents("org/name", split="test")
    assert "secret" not in str(caught.value)


def test_saved_data_set_with_splits(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert read_documents(tmp_path / "saved", split="test").texts == ("test",)
    with pytest.raises(DataError, match=r"saved: has several splits; found train, test"):
        read_documents(tmp_path / "saved")
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    with pytest.raises(DataError, match="saved: is no readable data set"):
        read_documents(tmp_path / "saved", split="train")
