"""Which experts each token runs and with what weight, and what a balance loss needs of it.

Selection, weights and sums are one autograd function, which keeps the logits and the selected
indices alone. Everything is computed in float32, or float64 for float64 logits. No host
synchronisation, no atomics: a second call is bit-identical.

Shapes: T tokens, E experts, N null experts (which cost nothing), A = E + N, K slots of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaconvert.kernels import routing_ops
from adaconvert.kernels.routing_steps import Normalise, Rule, Scores

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
    rule = Rule(
        top_k=top_k,
        null=null,
        tau=tau,
        scores=scores,
        normalise=normalise,
        scaling=scaling,
        force_real=force_real,
    )
    _check(logits, rule, bias, counted)
    if torch.compiler.is_compiling():
        outputs = routing_ops.router_select(logits, bias, counted, rule)
    else:
        outputs = _RouterSelect.apply(logits, bias, counted, rule)  # type: ignore[no-untyped-call]
    weights, experts, sums, counts = outputs
    return Routing(weights=weights, experts=experts, probability_sums=sums, counts=counts)


def _check(logits: Tensor, rule: Rule, bias: Tensor | None, counted: Tensor | None) -> None:
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
        ctx: Any, logits: Tensor, bias: Tensor | None, counted: Tensor | None, rule: Rule
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = routing_ops.forward(logits, bias, counted, rule)
        weights, experts, slots, sums, counts = found
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, slots, counted)
        ctx.mark_non_differentiable(experts, counts)
        return weights, experts, sums, counts

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, weights_grad: Tensor | None, _: None, sums_grad: Tensor | None, __: None
    ) -> tuple[Tensor | None, None, None, None]:
        logits, slots, counted = ctx.saved_tensors
        grad = routing_ops.backward(logits, slots, counted, weights_grad, sums_grad, ctx.rule)
        return grad, None, None, None
