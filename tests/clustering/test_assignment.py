"""The balanced assignment that fills clusters, and the exchanges that better it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaconvert.clustering.assignment import assign_balanced, fill, labels_of, pair_up


def drawn(data: st.DataObject) -> torch.Tensor:
    """Return affinities [f, N] of whole numbers, with many ties."""
    count, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    size = (count * width, count)
    return torch.randint(0, data.draw(st.integers(1, 30)), size, generator=generator).float()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_points_are_assigned_once_and_no_exchange_is_better(data: st.DataObject) -> None:
    affinity = drawn(data)
    before = affinity.clone()

    members = assign_balanced(affinity)

    assert sorted(members.flatten().tolist()) == list(range(len(affinity)))
    labels = torch.from_numpy(labels_of(members))
    own = affinity[torch.arange(len(labels)), labels]
    crossed = affinity[:, labels]
    assert (crossed + crossed.T <= own[:, None] + own).all()
    assert torch.equal(affinity, before)


def test_assignment_is_near_the_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        affinity = torch.randn(6, 3, generator=generator)
        totals = [
            float(affinity[torch.arange(6), torch.tensor(labels)].sum())
            for labels in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
        ]
        labels = torch.from_numpy(labels_of(assign_balanced(affinity)))
        found = float(affinity[torch.arange(6), labels].sum())
        assert found >= max(totals) - 0.1 * (max(totals) - float(np.mean(totals)))


def test_those_who_would_lose_most_choose_first() -> None:
    affinity = torch.tensor([[5.0, 4.0], [5.0, 0.0], [5.0, 1.0], [0.0, 0.5]])
    assert fill(affinity).tolist() == [[1, 2], [0, 3]]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pairs_are_disjoint_and_leave_no_worthy_pair(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    value = torch.randint(-3, 3, (count, count), generator=generator).float()
    value = torch.maximum(value, value.T).fill_diagonal_(-torch.inf)

    a, b = pair_up(value)

    taken = torch.cat((a, b)).tolist()
    assert len(set(taken)) == len(taken)
    assert (value[a, b] > 0).all()
    free = [cluster for cluster in range(count) if cluster not in taken]
    assert not (value[free][:, free] > 0).any()


@pytest.mark.parametrize("bad", [-1.0, 0.0])
def test_nothing_worthy_makes_no_pair(bad: float) -> None:
    a, b = pair_up(torch.full((3, 3), bad))
    assert len(a) == len(b) == 0
