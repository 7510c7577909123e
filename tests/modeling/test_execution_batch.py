"""Several tokens through a compiled network: right, one graph, and harmless where it fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from adaconvert.kernels.reference import expert_ffn
from adaconvert.modeling import adaptive_batch, adaptive_compiled, adaptive_decode
from adaconvert.modeling.adaptive_execution import (
    Decoder,
    ExpertWeights,
    run_experts,
    run_routed,
)
from adaconvert.modeling.adaptive_layout import keep_rows
from adaconvert.modeling.adaptive_routers import AnalyticRouter, ContributionRouter, LinearRouter
from adaconvert.modeling.adaptive_select import select_experts
from adaconvert.testing.compilers import has_compiler

needs_compiler = pytest.mark.skipif(
    not has_compiler(),
    reason="torch.compile needs a C++ compiler here",
)
HIDDEN, EXPERTS, WIDTH = 24, 6, 4


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled yet; even tiny matrices are."""
    monkeypatch.setenv("ADACONVERT_COMPILE", "1")
    torch._dynamo.reset()
    for module in (adaptive_batch, adaptive_decode):
        monkeypatch.setattr(module, "_BATCHES", {})


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def network(
    dtype: torch.dtype, seed: int = 0, *, glu: bool = True, biases: bool = False, shared: int = 0
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    neurons = shared + EXPERTS * WIDTH

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).mul_(columns**-0.5).to(dtype)

    def bias(size: int) -> Tensor | None:
        return torch.randn(size, generator=generator).to(dtype) if biases else None

    return ExpertWeights(
        gate=matrix(neurons, HIDDEN) if glu else None,
        up=matrix(neurons, HIDDEN),
        down=matrix(HIDDEN, neurons),
        gate_bias=bias(neurons) if glu else None,
        up_bias=bias(neurons),
        down_bias=bias(HIDDEN),
        # a module of its own per layer, as transformers has
        activation=nn.SiLU(),
        width=WIDTH,
        shared=shared,
    )


def expected(x: Tensor, weights: ExpertWeights, mask: Tensor) -> Tensor:
    named = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in named.items()}
    return expert_ffn(x.double(), mask, **wide)


