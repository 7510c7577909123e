"""G7, G10, G11: signals, dead runs, and two runs at once."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from adaconvert.cli.signals import signals_raise
from adaconvert.errors import AdaconvertError, InterruptedRunError, OutputConflictError, SourceError
from adaconvert.testing.writing import (
    KILLED,
    CrashingFileSystem,
    HookedFileSystem,
    Recorded,
    RecordingFileSystem,
    Step,
    TinyRun,
    in_child,
    is_new_shard,
    tree_digest,
)


class SignalledFileSystem(RecordingFileSystem):
    """A disk whose process gets a signal before one step, or while the kernel carries it out."""

    def __init__(self, at: Step, number: int, *, within: bool = False) -> None:
        super().__init__()
        self._at = at
        self._number = number
        self._within = within
        self._due = False

    def before(self, step: Step) -> None:
        """Send it, or note that it is due."""
        # the thread that syncs takes steps too: another step must not call it off
        self._due = self._due or step == self._at
        if not self._within:
            self.deliver()

    def deliver(self) -> None:
        """Send the signal, if it is due."""
        if self._due:
            self._due = False
            os.kill(os.getpid(), self._number)

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        self.deliver()

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.deliver()
        return fd

    def rename(self, src: Path, dst: Path) -> None:
        super().rename(src, dst)
        self.deliver()


def stop(run: TinyRun, fs: RecordingFileSystem) -> BaseException | None:
    """Return what ends a run under the command line's signal handlers, None when nothing does."""
    try:
        with signals_raise():
            run.run(fs)
    except (KeyboardInterrupt, AdaconvertError) as error:
        return error
    return None


@pytest.mark.parametrize(
    ("number", "every"), [(signal.SIGTERM, 1), (signal.SIGINT, 3)], ids=["sigterm", "sigint"]
)
def test_g7_a_signal_at_every_step(
    quick: TinyRun, recorded: Recorded, number: int, every: int
) -> None:
    home = quick.destination.parent
    complete = {(name[4:], digest) for name, digest in recorded.tree.items()}
    kept = 0
    for step in recorded.steps[::every]:
        error = stop(quick, SignalledFileSystem(step, number))
        assert isinstance(error, KeyboardInterrupt | InterruptedRunError | None), step
        if isinstance(error, InterruptedRunError):
            assert error.exit_code == 128 + number
        if "--resume to go on" in str(error):
            kept += 1
            assert os.listdir(home) == [".out.adaconvert-partial"]
        elif quick.destination.exists():
            assert tree_digest(quick.destination).items() <= complete, step
        else:
            assert not home.exists(), f"{step}: {error}"
        replace(quick, resume=True).run()
        assert tree_digest(home) == recorded.tree, step
        shutil.rmtree(home)
    assert kept > 30 // every


@pytest.mark.parametrize("overwrite", [False, True])
def test_g7_a_signal_within_a_step(
    quick: TinyRun, recorded: Recorded, memory: Path, overwrite: bool
) -> None:
    home, run = quick.destination.parent, replace(quick, overwrite=overwrite)
    replace(quick, seed=1).run()
    shutil.move(home, memory / "earlier")
    old = tree_digest(memory / "earlier" / "out")
    new = {name[4:]: digest for name, digest in recorded.tree.items() if name != "out"}
    fs = RecordingFileSystem()
    if overwrite:
        shutil.copytree(memory / "earlier", home)
        run.run(fs)
        shutil.rmtree(home)
    for step in fs.steps or recorded.steps:
        if step.action not in {"mkdir", "create", "rename"}:
            continue
        if overwrite:
            shutil.copytree(memory / "earlier", home)
        assert stop(run, SignalledFileSystem(step, signal.SIGTERM, within=True)) is not None
        there = [tree_digest(path) for path in home.glob("*out*") if "partial" not in path.name]
        # complete outputs only, and never none where there was one.
        assert all(tree in (old, new) for tree in there), step
        assert there or not overwrite, step
        replace(run, resume=True).run()
        assert tree_digest(home) == recorded.tree, step
        shutil.rmtree(home)


