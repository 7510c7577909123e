"""Null experts decide as their definition says: the top K' of all, weights by the source's rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels.routing import router_select
from adaconvert.modeling.adaptive_null import Decision, decide

EPS = torch.finfo(torch.float32).eps
SIZES = [(4, 4, 2, 4), (4, 8, 1, 3), (6, 3, 2, 2), (3, 5, 2, 8), (8, 1, 4, 4), (2, 0, 1, 2)]
#: (combine, weights) -> what `router_select` calls it.
NAMES: dict[tuple[str, str], Any] = {
    ("renorm", "real"): "real",
    ("renorm", "selected"): "selected",
    ("all", "real"): "all_real",
    ("all", "selected"): "none",
}


def logits_of(experts: int, null: int, tokens: int = 200, dtype: Any = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(experts + 7 * null)
    both = torch.randn(tokens, experts + null, generator=generator, dtype=torch.float64)
    return both[:, :experts].to(dtype), both[:, experts:].to(dtype)


def by_definition(
    real: Tensor,
    null: Tensor,
    slots: int,
    combine: str,
    mode: str,
    beta: float,
    min_real: int,
    scaling: float,
    gain: float,
) -> tuple[Tensor, Tensor]:
    """Return weights [T, n] and shares of null experts [T, M], one token at a time."""
    weights, shares = torch.zeros_like(real), torch.zeros_like(null)
    for t, (r, v) in enumerate(zip(real.tolist(), null.tolist(), strict=True)):
        every = [(-x, 0, e) for e, x in enumerate(r)] + [(-x - beta, 1, j) for j, x in enumerate(v)]
        chosen = sorted(every)[:slots]
        if min_real and all(kind for _, kind, _ in chosen):
            chosen[-1] = min(every[: len(r)])
        run = [e for _, kind, e in chosen if not kind]
        selected = sum(math.exp(-x) for x, _, _ in chosen)
        below = {
            ("renorm", "real"): sum(math.exp(r[e]) for e in run),
            ("renorm", "selected"): selected,
            ("all", "real"): sum(map(math.exp, r)),
            ("all", "selected"): sum(math.exp(-x) for x, _, _ in every),
        }[combine, mode]
        for e in run:
            factor = scaling if combine == "all" else 1.0
            weights[t, e] = math.exp(r[e]) / below * factor * (gain if mode == "selected" else 1.0)
        for x, kind, j in chosen:
            if kind:
                shares[t, j] = math.exp(-x) / selected
    return weights, shares


def spread(found: Decision) -> Tensor:
    """Return the weights by expert, [T, n]."""
    return torch.zeros_like(found.logits).scatter(-1, found.order, found.weights)


@pytest.mark.parametrize(("experts", "null", "top_k", "slots"), SIZES)
@pytest.mark.parametrize("combine", ["renorm", "all"])
@pytest.mark.parametrize("mode", ["real", "selected"])
@pytest.mark.parametrize("min_real", [0, 1])
def test_it_is_the_definition(
    experts: int, null: int, top_k: int, slots: int, combine: str, mode: str, min_real: int
) -> None:
    real, beside = logits_of(experts, null, dtype=torch.float64)
    for beta in (-0.7, 0.0, 0.9):
        told = {"slots": slots, "combine": combine, "beta": beta, "min_real": min_real}
        found = decide(real, beside, **told, weights_mode=mode, scaling=1.5, gain=2.0, shares=True)
        weights, shares = by_definition(
            real, beside, slots, combine, mode, beta, min_real, 1.5, 2.0
        )
        eps = torch.finfo(torch.float64).eps
        assert (spread(found) - weights).norm() <= 16 * eps * weights.norm()
        assert found.null_weights is not None
        assert (found.null_weights - shares).norm() <= 16 * eps * shares.norm()
        assert torch.equal(found.kept, found.weights > 0)


@pytest.mark.parametrize(("experts", "null", "top_k", "slots"), SIZES[:5])
@pytest.mark.parametrize(("combine", "mode"), list(NAMES))
@pytest.mark.parametrize("min_real", [0, 1])
def test_it_is_what_the_kernel_selects(
    experts: int, null: int, top_k: int, slots: int, combine: str, mode: str, min_real: int
) -> None:
    real, beside = logits_of(experts, null)
    beta = 0.25
    found = decide(
        real,
        beside,
        slots=slots,
        combine=combine,
        beta=beta,
        min_real=min_real,
        weights_mode=mode,
    )
    wanted = router_select(
        torch.cat([real, beside + beta], dim=-1),
        top_k=slots,
        normalise=NAMES[combine, mode],
        null=null,
        force_real=bool(min_real),
    )
    weights = torch.zeros(len(real), experts + 1)
    weights.scatter_add_(-1, wanted.experts % (experts + 1), wanted.weights)
    assert (spread(found) - weights[:, :experts]).norm() <= 16 * EPS * weights.norm()
    assert int(found.kept.sum()) == int((wanted.experts >= 0).sum())


@pytest.mark.parametrize(("experts", "null", "top_k", "slots"), SIZES)
def test_margins_are_thresholds_of_the_bias(
    experts: int, null: int, top_k: int, slots: int
) -> None:
    real, beside = logits_of(experts, null)
    margins = decide(real, beside, slots=slots, combine="renorm").margins
    assert margins.shape == (len(real), min(slots, experts))
    assert bool((margins[:, 1:] <= margins[:, :-1]).all())
    assert torch.equal(margins.isinf().sum(dim=-1), torch.full((200,), max(slots - null, 0)))
    for beta in (-1e4, -1.0, 0.0, 0.3, 1e4):
        run = decide(real, beside, slots=slots, combine="renorm", beta=beta).kept.sum(dim=-1)
        assert torch.equal(run, (margins >= beta).sum(dim=-1))
    # a quantile of the margins is the bias of that share
    finite = margins[margins.isfinite()]
    if len(finite):
        run = decide(real, beside, slots=slots, combine="renorm", beta=float(finite.median())).kept
        assert int(run.sum()) == int(margins.isinf().sum()) + int((finite >= finite.median()).sum())


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copied_rows_leave_every_token_its_experts(copies: int, dtype: torch.dtype) -> None:
    """Equal logits are common in bfloat16; then, too, no expert more or other than the source's."""
    generator = torch.Generator().manual_seed(copies)
    real = torch.randn(3000, 16, generator=generator).to(dtype)
    picked = real.float().softmax(dim=-1).topk(3).indices
    null, slots = real.repeat(1, copies), 3 * (1 + copies)
    found = decide(real, null, slots=slots, combine="renorm", first=picked)
    assert torch.equal(found.kept.sum(dim=-1), torch.full((3000,), 3))
    assert torch.equal(found.order[:, :3].sort().values, picked.sort().values)
    wanted = real.float().gather(-1, found.order[:, :3]).softmax(dim=-1)
    assert (found.weights[:, :3] - wanted).norm() <= 4 * EPS * wanted.norm()
    if dtype == torch.bfloat16:
        # the case this is about is there
        third = real.gather(-1, found.order[:, 2:4])
        assert int((third[:, 0] == third[:, 1]).sum()) > 10


