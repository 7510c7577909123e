"""A fingerprint changes with what is read, and with nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adaconvert.data.columns import columns_of
from adaconvert.data.fingerprint import fingerprint_of
from adaconvert.data.rows import iter_rows
from adaconvert.errors import DataError, ResourceError


def write(path: Path, *rows: object) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_content_decides_and_place_and_time_do_not(tmp_path: Path) -> None:
    one = write(tmp_path / "a.jsonl", {"text": "a"})
    two = write(tmp_path / "other" / "b.jsonl", {"text": "a"})
    os.utime(two, (0, 0))
    assert fingerprint_of(one) == fingerprint_of(two)
    # another reader would read it
    assert fingerprint_of(one) != fingerprint_of(write(tmp_path / "a.json", {"text": "a"}))
    before = fingerprint_of(one)
    status = one.stat()
    write(one, {"text": "b"})
    os.utime(one, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint_of(one) != before


def test_ends_are_enough_when_asked_for_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaconvert.data import fingerprint

    monkeypatch.setattr(fingerprint, "_END", 8)
    found = []
    for middle in ("aaaa", "bbbb", "aaa"):
        path = write(tmp_path / "a.jsonl", {"text": f"{'x' * 9}{middle}{'x' * 9}"})
        found.append((fingerprint_of(path, whole=False), fingerprint_of(path)))
    assert found[0][0] == found[1][0] != found[2][0]
    assert len({whole for _, whole in found}) == 3


def test_folder_is_its_data_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    write(folder / "a.train.jsonl", {"text": "a"})
    write(folder / "b.valid.jsonl", {"text": "b"})
    before = fingerprint_of(folder), fingerprint_of(folder, split="train")
    assert before[0] != before[1]
    (folder / "README.md").write_text("not read")
    write(folder / "b.valid.jsonl", {"text": "c"})
    assert fingerprint_of(folder) != before[0]
    assert fingerprint_of(folder, split="train") == before[1]
    (folder / "a.train.jsonl").rename(folder / "c.train.jsonl")
    assert fingerprint_of(folder, split="train") != before[1]
    with pytest.raises(DataError, match=r"no file of split 'test'"):
        fingerprint_of(folder, split="test")


def test_saved_data_set(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    before = fingerprint_of(tmp_path / "saved")
    assert before == fingerprint_of(str(tmp_path / "saved"))
    datasets.Dataset.from_dict({"text": ["b"]}).save_to_disk(str(tmp_path / "saved"))
    assert fingerprint_of(tmp_path / "saved") != before
    assert columns_of(tmp_path / "saved", ("text",)) == ("text",)


def test_hub_data_set_is_its_commit() -> None:
    assert fingerprint_of("org/name") is None
    found = {fingerprint_of("org/name", commit=c, split=s) for c in ("a", "b") for s in (None, "x")}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '\n{"text": "a", "id": 1}\nnot looked at', ("text", "id")),
        ("a.json", '[{"messages": []}, {"text": "a"}]', ("messages",)),
        # one conversation, not a list of messages
        ("a.json", '{"messages": [{"role": "user", "content": "a"}]}', ("messages",)),
        ("a.json", '{"version": 1, "data": [{"text": "a"}]}', ("text",)),
        ("a.txt", "anything", ("text",)),
        ("a.jsonl", "", ()),
    ],
)
def test_columns_of_files(tmp_path: Path, name: str, text: str, expected: tuple[str, ...]) -> None:
    (tmp_path / name).write_text(text)
    assert columns_of(tmp_path / name, ("text", "messages")) == expected
    (tmp_path / "folder").mkdir()
    (tmp_path / name).rename(tmp_path / "folder" / name)
    assert columns_of(tmp_path / "folder", ("text", "messages")) == expected


def test_columns_of_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    assert columns_of(tmp_path / "a.parquet", ("text",)) == ("text", "n")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: is no readable Parquet file"):
        columns_of(tmp_path / "a.parquet", ("text",))


def test_columns_of_what_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]")
    with pytest.raises(DataError, match=r"a\.jsonl line 1: is not a JSON object; found an array"):
        columns_of(tmp_path / "a.jsonl", ("text",))
    (tmp_path / "a.csv").write_text("text\na")
    with pytest.raises(DataError, match=r"a\.csv: is no data file by its name"):
        columns_of(tmp_path / "a.csv", ("text",))


class Hub:
    """Stands in for what reaches the hub, and remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        self.calls: list[tuple[str, object]] = []
        monkeypatch.setattr(datasets, "get_dataset_split_names", self.splits)
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self.info)

    def splits(self, name: str, config: str | None, **pinned: str) -> list[str]:
        return ["train"]

    def load(
        self, name: str, config: str | None, *, split: str, streaming: bool, **pin: str
    ) -> object:
        import datasets

        self.calls.append((f"{name} {config} {pin}", streaming))
        return datasets.Dataset.from_list([{"text": "a", "id": 1}] * 3)

    def info(self, name: str, revision: str | None, timeout: float) -> object:
        from types import SimpleNamespace

        if name == "org/gone":
            raise ConnectionError
        return SimpleNamespace(sha=f"commit-of-{revision}")


def test_hub_data_set_is_read_at_the_commit_that_is_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from adaconvert.train.sources import open_source

    hub = Hub(monkeypatch)
    source = open_source("org/name:en", "org/name:en")
    assert (source.commit, source.pinned, source.format) == ("commit-of-None", False, "text")
    assert [raw.value for raw in source.rows()] == ["a"] * 3
    assert hub.calls[-1] == ("org/name en {'revision': 'commit-of-None'}", False)
    pinned = open_source("org/name@v1", "org/name@v1", streaming=True)
    assert (pinned.commit, pinned.pinned) == ("commit-of-v1", True)
    next(pinned.rows())
    assert hub.calls[-1] == ("org/name None {'revision': 'commit-of-v1'}", True)
    unknown = open_source("org/gone", "org/gone")
    assert (unknown.commit, unknown.where) == (None, "org/gone")


def test_hub_columns_come_from_the_first_row_when_nothing_else_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    Hub(monkeypatch)
    assert columns_of("org/name", ("text",)) == ("text", "id")

    def rows() -> object:
        yield {"messages": []}

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: datasets.IterableDataset.from_generator(rows)
    )
    assert columns_of("org/name", ("text",), streaming=True) == ("messages",)


def test_rows_of_an_unknown_hub_data_set(tmp_path: Path) -> None:
    # offline, whether it exists cannot be known
    with pytest.raises((DataError, ResourceError), match=r"org/no-such: no such file or folder"):
        list(iter_rows("org/no-such", ("text",), streaming=True))
