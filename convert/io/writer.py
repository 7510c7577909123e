"""Writing one shard: a file of known size whose tensors are copied or written into their places."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from adaconvert.io.copying import Copier, SpanLike, as_spans
from adaconvert.io.digest import hash_tensors
from adaconvert.io.fs import FileSystem, reporting
from adaconvert.io.layout import (
    PlacedTensor,
    ShardLayout,
    ShardRecord,
    digest_order,
    index_json,
    layout_shards,
    parse_size,
    shard_digest,
    shard_digest_of_file,
)
from adaconvert.io.names import escape

if TYPE_CHECKING:
    import numpy
    from typing_extensions import Buffer

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

__all__ = [
    "Digests",
    "PlacedTensor",
    "ShardLayout",
    "ShardRecord",
    "ShardWriter",
    "index_json",
    "layout_shards",
    "parse_size",
    "shard_digest",
    "shard_digest_of_file",
]


#: sha256 of tensors by name, or what returns them once they are known.
Digests = Mapping[str, str] | Callable[[], Mapping[str, str]]


class ShardWriter:
    """Writes one shard: its tensors in any order, each from its first byte to its last.

    Args:
        fs: the disk.
        folder: where the shard goes.
        layout: what it holds.
        copier: copies ranges of source files.
        seal: takes the writer over once every byte is written, and says so in `finished`; syncs,
            closes and journals.

    Attributes:
        finished: it was taken over, so that leaving the `with` block does not close it.
    """

    def __init__(
        self,
        fs: FileSystem,
        folder: Path,
        layout: ShardLayout,
        copier: Copier,
        seal: Callable[[ShardWriter, Digests], None],
    ) -> None:
        self.layout = layout
        self.path = folder / layout.file
        self._fs = fs
        self._copier = copier
        self._seal = seal
        self._placed = {tensor.name: tensor for tensor in layout.tensors}
        self._filled = dict.fromkeys(self._placed, 0)
        self._fd: int | None = None
        self.finished = False

    def __enter__(self) -> ShardWriter:
        try:
            with self._reporting():
                if os.path.lexists(self.path):
                    self._fs.unlink(self.path)
                self._fd = self._fs.create(self.path)
                self._fs.allocate(self._fd, self.layout.nbytes)
                self._fs.write_at(self._fd, self.layout.header, 0)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.finished:
            self.close()

    def copy(self, name: str, ranges: Iterable[SpanLike]) -> None:
        """Append ranges of open files to a tensor, inside the kernel if possible.

        Args:
            name: tensor of this shard.
            ranges: (descriptor, offset, nbytes), or `Span` for strided runs.

        Raises:
            SourceError: a source file ended early.
            ResourceError: the disk is full or broken.
        """
        spans = tuple(as_spans(ranges))
        start = self._reserve(name, sum(span.total for span in spans))
        with self._reporting():
            self._copier.copy(self._descriptor(), start, spans, where=f"tensor '{escape(name)}'")

    def write(self, name: str, buffer: Buffer | Array) -> None:
        """Append the bytes of a contiguous buffer to a tensor.

        Raises:
            ResourceError: the disk is full or broken.
        """
        view = memoryview(cast("Buffer", buffer))
        start = self._reserve(name, view.nbytes)
        with self._reporting():
            self._fs.write_at(self._descriptor(), view, start)

    def finish(self, tensor_digests: Digests | None = None) -> None:
        """Hand the shard over to be synced and journalled; every tensor must be complete.

        Both happen in the background; an error there is raised by the next shard or by the commit.

        Args:
            tensor_digests: sha256 of tensors by name, or what waits for them and returns them.
                Those it lacks are hashed from the file.

        Raises:
            AdaconvertError: the shard before this one could not be synced.
        """
        for tensor in self.layout.tensors:
            if self._filled[tensor.name] != tensor.nbytes:
                filled = f"{self._filled[tensor.name]} of {tensor.nbytes} bytes"
                raise ValueError(f"{self.layout.file}: tensor {tensor.name} has {filled}")
        self._seal(self, {} if tensor_digests is None else tensor_digests)

    def complete(self, tensor_digests: Digests) -> ShardRecord:
        """Sync and close the file, and return what it holds.

        Raises:
            ResourceError: the disk is full or broken.
        """
        try:
            with self._reporting():
                self._fs.fsync(self._descriptor())
            digests = self._all_digests(tensor_digests)
        finally:
            self.close()
        return ShardRecord(
            file=self.layout.file,
            nbytes=self.layout.nbytes,
            digest=shard_digest(self.layout.header, digests.values()),
            tensors=digests,
        )

    def close(self) -> None:
        """Close the file as it is."""
        if self._fd is not None:
            self._fs.close(self._fd)
            self._fd = None

    def _all_digests(self, tensor_digests: Digests) -> dict[str, str]:
        known = dict(tensor_digests() if callable(tensor_digests) else tensor_digests)
        rest = [tensor for tensor in self.layout.tensors if tensor.name not in known]
        with self._reporting():
            known |= hash_tensors(self._descriptor(), rest, where=self.layout.file)
        return {tensor.name: known[tensor.name] for tensor in digest_order(self.layout.tensors)}

    def _reserve(self, name: str, nbytes: int) -> int:
        tensor, filled = self._placed[name], self._filled[name]
        if filled + nbytes > tensor.nbytes:
            raise ValueError(f"{self.layout.file}: more than {tensor.nbytes} bytes for {name}")
        self._filled[name] = filled + nbytes
        return tensor.start + filled

    def _descriptor(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.layout.file} is closed")
        return self._fd

    def _reporting(self) -> AbstractContextManager[None]:
        return reporting(self.layout.file, folder=self.path.parent, needed=self.layout.nbytes)
