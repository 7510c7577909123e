"""io.commit: the rules of a staging folder; faults are in tests/faults/test_g_*."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from adaconvert.errors import InterruptedRunError, OutputConflictError, SourceError
from adaconvert.io import manifest
from adaconvert.io.commit import Staging, already_committed
from adaconvert.io.fs import FileSystem
from adaconvert.io.header import read_header
from adaconvert.io.journal import Journal
from adaconvert.io.writer import ShardLayout, ShardRecord
from adaconvert.testing.writing import (
    HookedFileSystem,
    RecordingFileSystem,
    Step,
    TinyRun,
    tiny_source,
    tree_digest,
)


@pytest.fixture
def tiny(tmp_path: Path) -> TinyRun:
    return TinyRun(source=tiny_source(tmp_path / "src"), destination=tmp_path / "out")


@pytest.fixture
def staging(tiny: TinyRun) -> Iterator[Staging]:
    with Staging.open(tiny.destination, sources=[tiny.source], plan_digest="1" * 64) as opened:
        yield opened


def test_the_manifest_holds_what_is_there(tiny: TinyRun) -> None:
    tiny.run()
    record = manifest.read(tiny.destination)
    there = tree_digest(tiny.destination)
    shards = manifest.records(record)
    assert {*shards, *record["files"], manifest.MANIFEST_FILE} == set(there)  # type: ignore[misc]
    assert record["files"] == {n: there[n] for n in there if n in record["files"]}  # type: ignore[operator]
    names = set()
    for file, shard in shards.items():
        data = (tiny.destination / file).read_bytes()
        assert shard.nbytes == len(data)
        for name, ref in read_header(tiny.destination / file, file)[0].items():
            hashed = hashlib.sha256(data[ref.start : ref.start + ref.nbytes]).hexdigest()
            assert shard.tensors[name] == hashed
            names.add(name)
    assert names == {name for shard in shards.values() for name in shard.tensors}


def test_leaving_without_commit_undoes_it(tiny: TinyRun, tmp_path: Path) -> None:
    with Staging.open(
        tmp_path / "a" / "b" / "out", sources=[tiny.source], plan_digest="1" * 64
    ) as staging:
        staging.write_file("config.json", b"{}")
    assert os.listdir(tmp_path) == ["src"]


def test_commit_needs_the_manifest(staging: Staging) -> None:
    staging.write_file("config.json", b"{}")
    with pytest.raises(ValueError, match=r"records differ: \['adaconvert.json'\]"):
        staging.commit()


def test_nothing_comes_after_the_manifest(staging: Staging, tiny: TinyRun) -> None:
    staging.write_file(manifest.MANIFEST_FILE, b"{}")
    staging.write_file(manifest.MANIFEST_FILE, b"{ }")
    message = r"comes after adaconvert\.json, which must be last"
    with pytest.raises(ValueError, match=message):
        staging.write_file("config.json", b"{}")
    with pytest.raises(ValueError, match=message):
        staging.copy_file("tokenizer.json", tiny.source / "tokenizer.json")
    with pytest.raises(ValueError, match=message):
        staging.shard(ShardLayout(file="model.safetensors", header=b"", tensors=(), nbytes=0))


@pytest.mark.parametrize("extra", [True, False])
def test_commit_refuses_files_nobody_recorded(staging: Staging, extra: bool) -> None:
    staging.write_file("config.json", b"{}")
    staging.write_file(manifest.MANIFEST_FILE, b"{}")
    if extra:
        (staging.path / "stray").write_text("x")
    else:
        (staging.path / "config.json").unlink()
    name = "stray" if extra else "config.json"
    with pytest.raises(ValueError, match=f"records differ: .*{name}"):
        staging.commit()


@pytest.mark.parametrize("name", ["a/b", "../x", "/x", "", ".", ".."])
def test_names_of_side_files(staging: Staging, name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a file"):
        staging.write_file(name, b"")


def test_a_side_file_may_be_written_again(staging: Staging) -> None:
    for data in (b"first", b"2"):
        assert staging.write_file("README.md", data) == hashlib.sha256(data).hexdigest()
    assert (staging.path / "README.md").read_bytes() == b"2"
    assert staging.files == {"README.md": hashlib.sha256(b"2").hexdigest()}


def test_copy_file(staging: Staging, tmp_path: Path) -> None:
    data = os.urandom(5_000_000)
    (tmp_path / "big").write_bytes(data)
    (tmp_path / "link").symlink_to("big")
    assert (
        staging.copy_file("tokenizer.json", tmp_path / "link") == hashlib.sha256(data).hexdigest()
    )
    assert (staging.path / "tokenizer.json").read_bytes() == data
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="pipe: is not a regular file"):
        staging.copy_file("vocab.json", tmp_path / "pipe")


def test_already_committed(tiny: TinyRun) -> None:
    target = tiny.destination
    assert already_committed(target, plan_digest="1" * 64) is None
    plan = str(tiny.run().manifest["plan_digest"])
    found = already_committed(target, plan_digest=plan)
    assert found == manifest.read(target)
    assert already_committed(target, plan_digest="2" * 64) is None
    (target / "adaconvert.json").write_text("{}")
    assert already_committed(target, plan_digest=plan) is None


def test_facts_that_differ_are_named(tmp_path: Path) -> None:
    fs, path = FileSystem(), tmp_path / "journal"
    Journal.start(fs, path, "1" * 64, {"experts": 8, "seed": 0, "noise": 0.1}).close()
    facts = {"experts": 4, "seed": 0, "dtype": "bf16\n"}
    message = (
        r"had another plan \(dtype was None, is bf16\\n; experts was 8, is 4; "
        r"noise was 0\.1, is None\); expected plan 222222222222, found plan 1{9}\.\.\.\. Use the"
    )
    with pytest.raises(OutputConflictError, match=message):
        Journal.reopen(fs, path, "2" * 64, facts, "out")


def test_a_journal_of_another_format_is_another_plan(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text('{"format": 2, "plan": "' + "1" * 64 + '"}\n')
    with pytest.raises(OutputConflictError, match="had another plan"):
        Journal.reopen(FileSystem(), path, "1" * 64, {}, "out")


@pytest.mark.parametrize("raw", [b"", b"{}", b"\xff\n", b"[]\n", b"[" * 9999 + b"\n"], ids=range(5))
def test_a_journal_that_got_nowhere(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(raw)
    assert Journal.reopen(FileSystem(), path, "1" * 64, {}, "out") is None


def test_a_journal_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    fs, path = FileSystem(), tmp_path / "journal"
    records = [
        ShardRecord(file=f"{n}.safetensors", nbytes=n, digest="d", tensors={"t": "e"})
        for n in range(3)
    ]
    journal = Journal.start(fs, path, "p", {})
    for record in records[:2]:
        journal.append(record)
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"shard": "torn')
    again = Journal.reopen(fs, path, "p", {}, "out")
    assert again is not None
    assert path.read_bytes() == whole
    again.append(records[2])
    again.close()
    last = Journal.reopen(fs, path, "p", {}, "out")
    assert last is not None
    assert list(last.records.values()) == records
    last.close()


def test_resume_without_anything_to_resume(tiny: TinyRun) -> None:
    fs = RecordingFileSystem()
    replace(tiny, resume=True).run(fs)
    assert fs.shards_written == 3


def test_descriptors_are_closed(tiny: TinyRun) -> None:
    before = len(os.listdir("/proc/self/fd"))
    tiny.run()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_shard_finished_while_it_is_handed_over_is_kept(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first shard starts the thread that syncs shards; a busy machine can finish the shard
    # before the main thread goes on, and a signal then meets it in the middle of starting a thread
    journal = tiny.destination.parent / ".out.adaconvert-partial" / "journal.jsonl"
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.startswith("adaconvert-sync"):
            while journal.read_bytes().count(b"\n") < 2:
                time.sleep(0.001)
            signal.raise_signal(signal.SIGINT)

    def is_line_of_a_shard(step: Step) -> bool:
        return (step.action, Path(step.subject).name, step.turn) == ("fsync", journal.name, 1)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    slow = HookedFileSystem(is_line_of_a_shard, lambda: time.sleep(0.2))
    with pytest.raises(InterruptedRunError, match=r"interrupted\. 1 complete shard is kept"):
        tiny.run(slow)
    assert journal.exists()
