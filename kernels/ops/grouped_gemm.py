"""The three grouped GEMMs of an expert layer: rows of one expert times that expert's matrix.

R rows sorted by expert, E experts, n inputs and m outputs of one expert's matrix. `ends` [E] int32
are the ends of the experts' rows; rows from the last end on are not computed and their outputs are
not initialised. No rows at all are the loop's in either backend.

Two backends: "grouped_mm" is torch's, one launch and no look at `ends` from the host; "loop" is one
matrix product per expert, of any size and float dtype, and reads `ends` on the host once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Backend = Literal["loop", "grouped_mm"]

#: what grouped_mm asks of every row pitch and of the start of every matrix.
ALIGNMENT_BYTES = 16
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16,),
}


def times_transposed(backend: Backend, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    """Return rows [R, n] times weights [E, m, n] transposed: [R, m]."""
    return times(backend, rows, ends, weights.transpose(1, 2))


def times(backend: Backend, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
    """Return rows [R, n] times weights [E, n, m]: [R, m]."""
    if backend == "grouped_mm" and rows.shape[0]:
        return functional.grouped_mm(rows, weights, offs=ends)
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for expert, mine in _spans(ends):
        torch.mm(rows[mine], weights[expert], out=out[mine])
    return out


def outer(backend: Backend, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Return each expert's left [R, m] transposed times right [R, n]: [E, m, n], 0 for no rows."""
    if backend == "grouped_mm" and left.shape[0]:
        return functional.grouped_mm(left.t(), right, offs=ends)
    out = left.new_empty(ends.shape[0], left.shape[1], right.shape[1])
    for expert, mine in _spans(ends, idle=True):
        # 0 for no rows
        torch.mm(left[mine].t(), right[mine], out=out[expert])
    return out


def sums(backend: Backend, rows: Tensor, ends: Tensor) -> Tensor:
    """Return the sum of each expert's rows [R, m]: [E, m], 0 for no rows."""
    if backend == "grouped_mm":
        # as wide as the shortest row grouped_mm takes; the columns are equal
        ones = rows.new_ones(rows.shape[0], ALIGNMENT_BYTES // rows.element_size())
        return outer(backend, ones, rows, ends)[:, 0]
    out = rows.new_zeros(ends.shape[0], rows.shape[1])
    for expert, mine in _spans(ends):
        torch.sum(rows[mine], 0, out=out[expert])
    return out


def expert_of_rows(ends: Tensor, rows: int) -> Tensor:
    """Return the expert of each row, [R] int64; the last expert for rows that are not computed."""
    places = torch.arange(rows, device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, places, right=True).clamp_(max=ends.shape[0] - 1)


def refuses(rows: Tensor, *weights: Tensor) -> str | None:
    """Return why torch's grouped_mm cannot run rows of this dtype with these weights, or None.

    Args:
        rows: [R, n].
        weights: [E, m, n] each, as they are stored.
    """
    device = rows.device.type
    if rows.dtype not in _DTYPES.get(device, ()):
        return f"no grouped_mm for {rows.dtype} on {device}"
    if device == "cuda" and torch.cuda.get_device_capability(rows.device) < (8, 0):
        return "grouped_mm needs compute capability 8.0"
    each = ALIGNMENT_BYTES // rows.element_size()
    return next((reason for weight in weights if (reason := _misaligned(weight, each))), None)


def _misaligned(weight: Tensor, each: int) -> str | None:
    """Return how a stored matrix breaks the 16-byte rules of grouped_mm, None if it does not.

    Args:
        weight: [E, m, n].
        each: values in 16 bytes.
    """
    if any(size % each for size in weight.shape[1:]):
        return f"sizes {list(weight.shape[1:])} are not multiples of {each}"
    outer_stride, *inner = weight.stride()
    pitch = max(inner)
    if min(inner) != 1 or pitch < weight.shape[2 if inner[1] == 1 else 1]:
        return f"strides {inner} are not those of a matrix"
    if any(stride % each for stride in (outer_stride, pitch, weight.storage_offset())):
        return f"the weights do not start at multiples of {ALIGNMENT_BYTES} bytes"
    return None


def _spans(ends: Tensor, *, idle: bool = False) -> Iterator[tuple[int, slice]]:
    """Yield the experts that have rows, with `idle` the others too, with their rows."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if idle or end > start:
            yield expert, slice(start, end)
        start = end
