"""CMoE's split: the busiest neurons are shared, the others grouped by when they fire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from adaconvert.clustering import analytic
from adaconvert.clustering.analytic import shared_routed
from adaconvert.errors import OptionError, SourceError

Marks = NDArray[np.bool_]


def fired(tokens: int = 240) -> tuple[Marks, NDArray[np.int64]]:
    """Return marks [T, 16]: neurons of group -1 fire mostly, those of 0 to 3 with their group.

    The first neuron of each group fires a little more often: the method takes the busiest as
    centres, whichever group they are of.
    """
    generator = np.random.default_rng(2)
    group = generator.permutation([-1, -1, -1, -1, *np.repeat(np.arange(4), 3)])
    active = np.arange(tokens) % 4
    marks = np.where(group == -1, generator.random((tokens, 16)) < 0.8, active[:, None] == group)
    firsts = [int(np.flatnonzero(group == one)[0]) for one in range(4)]
    marks[:, firsts] |= generator.random((tokens, 4)) < 0.1
    return marks, group


def distances(marks: Marks, expert: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the L1 distance of each member to its expert's mean, one token at a time."""
    members = marks[:, expert].astype(np.float64)
    return np.abs(members - members.mean(axis=1, keepdims=True)).sum(axis=0)


def test_groups_are_found_and_the_busiest_are_in_front() -> None:
    marks, group = fired()
    order, stand = shared_routed(marks, num_experts=4, shared=4)
    assert group[order[:4]].tolist() == [-1] * 4
    assert order[:4].tolist() == sorted(order[:4].tolist())
    experts = order[4:].reshape(4, 3)
    assert sorted(set(group[expert].tolist()).pop() for expert in experts) == [0, 1, 2, 3]
    assert all(len(set(group[expert].tolist())) == 1 for expert in experts)
    assert group[stand].tolist() == group[experts[:, 0]].tolist()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_order_is_a_permutation_and_representatives_are_nearest(data: st.DataObject) -> None:
    count, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    shared, tokens = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 12))
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    marks = generator.random((tokens, shared + count * width)) < data.draw(st.floats(0, 1))

    order, stand = shared_routed(marks, num_experts=count, shared=shared)

    assert order.dtype == stand.dtype == np.int64
    assert sorted(order.tolist()) == list(range(marks.shape[1]))
    rates = marks.sum(axis=0)
    assert rates[order[:shared]].sum() == np.sort(rates)[::-1][:shared].sum()
    for expert, neuron in zip(order[shared:].reshape(count, width), stand, strict=True):
        away = distances(marks, expert)
        chosen = expert.tolist().index(neuron)
        assert away[chosen] == pytest.approx(away.min(), abs=1e-9)
        assert (away[:chosen] > away[chosen] - 1e-9).all()


def test_blocks_of_tokens_give_the_same_split(monkeypatch: pytest.MonkeyPatch) -> None:
    marks, _ = fired()
    whole = shared_routed(marks, num_experts=4, shared=4)
    monkeypatch.setattr(analytic, "BLOCK", 17)
    pieces = shared_routed(marks.astype(np.uint8), num_experts=4, shared=4)
    assert all(np.array_equal(one, other) for one, other in zip(whole, pieces, strict=True))


@pytest.mark.parametrize("shared", [-1, 16, 17])
def test_shared_neurons_that_leave_none_are_refused(shared: int) -> None:
    marks, _ = fired()
    with pytest.raises(OptionError, match=f"shared neurons: .* expected 0 to 15, found {shared}"):
        shared_routed(marks, num_experts=4, shared=shared)


def test_experts_that_do_not_divide_are_refused() -> None:
    marks, _ = fired()
    with pytest.raises(OptionError, match=r"found 5\. 12 neurons divide into 1, 2, 3, 4, 6, 12"):
        shared_routed(marks, num_experts=5, shared=4)


def test_no_tokens_are_refused() -> None:
    with pytest.raises(SourceError, match=r"markers of active neurons.*found \[0, 16\]"):
        shared_routed(np.zeros((0, 16), dtype=bool), num_experts=4, shared=4)
