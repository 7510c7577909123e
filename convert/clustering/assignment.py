"""Balanced assignment: f points to N clusters of exactly m = f / N members each.

Clusters are held as `members` [N, m], the indices of their points; gains as [N, m, N], what the
member in that slot of a cluster would gain by moving to each cluster.

Shapes: f points, N clusters, m members each, q pairs of clusters that exchange at one time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    #: what pairs (a, b) of clusters win [q] by exchanging member i of a and member j of b.
    Accept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

#: exchanges per cluster between two computations of all gains; 8 gained 1 % more in a quarter more
#: time. Wide clusters need more of them: a quarter of their width.
EXCHANGES = 4
#: rounds of exchanges at most, should rounding errors ever make them go round in circles.
ROUNDS = 100


def assign_balanced(affinity: torch.Tensor) -> torch.Tensor:
    """Return members [N, m] with a large sum of affinities [f, N].

    No exchange of two points betters it. The optimum of the linear assignment problem, which
    takes the square of f in memory, was at most 1 % of the spread better.
    """
    import torch

    members = fill(affinity)

    def accept(a: torch.Tensor, b: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return affinity[i, b] - affinity[i, a] + affinity[j, a] - affinity[j, b]

    for _ in range(ROUNDS):
        if exchange(members, gains(affinity, members), accept) <= 0:
            break
    return torch.sort(members, dim=1).values


def labels_of(members: torch.Tensor) -> NDArray[np.int64]:
    """Return the cluster of each point [f]."""
    labels = np.empty(members.numel(), dtype=np.int64)
    labels[members.cpu().numpy()] = np.arange(len(members))[:, None]
    return labels


def fill(affinity: torch.Tensor) -> torch.Tensor:
    """Return members [N, m] from affinities [f, N]: who would lose most chooses first.

    All points without a cluster ask for the best that has room; each cluster takes those that
    would lose most by the second best; the others ask again.
    """
    import torch

    f, count = affinity.shape
    room = torch.full((count,), f // count, device=affinity.device)
    labels = torch.full((f,), -1, dtype=torch.int64, device=affinity.device)
    waiting = torch.arange(f, device=affinity.device)
    while len(waiting):
        wanted, regret = first_choice(affinity.index_select(0, waiting), room)
        order = torch.sort(regret, descending=True, stable=True).indices
        order = order[torch.sort(wanted[order], stable=True).indices]
        asked = torch.bincount(wanted, minlength=count)
        first = asked.cumsum(0) - asked
        rank = torch.arange(len(order), device=order.device) - first[wanted[order]]
        taken = order[rank < room[wanted[order]]]
        labels[waiting[taken]] = wanted[taken]
        room -= torch.minimum(asked, room)
        waiting = waiting[labels[waiting] < 0]
    return torch.sort(labels, stable=True).indices.reshape(count, f // count)


def first_choice(affinity: torch.Tensor, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's best cluster with room, and how much better it is than the second."""
    import torch

    affinity = affinity.masked_fill_(room == 0, -torch.inf)
    best, wanted = affinity.max(1)
    second = affinity.scatter_(1, wanted[:, None], -torch.inf).max(1).values
    return wanted, best - second


def gains(
    affinity: torch.Tensor, members: torch.Tensor, stakes: torch.Tensor | None = None
) -> torch.Tensor:
    """Return what each member would gain in affinity [f, N] in each cluster: [N, m, N].

    `stakes` [f], if any, is what a point gains beside by leaving its cluster.
    """
    # index_select takes a third of the time of indexing, here and below
    gain = affinity.index_select(0, members.flatten()).reshape(*members.shape, -1)
    own = gain.diagonal(dim1=0, dim2=2).T
    return gain.sub_((own if stakes is None else own - stakes[members]).clone()[:, :, None])


def exchange(
    members: torch.Tensor,
    gain: torch.Tensor,
    accept: Accept,
) -> float:
    """Exchange members [N, m] in place where that wins, and return how much was won.

    Gains [N, m, N] are used up: those of members that moved are out of date and struck out,
    those of the others only approximate from the second step on, which is why `accept` has the
    last word. Two clusters whose exchange it refuses are paired again once one has changed.
    """
    import torch

    best = gain.amax(1)
    value = (best + best.T).fill_diagonal_(-torch.inf)
    total = 0.0
    for _ in range(max(EXCHANGES, members.shape[1] // 4)):
        a, b = pair_up(value)
        if not len(a):
            break
        slot_a, slot_b = gain[a, :, b].argmax(1), gain[b, :, a].argmax(1)
        i, j = members[a, slot_a], members[b, slot_b]
        won = accept(a, b, i, j)
        value[a, b] = value[b, a] = -torch.inf
        good = won > 0
        total += float(won[good].sum())
        moved = torch.cat((a[good], b[good]))
        slots = torch.cat((slot_a[good], slot_b[good]))
        members[moved, slots] = torch.cat((j[good], i[good]))
        gain[moved, slots] = -torch.inf
        best[moved] = gain.index_select(0, moved).amax(1)
        rows = best.index_select(0, moved) + best.index_select(1, moved).T
        value.index_copy_(0, moved, rows).index_copy_(1, moved, rows.T)
        value[moved, moved] = -torch.inf
    return total


def pair_up(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pairs of clusters, two vectors [q], from what pairs are worth, [N, N].

    No cluster is in two pairs; pairs worth nothing are left out. Each is the best one for both
    sides among those that were left when it was chosen, ties going to the lower number.
    """
    import torch

    left = torch.arange(len(value), device=value.device)
    found, partners = [left[:0]], [left[:0]]
    while len(left):
        worth, partner = value.max(1)
        places = torch.arange(len(left), device=left.device)
        mutual = (partner[partner] == places) & (worth > 0)
        a = torch.nonzero(mutual & (places < partner)).flatten()
        found.append(left[a])
        partners.append(left[partner[a]])
        # what is worth nothing now stays so, as the others only become fewer
        stay = torch.nonzero((worth > 0) & ~mutual).flatten()
        left, value = left[stay], value.index_select(0, stay).index_select(1, stay)
    return torch.cat(found), torch.cat(partners)
