"""`router_select` against its reference, with numbers and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adaconvert.kernels import reference_routing
from adaconvert.kernels.routing import NORMALISE, SCORES, Routing, router_select

Select = Callable[..., Routing]

#: options, with the number of experts
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


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def run(
    select: Select, logits: Tensor, options: dict[str, Any], seed: int = 7
) -> tuple[Routing, Tensor]:
    """Return the routing, and the gradient of the logits under random upstream gradients."""
    leaf = logits.detach().requires_grad_()
    found = select(leaf, **options)
    # in the reference, weights of null experts alone and sums over no token depend on nothing
    outputs = [o for o in (found.weights, found.probability_sums) if o.requires_grad]
    arriving = [draw(*o.shape, seed=seed + o.dim()).to(o.dtype) for o in outputs]
    grad = torch.zeros_like(leaf)
    if outputs:
        (grad,) = torch.autograd.grad(outputs, leaf, arriving)
    return found, grad


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


def agree(found: Routing, grad: Tensor, logits: Tensor, options: dict[str, Any]) -> None:
    """Check against the reference in float64, from the same logits."""
    wanted, wanted_grad = run(reference_routing.router_select, logits.double(), options)
    assert found.weights.dtype == (logits.dtype if logits.dtype.itemsize > 4 else torch.float32)
    assert torch.equal(found.experts, wanted.experts)
    assert torch.equal(found.counts, wanted.counts)
    assert error(found.weights, wanted.weights) <= 1e-5
    assert error(found.probability_sums, wanted.probability_sums) <= 1e-5
    assert grad.dtype == logits.dtype
    if wanted_grad.norm() > 1e-9:
        assert error(grad, wanted_grad) <= (1e-5 if logits.dtype.itemsize > 2 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, tokens: int, dtype: torch.dtype) -> None:
    experts, options = CASES[name]
    logits = draw(tokens, experts, seed=tokens, dtype=dtype)
    for extra in (
        {},
        {"bias": draw(experts, seed=3) / 8},
        {"counted": torch.arange(tokens) % 3 != 1},
    ):
        found, grad = run(router_select, logits, options | extra)
        agree(found, grad, logits, options | extra)


@pytest.mark.parametrize("name", [name for name in CASES if name != "one"])
def test_zeros_and_a_missing_expert_are_noticed(name: str) -> None:
    experts, options = CASES[name]
    logits = draw(37, experts)
    found, grad = run(router_select, logits, options)
    nothing = torch.zeros_like(found.weights)
    without = found.weights.masked_fill(found.experts == found.experts.max(), 0)
    zero_sums = torch.zeros_like(found.probability_sums)
    agree(found, grad, logits, options)
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
            agree(wrong, gradient, logits, options)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensor, dict[str, Any]]:
    """Logits on a grid, so that many are equal, and any options."""
    experts = draw(st.integers(1, 10))
    tokens = draw(st.integers(1, 4))
    grid = st.lists(st.integers(-8, 8), min_size=experts * tokens, max_size=experts * tokens)
    logits = torch.tensor(draw(grid), dtype=torch.float64).reshape(tokens, experts) / 4
    options = {
        "top_k": draw(st.integers(1, experts)),
        "null": draw(st.integers(0, experts - 1)),
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


@settings(deadline=None, max_examples=150)
@given(calls())
def test_ties_and_all_options_equal_the_reference(call: tuple[Tensor, dict[str, Any]]) -> None:
    logits, options = call
    wanted, wanted_grad = run(reference_routing.router_select, logits, options)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found, grad = run(router_select, logits.to(dtype), options)
        assert torch.equal(found.experts, wanted.experts)
        assert torch.equal(found.counts, wanted.counts)
        for ours, theirs in (
            (found.weights, wanted.weights),
            (found.probability_sums, wanted.probability_sums),
            (grad, wanted_grad),
        ):
            assert (ours - theirs).norm() <= limit * theirs.norm().clamp_min(1)


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

    assert torch.autograd.gradcheck(outputs, (logits,))


# -- logits that are no numbers


# the sigmoid of inf is 1
@pytest.mark.parametrize(
    ("case", "poison"),
    [
        (name, poison)
        for name, (_, options) in CASES.items()
        for poison in ("nan", "inf", "all -inf")
        if not (poison == "inf" and "scores" in options)
    ],
)
def test_a_bad_token_is_bad_alone(case: str, poison: str) -> None:
    experts, options = CASES[case]
    logits = draw(6, experts)
    others = torch.arange(6) != 2
    clean, clean_grad = run(router_select, logits, options | {"counted": others})
    if poison == "all -inf":
        logits[2] = -torch.inf
    else:
        logits[2, -1] = float(poison)
    found, grad = run(router_select, logits, options)
    real = found.experts[2] >= 0
    # a real expert is among them, so that the token's output is NaN and not zero
    assert real[0]
    assert found.weights[2, real].isnan().all()
    assert (found.weights[2, ~real] == 0).all()
    wanted = reference_routing.router_select(logits, **options)
    assert torch.equal(found.experts, wanted.experts)
    assert torch.equal(found.counts, wanted.counts)
    assert torch.equal(found.weights.isnan(), wanted.weights.isnan())
    assert not grad[2].isfinite().all()
    assert torch.equal(found.weights[others], clean.weights[others])
    assert torch.equal(found.experts[others], clean.experts[others])
    assert torch.equal(grad[others], clean_grad[others])
    assert found.probability_sums.isnan().all()
    hidden, _ = run(router_select, logits, options | {"counted": others})
    assert torch.equal(hidden.probability_sums, clean.probability_sums)
    assert torch.equal(hidden.counts, clean.counts)


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("normalise", NORMALISE)
def test_masked_experts_weigh_nothing(normalise: str, scores: str) -> None:
    logits = draw(4, 6)
    logits[:, [0, 3]] = -torch.inf
    logits[3, :4] = -torch.inf
    options = {"top_k": 6, "null": 2, "normalise": normalise, "scores": scores}
    found, grad = run(router_select, logits, options)
    assert found.weights.isfinite().all()
    assert grad.isfinite().all()
    assert (found.weights[(found.experts == 0) | (found.experts == 3)] == 0).all()
    assert (found.weights[3] == 0).all()
    assert (grad[logits == -torch.inf] == 0).all()
    agree(found, grad, logits, options)


# -- what is promised besides


@pytest.mark.parametrize("name", CASES)
def test_a_second_call_is_bit_identical_and_strides_do_not_matter(name: str) -> None:
    experts, options = CASES[name]
    logits = draw(41, experts)
    apart = torch.full((experts, 82), torch.nan).T[::2]
    apart.copy_(logits)
    assert not apart.is_contiguous() or experts == 1
    one, one_grad = run(router_select, logits, options)
    for again in (logits, apart, logits.T.contiguous().T):
        two, two_grad = run(router_select, again, options)
        for field in ("weights", "experts", "probability_sums", "counts"):
            assert torch.equal(getattr(one, field), getattr(two, field))
        assert torch.equal(one_grad, two_grad)


def test_no_tokens() -> None:
    found, grad = run(
        router_select, torch.empty(0, 6), {"top_k": 2, "null": 2, "normalise": "real", "tau": 0.5}
    )
    assert found.weights.shape == found.experts.shape == (0, 2)
    assert found.probability_sums.tolist() == [0.0] * 6
    assert found.counts.tolist() == [0] * 6
    assert grad.shape == (0, 6)


@pytest.mark.parametrize("part", ["weights", "probability_sums"])
def test_each_output_alone_has_the_right_gradient(part: str) -> None:
    """Also under an expanded upstream gradient, which is what `sum` sends."""
    logits = draw(9, 7, dtype=torch.float64).requires_grad_()
    options = {"top_k": 3, "normalise": "none", "null": 2, "scores": "sigmoid", "tau": 0.5}
    grads = [
        torch.autograd.grad(getattr(select(logits, **options), part)[..., 1:].sum(), logits)[0]
        for select in (router_select, reference_routing.router_select)
    ]
    assert error(grads[0], grads[1]) <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    """Values of meta tensors do not exist, so that reading one is an error."""
    experts, options = CASES[name]
    logits = torch.empty(5, experts, device="meta", requires_grad=True)
    counted = torch.ones(5, dtype=torch.bool, device="meta")
    found = router_select(logits, counted=counted, **options)
    (found.weights.sum() + found.probability_sums.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (5, experts)
