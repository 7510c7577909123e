"""G6, G7: the real command, killed or stopped by a signal while it writes, and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from adaconvert.io import manifest
from adaconvert.testing.writing import sparse_source, tiny_source, tree_digest

#: eight experts of 6.3 MB, a shard each: long enough to be met in the middle.
WIDE = ("--experts", "8", "--max-shard-size", "6.5MB")
KEPT = "run the same command with --resume to go on from there."


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`adaconvert upcycle` from `src` to `out` in one folder, and what it leaves there."""

    folder: Path
    options: tuple[str, ...] = WIDE

    @property
    def destination(self) -> Path:
        return self.folder / "out"

    @property
    def staging(self) -> Path:
        return self.folder / ".out.adaconvert-partial"

    def start(self, *more: str) -> subprocess.Popen[str]:
        """Start the command; it can be interrupted, whatever started this process."""
        paths = (str(self.folder / "src"), str(self.destination))
        return subprocess.Popen(
            [sys.executable, "-m", "adaconvert", "upcycle", *paths, "-q", *self.options, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *more: str) -> None:
        """Run it to its good end."""
        process = self.start(*more)
        _, err = process.communicate(timeout=200)
        assert (process.returncode, err) == (0, "")

    def complete_shards(self) -> int:
        """Return how many shards the journal lists; -1 when there is no journal."""
        try:
            return (self.staging / "journal.jsonl").read_bytes().count(b"\n") - 1
        except FileNotFoundError:
            return -1

    def signalled(
        self, number: signal.Signals, when: Callable[[], bool], *more: str
    ) -> tuple[int, str]:
        """Return exit code and messages of a run that gets a signal as soon as something holds."""
        process = self.start(*more)
        while process.poll() is None and not when():
            time.sleep(0.0005)
        process.send_signal(number)
        _, err = process.communicate(timeout=200)
        assert "Traceback" not in err
        return process.returncode, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """A run that nobody disturbed."""
    command = Command(folder=tmp_path_factory.mktemp("whole"))
    sparse_source(command.folder / "src", hidden=256, inner=2048)
    command.run("--no-verify")
    return command


@pytest.fixture
def wide(whole: Command, tmp_path: Path) -> Command:
    """The same before it runs."""
    (tmp_path / "src").symlink_to(whole.folder / "src")
    return Command(folder=tmp_path)


def goes_on(command: Command, whole: Command) -> None:
    """Check that a resumed run keeps what is complete, and ends where an undisturbed one does."""
    shards = sorted((command.staging / "checkpoint").glob("*.safetensors"))
    kept = {path.name: path.stat().st_ino for path in shards[: command.complete_shards()]}
    command.run("--no-verify", "--resume")
    assert tree_digest(command.destination) == tree_digest(whole.destination)
    assert {name: (command.destination / name).stat().st_ino for name in kept} == kept
    assert sorted(os.listdir(command.folder)) == ["out", "src"]


# verification follows the last shard and takes seconds, so no signal comes too late.
@pytest.mark.parametrize("shards", [0, 1, 5])
def test_g6_killed_and_resumed(wide: Command, whole: Command, shards: int) -> None:
    code, _ = wide.signalled(signal.SIGKILL, lambda: wide.complete_shards() >= shards)
    assert code == -signal.SIGKILL
    assert not wide.destination.exists()
    goes_on(wide, whole)


@pytest.mark.parametrize(
    ("number", "text"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "stopped by SIGTERM")],
)
def test_g7_stopped_and_resumed(
    wide: Command, whole: Command, number: signal.Signals, text: str
) -> None:
    code, err = wide.signalled(number, lambda: wide.complete_shards() >= 1)
    assert code == 128 + number
    count = wide.complete_shards()
    shards = "1 complete shard is" if count == 1 else f"{count} complete shards are"
    assert err == f"error: {text}. {shards} kept: {KEPT}\n"
    assert not wide.destination.exists()
    goes_on(wide, whole)


def test_g7_stopped_before_anything_is_complete(wide: Command) -> None:
    one_shard = Command(folder=wide.folder, options=("--experts", "8"))
    begun = one_shard.staging / "checkpoint" / "model.safetensors"
    for _ in range(5):
        code, err = one_shard.signalled(signal.SIGTERM, begun.exists)
        assert code == 143
        if KEPT not in err:
            break
        # a machine this busy came too late.
        shutil.rmtree(one_shard.staging)
    said = "error: stopped by SIGTERM. Nothing was complete, so nothing was kept.\n"
    assert err == said
    assert os.listdir(wide.folder) == ["src"]


def test_g6_killed_while_verifying(tmp_path: Path) -> None:
    tiny_source(tmp_path / "src")
    # it is made up, and verification would read it.
    (tmp_path / "src" / "tokenizer.json").unlink()
    command = Command(folder=tmp_path, options=("--experts", "2", "--max-shard-size", "60kB"))
    code, _ = command.signalled(signal.SIGKILL, lambda: command.complete_shards() == 3)
    assert code == -signal.SIGKILL
    assert not command.destination.exists()
    command.run("--resume")
    record = manifest.read(command.destination)["verification"]
    assert isinstance(record, dict)
    assert record["ok"] is True
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]
