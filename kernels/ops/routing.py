"""Which experts each token runs and with what weight, and what a balance loss needs of it.

Selection, weights and sums are one autograd function, which keeps the logits and the selected
indices alone. Everything is computed in float32, or float64 for float64 logits. No host
synchronisation, no atomics: a second call is bit-identical.

Shapes: T tokens, E experts, N null experts (which cost nothing), A = E + N, K slots of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Scores = Literal["softmax", "sigmoid"]
Normalise = Literal["none", "selected", "real", "all_real"]

SCORES: tuple[Scores, ...] = ("softmax", "sigmoid")
NORMALISE: tuple[Normalise, ...] = ("none", "selected", "real", "all_real")


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What `router_select` decided.

    Attributes:
        weights: [T, K] float32 (float64 for float64 logits); 0 where `experts` is -1.
        experts: [T, K] int64, best first; -1 for a null expert or one that tau leaves out.
        probability_sums: [A] sums over tokens of the scores, each token's made to add up to 1.
        counts: [A] int64, how many tokens selected each expert; null ones are the last N.
    """

    weights: Tensor
    experts: Tensor
    probability_sums: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """The options of `router_select` that are no tensors."""

    top_k: int
    null: int
    tau: float | None
    scores: Scores
    normalise: Normalise
    scaling: float
    force_real: bool

    @property
    def partial(self) -> bool:
        """Return whether a slot can hold something else than a real expert."""
        return self.null > 0 or self.tau is not None


def router_select(
    logits: Tensor,
    *,
    top_k: int,
    normalise: Normalise,
    null: int = 0,
    tau: float | None = None,
    scores: Scores = "softmax",
    scaling: float = 1.0,
    bias: Tensor | None = None,
    counted: Tensor | None = None,
    force_real: bool = False,
) -> Routing:
    """Return which experts each token runs, their weights, and the sums of a balance loss.

    The `top_k` best of all A experts are selected; of equal ones the lower index. Gradients reach
    the logits through `weights` and `probability_sums`. A token with a NaN logit, +inf under
    softmax, or none above -inf, selects 0, 1, ... with NaN weights, so that its output is NaN;
    no other token is touched.

    Args:
        logits: [T, A], real experts first.
        top_k: slots of a token.
        normalise: what a weight is a share of. "none": the score itself; "selected": of the
            selected experts, null ones included; "real": of the selected real ones; "all_real": of
            all real ones, so that under softmax null experts compete without taking weight from
            those that are selected.
        null: how many of the experts, the last ones, are null.
        tau: of the selected, keep those with score >= tau x the highest of all A, and in any case
            the first. What it leaves out is not selected for `normalise` and `counts` either.
        scores: of the logits; softmax is over all A.
        scaling: multiplies the weights.
        bias: [A] added to the scores for selection only (not for tau); gets no gradient.
        counted: [T] bool, tokens that enter `probability_sums` and `counts`; all by default.
        force_real: a token without a selected real expert gets the best one, in its last slot.

    Raises:
        TypeError: the logits are not floating point, or `counted` is not bool.
        ValueError: an option is out of range or a shape does not fit.

    Source: null experts and shares of the selected real ones are AdaMoE, Zeng et al. 2024, arXiv
        2406.13233, section 3 (`force_real` is ours); tau is D2DMoE, Szatkowski et al. 2024,
        arXiv 2310.04361, section 3; the bias is DeepSeek-V3, arXiv 2412.19437, equation 16, and
        the sums of its sigmoid scores follow equation 19.
    """
    rule = _Rule(
        top_k=top_k,
        null=null,
        tau=tau,
        scores=scores,
        normalise=normalise,
        scaling=scaling,
        force_real=force_real,
    )
    _check(logits, rule, bias, counted)
    outputs = _RouterSelect.apply(logits, bias, counted, rule)  # type: ignore[no-untyped-call]
    weights, experts, sums, counts = outputs
    return Routing(weights=weights, experts=experts, probability_sums=sums, counts=counts)