def inputs(dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    return x, torch.rand(tokens, EXPERTS, generator=generator) < 0.6


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("dtype", "limit", "options"),
    [
        (torch.float32, 1e-6, {}),
        (torch.float32, 1e-6, {"glu": False, "biases": True, "shared": 3}),
        (torch.bfloat16, 2**-7, {"biases": True}),
    ],
    ids=["float32", "float32 plain, shared", "bfloat16"],
)
def test_one_graph_serves_every_length_and_layer(
    dtype: torch.dtype, limit: float, options: dict[str, Any]
) -> None:
    before = len(adaptive_compiled._STEPS)
    for seed in range(2):
        weights = network(dtype, seed, **options)
        for tokens in (2, 5, HIDDEN, 33, 300):
            x, mask = inputs(dtype, tokens)
            out, pairs = run_experts(x, weights, mask, path="dense")
            wanted = expected(x, weights, mask)
            assert (out.double() - wanted).abs().max() <= limit * wanted.abs().max()
            assert pairs == tokens * weights.up.shape[0]
    assert len(adaptive_compiled._STEPS) == before + 1
    assert None not in adaptive_batch._BATCHES.values()


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("inference")
def test_a_gate_that_is_known_is_not_run_again_and_what_is_not_selected_may_be_infinite() -> None:
    weights = network(torch.float32)
    x, mask = inputs(torch.float32, 7)
    mask[:, 2] = False
    assert weights.gate is not None
    gated = functional.silu(functional.linear(x, weights.gate))
    gated[:, 2 * WIDTH : 3 * WIDTH] = float("inf")
    out, _ = run_experts(x, weights, mask, gated=gated, path="dense")
    wanted = expected(x, weights, mask)
    assert (out.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert None not in adaptive_batch._BATCHES.values()


def stand_in(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Something runs in place of every compiled graph."""
    monkeypatch.setattr(adaptive_batch, "compiled", lambda *_: lambda *_: None)
    monkeypatch.setattr(adaptive_batch.BatchGraph, "bound", lambda *_: run)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("when", ["made", "run"])
def test_a_graph_that_fails_costs_nothing_but_speed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no compiler")

    weights = network(torch.float32)
    calls: list[int] = []

    def run(x: Tensor, mask: Tensor) -> tuple[Tensor]:
        calls.append(1)
        return (expected(x, weights, mask).float(),) if len(calls) == 1 else broken()

    stand_in(monkeypatch, broken if when == "made" else run)
    x, mask = inputs(torch.float32, 5)
    for _ in range(3):
        out, _ = run_experts(x, weights, mask, path="dense")
        wanted = expected(x, weights, mask)
        assert (out.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert caplog.text.count("no compiler") == 1


@pytest.mark.usefixtures("inference")
def test_a_graph_with_another_output_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda x, mask: (torch.zeros_like(x),))
    weights = network(torch.float32)
    x, mask = inputs(torch.float32, 5)
    out, _ = run_experts(x, weights, mask, path="dense")
    assert torch.equal(out, run_experts(x, weights, mask, path="dense")[0])
    assert float(out.abs().max()) > 0


@pytest.mark.usefixtures("inference")
def test_parts_of_larger_tensors_run_uncompiled() -> None:
    weights = network(torch.float32)
    x, mask = inputs(torch.float32, 10)
    out, _ = run_experts(x[:, :], weights, mask.t().contiguous().t(), path="dense")
    wanted = expected(x, weights, mask)
    assert (out.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert not adaptive_batch._BATCHES


def test_gradients_are_recorded_uncompiled() -> None:
    weights = network(torch.float32)
    x, mask = inputs(torch.float32, 5)
    out, _ = run_experts(x.requires_grad_(), weights, mask)
    assert out.requires_grad
    assert not adaptive_batch._BATCHES


ROUTERS: dict[str, Any] = {
    "linear": lambda: LinearRouter(HIDDEN, EXPERTS, normalised=False),
    "contribution": lambda: ContributionRouter(HIDDEN, EXPERTS, width=8),
}


def routed(kind: str, weights: ExpertWeights) -> Decoder:
    generator = torch.Generator().manual_seed(1)
    router = ROUTERS[kind]()
    for parameter in router.parameters():
        parameter.data.normal_(generator=generator)
    return Decoder(weights, router.requires_grad_(False))


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("kind", "rule", "name", "values", "lengths"),
    [
        ("linear", "top-k", "k", [3, 5], (2, 5, HIDDEN, 100)),
        ("contribution", "dynamic-k", "tau", [0.2, 0.7], (5, 7)),
    ],
)
def test_router_selection_and_network_are_one_graph(
    kind: str, rule: str, name: str, values: list[float], lengths: tuple[int, ...]
) -> None:
    before = len(adaptive_compiled._STEPS)
    for seed in range(2):
        weights = network(torch.float32, seed, shared=2 * seed)
        decoder = routed(kind, weights)
        for value in values:
            for tokens in lengths:
                x, _ = inputs(torch.float32, tokens)
                found = run_routed(x, decoder, rule, value)
                assert found is not None, (value, tokens)
                router = decoder._score
                assert router is not None
                scores = router(x, *decoder._tensors)
                assert torch.equal(found[1], select_experts(scores, {"rule": rule, name: value}))
                wanted = expected(x, weights, found[1])
                assert (found[0].double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert len(adaptive_compiled._STEPS) == before + 2, "one for each width of the shared part"


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize(
    ("rule", "number", "tokens"),
    [("top-k", 1, 3), ("top-k", 2, 100), ("top-k", 1, 8), ("dynamic-k", 0.5, 8), ("top-p", 0.5, 6)],
)
def test_where_less_than_all_may_run_it_is_not_one_graph(
    rule: str, number: float, tokens: int
) -> None:
    x, _ = inputs(torch.float32, tokens)
    assert run_routed(x, routed("linear", network(torch.float32)), rule, number) is None
    assert not adaptive_decode._BATCHES


@pytest.mark.usefixtures("inference")
def test_a_graph_that_fails_leaves_the_rest_to_the_caller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no compiler")

    stand_in(monkeypatch, broken)
    decoder = routed("linear", network(torch.float32))
    for _ in range(2):
        assert run_routed(inputs(torch.float32, 5)[0], decoder, "top-k", 4) is None
    assert caplog.text.count("no compiler") == 1


def test_rows_of_a_matrix_written_behind_torch_s_back_are_dropped() -> None:
    weights = network(torch.float32)
    down = nn.Parameter(weights.down, requires_grad=False)
    weights = dataclasses.replace(weights, down=down)
    decoder = routed("linear", weights)
    assert keep_rows(down)
    down.data.add_(1)
    with torch.no_grad():
        run_routed(inputs(torch.float32, 5)[0], decoder, "top-k", 4)
    assert keep_rows(down), "there was no copy any more"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "router",
    [
        LinearRouter(HIDDEN, EXPERTS, normalised=False),
        LinearRouter(HIDDEN, EXPERTS, normalised=True),
        AnalyticRouter(HIDDEN, EXPERTS, gated=True, activation=functional.silu),
        ContributionRouter(HIDDEN, EXPERTS, width=8),
    ],
    ids=["param-center", "similarity", "analytic", "contribution"],
)
def test_cheaper_numbers_order_experts_as_scores_do(router: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data.normal_(generator=generator)
    x = torch.randn(50, HIDDEN, generator=generator).mul_(3).to(dtype)
    for k in range(1, EXPERTS):
        select = {"rule": "top-k", "k": k}
        ranked = select_experts(router(x, order_only=True).detach(), select)
        assert torch.equal(ranked, select_experts(router(x).detach(), select))


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("inference")
def test_networks_with_other_outputs_do_not_share_a_graph() -> None:
    for rows in (HIDDEN, HIDDEN // 2, 2 * HIDDEN):
        weights = network(torch.float32)
        generator = torch.Generator().manual_seed(rows)
        down = torch.randn(rows, weights.down.shape[1], generator=generator)
        weights = dataclasses.replace(weights, down=down)
        x, mask = inputs(torch.float32, 6)
        out, _ = run_experts(x, weights, mask, path="dense")
        wanted = expected(x, weights, mask)
        assert out.shape == wanted.shape
        assert (out.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh"])
def test_layers_with_an_activation_of_their_own_share_a_graph(name: str) -> None:
    x, mask = inputs(torch.float32, 6)
    with torch.no_grad():
        for seed in range(2):
            weights = dataclasses.replace(network(torch.float32, seed), activation=ACT2FN[name])
            run_experts(x, weights, mask, path="dense")
    assert len(adaptive_batch._BATCHES) == 1
    assert None not in adaptive_batch._BATCHES.values()


@needs_compiler
@pytest.mark.slow
def test_whoever_looks_at_operations_sees_them() -> None:
    weights = network(torch.float32)
    x, mask = inputs(torch.float32, 6)

    def run(x: Tensor) -> Tensor:
        return run_experts(x, weights, mask, path="dense")[0]

    def counted() -> int:
        with FlopCounterMode(display=False) as flops:
            run(x)
        return int(flops.get_total_flops())

    with torch.no_grad():
        assert counted() == 3 * 2 * len(x) * HIDDEN * EXPERTS * WIDTH
        assert not adaptive_batch._BATCHES, "not given up for what looks on"
        run(x)
        assert None not in adaptive_batch._BATCHES.values()
        assert counted() == 3 * 2 * len(x) * HIDDEN * EXPERTS * WIDTH
        other = x.flip(0)
        wanted = expected(other, weights, mask)
        traced = make_fx(run)(x)(other)
        assert (traced.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        both = torch.func.vmap(run)(torch.stack([x, other]))[1]
        assert (both.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        with forward_ad.dual_level():
            found = run(forward_ad.make_dual(x, torch.ones_like(x)))
            assert forward_ad.unpack_dual(found).tangent is not None
