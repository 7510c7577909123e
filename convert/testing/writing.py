"""Disks that watch, stop or fail a writer at any step, and a tiny conversion to try them on."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from adaconvert.io import manifest
from adaconvert.io.commit import Staging
from adaconvert.io.copying import FdCache, Span
from adaconvert.io.digest import DigestPool
from adaconvert.io.fs import FileSystem
from adaconvert.io.layout import PAGE
from adaconvert.io.source import Source
from adaconvert.io.writer import ShardLayout, index_json, layout_shards

KILLED = 137
TINY_CAP = 2048
_ROWS = {"embed": 2048, "gate_up": 8, "down": 8, "norm": 1}


@dataclass(frozen=True, slots=True)
class Step:
    """One change to the disk: what was done, to which path, how many bytes."""

    action: str
    subject: str
    nbytes: int = 0


class RecordingFileSystem(FileSystem):
    """The real disk, with a list of every change in `steps`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._turn = threading.Lock()

    def step(self, action: str, subject: str, nbytes: int = 0) -> None:
        """Add the change to `steps`."""
        with self._turn:
            self.steps.append(Step(action, subject, nbytes))
            self.before(len(self.steps) - 1)

    def before(self, index: int) -> None:
        """Do nothing; called before change number `index`."""


class CrashingFileSystem(RecordingFileSystem):
    """A disk whose process dies before one change, or half-way through it if that writes bytes."""

    def __init__(self, at: int, *, half: bool = False) -> None:
        super().__init__()
        self._at = at
        self._half = half

    def before(self, index: int) -> None:
        """Die, unless half of a write is still to be done."""
        writes = self.steps[index].action in {"write", "copy"} and self.steps[index].nbytes > 1
        if index == self._at and not (self._half and writes):
            os._exit(KILLED)

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all, or die half-way."""
        view = memoryview(data).cast("B")
        if self._half and len(self.steps) == self._at and len(view) > 1:
            os.pwrite(fd, view[: len(view) // 2], offset)
            os._exit(KILLED)
        super().write_at(fd, data, offset)

    def copy_range(self, src: int, src_offset: int, dst: int, offset: int, nbytes: int) -> int:
        """Copy, or die half-way."""
        if self._half and len(self.steps) == self._at and nbytes > 1:
            super().copy_range(src, src_offset, dst, offset, nbytes // 2)
            os._exit(KILLED)
        return super().copy_range(src, src_offset, dst, offset, nbytes)


class FailingFileSystem(RecordingFileSystem):
    """A disk on which one change fails, or every change of one kind."""

    def __init__(
        self, at: int | None = None, *, action: str | None = None, number: int = errno.ENOSPC
    ) -> None:
        super().__init__()
        self._at = at
        self._action = action
        self._number = number

    def before(self, index: int) -> None:
        """Raise if this is the change."""
        if index == self._at or self.steps[index].action == self._action:
            raise OSError(self._number, os.strerror(self._number))


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyPiece:
    """Bytes of a source tensor, as `planning.ops.Piece`."""

    tensor: str
    start: int
    nbytes: int
    stride: int = 0
    count: int = 1
    source: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyTarget:
    """A target tensor of the tiny conversion: copied from `pieces`, or made of `data`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str
    pieces: tuple[TinyPiece, ...] = ()
    data: bytes = b""


