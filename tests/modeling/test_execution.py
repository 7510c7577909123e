"""Every path of executing experts against the kernels' reference in float64."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.kernels.reference import expert_ffn
from adaconvert.modeling import adaptive_compiled, adaptive_execution, adaptive_gather
from adaconvert.modeling.adaptive_execution import ExpertWeights, run_experts
from adaconvert.modeling.adaptive_layout import neuron_major

#: largest difference from the float64 result over its largest value: rounding of sums of at most a
#: few hundred terms; for the short types two roundings to their precision (2^-8, 2^-11).
LIMITS = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-3,
}


def make(
    dtype: torch.dtype = torch.float32,
    *,
    hidden: int = 24,
    experts: int = 6,
    width: int = 4,
    shared: int = 0,
    glu: bool = True,
    biases: bool = False,
    major: bool = False,
    activation: Any = functional.silu,
    seed: int = 0,
) -> ExpertWeights:
    """Return random weights whose outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)
    neurons = shared + experts * width

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    down = draw(neurons, hidden, scale=neurons**-0.5)
    return ExpertWeights(
        gate=draw(neurons, hidden, scale=hidden**-0.5) if glu else None,
        up=draw(neurons, hidden, scale=hidden**-0.5),
        down=down.t() if major else down.t().contiguous(),
        gate_bias=draw(neurons) if glu and biases else None,
        up_bias=draw(neurons) if biases else None,
        down_bias=draw(hidden) if biases else None,
        activation=activation,
        width=width,
        shared=shared,
    )


def truth(x: Tensor, weights: ExpertWeights, mask: Tensor, **options: Any) -> Tensor:
    """Return the float64 result."""
    named = {field.name: getattr(weights, field.name) for field in dataclasses.fields(weights)}
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in named.items()}
    return expert_ffn(x.double(), mask, **wide, **options)


def error(out: Tensor, expected: Tensor) -> float:
    difference = (out.detach().double() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp_min(1e-30))


def masks(tokens: int, experts: int, density: float = 0.5, seed: int = 0) -> Tensor:
    """Return a random mask whose first row, with more than one, selects nothing."""
    drawn = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density
    if tokens > 1:
        drawn[0] = False
    return drawn


def activated(x: Tensor, weights: ExpertWeights) -> Tensor:
    first = (weights.up, weights.up_bias)
    if weights.gate is not None:
        first = (weights.gate, weights.gate_bias)
    gated: Tensor = weights.activation(functional.linear(x, *first))
    return gated


def paths_for(weights: ExpertWeights) -> list[str]:
    plain = weights.up_bias is None and weights.gate_bias is None
    grouped = plain and weights.up.dtype is torch.float32 and weights.width % 4 == 0
    major = neuron_major(weights.down)
    return ["dense", "gather", "union", *(["grouped"] if grouped and major else [])]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("glu", [True, False], ids=["glu", "plain"])
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "free"])
def test_every_path_is_the_reference(dtype: torch.dtype, glu: bool, biases: bool) -> None:
    layouts = itertools.product([True, False], [(1, 0), (4, 0), (4, 4), (12, 3)], [True, False])
    for major, (width, shared), known in layouts:
        weights = make(
            dtype, width=width, shared=shared, glu=glu, biases=biases, major=major, experts=5
        )
        x, mask = torch.randn(4, 24).to(dtype), masks(4, 5)
        expected = truth(x, weights, mask)
        gated = activated(x, weights) if known else None
        for path in paths_for(weights):
            with torch.inference_mode():
                out, _ = run_experts(x, weights, mask, gated=gated, path=path)
            assert out.dtype == dtype
            assert error(out, expected) <= LIMITS[dtype], (path, major, width, shared, known)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 9),
    hidden=st.integers(1, 20),
    experts=st.integers(1, 9),
    width=st.integers(1, 70),
    shared=st.integers(0, 5),
    density=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 1000),
)
def test_the_chosen_path_is_the_reference_for_any_shape(
    tokens: int,
    hidden: int,
    experts: int,
    width: int,
    shared: int,
    density: float,
    flags: tuple[bool, bool, bool, bool],
    seed: int,
) -> None:
    glu, biases, major, known = flags
    shape = {"hidden": hidden, "experts": experts, "width": width, "shared": shared}
    weights = make(torch.float64, glu=glu, biases=biases, major=major, seed=seed, **shape)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    mask = masks(tokens, experts, density, seed)
    gated = activated(x, weights) if known else None
    for path in (None, "gather", "union") if tokens else (None,):
        with torch.no_grad():
            out, pairs = run_experts(x, weights, mask, gated=gated, path=path)
        assert out.shape == (tokens, hidden)
        assert pairs <= tokens * weights.up.shape[0]
        if tokens:
            assert error(out, truth(x, weights, mask)) <= LIMITS[torch.float64]


