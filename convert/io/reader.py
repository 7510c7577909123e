"""Reading weights with `pread`: bounded memory, no mapping, an error once the file has changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from adaconvert.dtypes import numpy_dtype, torch_dtype
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.io.regular import open_regular, pread_exact
from adaconvert.io.source import Source, check_identity
from adaconvert.io.tensor_ref import TensorRef

if TYPE_CHECKING:
    import numpy
    import torch

CHUNK = 8 << 20


@contextmanager
def open_shard(source: Source, file: str) -> Iterator[int]:
    """Yield a read-only descriptor of a shard that is still the file `source` was opened on.

    Raises:
        SourceError: it was replaced, rewritten or removed.
        ResourceError: it may not be read.
    """
    shard = source.shards[source.files.index(file)]
    with open_regular(source.path(file), escape(file)) as (descriptor, status):
        check_identity(shard, status)
        yield descriptor


def read_bytes(source: Source, ref: TensorRef, start: int = 0, nbytes: int | None = None) -> bytes:
    """Return `nbytes` bytes of a tensor from its byte `start` on; all the rest by default.

    Raises:
        SourceError: the shard has changed, or a BOOL tensor holds something else than 0 and 1.
        ResourceError: the shard may not be read.
    """
    count = ref.nbytes - start if nbytes is None else nbytes
    if start < 0 or count < 0 or start + count > ref.nbytes:
        raise ValueError(f"range {start}+{count} lies outside the {ref.nbytes} bytes of {ref.name}")
    with open_shard(source, ref.file) as descriptor:
        data = pread_exact(descriptor, count, ref.start + start, escape(ref.file))
    _check_values(ref, data)
    return data


def iter_chunks(source: Source, ref: TensorRef, chunk: int = CHUNK) -> Iterator[bytes]:
    """Yield the bytes of a tensor in order, at most `chunk` bytes at a time.

    Raises:
        SourceError: the shard has changed, or a BOOL tensor holds something else than 0 and 1.
        ResourceError: the shard may not be read.
    """
    with open_shard(source, ref.file) as descriptor:
        for offset in range(0, ref.nbytes, chunk):
            count = min(chunk, ref.nbytes - offset)
            data = pread_exact(descriptor, count, ref.start + offset, escape(ref.file))
            _check_values(ref, data)
            yield data


def read_numpy(source: Source, ref: TensorRef) -> numpy.ndarray[Any, Any]:
    """Return a tensor as a writable array of its raw bits (see `dtypes.numpy_dtype`), in its shape.

    Raises:
        SourceError: the shard has changed, or a BOOL tensor holds something else than 0 and 1.
        ResourceError: the shard may not be read.
    """
    import numpy

    flat = numpy.empty(ref.nbytes, dtype=numpy.uint8)
    done = 0
    for data in iter_chunks(source, ref):
        flat[done : done + len(data)] = numpy.frombuffer(data, dtype=numpy.uint8)
        done += len(data)
    return flat.view(numpy_dtype(ref.dtype)).reshape(ref.shape)


def read_torch(source: Source, ref: TensorRef) -> torch.Tensor:
    """Return a tensor on the CPU, of its own dtype and memory.

    Raises:
        SourceError: the shard has changed, or a BOOL tensor holds something else than 0 and 1.
        ResourceError: the shard may not be read.
    """
    import numpy
    import torch

    bits = read_numpy(source, ref).reshape(-1).view(numpy.uint8)
    return torch.from_numpy(bits).view(torch_dtype(ref.dtype)).reshape(ref.shape)


def _check_values(ref: TensorRef, data: bytes) -> None:
    if ref.dtype == "BOOL" and data.translate(None, b"\x00\x01"):
        raise SourceError(
            f"BOOL tensor '{escape(ref.name)}' holds a byte that is neither 0 nor 1",
            where=escape(ref.file),
            hint="Fetch the file again.",
        )
