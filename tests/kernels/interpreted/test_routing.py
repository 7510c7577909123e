"""The kernels of `router_select` against the reference in fp64, through the public function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaconvert.kernels import dispatch, reference_routing, routing_steps, triton_routing
from adaconvert.kernels.routing import NORMALISE, SCORES, Routing, router_select
from adaconvert.kernels.routing_steps import Rule

#: options, with the number of columns
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "mixtral": (8, {"top_k": 2, "normalise": "selected"}),
    "olmoe": (64, {"top_k": 8, "normalise": "none"}),
    "deepseek": (33, {"top_k": 6, "normalise": "selected", "scores": "sigmoid", "scaling": 2.5}),
    "adamoe": (24, {"top_k": 5, "normalise": "real", "null": 16}),
    "adamoe-forced": (12, {"top_k": 2, "normalise": "real", "null": 8, "force_real": True}),
    "null-share": (11, {"top_k": 4, "normalise": "selected", "null": 4}),
    "null-apart": (11, {"top_k": 4, "normalise": "all_real", "null": 4}),
    "null-sigmoid": (9, {"top_k": 3, "normalise": "all_real", "null": 3, "scores": "sigmoid"}),
    "tau": (16, {"top_k": 16, "normalise": "none", "tau": 0.3}),
    "tau-share": (13, {"top_k": 7, "normalise": "selected", "tau": 0.2, "null": 3}),
    "tau-sigmoid": (13, {"top_k": 7, "normalise": "real", "tau": 0.8, "scores": "sigmoid"}),
    "everyone": (7, {"top_k": 7, "normalise": "selected"}),
    "one": (1, {"top_k": 1, "normalise": "none"}),
}


@pytest.fixture(autouse=True, scope="module")
def _kernels() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "triton")
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def differentiated(found: Routing, leaf: Tensor, seed: int = 7) -> Tensor:
    """Return the gradient of the logits under random upstream gradients."""
    # in the reference, weights of null experts alone and sums over no token depend on nothing
    outputs = [o for o in (found.weights, found.probability_sums) if o.requires_grad]
    arriving = [draw(*o.shape, seed=seed + o.dim()).to(o.dtype) for o in outputs]
    if not outputs:
        return torch.zeros_like(leaf)
    return torch.autograd.grad(outputs, leaf, arriving)[0]


def ours(logits: Tensor, options: dict[str, Any]) -> tuple[Routing, Tensor]:
    leaf = logits.detach().requires_grad_()
    found = router_select(leaf, **options)
    return found, differentiated(found, leaf)


def reference(logits: Tensor, options: dict[str, Any]) -> tuple[Routing, Tensor]:
    leaf = logits.detach().double().requires_grad_()
    found = reference_routing.router_select(leaf, **options)
    return found, differentiated(found, leaf)


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


def agree(found: tuple[Routing, Tensor], wanted: tuple[Routing, Tensor]) -> None:
    (routing, grad), (expected, expected_grad) = found, wanted
    assert routing.weights.dtype == (torch.float64 if grad.dtype.itemsize > 4 else torch.float32)
    assert torch.equal(routing.experts, expected.experts)
    assert torch.equal(routing.counts, expected.counts)
    assert error(routing.weights, expected.weights) <= 1e-5
    assert error(routing.probability_sums, expected.probability_sums) <= 1e-5
    if expected_grad.norm() > 1e-9:
        assert error(grad, expected_grad) <= (1e-5 if grad.dtype.itemsize > 2 else 2e-2)
    else:
        assert grad.norm() <= 1e-5


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    columns, options = CASES[name]
    logits = draw(37, columns, seed=37, dtype=dtype)
    extras: tuple[dict[str, Any], ...] = (
        {},
        {"bias": draw(columns, seed=3) / 8},
        {"counted": torch.arange(37) % 3 != 1},
    )
    for extra in extras if dtype == torch.float32 else extras[:1]:
        agree(ours(logits, options | extra), reference(logits, options | extra))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("tokens", [0, 1, 127, 128, 129])
def test_any_number_of_tokens(tokens: int) -> None:
    columns, options = CASES["mixtral"]
    found, grad = ours(draw(tokens, columns), options)
    if tokens:
        agree((found, grad), reference(draw(tokens, columns), options))
    else:
        assert found.weights.shape == found.experts.shape == (0, 2)
        assert not found.probability_sums.any()
        assert not found.counts.any()
        assert grad.shape == (0, columns)


@pytest.mark.parametrize("name", [name for name in CASES if name != "one"])
def test_zeros_and_a_missing_expert_are_noticed(name: str) -> None:
    columns, options = CASES[name]
    logits = draw(37, columns)
    found, grad = ours(logits, options)
    wanted = reference(logits, options)
    nothing = torch.zeros_like(found.weights)
    without = found.weights.masked_fill(found.experts == found.experts.max(), 0)
    zero_sums = torch.zeros_like(found.probability_sums)
    for weights, sums, gradient in (
        (nothing, found.probability_sums, grad),
        (without, found.probability_sums, grad),
        (found.weights, zero_sums, grad),
        (found.weights, found.probability_sums, torch.zeros_like(grad)),
        (found.weights, found.probability_sums, grad.index_fill(1, torch.tensor(0), 0)),
    ):
        wrong = Routing(
            weights=weights, experts=found.experts, probability_sums=sums, counts=found.counts
        )
        with pytest.raises(AssertionError):
            agree((wrong, gradient), wanted)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """Logits on a grid, so that many are equal, some -inf, and any options."""
    columns = draw(st.integers(1, 10))
    tokens = draw(st.integers(1, 4))
    grid = st.lists(st.integers(-8, 8), min_size=columns * tokens, max_size=columns * tokens)
    logits = torch.tensor(draw(grid), dtype=torch.float64).reshape(tokens, columns) / 4
    options = {
        "top_k": draw(st.integers(1, columns)),
        "null": draw(st.integers(0, columns - 1)),
        # no ratio of two scores of the grid
        "tau": draw(st.sampled_from([None, 0.0, 0.2, 0.55, 1.0])),
        "normalise": draw(st.sampled_from(NORMALISE)),
        "scores": draw(st.sampled_from(SCORES)),
        "force_real": draw(st.booleans()),
        "scaling": draw(st.sampled_from([1.0, 2.5])),
    }
    if draw(st.booleans()):
        options["counted"] = torch.tensor(
            draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)), dtype=torch.bool
        )
    return logits, options


@settings(deadline=None, max_examples=25)
@given(calls())
def test_ties_and_all_options_equal_the_reference(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    wanted, wanted_grad = reference(logits, options)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found, grad = ours(logits.to(dtype), options)
        assert torch.equal(found.experts, wanted.experts)
        assert torch.equal(found.counts, wanted.counts)
        for mine, theirs in (
            (found.weights, wanted.weights),
            (found.probability_sums, wanted.probability_sums),
            (grad, wanted_grad),
        ):
            assert (mine - theirs).norm() <= limit * theirs.norm().clamp_min(1)


@pytest.mark.parametrize("tau", [None, 0.4])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("normalise", NORMALISE)
def test_gradcheck(normalise: str, scores: str, tau: float | None) -> None:
    logits = draw(5, 7, seed=11, dtype=torch.float64).requires_grad_()
    counted = torch.tensor([True, True, False, True, True])

    def outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
        found = router_select(
            *(logits,),
            **{"top_k": 4, "null": 2, "tau": tau, "scores": scores, "normalise": normalise},
            **{"scaling": 1.5, "counted": counted, "force_real": True},
        )
        return found.weights, found.probability_sums

    assert torch.autograd.gradcheck(outputs, (logits,), fast_mode=True)


# -- rows that are no numbers


@pytest.mark.usefixtures("poison")
# the sigmoid of inf is 1
@pytest.mark.parametrize(
    ("case", "bad"),
    [
        (name, bad)
        for name, (_, options) in CASES.items()
        for bad in ("nan", "inf", "all -inf")
        if not (bad == "inf" and "scores" in options)
    ],
)
def test_a_bad_token_is_bad_alone(case: str, bad: str) -> None:
    columns, options = CASES[case]
    logits = draw(6, columns)
    others = torch.arange(6) != 2
    clean, clean_grad = ours(logits, options | {"counted": others})
    if bad == "all -inf":
        logits[2] = -torch.inf
    else:
        logits[2, -1] = float(bad)
    found, grad = ours(logits, options)
    wanted = reference_routing.router_select(logits, **options)
    assert torch.equal(found.experts, wanted.experts)
    assert torch.equal(found.counts, wanted.counts)
    assert torch.equal(found.weights.isnan(), wanted.weights.isnan())
    assert found.weights[2].isnan().any()
    assert not grad[2].isfinite().all()
    assert torch.equal(found.weights[others], clean.weights[others])
    assert torch.equal(grad[others], clean_grad[others])
    assert found.probability_sums.isnan().all()
    hidden, _ = ours(logits, options | {"counted": others})
    assert torch.equal(hidden.probability_sums, clean.probability_sums)
    assert torch.equal(hidden.counts, clean.counts)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("normalise", NORMALISE)
def test_masked_columns_weigh_nothing(normalise: str, scores: str) -> None:
    logits = draw(4, 6)
    logits[:, [0, 3]] = -torch.inf
    logits[3, :4] = -torch.inf
    options = {"top_k": 6, "null": 2, "normalise": normalise, "scores": scores}
    found, grad = ours(logits, options)
    rule = rule_of(options)
    weights, experts, slots, sums, counts = routing_steps.forward(logits, None, None, rule)
    assert torch.equal(found.experts, experts)
    assert torch.equal(found.counts, counts)
    assert (found.weights - weights).norm() <= 1e-5 * weights.norm()
    assert error(found.probability_sums, sums.double()) <= 1e-5
    arriving = (draw(4, 6, seed=9), draw(6, seed=8))
    expected = routing_steps.backward(logits, slots, None, *arriving, rule)
    assert (grad - expected).norm() <= 1e-5 * expected.norm().clamp_min(1)


def rule_of(options: dict[str, Any]) -> Rule:
    plain = {"null": 0, "tau": None, "scores": "softmax", "scaling": 1.0, "force_real": False}
    return Rule(**(plain | options))


# -- order, memory, doors


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("programs", [2, 1024])
@pytest.mark.parametrize("name", ["deepseek", "tau-share"])
def test_order_of_programs_and_repetition_change_nothing(
    name: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_routing, "_BLOCK", 256)
    monkeypatch.setattr(triton_routing, "_PROGRAMS", programs)
    columns, options = CASES[name]
    logits, counted = draw(43, columns), torch.arange(43) % 5 != 2
    rule = rule_of(options)
    calls = [
        triton_routing.router_select(logits, None, counted, rule, reverse=reverse)
        for reverse in (False, False, True)
    ]
    slots = calls[0][2]
    arriving = (draw(*slots.shape, seed=1), draw(columns, seed=2))
    grads = [
        triton_routing.backward(logits, slots, counted, *arriving, rule, reverse=reverse)
        for reverse in (False, False, True)
    ]
    for again in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(calls[0], calls[again], strict=True))
        assert torch.equal(grads[0], grads[again])
    wanted = routing_steps.forward(logits, None, counted, rule)
    assert all(torch.equal(calls[0][i], wanted[i]) for i in (1, 2, 4))
    assert error(calls[0][3], wanted[3].double()) <= 1e-5
    expected = routing_steps.backward(logits, slots, counted, *arriving, rule)
    assert error(grads[0], expected.double()) <= 1e-5


@pytest.mark.usefixtures("poison")
def test_logits_and_gradients_with_strides() -> None:
    options = {"top_k": 3, "normalise": "selected"}
    plain = draw(20, 9)
    wanted = ours(plain, options)
    padded = torch.full((20, 14), torch.nan)
    padded[:, :9] = plain
    turned = plain.t().contiguous().t()
    for strided in (padded[:, :9], turned):
        found = ours(strided, options)
        assert torch.equal(found[0].weights, wanted[0].weights)
        assert torch.equal(found[1], wanted[1])
    leaf = plain.clone().requires_grad_()
    found_routing = router_select(leaf, **options)
    (3 * found_routing.weights[:, 0].sum() + found_routing.probability_sums.sum()).backward()
    expanded = torch.tensor([3.0, 0.0, 0.0]).expand(20, 3)
    expected = routing_steps.backward(
        plain, found_routing.experts.int(), None, expanded, torch.ones(9), rule_of(options)
    )
    assert leaf.grad is not None
    assert error(leaf.grad, expected.double()) <= 1e-5


@pytest.mark.usefixtures("poison")
def test_bias_and_counted_with_strides() -> None:
    logits = draw(20, 9)
    bias, counted = draw(18, seed=4) / 8, torch.arange(40) % 3 != 1
    options = {"top_k": 3, "normalise": "selected", "scores": "sigmoid"}
    found = ours(logits, options | {"bias": bias[::2], "counted": counted[::2]})
    plain = options | {"bias": bias[::2].clone(), "counted": counted[::2].clone()}
    agree(found, reference(logits, plain))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("which", ["weights", "probability_sums"])
def test_one_gradient_alone(which: str) -> None:
    columns, options = CASES["null-share"]
    grads = []
    for select, logits in (
        (router_select, draw(9, columns)),
        (reference_routing.router_select, draw(9, columns).double()),
    ):
        output = getattr(select(logits.requires_grad_(), **options), which)
        grads.append(torch.autograd.grad(output, logits, draw(*output.shape).to(output.dtype))[0])
    assert error(*grads) <= 1e-5


@pytest.mark.usefixtures("poison")
def test_many_columns() -> None:
    logits = draw(9, 700)
    options = {"top_k": 10, "normalise": "selected", "null": 100}
    agree(ours(logits, options), reference(logits, options))


def test_a_compiled_graph_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def torch_code(*_: object) -> None:
        raise AssertionError("torch's version ran")

    monkeypatch.setattr(routing_steps, "forward", torch_code)
    monkeypatch.setattr(routing_steps, "backward", torch_code)
    columns, options = CASES["adamoe-forced"]

    def outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
        found = router_select(logits, **options)
        return found.weights, found.probability_sums

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    plain, plain_grad = ours(draw(9, columns), options)
    logits = draw(9, columns).requires_grad_()
    weights, sums = compiled(logits)
    traced = Routing(
        weights=weights, experts=plain.experts, probability_sums=sums, counts=plain.counts
    )
    assert torch.equal(weights, plain.weights)
    assert torch.equal(sums, plain.probability_sums)
    assert torch.equal(differentiated(traced, logits), plain_grad)


def test_what_is_too_wide_is_refused() -> None:
    wide = torch.zeros(1, triton_routing.WIDEST + 1)
    with pytest.raises(RuntimeError, match="4097 logits is wider than 4096"):
        router_select(wide, top_k=1, normalise="none")