def test_of_equal_logits_a_null_expert_stands_behind_its_real_one() -> None:
    # null 0 stands behind real 0, so before real 1; null 1 behind real 1
    real, null = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0]])
    found = decide(real, null, slots=2, combine="renorm", shares=True)
    assert found.kept.tolist() == [[True, False]]
    assert found.null_weights is not None
    assert found.null_weights.tolist() == [[0.0, 0.5]]
    for slots, run in ((3, 1), (4, 2), (5, 3)):
        found = decide(real, null, slots=slots, combine="renorm")
        assert int(found.kept.sum()) == run, slots


def test_shares_of_random_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(20000, 24, generator=generator)
    found = decide(both[:, :8], both[:, 8:], slots=5, combine="renorm")
    run = found.kept.sum(dim=-1)
    # K' n / (n + M), up to four errors of the mean
    assert abs(float(run.float().mean()) - 5 * 8 / 24) < 4 * float(run.float().std()) / 20000**0.5
    sums = found.weights.sum(dim=-1)
    assert (sums[run > 0] - 1).abs().max() <= 4 * EPS
    assert bool((run == 0).any())
    assert not sums[run == 0].any()


@pytest.mark.parametrize("combine", ["renorm", "all"])
def test_the_straight_through_factor(combine: str) -> None:
    real, null = logits_of(6, 6)
    real.requires_grad_()
    null.requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    told = {"slots": 3, "combine": combine, "beta": bias}
    plain = decide(real, null, **told)
    found = decide(real, null, **told, straight_through=True)
    assert torch.equal(plain.weights, found.weights)
    mix = torch.randn(found.weights.shape, generator=torch.Generator().manual_seed(1))
    before = torch.autograd.grad((plain.weights * mix).sum(), [real, null, bias], allow_unused=True)
    assert before[1] is None
    assert before[2] is None
    after = torch.autograd.grad((found.weights * mix).sum(), [real, null, bias])
    # d(w R / R.detach()) = dw + w d(log R), with R a softmax over what is selected
    selected = torch.cat([found.logits, found.null_logits + bias], dim=-1)
    best = selected.topk(3).indices
    share = selected.gather(-1, best).softmax(dim=-1)
    mass = torch.where(best < 6, share, 0).sum(dim=-1).clamp_min(1e-30).log()
    scale = (plain.weights * mix).sum(dim=-1).detach()
    extra = torch.autograd.grad((scale * mass)[found.kept[:, 0]].sum(), [real, null, bias])
    for got, had, added in zip(after, before, extra, strict=True):
        wanted = added if had is None else had + added
        assert (got - wanted).norm() <= 64 * EPS * wanted.norm()
    # one real expert: nothing without the factor
    single = found.kept.sum(dim=-1) == 1
    if combine == "renorm":
        assert not before[0][single].any()
    assert bool(after[0][single].any(dim=-1).all())
    assert bool(after[1][single].any(dim=-1).all())


def test_the_factor_is_one_where_masses_underflow() -> None:
    real = torch.tensor([[-300.0, -301.0]], requires_grad=True)
    null = torch.tensor([[10.0, 9.0]], requires_grad=True)
    found = decide(
        real, null, slots=2, combine="renorm", min_real=1, straight_through=True, shares=True
    )
    assert found.weights.tolist() == [[1.0, 0.0]]
    found.weights.sum().backward()
    assert real.grad is not None
    assert null.grad is not None
    assert bool(real.grad.isfinite().all())
    assert float(null.grad[0, 0]) == -1.0


def test_shapes_without_values() -> None:
    real, null = torch.empty(5, 4, device="meta"), torch.empty(5, 6, device="meta")
    found = decide(real, null, slots=3, combine="all", shares=True, straight_through=True)
    assert found.weights.shape == found.margins.shape == (5, 3)
    assert found.null_weights is not None
    assert found.null_weights.shape == (5, 6)
