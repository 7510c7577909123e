"""Matrices laid out so that the numbers of one neuron lie in one piece.

Checkpoints hold the down matrix as [d, f], so one neuron's column is spread over the whole matrix
and gathering a quarter of the columns reads nearly all of it. Two ways out, both asked for by the
caller of `prepare`:

- a copy by rows beside the matrix (`keep_rows`): a third more memory for the network, nothing else
  changes. Dropped when the matrix is seen to have changed.
- the matrix itself re-laid (`pack`): no memory, but `linear` slows down for short inputs.

Shapes: d hidden size, f neurons.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: dtypes whose `linear` stays usable on a re-laid matrix; float16 loses a factor of 7 to 100.
PACKED = (torch.float32, torch.bfloat16, torch.float64)
#: numbers of a matrix, along its diagonal, that are looked at before several tokens run.
SAMPLED = 64


def prepare(model: Any, *, in_place: bool = False) -> int:
    """Return how many matrices of an adaptive model were laid out so that decoding gathers well.

    For batch-1 decoding on the CPU; without it the output matrices are read whole. Names and values
    stay; weights that change afterwards drop their copy (through `.data`: at the next call with
    more than one token), so prepare again.

    Args:
        in_place: re-lay the matrices themselves (see `pack` for what that costs; saving needs
            `contiguous()`, which transformers calls). Otherwise copies are kept, a third more
            memory for the feed-forward networks.
    """
    matrices, downs = [], []
    for site in model.adaptive_sites().values():
        for role, name in site.adaptive_spec["weights"].items():
            child = getattr(site, name)
            # transformers' Conv1D holds [in, out]
            turned = type(child).__name__ == "Conv1D"
            if isinstance(getattr(child, "weight", None), nn.Parameter):
                matrices.append((child.weight, int((role == "down") != turned)))
                downs += [child.weight] if role == "down" and not turned else []
    return pack(matrices, model) if in_place else sum(map(keep_rows, downs))


@dataclass(frozen=True)
class Rows:
    """A matrix [d, f] by rows of neurons.

    Attributes:
        rows: [f, d].
        pointer, version: of the matrix when they were made.
        sample: numbers of the matrix, as a view and as they were; `check_rows` compares them.
    """

    rows: Tensor
    pointer: int
    version: int
    sample: tuple[Tensor, Tensor] | None = None

    def hold(self, down: Tensor) -> bool:
        """Return whether they are still of this matrix, as far as torch counts changes."""
        return self.pointer == down.data_ptr() and self.version == _version(down)


#: id of a down matrix -> the matrix and its copy by rows; goes when the matrix goes.
_KEPT: dict[int, tuple[weakref.ref[Tensor], Rows]] = {}


def _kept(down: Tensor) -> Rows | None:
    found = _KEPT.get(id(down))
    return found[1] if found is not None and found[0]() is down else None


def neuron_major(down: Tensor) -> bool:
    """Return whether each neuron's column of a [d, f] matrix lies in one piece."""
    return down.stride(0) == 1 and down.stride(1) >= down.shape[0]


def rows_of(down: Tensor) -> Tensor | None:
    """Return the matrix by rows of neurons, [d, f] -> [f, d]; None where it has none."""
    found = find_rows(down)
    return None if found is None else found.rows


def find_rows(down: Tensor) -> Rows | None:
    """Return the matrix by rows of neurons, with what tells whether that still holds."""
    if neuron_major(down):
        return Rows(down.detach().t(), down.data_ptr(), _version(down))
    kept = _kept(down)
    if kept is not None and not kept.hold(down):
        _KEPT.pop(id(down), None)
        return None
    return kept


def keep_rows(down: nn.Parameter) -> bool:
    """Return whether the matrix [d, f] now has a copy by rows that it had not."""
    if not _ordinary(down) or down.dim() != 2 or not down.is_floating_point():
        return False
    if rows_of(down) is not None:
        return False
    with torch.no_grad():
        rows = down.detach().t().contiguous()
    # along the diagonal: a write to some rows or to some experts' columns alone meets it too
    count = max(1, min(SAMPLED, *down.shape))
    seen = down.detach()[:: down.shape[0] // count, :: down.shape[1] // count].diagonal()
    own = Rows(rows, down.data_ptr(), _version(down), (seen, seen.clone()))
    key = id(down)
    _KEPT[key] = (weakref.ref(down, lambda _: _KEPT.pop(key, None)), own)
    return True


def check_rows(down: Tensor) -> None:
    """Drop the copy of a matrix when a sample of it differs.

    Writing through `.data`, as merging adapters does, leaves no other trace.
    """
    kept = _kept(down)
    if kept is None or kept.sample is None:
        return
    if not kept.hold(down) or not torch.equal(*kept.sample):
        _KEPT.pop(id(down), None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and not tensor.is_meta


def pack(matrices: Iterable[tuple[nn.Parameter, int]], within: nn.Module) -> int:
    """Return how many matrices were re-laid so that the numbers of one neuron lie in one piece.

    Values, names and shapes stay; the parameter becomes a transposed view. Left alone is what
    already lies so, and what could lose something: other dtypes than `PACKED`, other devices,
    subclasses (quantised weights), parameters with a gradient, and memory that another parameter or
    buffer of the model sees too.

    Cost, measured in float32 and bfloat16: `linear` on a re-laid matrix, a third of the network's
    work, reaches 0.95-1.0 of its speed from 128 tokens on, 0.6-0.9 from 2 to 64, which leaves
    0.77-0.95 for the network.

    Args:
        matrices: parameter and which of its two dimensions counts neurons.
        within: the model they are part of.
    """
    others = [t for t in (*within.parameters(), *within.buffers()) if _ordinary(t)]
    return sum(_pack_one(parameter, dim, others) for parameter, dim in matrices)


def _pack_one(parameter: nn.Parameter, dim: int, others: list[Tensor]) -> bool:
    if not _ordinary(parameter) or parameter.dim() != 2 or parameter.dtype not in PACKED:
        return False
    if parameter.grad is not None or parameter.stride(1 - dim) == 1:
        return False
    first, last = _span(parameter)
    for other in others:
        start, end = _span(other)
        if other is not parameter and start <= last and first <= end:
            return False
    rows = parameter.detach().movedim(dim, 0).contiguous()
    parameter.data = rows.movedim(0, dim)
    return True


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first and the last element."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr()
    return first, first + max(reach, 0) * tensor.element_size()
