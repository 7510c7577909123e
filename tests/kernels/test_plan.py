"""The invariants of a route plan, against sorting in plain Python."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaconvert.kernels import plan as plan_module
from adaconvert.kernels.plan import RoutePlan, route_plan


def sorted_pairs(experts_of: list[list[int]], experts: int) -> tuple[list[int], list[int]]:
    """Return the pairs in order and the count of each expert, from the definition."""
    flat = [expert for slots in experts_of for expert in slots]
    of = {e: [p for p, found in enumerate(flat) if found == e] for e in range(experts)}
    live = [p for e in range(experts) for p in of[e]]
    return live + [p for p in range(len(flat)) if p not in set(live)], [
        len(of[e]) for e in range(experts)
    ]


def check(plan: RoutePlan, experts_of: Tensor, experts: int) -> None:
    pairs, counts = sorted_pairs(experts_of.tolist(), experts)
    tokens, slots = experts_of.shape
    assert plan.pairs.tolist() == pairs
    assert plan.tokens.tolist() == [pair // slots for pair in pairs]
    assert plan.ends.diff(prepend=plan.ends.new_zeros(1)).tolist() == counts
    assert plan.places.shape == (tokens, slots)
    assert torch.equal(plan.places.reshape(-1)[plan.pairs], torch.arange(tokens * slots))
    assert plan.live.tolist() == [place < sum(counts) for place in range(tokens * slots)]
    assert plan.slots == slots
    assert plan.dropped is (sum(counts) < tokens * slots)
    kinds = (plan.pairs, plan.tokens, plan.ends, plan.places, plan.live)
    expected = (torch.int64, torch.int64, torch.int32, torch.int64, torch.bool)
    assert tuple(tensor.dtype for tensor in kinds) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_plan_is_the_stable_order_of_the_live_pairs(data: st.DataObject) -> None:
    tokens, slots = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 4))
    experts = data.draw(st.integers(1, 7))
    numbers = st.integers(-2, experts + 1)
    drawn = data.draw(st.lists(numbers, min_size=tokens * slots, max_size=tokens * slots))
    kind = data.draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]))
    experts_of = torch.tensor(drawn, dtype=kind).view(tokens, slots)
    check(route_plan(experts_of, experts), experts_of, experts)


@pytest.mark.parametrize(
    "experts_of",
    [
        torch.zeros(5, 2, dtype=torch.int64),
        torch.full((5, 2), -1),
        torch.full((5, 2), 4),
        torch.empty(0, 2, dtype=torch.int64),
        torch.tensor([[3, 3, 3]]),
        torch.arange(8).view(2, 4).t() % 4,
        torch.tensor([[2**40, -(2**40), 1]]),
    ],
    ids=["one expert", "all -1", "all E", "no tokens", "duplicates", "strided", "far outside"],
)
def test_edges(experts_of: Tensor) -> None:
    check(route_plan(experts_of, 4), experts_of, 4)


def test_more_experts_than_the_type_of_the_indices_can_count() -> None:
    experts_of = torch.tensor([[100, -1], [3, 127]], dtype=torch.int8)
    check(route_plan(experts_of, 300), experts_of, 300)


def test_no_slots_is_a_plan_of_nothing() -> None:
    plan = route_plan(torch.empty(3, 0, dtype=torch.int64), 4)
    assert plan.pairs.shape == (0,)
    assert plan.places.shape == (3, 0)
    assert not plan.dropped


def test_a_promise_that_is_not_kept_is_noticed_on_the_cpu() -> None:
    assert route_plan(torch.tensor([[-1, 0]]), 2, may_drop=False).dropped
    assert not route_plan(torch.tensor([[1, 0]]), 2, may_drop=True).dropped


def test_off_the_cpu_the_promise_counts() -> None:
    on_meta = torch.empty(3, 2, dtype=torch.int64, device="meta")
    assert route_plan(on_meta, 4).dropped
    assert not route_plan(on_meta, 4, may_drop=False).dropped


def test_nothing_waits_for_the_device() -> None:
    """The meta device has no values, so whatever reads one raises; the source names no reader."""
    plan_module.sort_pairs(torch.empty(3, 2, dtype=torch.int64, device="meta"), 4)
    tree = ast.parse(inspect.getsource(plan_module))
    called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not called & {"item", "tolist", "nonzero", "unique", "cpu", "numpy", "bincount"}


def test_the_plan_traces_into_one_graph() -> None:
    experts_of = torch.tensor([[0, 3], [-1, 1], [3, 5]])
    graph = torch.compile(route_plan, backend="eager", fullgraph=True)
    traced, plain = graph(experts_of, 4), route_plan(experts_of, 4)
    assert torch.equal(traced.pairs, plain.pairs)
    assert torch.equal(traced.ends, plain.ends)


@pytest.mark.parametrize(
    ("experts_of", "experts", "error", "match"),
    [
        (torch.zeros(2, 2), 4, TypeError, r"are torch\.float32; expected integers"),
        (torch.zeros(2, 2, dtype=torch.bool), 4, TypeError, r"torch\.bool"),
        (torch.zeros(4, dtype=torch.int64), 4, ValueError, r"\[4\]; expected \[T, K\]"),
        (torch.zeros(2, 2, dtype=torch.int64), 0, ValueError, "0 experts"),
    ],
)
def test_refused(experts_of: Tensor, experts: int, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        route_plan(experts_of, experts)