def _check(logits: Tensor, rule: _Rule, bias: Tensor | None, counted: Tensor | None) -> None:
    """Raise TypeError or ValueError as `router_select` says, else do nothing."""
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; expected floating point")
    if logits.dim() != 2:
        raise ValueError(f"logits have shape {tuple(logits.shape)}; expected [tokens, experts]")
    tokens, experts = logits.shape
    if not 0 <= rule.null < experts:
        raise ValueError(f"null is {rule.null}; expected 0 to {experts - 1} of {experts} experts")
    if not 1 <= rule.top_k <= experts:
        raise ValueError(f"top_k is {rule.top_k}; expected 1 to {experts}")
    if rule.tau is not None and not 0 <= rule.tau <= 1:
        raise ValueError(f"tau is {rule.tau}; expected 0 to 1")
    if rule.scores not in SCORES:
        raise ValueError(f"scores is {rule.scores!r}; expected one of {', '.join(SCORES)}")
    if rule.normalise not in NORMALISE:
        raise ValueError(f"normalise is {rule.normalise!r}; expected one of {', '.join(NORMALISE)}")
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected [{experts}]")
    if counted is not None and counted.shape != (tokens,):
        raise ValueError(f"counted has shape {tuple(counted.shape)}; expected [{tokens}]")
    if counted is not None and counted.dtype != torch.bool:
        raise TypeError(f"counted is {counted.dtype}; expected bool")


class _RouterSelect(torch.autograd.Function):
    """(logits, bias, counted, rule) -> (weights, experts, probability sums, counts)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, bias: Tensor | None, counted: Tensor | None, rule: _Rule
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, slots, sums, counts = _forward(logits, bias, counted, rule)
        experts = _without_null(slots, logits.shape[1] - rule.null)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, slots.int(), counted)
        ctx.mark_non_differentiable(experts, counts)
        return weights, experts, sums, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, weights_grad: Tensor | None, _: None, sums_grad: Tensor | None, __: None
    ) -> tuple[Tensor | None, None, None, None]:
        logits, slots, counted = ctx.saved_tensors
        grad = _backward(logits, slots.long(), counted, weights_grad, sums_grad, ctx.rule)
        return grad, None, None, None


def _forward(
    logits: Tensor, bias: Tensor | None, counted: Tensor | None, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights [T, K], slots [T, K], probability sums [A] and counts [A].

    Slots hold the selected experts: null ones with their own index, -1 where tau leaves one out.
    """
    logits = _clean(logits, rule)
    values = _values(logits, rule)
    slots = _slots(logits, values, bias, rule)
    weights = _slot_shares(logits, values, slots, rule)
    if rule.partial:
        weights = weights.masked_fill(~_is_real(slots, logits.shape[1] - rule.null), 0)
    if rule.scaling != 1:
        weights = weights * rule.scaling
    shares = _probabilities(logits, values, rule)
    if counted is not None:
        shares = shares.masked_fill(~counted[:, None], 0)
    return weights, slots, shares.sum(dim=0), _counts(slots, counted, logits.shape[1], rule)


def _counts(slots: Tensor, counted: Tensor | None, columns: int, rule: _Rule) -> Tensor:
    """Return how many counted tokens have each expert in a slot, [A] int64."""
    uses = slots >= 0
    if counted is not None:
        uses = uses & counted[:, None]
    # integers add up to the same in every order
    return slots.new_zeros(columns).scatter_add(
        0, _indices(slots, rule).flatten(), uses.long().flatten()
    )


