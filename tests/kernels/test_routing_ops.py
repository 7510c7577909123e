"""`route_plan` and `router_select` as operators of torch.library, and who computes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels import dispatch, plan, routing_ops, routing_steps
from adaconvert.kernels.plan import route_plan
from adaconvert.kernels.routing import router_select
from adaconvert.kernels.routing_steps import Rule

OPTIONS: dict[str, dict[str, Any]] = {
    "mixtral": {"top_k": 2, "normalise": "selected"},
    "adamoe": {"top_k": 3, "normalise": "real", "null": 4, "force_real": True},
    "deepseek": {"top_k": 3, "normalise": "selected", "scores": "sigmoid", "scaling": 2.5},
    "tau": {"top_k": 9, "normalise": "none", "tau": 0.3},
    "apart": {"top_k": 4, "normalise": "all_real", "null": 2, "tau": 0.1},
}
EXPERTS_OF = torch.tensor([[0, 3], [-1, 1], [3, 5]])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """One function is compiled for many options; the limit of recompilations is not the point."""
    torch.compiler.reset()


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def values(options: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of the operators that stand for the options."""
    plain = {"null": 0, "tau": None, "scores": "softmax", "scaling": 1.0, "force_real": False}
    rule = Rule(**(plain | options))
    return tuple(getattr(rule, name) for name in Rule.__dataclass_fields__)


def outputs(logits: Tensor, name: str, counted: Tensor | None) -> tuple[Tensor, ...]:
    found = router_select(logits, counted=counted, **OPTIONS[name])
    return found.weights, found.probability_sums, found.experts, found.counts


# -- what is registered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_router_select_is_a_sound_operator(name: str, dtype: torch.dtype) -> None:
    logits = draw(7, 9, dtype=dtype).requires_grad_()
    bias = draw(9, seed=1) / 8 if name == "deepseek" else None
    for counted in (None, torch.arange(7) % 3 != 1):
        call = (logits, bias, counted, *values(OPTIONS[name]))
        torch.library.opcheck(torch.ops.adaconvert.router_select, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIONS)
def test_its_backward_is_a_sound_operator(name: str, dtype: torch.dtype) -> None:
    logits = draw(7, 9, dtype=dtype)
    options = values(OPTIONS[name])
    weights, _, slots, sums, _ = torch.ops.adaconvert.router_select(logits, None, None, *options)
    counted = torch.arange(7) % 3 != 1
    for arriving in ((weights, sums), (weights, None), (None, sums)):
        call = (logits, slots, counted, *arriving, *options)
        torch.library.opcheck(torch.ops.adaconvert.router_select_backward, call)


