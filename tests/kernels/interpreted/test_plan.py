"""The kernels of `route_plan` against its torch version, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaconvert.kernels import dispatch, triton_plan
from adaconvert.kernels.plan import RoutePlan, route_plan, sort_pairs

FIELDS = ("pairs", "tokens", "ends", "places", "live")


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "triton")
        yield


def check(plan: RoutePlan, experts_of: Tensor, experts: int) -> None:
    """Check every field against the torch version, and that against the definition."""
    wanted = dict(zip(FIELDS, sort_pairs(experts_of, experts), strict=True))
    for name in FIELDS:
        found = getattr(plan, name)
        assert found.dtype == wanted[name].dtype, name
        assert torch.equal(found, wanted[name]), name
    flat = experts_of.reshape(-1).tolist()
    order = sorted(range(len(flat)), key=lambda p: flat[p] if 0 <= flat[p] < experts else experts)
    assert plan.pairs.tolist() == order
    live = sum(0 <= expert < experts for expert in flat)
    assert plan.live.tolist() == [place < live for place in range(len(flat))]
    assert plan.dropped is (live < len(flat))
    assert plan.slots == experts_of.shape[1]


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


def test_indices_without_a_sign() -> None:
    experts_of = torch.tensor([[0], [3], [255], [7]], dtype=torch.uint8)
    check(route_plan(experts_of, 300), experts_of, 300)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("experts", [1, 2, 7, 8, 64, 300])
@pytest.mark.parametrize(
    ("tokens", "slots"), [(1, 1), (127, 1), (128, 1), (129, 1), (64, 2), (43, 3), (131, 8)]
)
def test_any_size(tokens: int, slots: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts_of = torch.randint(-1, experts + 1, (tokens, slots), generator=generator)
    check(route_plan(experts_of, experts), experts_of, experts)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "experts_of",
    [
        torch.zeros(500, 2, dtype=torch.int64),
        torch.full((500, 2), -1),
        torch.full((500, 2), 4),
        torch.empty(0, 2, dtype=torch.int64),
        torch.empty(3, 0, dtype=torch.int64),
        torch.tensor([[3, 3, 3]]),
        torch.arange(800).view(2, 400).t() % 4,
        torch.arange(4).expand(200, 4),
        torch.tensor([[2**40, -(2**40), 1]]),
    ],
    ids=[
        *("one expert", "all -1", "all E", "no tokens", "no slots", "duplicates", "strided"),
        *("every expert", "far outside"),
    ],
)
def test_edges(experts_of: Tensor) -> None:
    check(route_plan(experts_of, 4), experts_of, 4)


def test_more_experts_than_the_type_of_the_indices_can_count() -> None:
    experts_of = torch.tensor([[100, -1], [3, 127]], dtype=torch.int8)
    check(route_plan(experts_of, 300), experts_of, 300)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("experts", [3, 40])
def test_order_of_programs_and_repetition_change_nothing(experts: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    experts_of = torch.randint(-1, experts, (300, 3), generator=generator)
    calls = [
        triton_plan.route_plan(experts_of, experts, reverse=reverse)
        for reverse in (False, False, True)
    ]
    for again in calls[1:]:
        assert all(torch.equal(a, b) for a, b in zip(calls[0], again, strict=True))


def test_a_pair_left_out_is_noticed() -> None:
    experts_of = torch.arange(300).view(150, 2) % 5
    plan = route_plan(experts_of, 5)
    other = experts_of.clone()
    other[70, 1] = -1
    for wrong in (route_plan(other, 5), route_plan(torch.full_like(other, -1), 5)):
        with pytest.raises(AssertionError):
            check(wrong, experts_of, 5)
    check(plan, experts_of, 5)


def test_a_compiled_graph_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    plain = triton_plan.route_plan

    def counted(*arguments: Any) -> Any:
        ran.append(arguments)
        return plain(*arguments)

    monkeypatch.setattr(triton_plan, "route_plan", counted)
    experts_of = torch.tensor([[0, 3], [-1, 1], [3, 5]])
    graph = torch.compile(route_plan, backend="aot_eager", fullgraph=True)
    found = graph(experts_of, 4)
    assert len(ran) == 1
    wanted = dict(zip(FIELDS, sort_pairs(experts_of, 4), strict=True))
    assert all(torch.equal(getattr(found, name), wanted[name]) for name in FIELDS)


def test_more_experts_than_a_block_counts_are_refused() -> None:
    with pytest.raises(RuntimeError, match="4096 experts are more than 4095"):
        route_plan(torch.zeros(1, 1, dtype=torch.int64), triton_plan.MOST + 1)
    facts = {"device": "cpu", "dtype": torch.int64, "experts": 8}
    reason = dispatch.refuses("route_plan", tokens=2**30, slots=2, **facts)
    assert reason == "triton: 2^31 pairs or more"
