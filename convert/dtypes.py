"""The one table that relates safetensors dtype names to config names and widths.

Holds no tensors and imports nothing; `torch_dtype` and `numpy_dtype` import lazily.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """One storable dtype: `name` as in a safetensors header, `config_name` as in config.json."""

    name: str
    config_name: str
    nbytes: int
    is_float: bool


_TABLE = (
    DType(name="F64", config_name="float64", nbytes=8, is_float=True),
    DType(name="F32", config_name="float32", nbytes=4, is_float=True),
    DType(name="F16", config_name="float16", nbytes=2, is_float=True),
    DType(name="BF16", config_name="bfloat16", nbytes=2, is_float=True),
    DType(name="I64", config_name="int64", nbytes=8, is_float=False),
    DType(name="I32", config_name="int32", nbytes=4, is_float=False),
    DType(name="I16", config_name="int16", nbytes=2, is_float=False),
    DType(name="I8", config_name="int8", nbytes=1, is_float=False),
    DType(name="U64", config_name="uint64", nbytes=8, is_float=False),
    DType(name="U32", config_name="uint32", nbytes=4, is_float=False),
    DType(name="U16", config_name="uint16", nbytes=2, is_float=False),
    DType(name="U8", config_name="uint8", nbytes=1, is_float=False),
    DType(name="BOOL", config_name="bool", nbytes=1, is_float=False),
    DType(name="F8_E4M3", config_name="float8_e4m3fn", nbytes=1, is_float=True),
    DType(name="F8_E5M2", config_name="float8_e5m2", nbytes=1, is_float=True),
)
BY_NAME = {d.name: d for d in _TABLE}
BY_CONFIG_NAME = {d.config_name: d for d in _TABLE}

#: dtypes a weight of a dense float checkpoint may have; anything else is refused as quantised.
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a contiguous tensor of `shape` elements of `dtype`."""
    count = 1
    for size in shape:
        count *= size
    return count * BY_NAME[dtype].nbytes


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name (imports torch)."""
    import torch

    dtype = getattr(torch, BY_NAME[name].config_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def numpy_dtype(name: str) -> numpy.dtype[numpy.generic]:
    """Return the numpy dtype that holds the same bits; BF16 and fp8 come back as unsigned
    integers."""
    import numpy

    raw = {"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "BOOL": "u1"}
    dtype = BY_NAME[name]
    kind = "f" if dtype.is_float else ("u" if name.startswith("U") else "i")
    return numpy.dtype(raw.get(name, f"<{kind}{dtype.nbytes}"))
