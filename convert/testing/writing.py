"""Disks that watch, stop or fail a run at any step, and a tiny run to try them on."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from adaconvert import conversion
from adaconvert.io.fs import FileSystem
from adaconvert.reports import ConversionResult
from adaconvert.testing.faults import (
    Stored,
    craft,
    dense_tensors,
    entry,
    floats,
    shard_name,
    write_config,
    write_index,
)

KILLED = 137
#: the long tensors get a shard each, everything else shares one.
TINY_CAP = 60_000
_LONG = 2048
_BYTES = frozenset({"write", "copy"})


@dataclass(frozen=True, slots=True)
class Step:
    """One change to the disk: what was done, to which path, for which time, and how many bytes.

    Threads may swap two steps from one run to the next, so a step is known by what it is.
    """

    action: str
    subject: str
    turn: int = 0
    nbytes: int = field(default=0, compare=False)

    @property
    def writes(self) -> bool:
        """Return whether the step can be left half done."""
        return self.action in _BYTES and self.nbytes > 1


class RecordingFileSystem(FileSystem):
    """The real disk, with a list of every change in `steps`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._turns: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def step(self, action: str, subject: str, nbytes: int = 0) -> None:
        """Add the change to `steps`."""
        with self._lock:
            step = self.upcoming(action, subject, nbytes)
            self._turns[action, subject] += 1
            self.steps.append(step)
        self.before(step)

    def upcoming(self, action: str, subject: str, nbytes: int = 0) -> Step:
        """Return the step that this change will be."""
        return Step(action, subject, self._turns[action, subject], nbytes)

    def before(self, step: Step) -> None:
        """Do nothing; called before each step."""

    @property
    def shards_written(self) -> int:
        """Return how many shards were created."""
        return len([s for s in self.steps if is_new_shard(s)])


class HookedFileSystem(RecordingFileSystem):
    """A disk that does something just before the first step that is `at`, or for which it holds."""

    def __init__(self, at: Step | Callable[[Step], bool], do: Callable[[], object]) -> None:
        super().__init__()
        self._when = at.__eq__ if isinstance(at, Step) else at
        self._do: Callable[[], object] | None = do

    def before(self, step: Step) -> None:
        """Do it, if this is the step."""
        if self._do is not None and self._when(step):
            do, self._do = self._do, None
            do()


class CrashingFileSystem(RecordingFileSystem):
    """A disk whose process dies before one step, or half-way through it if that writes bytes."""

    def __init__(self, at: Step, *, half: bool = False) -> None:
        super().__init__()
        self._at = at
        self._half = half

    def before(self, step: Step) -> None:
        """Die, unless half of the step is still to be done."""
        if step == self._at and not (self._half and step.writes):
            os._exit(KILLED)

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all, or die half-way."""
        if self._dies_within("write", fd, len(data)):
            os.pwrite(fd, memoryview(data).cast("B")[: len(data) // 2], offset)
            os._exit(KILLED)
        super().write_at(fd, data, offset)

    def copy_range(self, src: int, src_offset: int, dst: int, offset: int, nbytes: int) -> int:
        """Copy, or die half-way."""
        if self._dies_within("copy", dst, nbytes):
            with suppress(OSError):
                os.copy_file_range(src, dst, nbytes // 2, src_offset, offset)
            os._exit(KILLED)
        return super().copy_range(src, src_offset, dst, offset, nbytes)

    def _dies_within(self, action: str, fd: int, nbytes: int) -> bool:
        step = self.upcoming(action, self.name_of(fd), nbytes)
        return self._half and step == self._at and step.writes


class FailingFileSystem(RecordingFileSystem):
    """A disk on which one step fails, or every step of one kind."""

    def __init__(self, at: Step | str, number: int = errno.ENOSPC) -> None:
        super().__init__()
        self._at = at
        self._number = number

    def before(self, step: Step) -> None:
        """Raise if this is the step."""
        if self._at in (step, step.action):
            raise OSError(self._number, os.strerror(self._number))


def is_new_shard(step: Step) -> bool:
    """Return whether a step begins a shard."""
    return step.action == "create" and step.subject.endswith(".safetensors")


def safetensors_bytes(tensors: Mapping[str, Stored]) -> bytes:
    """Return a safetensors file of (dtype, shape, bytes) by name, padded as ours are."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def tiny_source(folder: Path) -> Path:
    """Return a Llama of one layer in two shards, made in `folder`, with side files of both kinds.

    Embedding and head are long enough to be copied by the kernel, the other tensors are not.
    """
    folder.mkdir(parents=True)
    tensors = dense_tensors(1)
    for first, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        tensors[name] = floats(_LONG, 8, first=first)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:7], names[7:]), start=1):
        file = shard_name(number, 2)
        (folder / file).write_bytes(safetensors_bytes({name: tensors[name] for name in part}))
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    write_config(folder, num_hidden_layers=1, vocab_size=_LONG)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "README.md").write_text("the source's own card, which is not copied")
    return folder


