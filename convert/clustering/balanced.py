"""Balanced k-means: f points in N clusters of exactly f / N points, with a small sum of squares.

Three steps: seed the means, fill the clusters by regret, then exchange pairs of members for as
long as that pays. The last step does most of the work. It counts what an exchange does to both
means (Hartigan's criterion), while Lloyd's iteration, and with it minimum-cost flow, holds the
means still: in a cluster of m points each point then sits 1/m of its own square closer to its
mean, which for the small m of experts is more than the clusters differ by. Nothing else is
needed: rounds of Lloyd between, or prices (the dual of the assignment) in the filling, added at
most one per cent to the gain over a random split.

Points are first rounded to whole numbers so small that every sum of products is a whole number
the floating point type holds exactly. Such sums are the same in any order, so labels depend on
the seed alone: not on threads, blocks, the BLAS library or the kind of device.

Shapes: f points, p coordinates, N clusters, m = f / N members each, q pairs of clusters.
Memory: two copies of the points and about five arrays of f x N numbers (float32).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from adaconvert.clustering.assignment import exchange, fill, gains, labels_of
from adaconvert.clustering.checks import check_experts, check_matrix

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

#: candidates per seed; 4 lost 2 % of the gain over random on clusters of six points, 16 added 1 %.
TRIALS = 8
#: seeds are drawn from this many points per cluster; 2 lost 3 % on clusters of six, 4 added 1 %.
POOL = 3
#: and from at least this many points where there are.
SMALLEST_POOL = 1024
#: a round of exchanges that adds less than this share of the gain over random is the last one;
#: without it the layers of SmolLM2-135M gain 5 % more in three times the time.
WORTHWHILE = 0.02


def balanced_kmeans(
    features: NDArray[Any],
    num_clusters: int,
    *,
    seed: int = 0,
    max_iter: int = 100,
    device: str | None = None,
) -> NDArray[np.int64]:
    """Return labels [f] in which each of the N clusters occurs exactly f / N times.

    Args:
        features: [f, p], one row per point. Scale matters, as in any k-means.
        num_clusters: N, a divisor of f.
        seed: the same seed gives the same labels.
        max_iter: rounds of exchanges at most; one product of points and means each.
        device: where to compute; None takes the accelerator where there is one.

    Raises:
        OptionError: N does not divide f.
        SourceError: a feature is NaN or infinite, or `features` is no matrix.

    Source: greedy k-means++ seeding, Arthur and Vassilvitskii 2007; exchange criterion,
        Hartigan 1975. MoEfication (2110.01786) and D2DMoE (2310.04361) solve the balanced
        assignment of Lloyd's iteration by minimum-cost flow instead.
    """
    features = np.asarray(features, dtype=np.float32)
    check_matrix(features, "features to cluster")
    width = check_experts(len(features), num_clusters)
    if width == 1 or num_clusters == 1:
        return np.arange(len(features), dtype=np.int64) // width
    points = to_grid(features, width, device or best_device())
    members = fill(seed_affinity(points, num_clusters, np.random.default_rng(seed)))
    improve(points, members, max_iter)
    return labels_of(members)


def best_device() -> str:
    """Return the accelerator's name where one is usable for this, else "cpu"."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    # mps has no float64
    return "cpu" if accelerator is None or accelerator.type == "mps" else accelerator.type


