"""io.copying: every way to copy gives the same bytes, whatever the system calls do."""

from __future__ import annotations

import errno
import os
import random
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaconvert.errors import ResourceError, SourceError
from adaconvert.io.copying import (
    BLOCK,
    PAGE,
    SHORT,
    Copier,
    FdCache,
    Gatherer,
    Span,
    SpanLike,
    as_spans,
    copy_ranges,
)
from adaconvert.io.fs import FileSystem

DATA = random.Random(0).randbytes(1 << 20)


class Refusing(FileSystem):
    """A disk whose kernel copies fail with an error, end early, or do little at a time."""

    def __init__(
        self, *, copy: int | None = None, send: int | None = None, most: int | None = None
    ) -> None:
        super().__init__()
        self.copy, self.send, self.most = copy, send, most
        self.used: set[str] = set()

    def copy_range(self, src: int, src_offset: int, dst: int, offset: int, nbytes: int) -> int:
        if self.copy is not None:
            return _fail(self.copy)
        self.used.add("copy")
        return super().copy_range(src, src_offset, dst, offset, min(nbytes, self.most or nbytes))

    def send_range(self, src: int, src_offset: int, dst: int, offset: int, nbytes: int) -> int:
        if self.send is not None:
            return _fail(self.send)
        self.used.add("send")
        return super().send_range(src, src_offset, dst, offset, min(nbytes, self.most or nbytes))

    def write_at(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        self.used.add("write")
        super().write_at(fd, data, offset)


def _fail(number: int) -> int:
    if number == 0:
        return 0
    raise OSError(number, os.strerror(number))


@contextmanager
def opened(folder: Path, data: bytes = DATA) -> Iterator[tuple[int, int]]:
    """Yield a source that holds `data` and an empty destination."""
    (folder / "src").write_bytes(data)
    src = os.open(folder / "src", os.O_RDONLY)
    dst = os.open(folder / "dst", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        yield src, dst
    finally:
        os.close(src)
        os.close(dst)


def expected(ranges: list[SpanLike], data: bytes = DATA) -> bytes:
    """Return the concatenation of the ranges, the slow and obvious way."""
    out = b""
    for span in (Span(*item) for item in ranges):
        starts = range(
            span.offset, span.offset + max(span.stride, 1) * span.runs, max(span.stride, 1)
        )
        out += b"".join(data[at : at + span.nbytes] for at in list(starts)[: span.runs])
    return out


@pytest.mark.parametrize(
    ("fs", "used"),
    [
        (Refusing(), {"copy"}),
        (Refusing(most=70_001), {"copy"}),
        *((Refusing(copy=n), {"send"}) for n in (errno.EXDEV, errno.EINVAL, errno.ENOSYS)),
        *((Refusing(copy=n), {"send"}) for n in (errno.EOPNOTSUPP, errno.EBADF)),
        (Refusing(copy=errno.EXDEV, most=70_001), {"send"}),
        (Refusing(copy=errno.ENOSYS, send=errno.EINVAL), {"write"}),
        (Refusing(copy=0), {"send"}),
        (Refusing(copy=0, send=0), {"write"}),
    ],
)
def test_every_way_to_copy(tmp_path: Path, fs: Refusing, used: set[str]) -> None:
    with opened(tmp_path) as (src, dst):
        # each lies at the same place of a page in both files.
        at, ranges = 17, list[SpanLike]()
        for nbytes, page in ((300_001, 0), (100_000, 99), (200_000, 1)):
            ranges.append((src, page * PAGE + at % PAGE, nbytes))
            at += nbytes
        assert copy_ranges(fs, dst, 17, ranges) == 600_001
        assert os.pread(dst, 1 << 20, 17) == expected(ranges)
    assert fs.used == used


@pytest.mark.parametrize(
    ("offset", "block", "used"),
    [(17, PAGE, {"write"}), (17, 1 << 20, {"copy"}), (PAGE, PAGE, {"copy"})],
)
def test_where_the_kernel_is_slower_it_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int, block: int, used: set[str]
) -> None:
    fs = Refusing()
    with opened(tmp_path) as (src, dst), monkeypatch.context() as patch:
        patch.setattr(os, "fstat", lambda fd: SimpleNamespace(st_blksize=block))
        assert copy_ranges(fs, dst, offset, [(src, 0, 900_000)]) == 900_000
        assert os.pread(dst, 1 << 20, offset) == DATA[:900_000]
    assert fs.used == used


@pytest.mark.parametrize("seed", range(12))
def test_any_mixture_of_ranges(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with opened(tmp_path) as (src, dst):
        ranges: list[SpanLike] = []
        for _ in range(12):
            nbytes = rng.choice([0, 1, 3, 64, 511, 4096, 20_000, 70_000, 150_000])
            gap = rng.choice([0, 1, 7, 300, 17_000, 40_000])
            most = max(1, (len(DATA) - 100) // (nbytes + gap or 1))
            runs = min(rng.choice([1, 1, 2, 5, 100, 900]), most)
            ranges.append((src, rng.randrange(100), nbytes, nbytes + gap, runs))
        wanted = expected(ranges)
        copier = Copier(FileSystem(), block=rng.choice([1 << 12, 1 << 17, BLOCK]))
        for _ in range(2):
            assert copier.copy(dst, 100, ranges) == len(wanted)
            assert os.pread(dst, len(wanted) + 1, 100) == wanted


def test_neighbours_are_joined() -> None:
    ranges: list[SpanLike] = [(3, 0, 10), (3, 10, 5), (3, 15, 0), (3, 20, 4, 4, 3), (4, 32, 1)]
    assert list(as_spans(ranges)) == [Span(3, 0, 15), Span(3, 20, 12), Span(4, 32, 1)]


def test_strided_runs_need_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    preadv = os.preadv

    def watched(fd: int, buffers: list[memoryview], offset: int) -> int:
        reads.append(offset)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    with opened(tmp_path) as (src, dst):
        ranges: list[SpanLike] = [(src, 32, 64, 128, 8000)]
        copy_ranges(FileSystem(), dst, 0, ranges)
        assert os.pread(dst, 1 << 20, 0) == expected(ranges)
    assert len(reads) == 1


@pytest.mark.parametrize(
    "span", [(0, 64 << 20, 0, 1), (0, 512, 1024, 1 << 16), (0, 32, 1 << 15, 2048)]
)
@pytest.mark.parametrize("kernel", [True, False])
def test_memory_does_not_grow(
    tmp_path: Path, span: tuple[int, int, int, int], kernel: bool
) -> None:
    with opened(tmp_path, b"") as (src, dst):
        os.truncate(tmp_path / "src", 65 << 20)
        fs = FileSystem() if kernel else Refusing(copy=errno.EXDEV, send=errno.EINVAL)
        tracemalloc.start()
        try:
            copied = copy_ranges(fs, dst, 0, [(src, *span)])
            assert tracemalloc.get_traced_memory()[1] < 3 * BLOCK
        finally:
            tracemalloc.stop()
        assert copied == span[1] * span[3]


def test_d7_offsets_beyond_4_gib(tmp_path: Path) -> None:
    far = (5 << 30) + 3
    with opened(tmp_path, b"") as (src, dst):
        os.truncate(tmp_path / "src", far + 200_000)
        wfd = os.open(tmp_path / "src", os.O_WRONLY)
        os.pwrite(wfd, DATA[:200_000], far)
        os.close(wfd)
        os.truncate(dst, far * 2)
        for fs in (FileSystem(), Refusing(copy=errno.EXDEV), Refusing(copy=0, send=0)):
            copy_ranges(fs, dst, far + 9, [(src, far, 200_000), (src, far + 1, 10, 1000, 100)])
            assert os.pread(dst, 200_000, far + 9) == DATA[:200_000]
            assert os.pread(dst, 10, far + 200_019) == DATA[1001:1011]


@pytest.mark.parametrize("fs", [FileSystem(), Refusing(copy=errno.EXDEV), Refusing(copy=0, send=0)])
@pytest.mark.parametrize(
    "span", [(0, len(DATA) + 1, 0, 1), (len(DATA) - 50, 51, 0, 1), (100, 1000, 4000, 300)]
)
def test_a16_source_cut_while_reading(
    tmp_path: Path, fs: FileSystem, span: tuple[int, int, int, int]
) -> None:
    message = (
        "tensor 'x': source changed while reading: the file ends early. Leave the source alone"
    )
    with opened(tmp_path) as (src, dst), pytest.raises(SourceError, match=message):
        copy_ranges(fs, dst, 0, [(src, *span)], where="tensor 'x'")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_other_errors_are_not_hidden_by_another_way(tmp_path: Path, number: int) -> None:
    fs = Refusing(copy=number, send=number)
    with opened(tmp_path) as (src, dst), pytest.raises(OSError, match=os.strerror(number)):
        copy_ranges(fs, dst, 0, [(src, 0, SHORT)])
    assert fs.used == set()


def test_gatherer_keeps_long_runs_whole(tmp_path: Path) -> None:
    with opened(tmp_path) as (src, _):
        ranges: list[SpanLike] = [(src, 0, 10), (src, 100, 5000), (src, 9, 3000, 4000, 2)]
        chunks = [bytes(c) for c in Gatherer(1024).chunks(Span(*item) for item in ranges)]
        assert b"".join(chunks) == expected(ranges)
        assert max(map(len, chunks)) <= 1024


def test_fd_cache(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}" for n in range(5)]
    for path in paths:
        path.write_bytes(path.name.encode())
    before = len(os.listdir("/proc/self/fd"))
    with FdCache(2) as cache:
        for _ in range(2):
            for path in paths:
                assert os.pread(cache.get(path), 9, 0) == path.name.encode()
        first = cache.get(paths[3])
        assert cache.get(paths[3]) == first
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_fd_cache_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe\n")
    with FdCache() as cache:
        with pytest.raises(SourceError, match=r"pipe\\n: is not a regular file"):
            cache.get(tmp_path / "pipe\n")
        with pytest.raises(SourceError, match="gone: file is missing"):
            cache.get(tmp_path / "gone")


def test_fd_cache_keeps_descriptors_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with FdCache() as cache:
        assert not os.get_inheritable(cache.get(tmp_path / "file"))


def test_resource_error_is_not_a_source_error() -> None:
    assert not issubclass(ResourceError, SourceError)
