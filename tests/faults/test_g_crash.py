"""G6, G8, G9, G12, H4, P12: a run that dies at any step loses nothing and can always go on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from adaconvert.errors import OutputConflictError
from adaconvert.io.commit import already_committed
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.testing.writing import (
    KILLED,
    CrashingFileSystem,
    RecordingFileSystem,
    Step,
    TinyConversion,
    in_child,
    tiny_source,
    tree_digest,
)

# forked children find it loaded.
assert np


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of runs are synced here."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="adaconvert-") as name:
        yield Path(name)


@pytest.fixture
def conversion(folder: Path) -> TinyConversion:
    return TinyConversion(source=tiny_source(folder / "src"), destination=folder / "out")


def complete_run(conversion: TinyConversion) -> tuple[list[Step], dict[str, str]]:
    """Return the steps of an undisturbed run and what it wrote."""
    elsewhere = conversion.destination.parent / "reference"
    fs = RecordingFileSystem()
    replace(conversion, destination=elsewhere, overwrite=False).run(fs)
    return fs.steps, tree_digest(elsewhere)


def rerun(conversion: TinyConversion) -> None:
    """Run again as the user would; a destination that is complete already is fine."""
    if conversion.resume and already_committed(
        conversion.destination, plan_digest=conversion.plan_digest
    ):
        return
    there = conversion.destination.exists() and not conversion.overwrite
    with (
        pytest.raises(OutputConflictError, match="exists and is not empty")
        if there
        else nullcontext()
    ):
        conversion.run()


@pytest.mark.parametrize("half", [False, True])
def test_g6_killed_at_every_step(conversion: TinyConversion, half: bool) -> None:
    steps, reference = complete_run(conversion)
    source = tree_digest(conversion.source)
    target = conversion.destination
    siblings = sorted(os.listdir(target.parent))
    killed = 0
    for at in range(len(steps)):
        if half and steps[at].action not in {"write", "copy"}:
            continue
        resume = at % 3 > 0
        code = in_child(partial(conversion.run, CrashingFileSystem(at, half=half)))
        killed += code == KILLED
        assert code in {KILLED, 0}, f"step {at} {steps[at]}"
        assert not target.exists() or tree_digest(target) == reference, f"step {at} {steps[at]}"
        rerun(replace(conversion, resume=resume))
        assert tree_digest(target) == reference, f"step {at} {steps[at]}"
        left = {*os.listdir(target.parent)} - {*siblings, target.name}
        if left:
            # killed after the last rename: only a resumed run looks, and it tidies up.
            assert not resume
            assert already_committed(target, plan_digest=conversion.plan_digest)
        assert sorted(os.listdir(target.parent)) == sorted([*siblings, target.name])
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
    assert killed >= 10
    assert tree_digest(conversion.source) == source


def test_g12_killed_while_replacing(conversion: TinyConversion) -> None:
    steps, _ = complete_run(conversion)
    target = conversion.destination
    earlier = replace(conversion, plan_digest="0" * 64, cap=None)
    wanted = tree_digest(target.parent / "reference")
    renames = 0
    # from the sync before the swap to the last removal; the swap adds about ten steps.
    for at in range(len(steps) - 6, len(steps) + 12):
        replacing = replace(conversion, overwrite=True, resume=at % 2 > 0)
        earlier.run()
        old = tree_digest(target)
        code = in_child(partial(replacing.run, CrashingFileSystem(at)))
        assert code in {KILLED, 0}
        there = tree_digest(target) if target.exists() else None
        aside = target.with_name(".out.adaconvert-old")
        if there is None:
            renames += 1
            assert tree_digest(aside) == old
        assert there in (None, old, wanted)
        rerun(replacing)
        assert tree_digest(target) == wanted
        assert sorted(os.listdir(target.parent)) == ["out", "reference", "src"]
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
    assert renames == 1


def test_g8_both_sides_of_the_last_rename(conversion: TinyConversion) -> None:
    steps, reference = complete_run(conversion)
    rename = next(at for at, step in enumerate(steps) if step.action == "rename")
    for at, there in ((rename, False), (rename + 1, True)):
        assert in_child(partial(conversion.run, CrashingFileSystem(at))) == KILLED
        assert conversion.destination.exists() is there
        rerun(replace(conversion, resume=True))
        assert tree_digest(conversion.destination) == reference
        for file in conversion.destination.iterdir():
            file.unlink()


def test_g9_order_of_steps(conversion: TinyConversion) -> None:
    steps, _ = complete_run(conversion)
    staged = [step for step in steps if "/checkpoint/" in step.subject]
    written = {s.subject: at for at, s in enumerate(steps) if s.action in {"write", "copy"}}
    synced = {s.subject: at for at, s in enumerate(steps) if s.action == "fsync"}
    folder = next(at for at, s in enumerate(steps) if s.action == "fsync_dir")
    rename = next(at for at, s in enumerate(steps) if s.action == "rename")
    parent = max(at for at, s in enumerate(steps) if s.action == "fsync_dir")
    files = {step.subject for step in staged if step.action == "create"}
    assert files <= synced.keys()
    assert all(written[file] < synced[file] < folder for file in files)
    assert folder < rename < parent
    assert steps[rename].subject.startswith(steps[folder].subject + " -> ")
    assert max(synced, key=lambda file: synced[file] if file in files else -1).endswith(
        MANIFEST_FILE
    )
    created = [step.subject for step in staged if step.action == "create"]
    assert created[-1].endswith(MANIFEST_FILE)
    shards = [file for file in files if file.endswith(".safetensors")]
    journal = [at for at, s in enumerate(steps) if s.subject.endswith("journal.jsonl")]
    for file in shards:
        assert any(at > synced[file] for at in journal)
    assert not [s for s in steps[rename + 1 :] if s.action in {"write", "copy", "create"}]


def test_h4_a_journalled_shard_that_changed_is_written_again(conversion: TinyConversion) -> None:
    steps, reference = complete_run(conversion)
    manifest = next(at for at, s in enumerate(steps) if s.subject.endswith(MANIFEST_FILE))
    assert in_child(lambda: conversion.run(CrashingFileSystem(manifest))) == KILLED
    staging = conversion.destination.with_name(".out.adaconvert-partial") / "checkpoint"
    shards = sorted(staging.glob("*.safetensors"))
    assert len(shards) == len(conversion.layouts()) > 2
    flipped = bytearray(shards[1].read_bytes())
    flipped[-1] ^= 1
    shards[1].write_bytes(flipped)
    assert replace(conversion, resume=True).run() == 1
    assert tree_digest(conversion.destination) == reference


@pytest.mark.parametrize("cut", [1, 40, 10_000])
def test_p12_torn_journal(conversion: TinyConversion, cut: int) -> None:
    steps, reference = complete_run(conversion)
    manifest = next(at for at, s in enumerate(steps) if s.subject.endswith(MANIFEST_FILE))
    assert in_child(lambda: conversion.run(CrashingFileSystem(manifest))) == KILLED
    journal = conversion.destination.with_name(".out.adaconvert-partial") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    shards = len(conversion.layouts())
    assert replace(conversion, resume=True).run() == (shards if cut == 10_000 else 1)
    assert tree_digest(conversion.destination) == reference


def test_h2_resume_under_another_plan(conversion: TinyConversion) -> None:
    steps, reference = complete_run(conversion)
    manifest = next(at for at, s in enumerate(steps) if s.subject.endswith(MANIFEST_FILE))
    assert in_child(lambda: conversion.run(CrashingFileSystem(manifest))) == KILLED
    other = replace(conversion, resume=True, plan_digest="2" * 64)
    message = "out: the unfinished run to resume had another plan; expected plan 222222222222"
    with pytest.raises(OutputConflictError, match=message) as caught:
        other.run()
    assert caught.value.exit_code == 4
    # what the first run finished is still there.
    assert replace(conversion, resume=True).run() == 0
    assert tree_digest(conversion.destination) == reference
