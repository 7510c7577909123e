"""Stored bits to float32 and back, with numpy alone: a conversion needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaconvert.dtypes import BY_NAME, numpy_dtype
from adaconvert.errors import SourceError

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]


def to_float32(raw: Array, dtype: str) -> Array:
    """Return float32 values of stored bits.

    Args:
        raw: array of `numpy_dtype(dtype)`; bf16 as uint16.
        dtype: safetensors dtype name of a float dtype.
    """
    import numpy

    if dtype == "BF16":
        return (raw.astype(numpy.uint32) << 16).view(numpy.float32)
    return raw.astype(numpy.float32)


def from_float32(values: Array, dtype: str, where: str) -> Array:
    """Return the stored bits of float32 values, rounded to nearest even.

    Args:
        values: finite or not; what is not finite stays so.
        dtype: safetensors dtype name to store.
        where: tensor name for the error.

    Raises:
        SourceError: a finite value has no finite neighbour in `dtype`.
    """
    import numpy

    if dtype == "BF16":
        bits = numpy.ascontiguousarray(values, dtype=numpy.float32).view(numpy.uint32)
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(numpy.uint16)
        rounded[nan] = ((bits[nan] >> 16) | 0x40).astype(numpy.uint16)
        finite_after = (rounded & 0x7F80) != 0x7F80
        stored = rounded
    else:
        with numpy.errstate(over="ignore"):
            stored = values.astype(numpy_dtype(dtype))
        finite_after = numpy.isfinite(stored)
    lost = int(numpy.count_nonzero(~finite_after & numpy.isfinite(values)))
    if lost:
        raise SourceError(
            f"cast to {BY_NAME[dtype].config_name} makes {lost} values infinite",
            where=where,
            hint="Choose --dtype bfloat16 or float32.",
        )
    return stored
