"""G6, G8, G9, G12, H2, H4, P12: a run that dies at any step loses nothing and can go on."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from adaconvert.errors import OutputConflictError
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.testing.faults import tree_state
from adaconvert.testing.writing import (
    KILLED,
    CrashingFileSystem,
    Recorded,
    RecordingFileSystem,
    Step,
    TinyRun,
    in_child,
    is_new_shard,
    tree_digest,
)

SHARDS = 3


def kill(run: TinyRun, step: Step, *, half: bool = False) -> None:
    """Leave the disk as a run leaves it that is killed at a step."""
    assert in_child(partial(run.run, CrashingFileSystem(step, half=half))) == KILLED, step


def run_again(run: TinyRun) -> None:
    """Run as the user would; only a resumed run may find its destination complete."""
    done = run.destination.exists() and not run.overwrite and not run.resume
    with (
        pytest.raises(OutputConflictError, match="exists and is not empty")
        if done
        else nullcontext()
    ):
        run.run()


def kill_before_the_manifest(run: TinyRun, recorded: Recorded) -> Path:
    """Leave every shard complete and nothing committed; return the staging folder."""
    kill(run, recorded.steps[recorded.first("create", MANIFEST_FILE)])
    return run.destination.with_name(".out.adaconvert-partial")


@pytest.mark.parametrize("half", [False, True], ids=["before", "half-way"])
def test_g6_killed_at_every_step(
    quick: TinyRun, recorded: Recorded, memory: Path, half: bool
) -> None:
    source = tree_state(quick.source)
    home, saved = quick.destination.parent, memory / "saved"
    renamed = recorded.first("rename")
    for at, step in enumerate(recorded.steps):
        if half and not step.writes:
            continue
        kill(quick, step, half=half)
        assert quick.destination.exists() is (at > renamed), step
        if home.exists():
            shutil.copytree(home, saved)
        # a torn write is nothing new to a run that starts again.
        for resume in (True,) if half else (False, True):
            run_again(replace(quick, resume=resume))
            if at > renamed and not resume:
                # the output is complete; what lies beside it is for a resumed run to remove.
                assert tree_digest(quick.destination) == tree_digest(saved / "out"), step
            else:
                assert tree_digest(home) == recorded.tree, step
            shutil.rmtree(home)
            if saved.exists():
                shutil.copytree(saved, home)
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(saved, ignore_errors=True)
    assert tree_state(quick.source) == source


def test_g12_killed_while_replacing(quick: TinyRun, recorded: Recorded, memory: Path) -> None:
    home, target = quick.destination.parent, quick.destination
    replace(quick, seed=1).run()
    shutil.copytree(home, memory / "earlier")
    old = tree_digest(target)
    wanted = {name[4:]: digest for name, digest in recorded.tree.items() if name != "out"}
    replacing = replace(quick, overwrite=True)
    fs = RecordingFileSystem()
    replacing.run(fs)
    assert tree_digest(home) == recorded.tree
    swap = next(at for at, s in enumerate(fs.steps) if s.action == "rename")
    assert not [s for s in fs.steps[:swap] if s.subject.startswith(str(target))]
    absent = 0
    for at, step in enumerate(fs.steps[swap - 1 :], start=swap - 1):
        shutil.rmtree(home)
        shutil.copytree(memory / "earlier", home)
        kill(replacing, step)
        there = tree_digest(target) if target.exists() else None
        if there is None:
            absent += 1
            assert tree_digest(target.with_name(".out.adaconvert-old")) == old
        assert there in (None, old if at <= swap else wanted), step
        run_again(replace(replacing, resume=at % 2 > 0))
        assert tree_digest(home) == recorded.tree, step
    assert absent == 1


def test_g8_both_sides_of_the_last_rename(quick: TinyRun, recorded: Recorded) -> None:
    rename = recorded.first("rename")
    for at, there in ((rename, False), (rename + 1, True)):
        kill(quick, recorded.steps[at])
        assert quick.destination.exists() is there
        fs = RecordingFileSystem()
        result = replace(quick, resume=True).run(fs)
        assert fs.shards_written == 0
        assert tree_digest(quick.destination.parent) == recorded.tree
        told = "an earlier run completed it; every byte is as written"
        assert (told in result.verification_lines) is there
        shutil.rmtree(quick.destination.parent)


def test_g9_order_of_steps(recorded: Recorded) -> None:
    steps = recorded.steps
    created = [s.subject for s in steps if s.action == "create" and "/checkpoint/" in s.subject]
    written = {s.subject: at for at, s in enumerate(steps) if s.writes}
    synced = {s.subject: at for at, s in enumerate(steps) if s.action == "fsync"}
    folder, rename = recorded.first("fsync_dir", "/checkpoint"), recorded.first("rename")
    assert {Path(file).name for file in created} == {
        name.removeprefix("out/") for name in recorded.tree if name != "out"
    }
    assert all(written[file] < synced[file] < folder for file in created)
    # the manifest is begun when every other file is safe, and the folder takes its name last.
    manifest = recorded.first("create", MANIFEST_FILE)
    assert created[-1].endswith(f"/{MANIFEST_FILE}")
    assert all(synced[file] < manifest for file in created[:-1])
    assert folder < rename
    assert steps[rename].subject.startswith(f"{steps[folder].subject} -> ")
    parents = [s.subject for s in steps[rename + 1 :] if s.action == "fsync_dir"]
    home = Path(created[0]).parents[2]
    assert parents == [str(home), str(home.parent)]
    assert not [s for s in steps[rename + 1 :] if s.action in {"create", "write", "copy"}]


def test_g9_a_shard_is_journalled_once_it_is_safe(recorded: Recorded) -> None:
    steps = recorded.steps
    journal = [at for at, s in enumerate(steps) if s.writes and s.subject.endswith(".jsonl")]
    shards = [s.subject for s in steps if is_new_shard(s)]
    safe = {s.subject: at for at, s in enumerate(steps) if s.action == "fsync"}
    # its first line is the plan.
    assert len(journal) == SHARDS + 1 == len(shards) + 1
    assert all(safe[shard] < line for shard, line in zip(shards, journal[1:], strict=True))
    assert safe[steps[journal[0]].subject] > journal[-1]


def test_h4_a_journalled_shard_that_changed_is_written_again(
    quick: TinyRun, recorded: Recorded
) -> None:
    staging = kill_before_the_manifest(quick, recorded)
    shards = sorted(staging.glob("checkpoint/*.safetensors"))
    assert len(shards) == SHARDS
    flipped = bytearray(shards[1].read_bytes())
    flipped[-1] ^= 1
    shards[1].write_bytes(flipped)
    fs = RecordingFileSystem()
    replace(quick, resume=True).run(fs)
    assert [Path(s.subject).name for s in fs.steps if is_new_shard(s)] == [shards[1].name]
    assert tree_digest(quick.destination.parent) == recorded.tree


@pytest.mark.parametrize(("cut", "left"), [(1, 1), (40, 1), (100_000, SHARDS)])
def test_p12_torn_journal(quick: TinyRun, recorded: Recorded, cut: int, left: int) -> None:
    journal = kill_before_the_manifest(quick, recorded) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-cut])
    fs = RecordingFileSystem()
    replace(quick, resume=True).run(fs)
    assert fs.shards_written == left
    assert tree_digest(quick.destination.parent) == recorded.tree


def test_h2_resume_under_another_plan(quick: TinyRun, recorded: Recorded) -> None:
    kill_before_the_manifest(quick, recorded)
    message = r"the unfinished run to resume had another plan \(seed was 0, is 2\); expected plan"
    with pytest.raises(OutputConflictError, match=message) as caught:
        replace(quick, resume=True, seed=2).run()
    assert caught.value.exit_code == 4
    # what the first run finished is still there.
    fs = RecordingFileSystem()
    replace(quick, resume=True).run(fs)
    assert fs.shards_written == 0
    assert tree_digest(quick.destination.parent) == recorded.tree


def test_h2_resume_from_another_source(quick: TinyRun, recorded: Recorded) -> None:
    kill_before_the_manifest(quick, recorded)
    config = quick.source / "config.json"
    config.write_text(config.read_text().replace("1e-05", "1e-06"))
    with pytest.raises(OutputConflictError, match="had another plan") as caught:
        replace(quick, resume=True).run()
    assert caught.value.exit_code == 4


def test_h2_resume_from_a_source_whose_weights_were_rewritten(
    quick: TinyRun, recorded: Recorded
) -> None:
    kill_before_the_manifest(quick, recorded)
    shard = sorted(quick.source.glob("*.safetensors"))[0]
    changed = bytearray(shard.read_bytes())
    changed[-1] ^= 1
    shard.write_bytes(changed)
    with pytest.raises(OutputConflictError, match=r"had another plan .*source files") as caught:
        replace(quick, resume=True).run()
    assert caught.value.exit_code == 4