@pytest.mark.parametrize("shape", [(3, 2), (0, 2), (3, 0), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_route_plan_is_a_sound_operator(shape: tuple[int, int], dtype: torch.dtype) -> None:
    experts_of = (torch.arange(shape[0] * shape[1]) % 6 - 1).view(shape).to(dtype)
    torch.library.opcheck(torch.ops.adaconvert.route_plan, (experts_of, 4))
    strided = experts_of.t().contiguous().t()
    torch.library.opcheck(torch.ops.adaconvert.route_plan, (strided, 4))


def test_gradcheck_of_the_operator() -> None:
    logits = draw(4, 9, dtype=torch.float64).requires_grad_()
    for options in OPTIONS.values():

        def found(logits: Tensor, options: dict[str, Any] = options) -> tuple[Tensor, Tensor]:
            rule = values(options)
            weights, _, _, sums, _ = torch.ops.adaconvert.router_select(logits, None, None, *rule)
            return weights, sums

        assert torch.autograd.gradcheck(found, (logits,))


def test_a_second_derivative_is_refused() -> None:
    logits = draw(4, 9).requires_grad_()
    rule = values(OPTIONS["mixtral"])
    weights = torch.ops.adaconvert.router_select(logits, None, None, *rule)[0]
    (grad,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        grad.sum().backward()


# -- compiled


def check(compiled: Any, name: str, counted: Tensor | None, tokens: int = 9) -> None:
    """Check values and gradients against eager mode, to the bit."""
    one, two = (draw(tokens, 9, seed=tokens).requires_grad_() for _ in range(2))
    plain, traced = outputs(one, name, counted), compiled(two, name, counted)
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    arriving = [draw(*output.shape, seed=5) for output in plain[:2]]
    wanted = torch.autograd.grad(plain[:2], one, arriving)
    found = torch.autograd.grad(traced[:2], two, arriving)
    assert torch.equal(*wanted, *found)
    assert float(found[0].norm()) > 0


@pytest.mark.parametrize("with_counted", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_traced_as_one_graph_it_computes_the_same(name: str, with_counted: bool) -> None:
    counted = torch.arange(9) % 3 != 1 if with_counted else None
    check(torch.compile(outputs, fullgraph=True, backend="aot_eager"), name, counted)


def test_inductor_computes_the_same() -> None:
    def both(logits: Tensor) -> tuple[Tensor, ...]:
        found = router_select(logits, top_k=3, null=2, normalise="real")
        order = route_plan(found.experts, 7)
        return found.weights * 2, found.probability_sums, order.pairs, order.ends, order.places

    logits = draw(9, 9).requires_grad_()
    plain = both(logits)
    traced = torch.compile(both, fullgraph=True)(logits)
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    arriving = [draw(*output.shape, seed=5) for output in plain[:2]]
    wanted = torch.autograd.grad(plain[:2], logits, arriving)
    assert torch.equal(*wanted, *torch.autograd.grad(traced[:2], logits, arriving))


def test_another_number_of_tokens_needs_no_other_graph() -> None:
    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager", dynamic=True)
    check(compiled, "tau", None, tokens=10)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(compiled, "tau", None, tokens=14)


def test_the_graph_holds_the_operators() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def both(logits: Tensor) -> Tensor:
        found = router_select(logits, top_k=2, normalise="selected")
        return route_plan(found.experts, 9, may_drop=False).places

    torch.compile(both, fullgraph=True, backend=backend)(draw(9, 9))
    names = [name.removesuffix(".default") for name in seen if name.startswith("adaconvert.")]
    assert names == ["adaconvert.router_select", "adaconvert.route_plan"]


@pytest.mark.parametrize("may_drop", [True, False])
def test_a_traced_plan_promises_what_it_was_promised(may_drop: bool) -> None:
    def promised(experts_of: Tensor) -> tuple[Tensor, bool]:
        found = route_plan(experts_of, 6, may_drop=may_drop)
        return found.pairs, found.dropped

    pairs, dropped = torch.compile(promised, fullgraph=True, backend="aot_eager")(EXPERTS_OF)
    assert torch.equal(pairs, route_plan(EXPERTS_OF, 6).pairs)
    assert dropped is may_drop


def test_exported_and_run_it_computes_the_same() -> None:
    class Router(torch.nn.Module):
        def forward(self, logits: Tensor) -> tuple[Tensor, ...]:
            found = router_select(logits, top_k=2, normalise="real", null=3)
            order = route_plan(found.experts, 6)
            return found.weights, found.experts, order.places, order.ends

    program = torch.export.export(Router(), (draw(9, 9),))
    plain, exported = Router()(draw(9, 9, seed=3)), program.module()(draw(9, 9, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(plain, exported, strict=True))


# -- who computes it


def refused(*_: Any, **__: Any) -> None:
    raise AssertionError("the selection was asked")


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_a_cpu_does_not_ask_for_a_kernel(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    monkeypatch.setattr(dispatch, "select", refused)
    route_plan(EXPERTS_OF, 4)
    found = router_select(draw(9, 9).requires_grad_(), top_k=2, normalise="selected")
    found.weights[:, 0].sum().backward()


def test_without_an_interpreter_a_cpu_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="route_plan cannot: triton: "):
        route_plan(EXPERTS_OF, 4)
    with pytest.raises(RuntimeError, match="router_select cannot: triton: "):
        router_select(draw(9, 9), top_k=2, normalise="selected")


def test_the_selection_is_asked_with_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, dict[str, Any]] = {}

    def select(op: str, **facts: Any) -> None:
        asked[op] = facts

    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr(dispatch, "select", select)
    route_plan(torch.zeros(5, 2, dtype=torch.int32), 4)
    router_select(torch.zeros(5, 4), top_k=2, normalise="selected")
    sizes = {"device": "cpu", "capability": None, "tokens": 5, "slots": 2, "experts": 4}
    assert asked["route_plan"] == sizes | {"dtype": torch.int32}
    assert asked["router_select"] == sizes | {"dtype": torch.float32}


@pytest.mark.parametrize("choice", dispatch.CHOICES)
def test_shapes_alone_need_no_kernel(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, choice)
    assert route_plan(torch.empty(5, 2, dtype=torch.int32, device="meta"), 4).ends.shape == (4,)
    logits = torch.empty(5, 4, device="meta", requires_grad=True)
    found = router_select(logits, top_k=2, normalise="selected")
    assert found.experts.shape == (5, 2)
    found.weights.sum().backward()
    assert logits.grad is not None


def test_the_selected_kernel_runs_forward_and_in_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[str] = []

    def select(op: str, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            ran.append(op)
            plain = {"route_plan": plan.sort_pairs, "router_select": routing_steps.forward}
            return plain[op](*arguments)

        return call

    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setattr(dispatch, "select", select)
    rule = values(OPTIONS["mixtral"])
    route_plan(EXPERTS_OF, 4)
    torch.ops.adaconvert.route_plan(EXPERTS_OF, 4)
    router_select(draw(9, 9), **OPTIONS["mixtral"])
    torch.ops.adaconvert.router_select(draw(9, 9), None, None, *rule)
    assert ran == ["route_plan"] * 2 + ["router_select"] * 2


def test_the_operators_take_the_rule_field_by_field() -> None:
    """The schema, the tuple and the dataclass name the same options in the same order."""
    schema = torch.ops.adaconvert.router_select.default._schema
    names = [argument.name for argument in schema.arguments][3:]
    assert names == list(Rule.__dataclass_fields__)
    rule = Rule(**dict(zip(names, values(OPTIONS["apart"]), strict=True)))
    assert routing_ops._rule(routing_ops._values(rule)) == rule
