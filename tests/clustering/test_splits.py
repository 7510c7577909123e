"""Splits are permutations of the neurons that put those together which belong together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaconvert.clustering import splits
from adaconvert.errors import OptionError, SourceError

Matrix = NDArray[np.float32]


def grouped(tokens: int = 300, groups: int = 8, width: int = 6) -> tuple[Matrix, Matrix]:
    """Return activations [T, f] of neurons that fire in groups, and each one's group [f]."""
    generator = np.random.default_rng(5)
    group = generator.permutation(np.repeat(np.arange(groups), width))
    firing = generator.random((tokens, groups)) < 0.2
    hidden = firing[:, group] * generator.standard_normal((tokens, len(group)))
    # neurons differ in strength a hundredfold: edges are between directions, not lengths
    return (hidden * 10 ** generator.uniform(-1, 1, len(group))).astype(np.float32), group


def together(order: NDArray[np.int64], group: Matrix, count: int) -> bool:
    return all(len(set(expert)) == 1 for expert in group[order].reshape(count, -1).tolist())


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 2**63))
def test_every_split_is_a_permutation(count: int, width: int, seed: int) -> None:
    size = count * width
    rows = np.random.default_rng(seed).standard_normal((size, 4)).astype(np.float32)
    orders = [
        splits.contiguous_order(size),
        splits.random_order(size, seed),
        splits.clustered_order(rows, count, seed),
        splits.coactivation_order(rows.T, count, seed),
    ]
    for order in orders:
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(size))


def test_order_keeps_neurons_of_an_expert_in_their_order() -> None:
    labels = np.array([1, 0, 2, 1, 0, 2])
    assert splits.order_from_labels(labels, 3).tolist() == [1, 4, 0, 3, 2, 5]


@pytest.mark.parametrize(("labels", "found"), [([0, 0, 0, 1], "2 of 1 to 3"), ([0, 0, 2, 2], "3")])
def test_uneven_labels_are_refused(labels: list[int], found: str) -> None:
    with pytest.raises(OptionError, match=f"expected 2 experts of 2, found {found}"):
        splits.order_from_labels(np.array(labels), 2)


def test_random_orders_follow_their_seed() -> None:
    assert splits.random_order(50, 1).tolist() == splits.random_order(50, 1).tolist()
    assert splits.random_order(50, 1).tolist() != splits.random_order(50, 2).tolist()


def test_clustering_ignores_the_length_of_rows() -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((48, 12)).astype(np.float32)
    longer = rows * 2.0 ** generator.integers(-6, 7, (48, 1))
    assert np.array_equal(
        splits.clustered_order(rows, 8, 0), splits.clustered_order(longer.astype(np.float32), 8, 0)
    )


def test_neurons_that_fire_together_share_an_expert() -> None:
    hidden, group = grouped()
    assert together(splits.coactivation_order(hidden, 8, 0), group, 8)


def test_blocks_of_tokens_give_the_same_split() -> None:
    hidden, _ = grouped()
    whole = splits.coactivation_order(hidden, 8, 0)
    blocks = (hidden[start : start + 70] for start in range(0, len(hidden), 70))
    assert np.array_equal(splits.coactivation_order(blocks, 8, 0), whole)


def test_few_tokens_are_kept_exactly() -> None:
    hidden, _ = grouped(tokens=40)
    folded = splits.fold_tokens([hidden], 0)
    assert folded.shape == (hidden.shape[1], 40)
    exact = np.abs(hidden).T.astype(np.float64) @ np.abs(hidden)
    assert np.abs(folded @ folded.T - exact).max() <= 1e-5 * exact.max()


def test_many_tokens_are_folded_and_still_tell_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "SKETCH_WIDTH", 128)
    hidden, group = grouped(tokens=1000)
    assert splits.fold_tokens([hidden], 0).shape == (48, 128)
    assert together(splits.coactivation_order(hidden, 8, 0), group, 8)


def test_dead_neurons_are_assigned_too() -> None:
    hidden, _ = grouped()
    hidden[:, ::3] = 0
    order = splits.coactivation_order(hidden, 8, 0)
    assert sorted(order.tolist()) == list(range(48))


@pytest.mark.parametrize("split", [splits.clustered_order, splits.coactivation_order])
def test_what_cannot_be_split_is_refused(split: Callable[..., NDArray[np.int64]]) -> None:
    square = np.eye(6, dtype=np.float32)
    with pytest.raises(OptionError, match=r"expected a divisor of 6, found 4.*1, 2, 3, 6 experts"):
        split(square, 4, 0)
    square[2, 3] = np.nan
    with pytest.raises(SourceError, match="to cluster: NaN or infinity in 1 of 6 rows"):
        split(square, 2, 0)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(SourceError, match="activations to cluster: there are none"):
        splits.coactivation_order([], 2, 0)
