"""What a run has finished so far, and the lock that says it is still running."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from adaconvert.errors import OutputConflictError
from adaconvert.io.fs import FileSystem
from adaconvert.io.layout import ShardRecord
from adaconvert.io.names import escape

FORMAT: Final = 1
LOCK_FILE: Final = "lock"
JOURNAL_FILE: Final = "journal.jsonl"
CHECKPOINT_FOLDER: Final = "checkpoint"


class Lock:
    """A staging folder held by this process: `claim` makes or enters it, `release` lets it go."""

    def __init__(self, fs: FileSystem, folder: Path, fd: int) -> None:
        self._fs = fs
        self.folder = folder
        self._fd = fd
        self._spare = -1

    @classmethod
    def claim(cls, fs: FileSystem, folder: Path, where: str) -> Lock:
        """Return the lock of a staging folder, which exists afterwards.

        Raises:
            OutputConflictError: another run holds it, or adaconvert did not make the folder.
        """
        while True:
            made = _enter(fs, folder)
            try:
                fd = _open_lock(fs, folder / LOCK_FILE)
            except FileNotFoundError:
                # its holder removed the folder between the two calls.
                continue
            except BaseException:
                if made:
                    fs.rmdir(folder)
                raise
            lock = cls(fs, folder, fd)
            if lock._take(where):
                return lock

    def _take(self, where: str) -> bool:
        mine = False
        try:
            if not self._fs.lock(self._fd):
                raise _held(self._fd, where)
            mine = _is_still(self._fd, self.folder / LOCK_FILE)
            if mine:
                # given back before removal, which needs a descriptor even when there is no other.
                self._spare = os.dup(self._fd)
                holder = f"{os.getpid()} {socket.gethostname()}\n".encode()
                self._fs.truncate(self._fd, 0)
                self._fs.write_at(self._fd, holder, 0)
        except BaseException:
            # what an earlier run finished stays; a folder without a journal holds nothing.
            self.release(remove=mine and not os.path.lexists(self.folder / JOURNAL_FILE))
            raise
        if not mine:
            self._fs.close(self._fd)
        return mine

    def release(self, *, remove: bool) -> None:
        """Let the folder go, removed with everything in it or as it is."""
        if self._spare >= 0:
            os.close(self._spare)
        try:
            if remove:
                self._remove()
        finally:
            self._fs.close(self._fd)

    def clear(self) -> None:
        """Remove everything in the folder but the lock."""
        checkpoint = self.folder / CHECKPOINT_FOLDER
        # without its journal nothing is taken for complete, so that goes first.
        if os.path.lexists(self.folder / JOURNAL_FILE):
            self._fs.unlink(self.folder / JOURNAL_FILE)
        if checkpoint.is_dir():
            self._fs.remove_tree(checkpoint)

    def _remove(self) -> None:
        self.clear()
        self._fs.unlink(self.folder / LOCK_FILE)
        # a run that enters now makes its own lock, and finds the folder empty or busy.
        try:
            self._fs.rmdir(self.folder)
        except OSError:
            if not os.path.lexists(self.folder / LOCK_FILE):
                raise


def _enter(fs: FileSystem, folder: Path) -> bool:
    try:
        fs.mkdir(folder)
        return True
    except FileExistsError:
        is_folder = folder.is_dir() and not folder.is_symlink()
    if not is_folder:
        raise _in_the_way(folder, "is not a folder")
    with suppress(FileNotFoundError):
        strange = set(os.listdir(folder)) - {LOCK_FILE, JOURNAL_FILE, CHECKPOINT_FOLDER}
        if strange:
            raise _in_the_way(folder, f"holds '{escape(min(strange))}', which is not adaconvert's")
    return False


def _in_the_way(folder: Path, what: str) -> OutputConflictError:
    return OutputConflictError(
        f"is in the way and {what}", where=escape(folder.name), hint="Move it away."
    )


def _open_lock(fs: FileSystem, path: Path) -> int:
    try:
        return fs.create(path)
    except FileExistsError:
        return fs.reopen(path)


def _is_still(fd: int, path: Path) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(fd))


def _held(fd: int, where: str) -> OutputConflictError:
    # the winner of a race may not have written its name yet.
    for _ in range(20):
        holder = os.pread(fd, 300, 0).decode("utf-8", "replace").split()
        if len(holder) == 2:
            break
        time.sleep(0.01)
    pid, host = holder if len(holder) == 2 else ("?", "?")
    return OutputConflictError(
        "another run is writing here",
        where=where,
        found=f"process {escape(pid)} on host {escape(host)}",
        hint="Wait for it, or choose another destination.",
    )


class Journal:
    """An append-only list of finished shards; a line counts once it ends in a newline.

    Attributes:
        records: the shards it lists, by file; the last line about a file counts.
    """

    def __init__(self, fs: FileSystem, fd: int, end: int, records: dict[str, ShardRecord]) -> None:
        self._fs = fs
        self._fd = fd
        self._end = end
        self.records = records

    @classmethod
    def start(cls, fs: FileSystem, path: Path, plan: str, facts: Mapping[str, object]) -> Journal:
        """Return a new journal whose first line names the plan."""
        journal = cls(fs, fs.create(path), 0, {})
        try:
            journal._append({"facts": dict(facts), "format": FORMAT, "plan": plan})
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def reopen(
        cls, fs: FileSystem, path: Path, plan: str, facts: Mapping[str, object], where: str
    ) -> Journal | None:
        """Return the journal of an earlier run of the same plan, None when it got nowhere.

        Raises:
            OutputConflictError: the earlier run had another plan.
        """
        try:
            lines, end = _lines(path)
        except FileNotFoundError:
            return None
        if not lines:
            return None
        _check_same_plan(lines[0], plan, facts, where)
        records = [record for line in lines[1:] if (record := _record(line)) is not None]
        journal = cls(fs, fs.reopen(path), end, {record.file: record for record in records})
        try:
            fs.truncate(journal._fd, end)
        except BaseException:
            journal.close()
            raise
        return journal

    def append(self, record: ShardRecord) -> None:
        """Add a finished shard and make the line survive a power cut."""
        tensors = dict(record.tensors)
        line = {"bytes": record.nbytes, "digest": record.digest, "shard": record.file}
        self._append({**line, "tensors": tensors})
        self.records[record.file] = record

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            self._fs.close(self._fd)
            self._fd = -1

    def _append(self, value: Mapping[str, object]) -> None:
        line = json.dumps(value, sort_keys=True).encode("ascii") + b"\n"
        self._fs.write_at(self._fd, line, self._end)
        self._fs.fsync(self._fd)
        self._end += len(line)


def _lines(path: Path) -> tuple[list[dict[str, object]], int]:
    lines: list[dict[str, object]] = []
    end = 0
    for raw in path.read_bytes().splitlines(keepends=True):
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError):
            break
        if not raw.endswith(b"\n") or not isinstance(value, dict):
            break
        lines.append(value)
        end += len(raw)
    return lines, end


def _record(line: Mapping[str, object]) -> ShardRecord | None:
    file, nbytes = line.get("shard"), line.get("bytes")
    digest, tensors = line.get("digest"), line.get("tensors")
    if not isinstance(file, str) or not isinstance(nbytes, int):
        return None
    if not isinstance(digest, str) or not isinstance(tensors, dict):
        return None
    return ShardRecord(file=file, nbytes=nbytes, digest=digest, tensors=tensors)


def _check_same_plan(
    line: Mapping[str, object], plan: str, facts: Mapping[str, object], where: str
) -> None:
    if line.get("format") == FORMAT and line.get("plan") == plan:
        return
    before = line.get("facts")
    before = before if isinstance(before, dict) else {}
    differences = [
        f"{escape(key)} was {escape(before.get(key))}, is {escape(facts.get(key))}"
        for key in sorted({*before, *facts})
        if before.get(key) != facts.get(key)
    ]
    raise OutputConflictError(
        "the unfinished run to resume had another plan"
        + (f" ({'; '.join(differences)})" if differences else ""),
        where=where,
        expected=f"plan {plan[:12]}",
        found=f"plan {escape(line.get('plan'), 12)}",
        hint="Use the same arguments as before, or leave --resume out to start again.",
    )