def to_grid(features: NDArray[np.float32], width: int, device: str) -> torch.Tensor:
    """Return the features scaled by one factor and rounded to whole numbers [f, p].

    No row is longer than 2**12 in float32: by Cauchy-Schwarz no partial sum of a product of two
    rows exceeds 2**24, up to which float32 holds every whole number. Rows of very different
    lengths need a finer grid and get it in float64, where sums of `width` rows times rows must
    stay below 2**53.
    """
    import torch

    squares = np.einsum("ij,ij->i", features, features, dtype=np.float64)
    longest = math.sqrt(squares.max())
    if longest == 0:
        return torch.from_numpy(features.copy()).to(device)
    fraction, exponent = math.frexp(longest)
    points = torch.from_numpy(np.ldexp(features, -exponent)).to(device)
    alike = longest <= 8 * math.sqrt(np.median(squares))
    finest = 2.0 ** ((51 - width.bit_length()) // 2)
    dtype, radius = (torch.float32, 2.0**12) if alike else (torch.float64, finest)
    # rounding adds at most half a unit per coordinate
    room = max(radius - 0.5 * points.shape[1] ** 0.5, 1.0)
    # eight bits of the length, as its last bit may differ by processor
    bound = math.ceil(fraction * 256) / 256
    return points.to(dtype).mul_(room / bound).round_()


def squared_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return the squared length of each row [rows]."""
    return (rows * rows).sum(1)


def seed_affinity(
    points: torch.Tensor, num_clusters: int, generator: np.random.Generator
) -> torch.Tensor:
    """Return minus the squared distances [f, N] to N points far apart (greedy k-means++)."""
    import torch

    f = len(points)
    size = min(f, max(SMALLEST_POOL, POOL * num_clusters))
    pool = torch.from_numpy(np.sort(generator.permutation(f)[:size])).to(points.device)
    norms = squared_norms(points)
    distance = torch.addmm(norms, points[pool], points.T, alpha=-2).add_(norms[pool, None])
    chosen = [int(generator.integers(size))]
    nearest = distance[chosen[0]]
    for _ in range(1, num_clusters):
        mass = nearest[pool].double().cumsum(0)
        draws = torch.from_numpy(generator.random(TRIALS)).to(points.device) * mass[-1]
        # points all alike have no mass left; the last one is then as good as any
        index = torch.searchsorted(mass, draws, right=True).clamp_(max=size - 1)
        trials = torch.minimum(nearest, distance.index_select(0, index))
        best = int(trials.sum(1, dtype=torch.float64).argmin())
        chosen.append(int(index[best]))
        nearest = trials[best]
    return -distance[chosen].T


def improve(points: torch.Tensor, members: torch.Tensor, max_iter: int) -> None:
    """Exchange members [N, m] in place until a round is hardly worth its product.

    Moving i from a to b and j from b to a changes the sum of squares by -2/m times
    `(sums[a] - sums[b]) . (j - i) + |j - i|**2`, a whole number: it can only fall.
    """
    import torch

    count, width = members.shape
    sums = torch.zeros(count, points.shape[1], dtype=torch.float64, device=points.device)
    for slot in members.T:
        sums += points[slot]
    stakes = squared_norms(points) / width

    def accept(a: torch.Tensor, b: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        step = (points.index_select(0, j) - points.index_select(0, i)).double()
        apart = sums.index_select(0, a) - sums.index_select(0, b)
        won: torch.Tensor = torch.linalg.vecdot(apart + step, step)
        good = won > 0
        sums[a[good]] += step[good]
        sums[b[good]] -= step[good]
        return won

    means = torch.zeros_like(points[:count])
    affinity = torch.zeros(len(points), count, dtype=points.dtype, device=points.device)
    before = gain_over_random(points, sums, width)
    for _ in range(max_iter):
        update(affinity, means, (sums / width).round_().to(points.dtype), points)
        won = exchange(members, gains(affinity, members, stakes), accept)
        after = gain_over_random(points, sums, width)
        if won <= 0 or after - before < WORTHWHILE * after:
            return
        before = after


def gain_over_random(points: torch.Tensor, sums: torch.Tensor, width: int) -> float:
    """Return how much lower the sum of squares is than that expected of random clusters."""
    import torch

    f, count = len(points), len(sums)
    total = squared_norms(points).sum(dtype=torch.float64)
    around = total - (sums.sum(0) ** 2).sum() / f
    return float(around * (f - count) / (f - 1) - (total - (sums**2).sum() / width))


def update(
    affinity: torch.Tensor, means: torch.Tensor, new: torch.Tensor, points: torch.Tensor
) -> None:
    """Hold in `means` [N, p] the new ones and in `affinity` [f, N] their products with points."""
    import torch

    changed = torch.nonzero((means != new).any(1)).flatten()
    means[changed] = new[changed]
    affinity.index_copy_(1, changed, points @ new[changed].T)