def safetensors_bytes(
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]], *, data_start: int = 8
) -> bytes:
    """Return a safetensors file of (dtype, shape, bytes) by name; data starts at `data_start`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        offsets = [len(body), len(body) + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    text = text.ljust(data_start - 8)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def tiny_source(folder: Path) -> Path:
    """Return a checkpoint of two shards with four finite F32 tensors, made in `folder`."""
    folder.mkdir(parents=True)
    shards: list[dict[str, tuple[str, tuple[int, ...], bytes]]] = [{}, {}]
    # embed is long enough to be copied by the kernel, the others are not.
    for index, (name, rows) in enumerate(_ROWS.items()):
        data = hashlib.sha256(name.encode()).digest() * (rows * 16 * 4 // 32)
        # clears the top exponent bit of each value, so that none is NaN or infinite.
        data = bytes(byte & 0x3F if at % 4 == 3 else byte for at, byte in enumerate(data))
        shards[index % 2][name] = ("F32", (rows, 16), data)
    # the long tensor lies at the same place of a page as in the target: the kernel copies it.
    start = layout_shards(tiny_targets(), TINY_CAP)[0].tensors[0].start + PAGE
    weight_map: dict[str, str] = {}
    for index, tensors in enumerate(shards, start=1):
        file = f"model-{index:05d}-of-00002.safetensors"
        (folder / file).write_bytes(safetensors_bytes(tensors, data_start=start))
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def tiny_targets() -> tuple[TinyTarget, ...]:
    """Return what the tiny source is converted to: copies whole, cut and strided, and new bytes."""
    whole = TinyPiece(tensor="down", start=0, nbytes=512)
    half = [TinyPiece(tensor="gate_up", start=at, nbytes=256) for at in (0, 256)]
    column = TinyPiece(tensor="gate_up", start=8, nbytes=8, stride=64, count=8)
    embed = TinyPiece(tensor="embed", start=0, nbytes=2048 * 64)
    norm = TinyPiece(tensor="norm", start=0, nbytes=64)
    targets = [_copied("embed", (2048, 16), "embed", embed)]
    for expert in range(2):
        group = f"expert.{expert}"
        targets += [
            _copied(f"{group}.gate", (4, 16), group, half[0]),
            _copied(f"{group}.up", (4, 16), group, half[1]),
            _copied(f"{group}.swapped", (8, 16), group, half[1], half[0]),
            _copied(f"{group}.down", (8, 16), group, whole),
            _copied(f"{group}.column", (8, 2), group, column),
        ]
    router = TinyTarget(
        name="router", dtype="BF16", shape=(2, 16), group="router", data=bytes(range(64))
    )
    return (*targets, router, _copied("norm", (1, 16), "norm", norm))


def _copied(name: str, shape: tuple[int, ...], group: str, *pieces: TinyPiece) -> TinyTarget:
    return TinyTarget(name=name, dtype="F32", shape=shape, group=group, pieces=pieces)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConversion:
    """A complete conversion in miniature, step for step what a real one does to the disk."""

    source: Path
    destination: Path
    targets: Sequence[TinyTarget] = field(default_factory=tiny_targets)
    cap: int | None = TINY_CAP
    plan_digest: str = "1" * 64
    overwrite: bool = False
    resume: bool = False
    needed_bytes: int = 0
    after_shard: Callable[[int], None] = lambda index: None

    def layouts(self) -> tuple[ShardLayout, ...]:
        """Return the shards of the target."""
        return layout_shards(self.targets, self.cap)

    def run(self, fs: FileSystem | None = None) -> int:
        """Write and commit the target and return how many shards had to be written."""
        source = Source.open(self.source)
        layouts = self.layouts()
        with (
            Staging.open(
                self.destination,
                sources=[self.source],
                plan_digest=self.plan_digest,
                overwrite=self.overwrite,
                resume=self.resume,
                needed_bytes=self.needed_bytes,
                fs=fs,
            ) as staging,
            DigestPool([source]) as pool,
            FdCache(2) as files,
        ):
            done = staging.completed_shards(layouts)
            left = [layout for layout in layouts if layout.file not in done]
            for index, layout in enumerate(left):
                self._write(staging, layout, source, pool, files)
                self.after_shard(index)
            self._finish(staging, source, layouts)
        return len(left)

    def _write(
        self,
        staging: Staging,
        layout: ShardLayout,
        source: Source,
        pool: DigestPool,
        files: FdCache,
    ) -> None:
        targets = {target.name: target for target in self.targets}
        with staging.shard(layout) as shard:
            copied = {}
            for placed in layout.tensors:
                target = targets[placed.name]
                if not target.pieces:
                    shard.write(target.name, target.data)
                    continue
                copied[target.name] = target.pieces
                spans = []
                for piece in target.pieces:
                    ref = source.tensors[piece.tensor]
                    start = ref.start + piece.start
                    fd = files.shard(source, ref.file)
                    spans.append(Span(fd, start, piece.nbytes, piece.stride, piece.count))
                shard.copy(target.name, spans)
            shard.finish(
                lambda: {name: pool.digest_ranges(pieces) for name, pieces in copied.items()}
            )

    def _finish(self, staging: Staging, source: Source, layouts: Sequence[ShardLayout]) -> None:
        staging.copy_file("tokenizer.json", self.source / "tokenizer.json")
        staging.write_file("config.json", b"{}\n")
        index = index_json(layouts)
        if index is not None:
            staging.write_file("model.safetensors.index.json", index)
        record = manifest.build(
            method="tiny",
            options={},
            sources=[{"label": source.label, "fingerprint": source.fingerprint}],
            plan_digest=self.plan_digest,
            exactness={"kind": "exact", "why": "bytes are copied"},
            shards=staging.records(),
            files=dict(staging.files),
        )
        staging.write_file(manifest.MANIFEST_FILE, manifest.dump(record))
        staging.commit()


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