@pytest.mark.parametrize("path", ["dense", "gather", "union", "grouped", None])
def test_the_measure_would_notice_a_missing_expert(path: str | None) -> None:
    weights = make(major=True)
    x, mask = torch.randn(3, 24), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4] = False
    whole = truth(x, weights, torch.ones_like(mask))
    with torch.inference_mode():
        out, _ = run_experts(x, weights, mask, path=path)
    assert error(out, whole) > 1e3 * LIMITS[torch.float32]
    assert error(torch.zeros_like(out), whole) > 0.5


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("biases", [True, False])
def test_a_token_without_experts_gets_shared_neurons_and_output_bias(
    shared: int, biases: bool
) -> None:
    weights = make(shared=shared, biases=biases, major=True)
    x, mask = torch.randn(3, 24), torch.zeros(3, 6, dtype=torch.bool)
    gate, up = weights.gate, weights.up
    assert gate is not None
    front = slice(0, shared)
    first = functional.linear(
        x, gate[front], None if weights.gate_bias is None else weights.gate_bias[front]
    )
    second = functional.linear(
        x, up[front], None if weights.up_bias is None else weights.up_bias[front]
    )
    expected = functional.linear(
        functional.silu(first) * second, weights.down[:, front], weights.down_bias
    )
    for path in [*paths_for(weights), None]:
        with torch.inference_mode():
            out, pairs = run_experts(x, weights, mask, path=path)
        # float32 sums of at most four terms in another order
        assert (out - expected).abs().max() <= 1e-6, path
        if path in ("gather", "union", "grouped"):
            assert pairs == 3 * shared


def test_all_experts_are_the_stock_computation_to_the_last_bit() -> None:
    for tokens in (1, 3, 40):
        weights = make(biases=True)
        x = torch.randn(tokens, 24)
        assert weights.gate is not None
        gate = functional.silu(functional.linear(x, weights.gate, weights.gate_bias))
        hidden = gate * functional.linear(x, weights.up, weights.up_bias)
        stock = functional.linear(hidden, weights.down, weights.down_bias)
        for mask in (None, torch.ones(tokens, 6, dtype=torch.bool)):
            with torch.inference_mode():
                out, pairs = run_experts(x, weights, mask)
            assert torch.equal(out, stock)
            assert pairs == tokens * 24


def test_gradients_of_the_dense_path_are_the_references() -> None:
    for glu, shared in itertools.product([True, False], [0, 3]):
        weights = make(torch.float64, glu=glu, biases=True, shared=shared)
        leaves = {
            field.name: value.requires_grad_()
            for field in dataclasses.fields(weights)
            if isinstance(value := getattr(weights, field.name), Tensor)
        }
        x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
        factors = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
        mask, upstream = masks(5, 6), torch.randn(5, 24, dtype=torch.float64)
        for given_factors in (None, factors):
            found, expected = [], []
            inputs = [x, *leaves.values(), *([] if given_factors is None else [factors])]
            out, pairs = run_experts(x, weights, mask, weights_per_expert=given_factors)
            assert pairs == 5 * weights.up.shape[0]
            found = torch.autograd.grad(out, inputs, upstream)
            direct = truth(x, weights, mask, weights_per_expert=given_factors)
            expected = torch.autograd.grad(direct, inputs, upstream)
            assert error(out, direct) <= LIMITS[torch.float64]
            for one, other in zip(found, expected, strict=True):
                assert error(one, other) <= LIMITS[torch.float64]


def test_expert_weights_without_gradients() -> None:
    weights = make(torch.float64, biases=True, shared=2)
    x, mask = torch.randn(3, 24, dtype=torch.float64), masks(3, 6)
    factors = torch.rand(3, 6, dtype=torch.float64)
    with torch.inference_mode():
        out, _ = run_experts(x, weights, mask, weights_per_expert=factors)
    expected = truth(x, weights, mask, weights_per_expert=factors)
    assert error(out, expected) <= LIMITS[torch.float64]


def test_infinite_unselected_neurons_do_not_reach_the_output() -> None:
    weights = make(major=True)
    assert weights.gate is not None
    weights.gate[0], weights.up[0] = float("nan"), float("inf")
    x, mask = torch.randn(3, 24), torch.ones(3, 6, dtype=torch.bool)
    mask[:, 0] = False
    for path in paths_for(weights):
        with torch.inference_mode():
            out, _ = run_experts(x, weights, mask, path=path)
        assert bool(out.isfinite().all()), path


def test_the_callers_gate_is_not_written_to() -> None:
    for glu in (True, False):
        weights = make(glu=glu)
        x = torch.randn(8, 24)
        gated = activated(x, weights)
        before = gated.clone()
        with torch.inference_mode():
            for path in ("dense", "gather", "union"):
                run_experts(x, weights, masks(8, 6), gated=gated, path=path)
        assert torch.equal(gated, before)


