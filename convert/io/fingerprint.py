"""Which model adapters or exits were made for: a digest of a few weights of every linear.

sha256 over, for each linear in the order of its path: the path, a zero byte, and the first
64 values of the first row of its weight as bfloat16. A base that was loaded in bfloat16 has the
digest of the float32 base it comes from. The row is taken as stored: outputs first for a linear,
inputs first for GPT-2's Conv1D.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adaconvert.dtypes import BY_NAME, torch_dtype
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.io.reader import read_bytes

if TYPE_CHECKING:
    import torch

    from adaconvert.io.source import Source

VALUES = 64


def of_model(linears: Mapping[str, Any]) -> str | None:
    """Return the digest of linears in memory.

    Args:
        linears: module path -> the linear itself, not what wraps it.

    Returns:
        hex digest; None where a weight is packed or has no values yet, or there is no linear.
    """
    rows = []
    for path, linear in linears.items():
        weight = getattr(linear, "weight", None)
        if not _is_plain(weight):
            return None
        assert weight is not None
        rows.append((path, weight.detach()[0, :VALUES]))
    return _digest(rows)


def of_source(
    source: Source,
    names: Mapping[str, str],
    *,
    dtypes: Mapping[str, str] | None = None,
    half: bool = False,
) -> str | None:
    """Return the digest of linears in a checkpoint; of each weight a few bytes are read.

    Args:
        source: the base.
        names: module path -> name of its weight in `source`.
        dtypes: name of a weight -> dtype it is rounded to before, where it is not that of `source`.
        half: then round to float16 as well, which gives the digest of the model cast to that.

    Returns:
        hex digest, None without a linear.

    Raises:
        SourceError: a weight is not there or is no matrix of floats.
    """
    import torch

    rows = []
    for path, name in names.items():
        ref = source.tensors.get(name)
        if ref is None or len(ref.shape) != 2 or not BY_NAME[ref.dtype].is_float:
            raise SourceError(
                f"the weight of '{escape(path)}' cannot be read",
                where=escape(name),
                expected="a matrix of floats",
                found="none" if ref is None else f"{ref.dtype} {list(ref.shape)}",
            )
        count = min(VALUES, ref.shape[1])
        data = read_bytes(source, ref, 0, count * BY_NAME[ref.dtype].nbytes)
        row = torch.frombuffer(bytearray(data), dtype=torch_dtype(ref.dtype))
        row = row.to(torch_dtype((dtypes or {}).get(name, ref.dtype)))
        rows.append((path, row.half() if half else row))
    return _digest(rows)


def _digest(rows: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    import torch

    found = sorted(rows, key=lambda row: row[0])
    if not found:
        return None
    digest = hashlib.sha256()
    for path, row in found:
        digest.update(path.encode() + b"\0")
        bits = row.to(device="cpu", dtype=torch.bfloat16).contiguous().view(torch.int16)
        digest.update(bits.numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def _is_plain(weight: Any) -> bool:
    known = weight is not None and weight.dim() == 2 and weight.is_floating_point()
    return bool(known and not weight.is_meta and weight.shape[1] > 0)
