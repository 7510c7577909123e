"""The folder beside the destination from which an interrupted fine-tune goes on.

    .<name>.adaconvert-training/run.json         what the run is made of
    .<name>.adaconvert-training/checkpoint-<n>/  as Trainer writes it, then `complete.json`

A checkpoint without a `complete.json` that fits its files was not written to the end or is damaged,
and is not gone on from; the one before it is kept for that case.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from adaconvert.errors import OutputConflictError
from adaconvert.io.destination import Destination
from adaconvert.io.fs import reporting

RUN_FILE: Final = "run.json"
COMPLETE_FILE: Final = "complete.json"
#: complete checkpoints that are kept.
KEPT: Final = 2
_SUFFIX: Final = ".adaconvert-training"

logger = logging.getLogger(__name__)


class Work:
    """A work folder that this run holds.

    Attributes:
        path: where it is.
        resumed: checkpoint to go on from, None to start at the beginning.
    """

    def __init__(self, path: Path, resumed: Path | None) -> None:
        self.path = path
        self.resumed = resumed

    @classmethod
    def open(cls, destination: Path, facts: Mapping[str, Any], *, resume: bool) -> Work:
        """Return the work folder of a destination; what an earlier run left is gone or resumed.

        Args:
            destination: folder the result will be; its staging folder is held by the caller.
            facts: what decides the result.
            resume: go on from the last complete checkpoint, if there is one.

        Raises:
            OutputConflictError: the run to go on from was made of something else.
            ResourceError: the folder cannot be written.
        """
        path = folder_of(destination)
        with reporting(path.name):
            if path.exists() and not resume:
                shutil.rmtree(path)
            path.mkdir(parents=True, exist_ok=True)
            run = path / RUN_FILE
            if run.is_file():
                _check_same(_read(run), facts)
            else:
                _write_whole(run, json.dumps(facts, indent=2, sort_keys=True))
            found = cls._last_complete(path) if resume else None
        return cls(path, found)

    @staticmethod
    def _last_complete(path: Path) -> Path | None:
        damaged = False
        for folder in _checkpoints(path):
            why = _fault(folder)
            if why is None:
                if damaged:
                    logger.warning("going on from %s", folder.name)
                return folder
            logger.warning("%s is not used: %s", folder.name, why)
            damaged = True
            _remove(folder)
        if damaged:
            logger.warning("no checkpoint is complete, so training starts from the beginning")
        return None

    def completed(self, step: int) -> None:
        """Mark the checkpoint of a step as written to the end; all but the last `KEPT` go."""
        folder = self.path / f"checkpoint-{step}"
        with reporting(f"{self.path.name}/{folder.name}", folder=self.path):
            _write_whole(folder / COMPLETE_FILE, json.dumps(_hashes(folder), sort_keys=True))
        marked = [found for found in _checkpoints(self.path) if _is_marked(found)]
        for old in marked[KEPT:]:
            _remove(old)

    def hint(self) -> str:
        """Return what to do after an interruption."""
        if any(_is_marked(folder) for folder in self.path.glob("checkpoint-*")):
            return "Run the same command with --resume to go on from the last checkpoint."
        return "No checkpoint was complete, so nothing was kept."

    def kept(self) -> str:
        """Return where the last good state is, when training went wrong."""
        found = sorted((f for f in self.path.glob("checkpoint-*") if _is_marked(f)), key=_step)
        if not found:
            return "No checkpoint was complete, so nothing was kept."
        return (
            f"The state of step {_step(found[-1])} is kept in {self.path.name}/{found[-1].name} "
            "until the command is run again."
        )

    def close(self, *, keep: bool) -> None:
        """Leave the folder, for good unless it holds a checkpoint and `keep`."""
        if not keep or not any(_is_marked(f) for f in self.path.glob("checkpoint-*")):
            shutil.rmtree(self.path, ignore_errors=True)


def folder_of(destination: Path) -> Path:
    """Return where the work folder of a destination lies."""
    return Destination.resolve(destination).beside(_SUFFIX)


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _is_marked(folder: Path) -> bool:
    return (folder / COMPLETE_FILE).is_file()


def _checkpoints(path: Path) -> list[Path]:
    """Return the checkpoint folders, the last step first."""
    return sorted(path.glob("checkpoint-*"), key=_step, reverse=True)


def _fault(folder: Path) -> str | None:
    """Return why a checkpoint cannot be gone on from, None when it can."""
    if not _is_marked(folder):
        return "it was not written to the end"
    try:
        marked = json.loads((folder / COMPLETE_FILE).read_text(encoding="utf-8"))
        found = _hashes(folder)
    except (OSError, ValueError) as error:
        return f"it cannot be read ({error})"
    wrong = sorted(name for name in {*marked, *found} if marked.get(name) != found.get(name))
    return f"{wrong[0]} is damaged" if wrong else None


def _remove(folder: Path) -> None:
    """Remove a checkpoint, its mark first; where that fails it stays, with a warning."""
    try:
        (folder / COMPLETE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        logger.warning("%s cannot be removed (%s); remove it yourself", folder.name, reason)


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != COMPLETE_FILE:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _read(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(run.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise OutputConflictError(
            f"cannot be read ({error})",
            where=f"{run.parent.name}/{run.name}",
            hint="Leave --resume out to start again.",
        ) from error


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = sorted(_differing(before, json.loads(json.dumps(now))))
    if differing:
        raise OutputConflictError(
            f"the interrupted run differs in {', '.join(differing)}",
            where="--resume",
            hint="Give the options it was started with, or leave --resume out to start again.",
        )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield where two records differ, such as `options.routing.balance`."""
    for key in {*before, *now}:
        was, found = before.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(found, Mapping):
            yield from (f"{key}.{inner}" for inner in _differing(was, found))
        elif was != found:
            yield key
