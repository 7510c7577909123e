"""The operators of the grouped expert feed-forward: what torch asks of them; compiled graphs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels import grouped_gemm, grouped_ops
from adaconvert.kernels.grouped import grouped_ffn
from adaconvert.kernels.grouped_steps import Inputs
from adaconvert.kernels.plan import RoutePlan, route_plan

OPS = torch.ops.adaconvert
T, K, E, D, WIDTH = 12, 2, 4, 8, 16
NAMES = ("x", "weights_of", "first", "down", "first_bias", "down_bias")


def made(*, glu: bool = True, bias: bool = True, dtype: torch.dtype = torch.float32) -> Inputs:
    wide = 2 * WIDTH if glu else WIDTH
    shapes = [(T, D), (T, K), (E, wide, D), (E, D, WIDTH), (E, wide), (E, D)]
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    tensors[1] = torch.rand(T, K, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    return Inputs(*tensors[:4], *(tensors[4:] if bias else (None, None)))


def routing(*, drop: bool) -> Tensor:
    experts_of = torch.rand(T, E).topk(K).indices
    if drop:
        experts_of[::3, 1] = -1
        experts_of[4] = E
    return experts_of


def call_of(inputs: Inputs, plan: RoutePlan, glu: bool, backend: str) -> tuple[Any, ...]:
    order = (plan.pairs, plan.tokens, plan.ends, plan.places, plan.live, plan.dropped)
    return (*inputs, *order, "silu", glu, backend)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize(("glu", "bias"), [(True, False), (False, True)])
def test_torch_finds_nothing_wrong_with_the_operators(backend: str, glu: bool, bias: bool) -> None:
    inputs, plan = made(glu=glu, bias=bias), route_plan(routing(drop=False), E)
    call = call_of(inputs, plan, glu, backend)
    torch.library.opcheck(OPS.grouped_ffn.default, call)
    out, pre = OPS.grouped_ffn(*call)
    assert pre.shape == (T * K, inputs.first.shape[1])
    needs = [tensor is not None for tensor in inputs]
    fixed = (torch.randn_like(out), pre.detach(), needs)
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in call]
    torch.library.opcheck(OPS.grouped_ffn_backward.default, (*fixed, *frozen))


def run(experts_of: Tensor, *given: Tensor, **options: Any) -> Tensor:
    """Return the output of a routing, as a model would compute it."""
    inputs = dict(zip(NAMES, given, strict=False))
    first = "gate_up" if options.get("glu", True) else "up"
    named = {f"{first}_bias": inputs.get("first_bias"), "down_bias": inputs.get("down_bias")}
    return grouped_ffn(
        *(inputs["x"], inputs["weights_of"], route_plan(experts_of, E)),
        **{first: inputs["first"], "down": inputs["down"], **named},
        **{"activation": "silu", "glu": True, **options},
    )


def results(function: Any, experts_of: Tensor, inputs: Inputs, **options: Any) -> list[Tensor]:
    """Return the output and the gradients of a random, always equal upstream gradient."""
    given = [tensor for tensor in inputs if tensor is not None]
    out = function(experts_of, *given, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [t for t in given if t.requires_grad], upstream)]


def compiled(**options: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(run, fullgraph=True, **{"backend": "aot_eager", **options})


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("glu", "bias"), [(True, False), (False, True)])
def test_compiled_is_eager_to_the_bit(drop: bool, dtype: Any, glu: bool, bias: bool) -> None:
    inputs, experts_of = made(glu=glu, bias=bias, dtype=dtype), routing(drop=drop)
    got = results(compiled(), experts_of, inputs, glu=glu)
    wanted = results(run, experts_of, inputs, glu=glu)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_one_graph_for_every_number_of_tokens() -> None:
    function = compiled(dynamic=True)
    inputs, experts_of = made(), routing(drop=True)
    for tokens in (T, 7, 3):
        fewer = inputs._replace(
            x=inputs.x.detach()[:tokens].requires_grad_(),
            weights_of=inputs.weights_of.detach()[:tokens].requires_grad_(),
        )
        got = results(function, experts_of[:tokens], fewer)
        wanted = results(run, experts_of[:tokens], fewer)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.compiler.set_stance("fail_on_recompile"):
        results(function, experts_of[:5], fewer._replace(x=inputs.x[:5], weights_of=inputs[1][:5]))


def test_inductor() -> None:
    inputs, experts_of = made(), routing(drop=True)
    got = results(compiled(backend="inductor"), experts_of, inputs)
    wanted = results(run, experts_of, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_rows_that_nobody_computes_do_not_show(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, experts_of = made(), routing(drop=True)
    wanted = results(run, experts_of, inputs)
    times, seen = grouped_gemm.times, []

    def poisoned(backend: Any, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
        out = times(backend, rows, ends, weights)
        seen.append((rows.shape[0], int(ends[-1])))
        out[int(ends[-1]) :] = float("nan")
        return out

    monkeypatch.setattr(grouped_gemm, "times", poisoned)
    got = results(compiled(), experts_of, inputs, backend=backend)
    assert seen == [(T * K, T * K - 6)] * 4
    error = [
        float((a - b).norm().detach() / b.norm().detach()) for a, b in zip(got, wanted, strict=True)
    ]
    assert max(error) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_only_what_needs_a_gradient_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, experts_of = made(), routing(drop=True)
    wanted = results(run, experts_of, inputs)[1 + NAMES.index(name)]
    frozen = Inputs(*(tensor.detach() for tensor in inputs))
    frozen = frozen._replace(**{name: getattr(frozen, name).requires_grad_()})
    asked, real = [], grouped_ops.run_backward

    def spy(*given: Any) -> Any:
        asked.append(given[-1])
        return real(*given)

    monkeypatch.setattr(grouped_ops, "run_backward", spy)
    _, got = results(compiled(), experts_of, frozen)
    assert torch.equal(got, wanted)
    assert asked == [frozenset([name])]


def test_autocast() -> None:
    inputs, experts_of = made(), routing(drop=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(compiled(), experts_of, inputs)
        wanted = results(run, experts_of, inputs)
    assert not torch.equal(wanted[0], results(run, experts_of, inputs)[0])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_second_derivative_is_refused() -> None:
    inputs, plan = made(), route_plan(routing(drop=False), E)
    out, _ = OPS.grouped_ffn(*call_of(inputs, plan, True, "auto"))
    (first,) = torch.autograd.grad(out, inputs.x, torch.randn_like(out), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        first.sum().backward()


def test_importing_loads_no_compiler() -> None:
    """Tracing has to be possible, not paid for: torch's compiler imports Triton."""
    code = """
import sys
import adaconvert.kernels.experts
print({"triton", "torch._dynamo", "torch._inductor"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_exported() -> None:
    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Parameter(torch.randn(E, 2 * WIDTH, D))
            self.down = torch.nn.Parameter(torch.randn(E, D, WIDTH))

        def forward(self, experts_of: Tensor, x: Tensor, weights_of: Tensor) -> Tensor:
            return run(experts_of, x, weights_of, self.first, self.down)

    given = (routing(drop=True), torch.randn(T, D), torch.rand(T, K))
    module = Experts()
    program = torch.export.export(module, given)
    called = {str(node.target) for node in program.graph.nodes}
    assert "adaconvert.grouped_ffn.default" in called
    assert torch.equal(program.module()(*given), module(*given))


def test_shapes_are_checked_before_the_graph() -> None:
    inputs, experts_of = made(bias=False), routing(drop=False)
    wrong = inputs._replace(down=torch.zeros(E + 1, D, WIDTH))
    with pytest.raises(Exception, match=r"down is \[5, 8, 16\]; expected \[4, 8, 16\]"):
        results(compiled(), experts_of, wrong)