def sparse_source(folder: Path, *, hidden: int, inner: int) -> Path:
    """Return a Llama of one layer, F32 and all zero, whose shard takes no room on the disk.

    Args:
        folder: made.
        hidden: width of the model; its four attention matrices are square.
        inner: neurons of its feed-forward network.
    """
    folder.mkdir(parents=True)
    wide = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    header: dict[str, object] = {}
    end = 0
    for name, (_, shape, _) in dense_tensors(1).items():
        part = name.split(".")[-2]
        rows = (shape[0],) if "embed" in name or "lm_head" in name else (hidden,)
        mine = wide.get(part, (*rows, *[hidden] * (len(shape) - 1)))
        start, end = end, end + 4 * math.prod(mine)
        header[name] = entry("F32", mine, start, end)
    raw = craft(header)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + end)
    write_config(folder, num_hidden_layers=1, hidden_size=hidden, intermediate_size=inner)
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRun:
    """One run of `conversion.run` on a tiny source, without the verification at its end.

    Attributes:
        source: see `tiny_source`.
        destination: as the user gives it.
        seed: another one is another plan.
    """

    source: Path
    destination: Path
    seed: int = 0
    experts: int = 2
    shared_experts: str = "none"
    max_shard_size: str | int = TINY_CAP
    overwrite: bool = False
    resume: bool = False

    def run(self, fs: FileSystem | None = None) -> ConversionResult:
        """Return the result of converting the source on that disk."""
        settings = conversion.RunSettings(
            destination=self.destination,
            overwrite=self.overwrite,
            resume=self.resume,
            verify=False,
            max_shard_size=self.max_shard_size,
            fs=fs,
        )
        options = {
            "experts": self.experts,
            "shared_experts": self.shared_experts,
            "seed": self.seed,
        }
        return conversion.run([str(self.source)], "upcycle", options, settings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What an undisturbed run did, to be compared with disturbed ones.

    Attributes:
        steps: every change to the disk.
        tree: `tree_digest` of the folder the destination is in.
    """

    steps: tuple[Step, ...]
    tree: dict[str, str]

    def first(self, action: str, name: str = "") -> int:
        """Return the index of the first step of a kind, on a path that ends in `name`."""
        found = (s.action == action and s.subject.endswith(name) for s in self.steps)
        return list(found).index(True)


def record(run: TinyRun) -> Recorded:
    """Return what `run` does; the folder its destination is in is removed again."""
    fs = RecordingFileSystem()
    run.run(fs)
    tree = tree_digest(run.destination.parent)
    shutil.rmtree(run.destination.parent)
    return Recorded(steps=tuple(fs.steps), tree=tree)


def tree_digest(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, and "" for every folder, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes() if path.is_file() else None
        name = str(path.relative_to(folder))
        found[name] = "" if data is None else hashlib.sha256(data).hexdigest()
    return found


def in_child(work: Callable[[], object]) -> int:
    """Return the exit code of a forked child that does `work`: 0, or 1 when that raised."""
    pid = os.fork()
    if pid == 0:
        code = 1
        with suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