def _backward(
    logits: Tensor,
    slots: Tensor,
    counted: Tensor | None,
    weights_grad: Tensor | None,
    sums_grad: Tensor | None,
    rule: _Rule,
) -> Tensor:
    """Return the gradient of the logits, [T, A] in their dtype.

    Every weight is a share of a pool: w_k = v_k / sum over the pool of v_j, with v = exp(a). Hence
    dL/da_j = w_j g_j (where j is a real slot) - (v_j / sum v) sum_k w_k g_k (where j is in the
    pool). Under softmax a is the logit, under sigmoid its log-sigmoid of slope sigmoid(-logit).

    Args:
        logits: [T, A] as given.
        slots: [T, K] as `_forward` returns them.
        counted: [T] or None.
        weights_grad: [T, K] or None for zero.
        sums_grad: [A] or None for zero.
        rule: as given.
    """
    wide = _clean(logits, rule)
    values = _values(wide, rule)
    if weights_grad is None:
        grad = torch.zeros_like(wide)
    else:
        grad = _weights_backward(wide, values, slots, weights_grad, rule)
    if sums_grad is not None:
        shares = _probabilities(wide, values, rule)
        part = (sums_grad - (shares * sums_grad).sum(dim=-1, keepdim=True)).mul_(shares)
        grad += part if counted is None else part.masked_fill_(~counted[:, None], 0)
    if rule.scores == "sigmoid":
        grad *= torch.sigmoid(-wide)
    return grad.to(logits.dtype)


def _weights_backward(
    logits: Tensor, values: Tensor, slots: Tensor, arriving: Tensor, rule: _Rule
) -> Tensor:
    """Return dL/da as in `_backward` of the weights' gradient [T, K] alone, [T, A]."""
    columns = logits.shape[1]
    shares = _slot_shares(logits, values, slots, rule)
    parts = shares * arriving
    if rule.scaling != 1:
        parts = parts * rule.scaling
    if rule.partial:
        parts = parts.masked_fill(~_is_real(slots, columns - rule.null), 0)
    total = parts.sum(dim=-1, keepdim=True)
    if rule.normalise in ("selected", "real"):
        parts = parts - total * shares
    grad = _spread(parts, slots, columns, rule)
    if rule.normalise == "none" and rule.scores == "softmax":
        return torch.addcmul(grad, total, values, value=-1)
    if rule.normalise == "all_real":
        real_shares = _shares(_logarithms(logits, rule)[:, : columns - rule.null])
        grad[:, : columns - rule.null] -= total * real_shares
    return grad


def _spread(parts: Tensor, slots: Tensor, columns: int, rule: _Rule) -> Tensor:
    """Return [T, A] with each slot's part [T, K] at its expert, 0 elsewhere."""
    if rule.tau is None:
        return parts.new_zeros(parts.shape[0], columns).scatter(1, slots, parts)
    # what tau leaves out goes to a column of its own, so that no index is written twice
    wider = parts.new_zeros(parts.shape[0], columns + 1)
    return wider.scatter(1, torch.where(slots < 0, columns, slots), parts)[:, :columns]


def _clean(logits: Tensor, rule: _Rule) -> Tensor:
    """Return logits as they are computed with, [T, A]; all NaN for a token that is unusable."""
    wide = (logits if logits.dtype == torch.float64 else logits.float()).contiguous()
    highest = wide.amax(dim=-1, keepdim=True)
    usable = highest.isfinite() if rule.scores == "softmax" else highest > -torch.inf
    return wide.masked_fill(~usable, torch.nan)


def _without_null(slots: Tensor, experts: int) -> Tensor:
    return torch.where(_is_real(slots, experts), slots, -1)


def _is_real(slots: Tensor, experts: int) -> Tensor:
    return (slots >= 0) & (slots < experts)


def _indices(slots: Tensor, rule: _Rule) -> Tensor:
    """Return slots as indices: what tau leaves out is 0, and must not be used."""
    return slots if rule.tau is None else slots.clamp_min(0)


def _values(logits: Tensor, rule: _Rule) -> Tensor:
    """Return the scores, [T, A]."""
    return _softmax(logits) if rule.scores == "softmax" else torch.sigmoid(logits)


def _logarithms(logits: Tensor, rule: _Rule) -> Tensor:
    """Return logarithms of the scores up to a constant of the token, [T, A]."""
    return logits if rule.scores == "softmax" else torch.nn.functional.logsigmoid(logits)


def _probabilities(logits: Tensor, values: Tensor, rule: _Rule) -> Tensor:
    """Return the scores as shares of the token's sum, [T, A]."""
    return values if rule.scores == "softmax" else _softmax(_logarithms(logits, rule))


