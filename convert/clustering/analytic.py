"""CMoE's split: neurons that fire on most tokens are always on, the others form experts.

Shapes: T tokens, f neurons, s of them shared, N routed experts of m = (f - s) / N neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adaconvert.clustering.assignment import assign_balanced
from adaconvert.clustering.balanced import best_device
from adaconvert.clustering.checks import check_experts, check_matrix
from adaconvert.errors import OptionError

if TYPE_CHECKING:
    import torch

#: tokens whose markers are held in floating point at a time.
BLOCK = 2048


def shared_routed(
    marks: NDArray[Any],
    *,
    num_experts: int,
    shared: int,
    device: str | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the order [f] of the neurons and the one that stands for each routed expert [N].

    The s neurons marked most often come first. Of the others, the N marked most often are the
    centres; neurons are assigned to them once, so that all experts are equally wide and the L1
    distances of markers to those of the centres are small. An expert's representative is the
    member nearest to its mean in L1. Ties go to the lower neuron throughout.

    Deviates from the paper in the assignment: by regret and exchanges (`assign_balanced`) in
    place of a linear assignment problem, which takes (f - s)**2 numbers.

    Args:
        marks: bool [T, f]: whether a neuron is among the most active of a token (the paper marks
            10 per token, of unit-length rows and inputs).
        num_experts: N, a divisor of f - s.
        shared: s, neurons that are always on.
        device: where to compute; None takes the accelerator where there is one.

    Raises:
        OptionError: N does not divide f - s, or s is not between 0 and f - 1.
        SourceError: `marks` is no matrix.

    Source: CMoE, 2502.04416, section 3.2.
    """
    import torch

    check_matrix(marks, "markers of active neurons")
    check_shared(marks.shape[1], num_experts, shared)
    rates = np.count_nonzero(marks, axis=0)
    ranked = np.argsort(-rates, kind="stable")
    always, routed = np.sort(ranked[:shared]), np.sort(ranked[shared:])
    marked = torch.from_numpy(marks[:, routed] != 0).to(device or best_device())
    centres = torch.from_numpy(np.searchsorted(routed, ranked[shared : shared + num_experts]))
    members = assign_balanced(nearness(marked, marked[:, centres.to(marked.device)], 1))
    stand = representatives(marked, members)
    order = np.concatenate([always, routed[members.flatten().cpu().numpy()]])
    return order.astype(np.int64), routed[stand.cpu().numpy()].astype(np.int64)


def check_shared(size: int, num_experts: int, shared: int) -> None:
    """Return when `size` neurons can be cut into shared ones and equal experts.

    Raises:
        OptionError: they cannot; the hint lists the numbers of experts that work.
    """
    if not 0 <= shared < size:
        raise OptionError(
            "leaves no neurons for routed experts",
            where="shared neurons",
            expected=f"0 to {size - 1}",
            found=shared,
        )
    check_experts(size - shared, num_experts)


def nearness(marked: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """Return minus `width` times the L1 distances [f, N] of markers to `counts / width` [T, N].

    |m - c| is c + m (1 - 2c) for a marker m of 0 or 1 and c between. All numbers are whole, and
    small enough for their type to hold them exactly.
    """
    import torch

    dtype = torch.float32 if len(marked) * width < 2**22 else torch.float64
    near = torch.zeros(marked.shape[1], counts.shape[1], dtype=dtype, device=marked.device)
    for start in range(0, len(marked), BLOCK):
        block = marked[start : start + BLOCK].to(dtype)
        near += block.T @ (2 * counts[start : start + BLOCK].to(dtype) - width)
    return near.sub_(counts.sum(0))


def representatives(marked: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Return the member [N] of each expert nearest to its mean marker in L1."""
    import torch

    width = members.shape[1]
    counts = torch.zeros(len(marked), len(members), dtype=torch.int64, device=marked.device)
    for slot in members.T:
        counts += marked[:, slot]
    near = nearness(marked, counts, width)
    own = near[members, torch.arange(len(members), device=members.device)[:, None]]
    return members.gather(1, own.argmax(1, keepdim=True)).flatten()
