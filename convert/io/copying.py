"""Bytes go from file to file inside the kernel, or through small buffers where that is faster.

Offsets and lengths are bytes. Anonymous memory stays below 10 MiB, whatever is copied.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple

from adaconvert.errors import SourceError
from adaconvert.io.fs import FileSystem
from adaconvert.io.layout import PAGE
from adaconvert.io.names import escape
from adaconvert.io.regular import open_regular

if TYPE_CHECKING:
    from adaconvert.io.source import Source

#: size of each of the two buffers short runs are gathered in.
BLOCK: Final = 4 << 20
#: a run at least this long is copied by a system call of its own.
SHORT: Final = 64 << 10
#: size of the buffer long runs pass through where the kernel is slower; filled to a page boundary.
THROUGH: Final = 1 << 20
_LOCAL_BLOCK: Final = 64 << 10
#: reading a gap of this size costs about as much as one more system call.
_GAP: Final = 16 << 10
_NEXT_WAY: Final = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF}
    | {errno.EPERM, errno.ETXTBSY}
)


class Span(NamedTuple):
    """`runs` x `nbytes` bytes of an open file, `stride` bytes apart; a triple is one run."""

    fd: int
    offset: int
    nbytes: int
    stride: int = 0
    runs: int = 1

    @property
    def total(self) -> int:
        """Return the number of bytes the span contributes."""
        return self.nbytes * self.runs


SpanLike = Span | tuple[int, int, int] | tuple[int, int, int, int, int]
_Way = Callable[[int, int, int, int, int], int]


def as_spans(ranges: Iterable[SpanLike]) -> Iterator[Span]:
    """Yield the ranges as spans, empty ones left out and neighbours joined."""
    last: Span | None = None
    for item in ranges:
        span = Span(*item)
        if span.runs == 1 or span.stride == span.nbytes:
            span = Span(span.fd, span.offset, span.total)
        if span.total == 0:
            continue
        if last is not None and _adjoin(last, span):
            last = last._replace(nbytes=last.nbytes + span.nbytes)
            continue
        if last is not None:
            yield last
        last = span
    if last is not None:
        yield last


def _adjoin(left: Span, right: Span) -> bool:
    single = left.runs == 1 and right.runs == 1
    return single and left.fd == right.fd and left.offset + left.nbytes == right.offset


class Copier:
    """Copies ranges of open files into another; keeps its buffers from one call to the next.

    Not for use by two threads at once.
    """

    def __init__(self, fs: FileSystem, *, block: int = BLOCK, short: int = SHORT) -> None:
        self._fs = fs
        self._short = short
        self._gather = Gatherer(block)
        self._buffer = bytearray()

    def copy(
        self, dst_fd: int, dst_offset: int, ranges: Iterable[SpanLike], *, where: str = ""
    ) -> int:
        """Copy the concatenation of `ranges` to `dst_offset` and return its length.

        Raises:
            SourceError: a source file ended early.
        """
        done = 0
        try:
            for short, spans in groupby(as_spans(ranges), lambda span: span.nbytes < self._short):
                if short:
                    done += self._copy_short(dst_fd, dst_offset + done, spans)
                else:
                    for span in spans:
                        done += self._copy_long(dst_fd, dst_offset + done, span)
        except EndOfSourceError as error:
            raise source_changed(where) from error
        return done

    def _copy_short(self, dst_fd: int, dst_offset: int, spans: Iterable[Span]) -> int:
        done = 0
        for chunk in self._gather.chunks(spans):
            self._fs.write_at(dst_fd, chunk, dst_offset + done)
            done += len(chunk)
        return done

    def _copy_long(self, dst_fd: int, dst_offset: int, span: Span) -> int:
        ways: list[_Way] = [self._fs.copy_range, self._fs.send_range, self._through_memory]
        if not _kernel_is_faster(dst_fd, dst_offset - span.offset):
            ways = ways[-1:]
        for index in range(span.runs):
            offset, left = span.offset + index * span.stride, span.nbytes
            while left:
                copied = _first_that_works(ways, (span.fd, offset, dst_fd, dst_offset, left))
                offset, dst_offset, left = offset + copied, dst_offset + copied, left - copied
        return span.total

    def _through_memory(self, src: int, src_offset: int, dst: int, offset: int, nbytes: int) -> int:
        if not self._buffer:
            self._buffer = bytearray(THROUGH)
        block = memoryview(self._buffer)[: min(nbytes, THROUGH - offset % PAGE)]
        read_exactly(src, src_offset, block)
        self._fs.write_at(dst, block, offset)
        return len(block)


def copy_ranges(
    fs: FileSystem, dst_fd: int, dst_offset: int, pieces: Iterable[SpanLike], *, where: str = ""
) -> int:
    """Copy the concatenation of `pieces` to `dst_offset` of a file and return its length.

    Raises:
        SourceError: a source file ended early.
    """
    return Copier(fs).copy(dst_fd, dst_offset, pieces, where=where)


def _kernel_is_faster(dst_fd: int, distance: int) -> bool:
    # bytes that keep their place within a page are moved (or shared) page by page; else the kernel
    # splits every page in two, which took 1.7 x the processor time of a buffer that stays in the
    # cache (ext4, Linux 6.18). Network file systems, which state a large block, copy on the server.
    return distance % PAGE == 0 or os.fstat(dst_fd).st_blksize > _LOCAL_BLOCK


def _first_that_works(ways: list[_Way], arguments: tuple[int, int, int, int, int]) -> int:
    # ways that fail are dropped for the rest of the run; the last one reports every error itself.
    while len(ways) > 1:
        try:
            copied = ways[0](*arguments)
        except OSError as error:
            if error.errno not in _NEXT_WAY:
                raise
        else:
            # 0 means the end of the file, or a file system that cannot tell: let read() decide.
            if copied:
                return copied
        ways.pop(0)
    return ways[0](*arguments)


class EndOfSourceError(Exception):
    """A file ended before the range that was asked for."""


def source_changed(where: str) -> SourceError:
    """Return the error for a source that is shorter than its header said when it was opened."""
    return SourceError(
        "source changed while reading: the file ends early",
        where=where or None,
        hint="Leave the source alone while it is converted, then run again.",
    )


class Gatherer:
    """Reads many short runs into one buffer."""

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        self._out = bytearray()
        self._raw = bytearray()

    def chunks(self, spans: Iterable[Span]) -> Iterator[memoryview]:
        """Yield the concatenation of `spans` in pieces; each is valid until the next is asked for.

        Raises:
            EndOfSourceError: a file ended early.
        """
        if not self._out:
            self._out = bytearray(self._block)
        out, filled = memoryview(self._out), 0
        for part in (part for span in spans for part in self._parts(span)):
            if filled + part.total > len(out) and filled:
                yield out[:filled]
                filled = 0
            self._read(part, out[filled : filled + part.total])
            filled += part.total
        if filled:
            yield out[:filled]

    def _parts(self, span: Span) -> Iterator[Span]:
        # each part fills at most the output buffer, and its covering span at most the input buffer.
        if span.runs == 1 or span.nbytes > self._block // 2:
            for index in range(span.runs):
                start = span.offset + index * span.stride
                for at in range(0, span.nbytes, self._block):
                    yield Span(span.fd, start + at, min(self._block, span.nbytes - at))
            return
        dense = 0 <= span.stride - span.nbytes <= _GAP
        each = max(1, self._block // (span.stride if dense else span.nbytes))
        for first in range(0, span.runs, each):
            count = min(each, span.runs - first)
            offset = span.offset + first * span.stride
            yield Span(span.fd, offset, span.nbytes, span.stride, count)

    def _read(self, part: Span, out: memoryview) -> None:
        if part.runs == 1 or not 0 <= part.stride - part.nbytes <= _GAP:
            for index in range(part.runs):
                at = index * part.nbytes
                read_exactly(part.fd, part.offset + index * part.stride, out[at : at + part.nbytes])
            return
        self._read_covering_span(part, out)

    def _read_covering_span(self, part: Span, out: memoryview) -> None:
        import numpy

        if not self._raw:
            self._raw = bytearray(self._block)
        cover = (part.runs - 1) * part.stride + part.nbytes
        raw = memoryview(self._raw)[:cover]
        read_exactly(part.fd, part.offset, raw)
        rows = numpy.lib.stride_tricks.as_strided(
            numpy.frombuffer(raw, numpy.uint8),
            shape=(part.runs, part.nbytes),
            strides=(part.stride, 1),
            writeable=False,
        )
        numpy.frombuffer(out, numpy.uint8).reshape(part.runs, part.nbytes)[:] = rows


def read_exactly(fd: int, offset: int, out: memoryview) -> None:
    """Fill `out` with the bytes at `offset` of a file.

    Raises:
        EndOfSourceError: the file ended early.
    """
    while out:
        count = os.preadv(fd, [out], offset)
        if count == 0:
            raise EndOfSourceError
        offset, out = offset + count, out[count:]


class FdCache:
    """The few most recently used source files, open for reading.

    Args:
        limit: how many stay open; the one unused for longest is closed when one more is asked for.
    """

    def __init__(self, limit: int = 8) -> None:
        self._limit = max(1, limit)
        self._open: OrderedDict[str, tuple[int, ExitStack]] = OrderedDict()

    def get(self, path: Path) -> int:
        """Return a descriptor of `path`, valid until `limit` other files have been asked for.

        Raises:
            SourceError: the file is gone or is no regular file.
            ResourceError: it may not be read, or too many files are open.
        """
        return self._get(str(path), lambda: _descriptor_of(open_regular(path, escape(path.name))))

    def shard(self, source: Source, file: str) -> int:
        """Do as `get` for a shard, after checking that it is still the file `source` was opened on.

        Raises:
            SourceError: it was replaced, rewritten or removed.
            ResourceError: it may not be read, or too many files are open.
        """
        from adaconvert.io.reader import open_shard

        return self._get(str(source.path(file)), lambda: open_shard(source, file))

    def _get(self, key: str, opener: Callable[[], AbstractContextManager[int]]) -> int:
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key][0]
        while len(self._open) >= self._limit:
            self._open.popitem(last=False)[1][1].close()
        with ExitStack() as stack:
            fd = stack.enter_context(opener())
            self._open[key] = (fd, stack.pop_all())
        return fd

    def close(self) -> None:
        """Close every file."""
        while self._open:
            self._open.popitem()[1][1].close()

    def __enter__(self) -> FdCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextmanager
def _descriptor_of(opened: AbstractContextManager[tuple[int, os.stat_result]]) -> Iterator[int]:
    with opened as (descriptor, _):
        yield descriptor
