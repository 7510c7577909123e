"""Weights as transformers' loader wants them: by name, each read from disk when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from adaconvert.dtypes import nbytes_of, torch_dtype
from adaconvert.io.reader import read_bytes, read_torch
from adaconvert.io.source import Source
from adaconvert.io.tensor_ref import TensorRef

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class ReadCount:
    """How much has been read, so that tests can hold the runner to one block at a time.

    Attributes:
        total: bytes read in all.
        tensors: how often each tensor was read.
    """

    total: int = 0
    tensors: dict[str, int] = field(default_factory=dict)


class StoredTensor:
    """A tensor on disk that reads itself when indexed with `...`, as the slices of safetensors do.

    transformers' loader indexes each weight once, on its own threads, and casts the result; so the
    stored and the cast form of a whole checkpoint are never in memory together. It is read with
    `pread`, not
    mapped: a file that shrinks is an error and not a SIGBUS.

    Source: `_materialize_copy` in transformers 5.17 and 5.23, `core_model_loading.py`.
    """

    __slots__ = ("_count", "_ref", "_source")

    def __init__(self, source: Source, ref: TensorRef, count: ReadCount) -> None:
        self._source = source
        self._ref = ref
        self._count = count

    def __getitem__(self, key: object) -> torch.Tensor:
        if key is not Ellipsis:
            raise TypeError("a stored tensor is read whole")
        self._count.total += self._ref.nbytes
        self._count.tensors[self._ref.name] = self._count.tensors.get(self._ref.name, 0) + 1
        return read_torch(self._source, self._ref)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the named rows of a matrix, stacked; nothing else is read."""
        import torch

        columns = self._ref.shape[1]
        nbytes = nbytes_of(self._ref.dtype, (columns,))
        data = bytearray()
        for row in rows:
            data += read_bytes(self._source, self._ref, row * nbytes, nbytes)
        self._count.total += len(data)
        flat = torch.frombuffer(data, dtype=torch_dtype(self._ref.dtype))
        return flat.view(len(rows), columns)

    def get_shape(self) -> list[int]:
        """Return the sizes, outermost first."""
        return list(self._ref.shape)

    def get_dtype(self) -> str:
        """Return the safetensors dtype name."""
        return self._ref.dtype


class StoredRows:
    """Some rows of a stored matrix, read row by row when indexed with `...`."""

    __slots__ = ("_rows", "_whole")

    def __init__(self, whole: StoredTensor, rows: Sequence[int]) -> None:
        self._whole = whole
        self._rows = tuple(rows)

    def __getitem__(self, key: object) -> torch.Tensor:
        return self._whole.rows(self._rows)


def stored_tensors(
    source: Source,
    count: ReadCount,
    *,
    keep: Callable[[str], bool] | None = None,
    rename: Callable[[str], str] | None = None,
) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint, unread, by name.

    Args:
        source: the opened checkpoint.
        count: what counts the reads.
        keep: which names to return; all when None.
        rename: the name each gets; its own when None.
    """
    return {
        rename(name) if rename else name: StoredTensor(source, ref, count)
        for name, ref in source.tensors.items()
        if keep is None or keep(name)
    }
