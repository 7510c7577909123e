"""Tokens are made once; a hit gives the same, and a damaged entry is made again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from adaconvert.errors import DataError
from adaconvert.train import cache as caching
from adaconvert.train import data as packing
from adaconvert.train.cache import TokenCache, cache_folder
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed, pack

Pack = Callable[..., Packed]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADACONVERT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def packed(dense: Path, text: Path, folder: Path) -> Pack:
    def run(data: list[str] | None = None, model: Path = dense, **options: Any) -> Packed:
        given = {"steps": 3, "seq_len": 16, "batch_size": 4, **options}
        return pack(FinetuneConfig.of(data or [str(text)], given), model)

    return run


def test_hit_is_the_same_data_unread(
    packed: Pack, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = packed()
    monkeypatch.setattr(packing, "_packed", None)
    found = packed()
    assert found.cached
    assert not made.cached
    assert (found.digest, found.sources) == (made.digest, made.sources)
    assert numpy.array_equal(found.ids, made.ids)
    assert found[3]["input_ids"].equal(made[3]["input_ids"])
    (entry,) = os.listdir(folder)
    assert sorted(os.listdir(folder / entry)) == ["entry.json", "ids.npy"]
    # nothing about this machine
    assert str(folder.parent.parent) not in (folder / entry / "entry.json").read_text()


def test_conversations_are_cached_with_what_is_learned(
    packed: Pack, tmp_path: Path, folder: Path
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    made, found = (packed([str(path)], seq_len=32) for _ in range(2))
    assert found.cached
    assert found.digest == made.digest
    assert numpy.array_equal(found.kinds, made.kinds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"seq_len": 8}, {"steps": 4}, {"batch_size": 2}, {"data_format": "text"}],
    ids=lambda options: next(iter(options)),
)
def test_what_decides_the_tokens_is_in_the_key(packed: Pack, options: dict[str, Any]) -> None:
    packed()
    assert packed(**options).cached == ("data_format" in options)


def test_other_text_tokenizer_or_weight_is_another_entry(
    packed: Pack, dense: Path, text: Path, tmp_path: Path, folder: Path
) -> None:
    packed()
    other = tmp_path / "other"
    other.mkdir()
    copy = shutil.copy(text, other)
    # the same text in another place
    assert packed([copy]).cached
    Path(copy).write_text(text.read_text() + "\n" + json.dumps({"text": "more " * 20}))
    assert not packed([copy]).cached
    model = shutil.copytree(dense, tmp_path / "model")
    assert packed(model=model).cached
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert not packed(model=model).cached
    assert not packed([f"{text},1", f"{copy},2"]).cached
    assert not packed([f"{text},1", f"{copy},3"]).cached
    assert len(os.listdir(folder)) == 5


def rewrite(path: Path, raw: bytes) -> None:
    """Another file under the name: the one that was there is mapped into this process."""
    path.unlink()
    path.write_bytes(raw)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    rewrite(path, raw)


def cut(path: Path) -> None:
    rewrite(path, path.read_bytes()[:-8])


def empty(path: Path) -> None:
    rewrite(path, b"")


def pickled(path: Path) -> None:
    path.unlink()
    numpy.save(path, numpy.array([{}], dtype=object), allow_pickle=True)


def claim_more(path: Path) -> None:
    entry = json.loads(path.read_text())
    entry["facts"]["sources"][0]["documents"] = 99
    rewrite(path, json.dumps(entry).encode())


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("ids.npy", flip),
        ("ids.npy", cut),
        ("ids.npy", empty),
        ("ids.npy", Path.unlink),
        ("ids.npy", pickled),
        ("entry.json", empty),
        ("entry.json", claim_more),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_entry_is_made_again(
    packed: Pack, folder: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Any
) -> None:
    made = packed()
    (entry,) = folder.iterdir()
    damage(entry / name)
    again = packed()
    assert not again.cached
    assert (again.digest, again.sources) == (made.digest, made.sources)
    assert "cached tokens are damaged and made again" in caplog.text
    assert packed().cached


def test_no_cache_leaves_nothing(packed: Pack, folder: Path) -> None:
    made = packed(cache=False)
    assert not folder.exists()
    assert packed().digest == made.digest


def test_cache_that_cannot_be_written_costs_nothing_but_time(
    packed: Pack, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.mkdir()
    folder.write_text("a file where the folder should be")
    assert len(packed()) == 12
    assert "tokens are not cached: " in caplog.text


def test_full_disk_leaves_no_half_entry(
    packed: Pack, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching.os, "fsync", full)
    assert len(packed()) == 12
    assert os.listdir(folder) == []


def test_entry_of_a_faster_run_is_taken(packed: Pack, folder: Path) -> None:
    made = packed()
    (entry,) = folder.iterdir()
    stored = TokenCache(folder).store(entry.name, made.ids, None, {"sources": [], "digest": ""})
    assert stored is not None
    assert stored[2]["digest"] == made.digest
    assert os.listdir(folder) == [entry.name]


def test_bad_data_is_never_cached(packed: Pack, tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}')
    with pytest.raises(DataError, match="is not text"):
        packed([str(path)])
    assert not folder.exists()


def test_place_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ADACONVERT_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [cache_folder()]
    for name in ("XDG_CACHE_HOME", "HF_HOME", "ADACONVERT_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
        found.append(cache_folder())
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        ".cache/adaconvert",
        "XDG_CACHE_HOME/adaconvert",
        "HF_HOME/adaconvert",
        "ADACONVERT_CACHE",
    ]
