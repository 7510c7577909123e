"""Several tokens through a compiled network: right, one graph, and harmless where it fails."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.kernels.reference import expert_ffn
from adaconvert.modeling import adaptive_batch, adaptive_compiled
from adaconvert.modeling.adaptive_execution import ExpertWeights, run_experts
from adaconvert.modeling.adaptive_routers import AnalyticRouter, ContributionRouter, LinearRouter
from adaconvert.modeling.adaptive_select import select_experts

needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler here",
)
HIDDEN, EXPERTS, WIDTH = 24, 6, 4


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled yet; even tiny matrices are."""
    monkeypatch.setenv("ADACONVERT_COMPILE", "1")
    torch._dynamo.reset()
    monkeypatch.setattr(adaptive_batch, "_BATCHES", {})


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


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("when", ["made", "run"])
def test_a_graph_that_fails_costs_nothing_but_speed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("no compiler")

    def made(*_: object) -> Any:
        if when == "made":
            broken()
        calls: list[int] = []

        def run(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
            calls.append(1)
            return expected(x, weights, mask).float() if len(calls) == 1 else broken()

        return run

    monkeypatch.setattr(adaptive_batch, "_made", made)
    weights = network(torch.float32)
    x, mask = inputs(torch.float32, 5)
    for _ in range(3):
        out, _ = run_experts(x, weights, mask, path="dense")
        wanted = expected(x, weights, mask)
        assert (out.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert caplog.text.count("no compiler") == 1


@pytest.mark.usefixtures("inference")
def test_a_graph_with_another_output_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_batch, "_made", lambda x, *_: lambda *_: torch.zeros_like(x))
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