# -- which path runs, seen by how many pairs it computes


def executed(x: Tensor, weights: ExpertWeights, mask: Tensor, **options: Any) -> int:
    with torch.inference_mode():
        return run_experts(x, weights, mask, **options)[1]


def test_few_tokens_with_few_experts_are_gathered() -> None:
    weights = make(experts=20, major=True, shared=2)
    for tokens, chosen in ((1, 3), (2, 1), (4, 1)):
        mask = torch.zeros(tokens, 20, dtype=torch.bool)
        mask[:, :chosen] = True
        assert executed(torch.randn(tokens, 24), weights, mask) == tokens * (2 + chosen * 4)


def test_many_selected_neurons_run_dense() -> None:
    weights = make(experts=10, major=True)
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[:, :5] = True
    # half is above the limit of the uncompiled forms, which small matrices take
    assert executed(torch.randn(1, 24), weights, mask) == 40
    assert executed(torch.randn(3, 24), weights, mask.expand(3, 10)) == 120


def test_tokens_that_share_experts_run_their_union() -> None:
    weights = make(experts=10)
    mask = torch.zeros(64, 10, dtype=torch.bool)
    mask[:, 2:5] = masks(64, 3)
    mask[1, 2:5] = True
    assert executed(torch.randn(64, 24), weights, mask) == 64 * 3 * 4
    assert executed(torch.randn(16, 24), weights, mask[:16]) == 16 * 40


def test_many_tokens_with_few_experts_each_are_grouped_in_float32_only() -> None:
    for dtype, major, grouped in (
        (torch.float32, True, True),
        (torch.float32, False, False),
        (torch.bfloat16, True, False),
    ):
        weights = make(dtype, experts=16, width=16, shared=4, major=major)
        mask = torch.eye(16, dtype=torch.bool).repeat(8, 1)
        x = torch.randn(128, 24).to(dtype)
        assert executed(x, weights, mask) == (128 * (4 + 16) if grouped else 128 * 260)


@pytest.mark.parametrize("why", ["gradients", "autocast", "subclass", "dtype"])
def test_what_is_not_plain_inference_runs_dense(why: str) -> None:
    class Odd(nn.Parameter):
        pass

    weights = make(experts=10, major=True)
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[:, 1] = True
    x = torch.randn(1, 24)
    assert executed(x, weights, mask) == 4
    if why == "gradients":
        assert run_experts(x, weights, mask)[1] == 40
    elif why == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert executed(x, weights, mask) == 40
    elif why == "subclass":
        odd = dataclasses.replace(weights, up=Odd(weights.up))
        assert executed(x, odd, mask) == 40
    else:
        biased = dataclasses.replace(weights, down_bias=torch.zeros(24, dtype=torch.float64))
        assert not adaptive_gather.plain(biased)


def test_tracing_runs_dense() -> None:
    weights = make(experts=10, major=True)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[:, 1] = True
    x = torch.randn(2, 24)
    with torch.no_grad():
        traced = torch.compile(
            lambda x: run_experts(x, weights, mask)[0], backend="eager", fullgraph=True
        )
        assert error(traced(x), truth(x, weights, mask)) <= LIMITS[torch.float32]


def test_kept_buffers_serve_every_mode_and_thread() -> None:
    weights = make(major=True)
    x = torch.randn(1, 24)
    mask = torch.tensor([[True, False, True, False, False, False]])
    expected = truth(x, weights, mask)
    found: list[Tensor] = []

    def run(*modes: Any) -> None:
        for mode in modes:
            with mode():
                found.append(run_experts(x, weights, mask)[0])

    run(torch.inference_mode, torch.no_grad, torch.inference_mode)
    workers = [threading.Thread(target=run, args=(torch.inference_mode,) * 20) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 83
    assert all(error(out, expected) <= LIMITS[torch.float32] for out in found)


@pytest.mark.parametrize(("tokens", "bytes_"), [(1, 1 << 20), (1, 0), (2, 1 << 20)])
def test_only_one_token_of_a_small_network_gathers_everything(
    monkeypatch: pytest.MonkeyPatch, tokens: int, bytes_: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(adaptive_compiled, "ANY_BYTES", bytes_)
    monkeypatch.setattr(adaptive_execution, "compiles", lambda *arguments: True)
    monkeypatch.setattr(
        adaptive_execution, "_gather", lambda x, *others: (seen.append(len(x)), x)[1]
    )
    weights, x = make(major=True), torch.randn(tokens, 24)
    with torch.inference_mode():
        run_experts(x, weights, torch.ones(tokens, 6, dtype=torch.bool))
    assert seen == ([1] if tokens == 1 and bytes_ else [])


def test_limits_are_ordered() -> None:
    assert adaptive_execution.GATHER_LIMIT[1] < adaptive_execution.GATHER_LIMIT[0] < 1
