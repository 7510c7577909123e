"""Forward and backward of `router_select` in plain torch, as functions of tensors.

Everything is computed in float32, or float64 for float64 logits; no host synchronisation, no
atomics.

Shapes: T tokens, E experts, N null experts (which cost nothing), A = E + N, K slots of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scores = Literal["softmax", "sigmoid"]
Normalise = Literal["none", "selected", "real", "all_real"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
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


def forward(
    logits: Tensor, bias: Tensor | None, counted: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return weights [T, K], experts [T, K], slots [T, K], probability sums [A] and counts [A].

    Experts are int64, as `routing.Routing` has them. Slots are int32, the selected experts: null
    ones with their own index, -1 where tau leaves one out; `backward` needs them.
    """
    logits = _clean(logits, rule)
    values = _values(logits, rule)
    slots = _slots(logits, values, bias, rule)
    real = _is_real(slots, logits.shape[1] - rule.null)
    weights = _slot_shares(logits, values, slots, rule)
    if rule.partial:
        weights = weights.masked_fill(~real, 0)
    if rule.scaling != 1:
        weights = weights * rule.scaling
    shares = _probabilities(logits, values, rule)
    if counted is not None:
        shares = shares.masked_fill(~counted[:, None], 0)
    counts = _counts(slots, counted, logits.shape[1], rule)
    return weights, torch.where(real, slots, -1), slots.int(), shares.sum(dim=0), counts


def _counts(slots: Tensor, counted: Tensor | None, columns: int, rule: Rule) -> Tensor:
    """Return how many counted tokens have each expert in a slot, [A] int64."""
    uses = slots >= 0
    if counted is not None:
        uses = uses & counted[:, None]
    # integers add up to the same in every order
    return slots.new_zeros(columns).scatter_add(
        0, _indices(slots, rule).flatten(), uses.long().flatten()
    )


def backward(
    logits: Tensor,
    slots: Tensor,
    counted: Tensor | None,
    weights_grad: Tensor | None,
    sums_grad: Tensor | None,
    rule: Rule,
) -> Tensor:
    """Return the gradient of the logits, [T, A] in their dtype.

    Every weight is a share of a pool: w_k = v_k / sum over the pool of v_j, with v = exp(a). Hence
    dL/da_j = w_j g_j (where j is a real slot) - (v_j / sum v) sum_k w_k g_k (where j is in the
    pool). Under softmax a is the logit, under sigmoid its log-sigmoid of slope sigmoid(-logit).

    Args:
        logits: [T, A] as given.
        slots: [T, K] int32 as `forward` returns them.
        counted: [T] or None.
        weights_grad: [T, K] or None for zero.
        sums_grad: [A] or None for zero.
        rule: as given.
    """
    wide = _clean(logits, rule)
    slots = slots.long()
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
    logits: Tensor, values: Tensor, slots: Tensor, arriving: Tensor, rule: Rule
) -> Tensor:
    """Return dL/da as in `backward` of the weights' gradient [T, K] alone, [T, A]."""
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


def _spread(parts: Tensor, slots: Tensor, columns: int, rule: Rule) -> Tensor:
    """Return [T, A] with each slot's part [T, K] at its expert, 0 elsewhere."""
    if rule.tau is None:
        return parts.new_zeros(parts.shape[0], columns).scatter(1, slots, parts)
    # what tau leaves out goes to a column of its own, so that no index is written twice
    wider = parts.new_zeros(parts.shape[0], columns + 1)
    return wider.scatter(1, torch.where(slots < 0, columns, slots), parts)[:, :columns]


def _clean(logits: Tensor, rule: Rule) -> Tensor:
    """Return logits as they are computed with, [T, A]; all NaN for a token that is unusable."""
    wide = (logits if logits.dtype == torch.float64 else logits.float()).contiguous()
    highest = wide.amax(dim=-1, keepdim=True)
    usable = highest.isfinite() if rule.scores == "softmax" else highest > -torch.inf
    if wide.device.type == "cpu" and bool(usable.all()):
        return wide
    return wide.masked_fill(~usable, torch.nan)


def _is_real(slots: Tensor, experts: int) -> Tensor:
    return (slots >= 0) & (slots < experts)


def _indices(slots: Tensor, rule: Rule) -> Tensor:
    """Return slots as indices: what tau leaves out is 0, and must not be used."""
    return slots if rule.tau is None else slots.clamp_min(0)


def _values(logits: Tensor, rule: Rule) -> Tensor:
    """Return the scores, [T, A]."""
    return _softmax(logits) if rule.scores == "softmax" else torch.sigmoid(logits)


def _logarithms(logits: Tensor, rule: Rule) -> Tensor:
    """Return logarithms of the scores up to a constant of the token, [T, A]."""
    return logits if rule.scores == "softmax" else torch.nn.functional.logsigmoid(logits)


def _probabilities(logits: Tensor, values: Tensor, rule: Rule) -> Tensor:
    """Return the scores as shares of the token's sum, [T, A]."""
    return values if rule.scores == "softmax" else _softmax(_logarithms(logits, rule))


def _slots(logits: Tensor, values: Tensor, bias: Tensor | None, rule: Rule) -> Tensor:
    """Return the selected experts as `forward` says, best first, [T, K] int64."""
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


def _are_weak(logits: Tensor, slots: Tensor, tau: float, rule: Rule) -> Tensor:
    """Return which scores are below tau x the token's highest, [T, K] bool; NaN is not."""
    logarithms = _logarithms(logits, rule)
    # by the ratio, which is exactly 1 for equal logits and does not underflow for low ones
    return (logarithms.gather(1, slots) - logarithms.amax(dim=-1, keepdim=True)).exp() < tau


def _top(keys: Tensor, k: int) -> Tensor:
    """Return the indices of the k highest of each row, of equal ones the lower, [T, k] int64.

    `torch.topk` promises no order of equal ones, so float32 keys become integers that all differ:
    the float's bits, in their order, above the reversed index. On a CPU, where looking does not
    stall, that is done for the rows that need it only.
    """
    if keys.device.type != "cpu":
        return _top_of_ties(keys, k)
    values, indices = keys.topk(k, dim=-1)
    # NaN, which is not below anything, is a tie too
    clear = (values[:, 1:] < values[:, :-1]).all(dim=-1)
    clear &= (keys >= values[:, -1:]).sum(dim=-1) == k
    if not bool(clear.all()):
        rows = (~clear).nonzero()[:, 0]
        indices.index_copy_(0, rows, _top_of_ties(keys[rows], k))
    return indices


def _top_of_ties(keys: Tensor, k: int) -> Tensor:
    """Return what `_top` does, looking at no value from the host."""
    if keys.dtype == torch.float64 or keys.shape[1] <= 16:
        return keys.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # -0.0 + 0.0 is 0.0, which has other bits
    bits = (keys + 0.0).view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits).long()
    reverse = torch.arange(keys.shape[1] - 1, -1, -1, device=keys.device)
    return ordered.bitwise_left_shift_(32).bitwise_or_(reverse).topk(k, dim=-1).indices


def _slot_shares(logits: Tensor, values: Tensor, slots: Tensor, rule: Rule) -> Tensor:
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

    On the CPU that of 8 columns takes as long as that of 200, so few columns go another way.
    """
    if logarithms.device.type != "cpu" or logarithms.shape[-1] >= 16:
        return logarithms.softmax(dim=-1)
    powers = (logarithms - logarithms.amax(dim=-1, keepdim=True)).exp_()
    return powers.div_(powers.sum(dim=-1, keepdim=True))