@pytest.mark.parametrize(
    ("number", "text"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM")],
)
def test_g7_what_is_complete_is_kept(
    quick: TinyRun, recorded: Recorded, number: int, text: str
) -> None:
    # the second shard is begun once the first one waits to be synced, and that is waited for.
    second = recorded.steps[recorded.first("create", "-00002-of-00003.safetensors")]
    error = stop(quick, SignalledFileSystem(second, number))
    kept = "1 complete shard is kept: run the same command with --resume to go on from there."
    assert str(error) == f"{text}. {kept}"
    fs = RecordingFileSystem()
    replace(quick, resume=True).run(fs)
    assert fs.shards_written == 2
    assert tree_digest(quick.destination.parent) == recorded.tree


def test_g7_a_shard_being_synced_is_waited_for(quick: TinyRun, recorded: Recorded) -> None:
    def late() -> None:
        # by then the second shard is written, and the run waits for the first.
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)

    synced = recorded.steps[recorded.first("fsync", "-00001-of-00003.safetensors")]
    error = stop(quick, HookedFileSystem(synced, late))
    assert str(error).startswith("stopped by SIGTERM. 1 complete shard is kept: run")


def test_g7_nothing_complete_nothing_kept(quick: TinyRun, recorded: Recorded) -> None:
    allocate = recorded.steps[recorded.first("allocate")]
    error = stop(quick, SignalledFileSystem(allocate, signal.SIGTERM))
    assert str(error) == "stopped by SIGTERM. Nothing was complete, so nothing was kept."
    assert os.listdir(quick.source.parent) == ["src"]


def test_other_errors_keep_nothing(quick: TinyRun, recorded: Recorded) -> None:
    def damage() -> None:
        raise SourceError("is damaged", where="model.safetensors")

    third = recorded.steps[recorded.first("create", "-00003-of-00003.safetensors")]
    with pytest.raises(SourceError, match=r"model\.safetensors: is damaged"):
        quick.run(HookedFileSystem(third, damage))
    assert os.listdir(quick.source.parent) == ["src"]


def test_g10_a_dead_run_is_removed(
    quick: TinyRun, recorded: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    third = recorded.steps[recorded.first("create", "-00003-of-00003.safetensors")]
    assert in_child(partial(quick.run, CrashingFileSystem(third))) == KILLED
    staging = quick.destination.with_name(".out.adaconvert-partial")
    (staging / "checkpoint" / "left-over.safetensors").write_bytes(b"x")
    fs = RecordingFileSystem()
    quick.run(fs)
    assert fs.shards_written == 3
    assert "out: an unfinished run is discarded" in caplog.text
    assert tree_digest(quick.destination.parent) == recorded.tree


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_g10_a_live_run_is_left_alone(
    quick: TinyRun, recorded: Recorded, resume: bool, overwrite: bool
) -> None:
    second = replace(quick, resume=resume, overwrite=overwrite, seed=1)
    refused = []

    def meanwhile() -> None:
        found = f"found process {os.getpid()} on host {re.escape(socket.gethostname())}"
        message = f"another run is writing here; {found}"
        with pytest.raises(OutputConflictError, match=message) as caught:
            second.run()
        refused.append(caught.value.exit_code)

    quick.run(HookedFileSystem(is_new_shard, meanwhile))
    assert refused == [4]
    assert tree_digest(quick.destination.parent) == recorded.tree


def test_g11_started_together(quick: TinyRun, recorded: Recorded) -> None:
    home = quick.destination.parent
    for _ in range(5):
        start, go = os.pipe()
        children = [_start(quick, start, go) for _ in range(4)]
        os.close(start)
        os.close(go)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert sorted(codes) == [0, 4, 4, 4]
        assert tree_digest(home) == recorded.tree
        shutil.rmtree(home)


def _start(run: TinyRun, start: int, go: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        # the end of the pipe closes for all children at once.
        os.close(go)
        os.read(start, 1)
        run.run()
        code = 0
    except OutputConflictError as error:
        code = error.exit_code
    finally:
        os._exit(code)
