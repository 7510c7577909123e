"""Orders of the neurons of one layer: the split decides which of them share an expert.

Shapes: f neurons, d model width, N experts of m = f / N neurons, T tokens, w columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaconvert.clustering.balanced import balanced_kmeans
from adaconvert.clustering.checks import check_experts, check_matrix
from adaconvert.errors import OptionError, SourceError

#: columns that tokens are folded into; up to this many tokens co-activation is exact.
SKETCH_WIDTH = 4096


def order_from_labels(labels: NDArray[np.int64], num_experts: int) -> NDArray[np.int64]:
    """Return neurons [f] by expert, within an expert in the order they had.

    Raises:
        OptionError: the experts in `labels` [f] are not equally many neurons wide.
    """
    width = check_experts(len(labels), num_experts)
    counts = np.bincount(labels, minlength=num_experts)
    if len(counts) != num_experts or (counts != width).any():
        raise OptionError(
            "experts differ in width",
            where="labels of the neurons",
            expected=f"{num_experts} experts of {width}",
            found=f"{len(counts)} of {counts.min()} to {counts.max()}",
        )
    return np.argsort(labels, kind="stable").astype(np.int64)


def contiguous_order(size: int) -> NDArray[np.int64]:
    """Return the neurons [f] as they are."""
    return np.arange(size, dtype=np.int64)


def random_order(size: int, seed: int) -> NDArray[np.int64]:
    """Return the neurons [f] shuffled; the split of the released LLaMA-MoE models.

    Source: LLaMA-MoE, 2406.16554, section 3.1.
    """
    return np.random.default_rng(seed).permutation(size).astype(np.int64)


def clustered_order(
    rows: NDArray[Any], num_experts: int, seed: int, *, device: str | None = None
) -> NDArray[np.int64]:
    """Return neurons [f] so that those of an expert read similar directions.

    Args:
        rows: [f, d], input weights of the neurons: the gate's of a GLU, else the up matrix's.
            They are scaled to unit length here; rows of zeros stay what they are.
        num_experts: N, a divisor of f.
        seed: the same seed gives the same order.
        device: see `balanced_kmeans`.

    Raises:
        OptionError: N does not divide f.
        SourceError: a weight is NaN or infinite.

    Source: MoEfication, 2110.01786, section 3.2; rows of the gate as in D2DMoE, 2310.04361.
    """
    check_matrix(rows, "weights to cluster")
    labels = balanced_kmeans(unit_rows(rows), num_experts, seed=seed, device=device)
    return order_from_labels(labels, num_experts)


def coactivation_order(
    hidden: NDArray[Any] | Iterable[NDArray[Any]],
    num_experts: int,
    seed: int,
    *,
    device: str | None = None,
) -> NDArray[np.int64]:
    """Return neurons [f] so that those of an expert are active on the same tokens.

    The graph's nodes are neurons; an edge weighs `sum_t |h_ti h_tj|`, for ReLU the paper's
    weight, divided by the lengths of both neurons' columns of activations. Of unit vectors in
    clusters of one size, the sum of squares is f minus the weight of all edges within clusters
    over m; balanced k-means on the columns of |h| therefore looks for the minimum cut of this
    graph, and the graph is never built. Beyond `SKETCH_WIDTH` tokens their columns are folded with
    random signs, which keeps each edge's expectation.

    It differs from the paper's METIS in that experts come out equally wide (METIS: nearly, then
    the code moves random neurons), that edges are normalised, so that neurons which are always
    on do not attract everything, and that weights are not clamped per batch, cut at a
    percentile or truncated to integers, as its code does. METIS coarsens the graph and refines
    the coarse cut; this seeds and refines on the graph itself.

    Args:
        hidden: [T, f], what the down matrix receives, or an iterable of such blocks.
        num_experts: N, a divisor of f.
        seed: the same seed gives the same order.
        device: see `balanced_kmeans`.

    Raises:
        OptionError: N does not divide f.
        SourceError: an activation is NaN or infinite, or there are none.

    Source: MoEfication, 2110.01786, section 3.2, co-activation graph split.
    """
    blocks = [hidden] if isinstance(hidden, np.ndarray) else hidden
    features = unit_rows(fold_tokens(blocks, seed))
    labels = balanced_kmeans(features, num_experts, seed=seed, device=device)
    return order_from_labels(labels, num_experts)


def fold_tokens(blocks: Iterable[NDArray[Any]], seed: int) -> NDArray[np.float32]:
    """Return [f, w], whose products of rows are, or from w tokens on estimate, those of |h|.

    Raises:
        SourceError: a block is not finite, or there is no block.
    """
    signs = np.random.default_rng(seed)
    folded: NDArray[np.float32] | None = None
    seen = 0
    for block in blocks:
        check_matrix(block, "activations to cluster")
        if folded is None:
            folded = np.zeros((SKETCH_WIDTH, block.shape[1]), dtype=np.float32)
        for start in range(0, len(block), SKETCH_WIDTH):
            piece = np.abs(block[start : start + SKETCH_WIDTH]).astype(np.float32)
            piece *= signs.choice(np.array([-1, 1], dtype=np.float32), size=(len(piece), 1))
            folded[np.arange(seen, seen + len(piece)) % SKETCH_WIDTH] += piece
            seen += len(piece)
    if folded is None:
        raise SourceError("there are none", where="activations to cluster")
    return np.ascontiguousarray(folded[: min(seen, SKETCH_WIDTH)].T)


def unit_rows(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return the rows at unit length; rows of zeros stay zero."""
    squares = np.einsum("ij,ij->i", rows, rows, dtype=np.float64, casting="same_kind")
    lengths = np.sqrt(np.where(squares > 0, squares, 1)).astype(np.float32)
    return rows.astype(np.float32) / lengths[:, None]
