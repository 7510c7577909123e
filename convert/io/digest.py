"""Hashes of tensors, and the one look at every source value for NaN and infinity.

Blocks are small enough to stay in the processor's cache between reading, hashing and scanning.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from adaconvert.dtypes import BY_NAME
from adaconvert.errors import SourceError
from adaconvert.io.copying import (
    EndOfSourceError,
    Gatherer,
    Span,
    read_exactly,
    source_changed,
)
from adaconvert.io.deferral import awaited, in_order, signals_deferred, submitted
from adaconvert.io.layout import Extent
from adaconvert.io.names import escape
from adaconvert.io.tensor_ref import TensorRef

if TYPE_CHECKING:
    import numpy

    from adaconvert.io.source import Source

#: bytes read, hashed and scanned at a time.
BLOCK: Final = 1 << 20

#: per dtype: unsigned integer of its width, mask of the exponent (all set: NaN or infinity).
_EXPONENTS: Final = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
_LOCAL = threading.local()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDigest:
    """What one pass over a tensor finds.

    Attributes:
        sha256: hash of its bytes.
        finite: no value is NaN or infinite; always true of integers.
        first_bad: flat index of the first value that is, None when all are finite.
        bad_count: how many there are.
    """

    sha256: str
    finite: bool = True
    first_bad: int | None = None
    bad_count: int = 0


class PieceLike(Protocol):
    """`count` runs of `nbytes` bytes of a source tensor; `planning.ops.Piece` is one."""

    @property
    def source(self) -> int: ...
    @property
    def tensor(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def stride(self) -> int: ...
    @property
    def count(self) -> int: ...


class _Scan:
    """Counts the values of a stream of one dtype that are not finite."""

    def __init__(self, dtype: str) -> None:
        self._kind, self._mask = _EXPONENTS[dtype]
        self._width = BY_NAME[dtype].nbytes
        self._seen = 0
        self.first: int | None = None
        self.count = 0

    def update(self, block: memoryview) -> None:
        import numpy

        values = numpy.frombuffer(block, self._kind)
        exponents = _scratch(values.dtype, len(values))
        numpy.bitwise_and(values, values.dtype.type(self._mask), out=exponents)
        if len(values) and int(exponents.max()) == self._mask:
            bad = numpy.flatnonzero(exponents == self._mask)
            self.count += len(bad)
            if self.first is None:
                self.first = self._seen + int(bad[0])
        self._seen += len(values)


def _scratch(dtype: numpy.dtype[numpy.generic], length: int) -> numpy.ndarray:
    import numpy

    held = getattr(_LOCAL, "scratch", None)
    if held is None:
        held = _LOCAL.scratch = numpy.empty(BLOCK, numpy.uint8)
    view: numpy.ndarray = held[: length * dtype.itemsize].view(dtype)
    return view


def _buffer() -> memoryview:
    held = getattr(_LOCAL, "buffer", None)
    if held is None:
        held = _LOCAL.buffer = bytearray(BLOCK)
    return memoryview(held)


def _each_block(
    fd: int, start: int, nbytes: int, where: str, visit: Callable[[memoryview], None]
) -> None:
    buffer = _buffer()
    try:
        for at in range(0, nbytes, BLOCK):
            block = buffer[: min(BLOCK, nbytes - at)]
            read_exactly(fd, start + at, block)
            visit(block)
    except EndOfSourceError as error:
        raise source_changed(where) from error


def hash_tensors(
    fd: int, tensors: Sequence[Extent], *, threads: int = 1, where: str = ""
) -> dict[str, str]:
    """Return the sha256 of each tensor of an open shard, in the order given.

    Raises:
        SourceError: the file ends early.
    """

    def one(tensor: Extent) -> str:
        hasher = hashlib.sha256()
        _each_block(fd, tensor.start, tensor.nbytes, where, hasher.update)
        return hasher.hexdigest()

    if threads <= 1 or len(tensors) < 2:
        return {tensor.name: one(tensor) for tensor in tensors}
    with ThreadPoolExecutor(threads) as pool:
        digests = list(in_order(pool, one, tensors))
    return {tensor.name: digest for tensor, digest in zip(tensors, digests, strict=True)}


def digest_tensor(source: Source, ref: TensorRef) -> TensorDigest:
    """Return hash and value check of one source tensor, read once.

    Raises:
        SourceError: the shard has changed since the source was opened.
        ResourceError: it may not be read.
    """
    from adaconvert.io.reader import open_shard

    hasher = hashlib.sha256()
    scan = _Scan(ref.dtype) if ref.dtype in _EXPONENTS else None

    def visit(block: memoryview) -> None:
        hasher.update(block)
        if scan is not None:
            scan.update(block)

    with open_shard(source, ref.file) as fd:
        _each_block(fd, ref.start, ref.nbytes, escape(ref.file), visit)
    if scan is None or scan.count == 0:
        return TensorDigest(sha256=hasher.hexdigest())
    return TensorDigest(
        sha256=hasher.hexdigest(), finite=False, first_bad=scan.first, bad_count=scan.count
    )


def non_finite_error(ref: TensorRef, digest: TensorDigest) -> SourceError:
    """Return the error for a tensor with values that are NaN or infinite."""
    values = "value" if digest.bad_count == 1 else "values"
    return SourceError(
        f"tensor '{escape(ref.name)}' holds {digest.bad_count} non-finite {values}, "
        f"first at flat index {digest.first_bad}",
        where=escape(ref.file),
        hint="Repair the source, or pass --allow-nonfinite to convert it as it is.",
    )


class DigestPool:
    """Hashes and checks every source tensor once, in the background, and remembers the result.

    Args:
        sources: checkpoints in the plan's order.
        threads: how many tensors are read at a time.
        allow_nonfinite: NaN and infinity are kept in `nonfinite` instead of raised.
    """

    def __init__(
        self, sources: Sequence[Source], *, threads: int = 1, allow_nonfinite: bool = False
    ) -> None:
        self._sources = tuple(sources)
        self._allow_nonfinite = allow_nonfinite
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="adaconvert-digest")
        self._found: dict[tuple[int, str], Future[TensorDigest]] = {}
        self._hashed: dict[tuple[PieceLike, ...], Future[str]] = {}
        self._lock = threading.Lock()

    def prefetch(self, tensors: Iterable[tuple[int, str]]) -> None:
        """Queue (source, name) pairs in the order they will be asked for."""
        for source, name in tensors:
            self._request(source, name)

    def prefetch_ranges(self, pieces: Iterable[PieceLike]) -> None:
        """Queue a list of pieces that will be asked for."""
        wanted = tuple(pieces)
        self.prefetch((piece.source, piece.tensor) for piece in wanted)
        if not self._is_one_tensor(wanted):
            self._request_ranges(wanted)

    def tensor(self, source: int, name: str) -> TensorDigest:
        """Return what one pass over a source tensor found, waiting for it.

        Raises:
            SourceError: it holds NaN or infinity and that is not allowed, or the shard has changed.
            ResourceError: it may not be read.
        """
        found = awaited(self._request(source, name))
        if not found.finite and not self._allow_nonfinite:
            raise non_finite_error(self._sources[source].tensors[name], found)
        return found

    def digest_ranges(self, pieces: Iterable[PieceLike]) -> str:
        """Return the sha256 of the concatenation of pieces of source tensors, waiting for it.

        A piece that is one whole tensor is not read again; equal lists of pieces are hashed once.

        Raises:
            SourceError: as `tensor`, for any of the tensors.
            ResourceError: a shard may not be read.
        """
        wanted = tuple(pieces)
        whole = [self.tensor(piece.source, piece.tensor) for piece in wanted]
        if self._is_one_tensor(wanted):
            return whole[0].sha256
        return awaited(self._request_ranges(wanted))

    def nonfinite(self) -> dict[tuple[int, str], TensorDigest]:
        """Return what was found so far with NaN or infinity, by source and name."""
        with self._lock:
            found = dict(self._found)
        done = {key: _result(future) for key, future in found.items()}
        return {key: digest for key, digest in done.items() if digest and not digest.finite}

    def source_digest(self, source: int) -> str:
        """Return one sha256 over names and hashes of all tensors of a source, waiting for them.

        Raises:
            SourceError: as `tensor`.
            ResourceError: a shard may not be read.
        """
        names = sorted(self._sources[source].tensors)
        self.prefetch((source, name) for name in names)
        return digest_of_digests({name: self.tensor(source, name).sha256 for name in names})

    def close(self) -> None:
        """Drop what has not been started and wait for the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> DigestPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, source: int, name: str) -> Future[TensorDigest]:
        key = (source, name)
        with self._lock:
            if key not in self._found:
                opened = self._sources[source]
                tensor = opened.tensors[name]
                self._found[key] = submitted(self._pool, digest_tensor, opened, tensor)
            return self._found[key]

    def _request_ranges(self, pieces: tuple[PieceLike, ...]) -> Future[str]:
        with self._lock:
            if pieces not in self._hashed:
                self._hashed[pieces] = submitted(self._pool, self._hash_pieces, pieces)
            return self._hashed[pieces]

    def _is_one_tensor(self, pieces: tuple[PieceLike, ...]) -> bool:
        if len(pieces) != 1:
            return False
        piece = pieces[0]
        nbytes = self._sources[piece.source].tensors[piece.tensor].nbytes
        contiguous = piece.count == 1 or piece.stride == piece.nbytes
        return piece.start == 0 and contiguous and piece.nbytes * piece.count == nbytes

    def _hash_pieces(self, pieces: tuple[PieceLike, ...]) -> str:
        from adaconvert.io.reader import open_shard

        hasher = hashlib.sha256()
        gather = Gatherer(BLOCK)
        for piece in pieces:
            source = self._sources[piece.source]
            ref = source.tensors[piece.tensor]
            with open_shard(source, ref.file) as fd:
                start = ref.start + piece.start
                span = Span(fd, start, piece.nbytes, piece.stride, piece.count)
                try:
                    for chunk in gather.chunks([span]):
                        hasher.update(chunk)
                except EndOfSourceError as error:
                    raise source_changed(escape(ref.file)) from error
        return hasher.hexdigest()


def _result(future: Future[TensorDigest]) -> TensorDigest | None:
    with signals_deferred():
        good = future.done() and not future.cancelled() and future.exception() is None
        return future.result() if good else None


def digest_of_digests(digests: Mapping[str, str]) -> str:
    """Return one sha256 over a mapping of names to hashes, whatever its order."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(name.encode() + b"\0" + bytes.fromhex(digests[name]))
    return whole.hexdigest()