def _slots(logits: Tensor, values: Tensor, bias: Tensor | None, rule: _Rule) -> Tensor:
    """Return the selected experts as `_forward` says, best first, [T, K] int64."""
    # scores keep the order of the logits, but some that differ are rounded to the same score
    keys = logits if bias is None else values + bias.to(values.dtype)
    slots = _top(keys, rule.top_k)
    if rule.tau is not None:
        weak = _are_weak(logits, slots, rule.tau, rule)
        weak[:, 0] = False
        slots = slots.masked_fill(weak, -1)
    if rule.force_real and rule.null:
        experts = logits.shape[1] - rule.null
        served = _is_real(slots, experts).any(dim=-1, keepdim=True)
        last = torch.where(served, slots[:, -1:], _top(keys[:, :experts], 1))
        slots = torch.cat([slots[:, :-1], last], dim=-1)
    return slots


def _are_weak(logits: Tensor, slots: Tensor, tau: float, rule: _Rule) -> Tensor:
    """Return which scores are below tau x the token's highest, [T, K] bool; NaN is not."""
    logarithms = _logarithms(logits, rule)
    # by the ratio, which is exactly 1 for equal logits and does not underflow for low ones
    return (logarithms.gather(1, slots) - logarithms.amax(dim=-1, keepdim=True)).exp() < tau


def _top(keys: Tensor, k: int) -> Tensor:
    """Return the indices of the k highest of each row, of equal ones the lower, [T, k] int64.

    `torch.topk` promises no order of equal ones, so float32 keys become integers that all differ:
    the float's bits, in their order, above the reversed index. 3 to 7 times as fast as a stable
    sort of 64 to 512 keys (one core of a two-core x86 machine); few are sorted in one call.
    """
    if keys.dtype == torch.float64 or keys.shape[1] <= 16:
        return keys.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # -0.0 + 0.0 is 0.0, which has other bits
    bits = (keys + 0.0).view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
    reverse = torch.arange(keys.shape[1] - 1, -1, -1, device=keys.device)
    return ordered.bitwise_left_shift_(32).bitwise_or_(reverse).topk(k, dim=-1).indices


def _slot_shares(logits: Tensor, values: Tensor, slots: Tensor, rule: _Rule) -> Tensor:
    """Return what each slot's weight is before scaling, [T, K].

    A null expert under "selected" has its share too; of other slots that are not real, those
    outside the pool of "selected" and "real" have 0, and the rest is not to be used.
    """
    if rule.normalise == "none":
        return values.gather(1, _indices(slots, rule))
    experts = logits.shape[1] - rule.null
    if rule.normalise == "all_real":
        real_shares = _shares(_logarithms(logits, rule)[:, :experts])
        return real_shares.gather(1, slots.clamp(0, experts - 1))
    chosen = _logarithms(logits.gather(1, _indices(slots, rule)), rule)
    if rule.partial:
        limit = experts if rule.normalise == "real" else logits.shape[1]
        chosen = chosen.masked_fill(~_is_real(slots, limit), -torch.inf)
    return _shares(chosen)


def _shares(logarithms: Tensor) -> Tensor:
    """Return the softmax of each row, 0 in a row of nothing but -inf.

    Shares of logarithms do not underflow where the pool is far below the token's highest score.
    """
    empty = logarithms.amax(dim=-1, keepdim=True) == -torch.inf
    return _softmax(logarithms).masked_fill(empty, 0)


def _softmax(logarithms: Tensor) -> Tensor:
    """Return `torch.softmax` of each row.

    On the CPU that of 8 columns takes as long as that of 200, so few columns go another way:
    16384 x 8 in 0.4 ms instead of 2.5 ms (one core of a two-core x86 machine).
    """
    if logarithms.device.type != "cpu" or logarithms.shape[-1] >= 16:
        return logarithms.softmax(dim=-1)
    powers = (logarithms - logarithms.amax(dim=-1, keepdim=True)).exp_()
    return powers.div_(powers.sum(dim=-1, keepdim=True))
