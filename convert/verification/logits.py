"""Two sets of logits and two sets of hidden states, and how far they are apart.

Shapes: T tokens, V vocabulary, B sequences, S positions, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: tokens compared at a time: in float64 a large vocabulary takes a megabyte per token.
_ROWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitDifference:
    """How far the target's logits are from the dense model's.

    Attributes:
        max_abs_diff: largest difference of one logit; infinite when a logit is not finite.
        max_abs_logit: largest dense logit by magnitude.
        argmax_agreement: fraction of tokens for which both prefer the same next token.
        disputed: number of tokens for which they do not although the dense model's choice is clear,
            that is its best two logits are further apart than twice the tolerance.
        kl: mean over tokens of KL(dense || target) in nats.
        tokens: number of tokens that were compared.
        left_out: number of logits that are no numbers in either model, because weights of the
            source are none; they are not compared.
        silent: not one of the dense model's logits is a number, so there was nothing to compare.
    """

    max_abs_diff: float
    max_abs_logit: float
    argmax_agreement: float
    disputed: int
    kl: float
    tokens: int
    left_out: int = 0
    silent: bool = False

    @property
    def finite(self) -> bool:
        """Tell whether every logit that the dense model gives is a number, in both models."""
        return self.max_abs_diff != float("inf")

    @property
    def relative(self) -> float:
        """Return the largest difference as a fraction of the largest dense logit."""
        if self.max_abs_diff == 0:
            return 0.0
        return self.max_abs_diff / self.max_abs_logit if self.max_abs_logit else float("inf")


def compare_logits(
    dense: torch.Tensor, target: torch.Tensor, *, tolerance: float
) -> LogitDifference:
    """Return how far `target` is from `dense`, both [B, S, V].

    Logits that are no numbers in both models are left out; one that is none in only one of them
    makes the difference infinite.

    Args:
        dense: logits of the source.
        target: logits of the converted model.
        tolerance: relative difference below which an argmax may flip, as a fraction of max|dense|.
    """
    import torch

    left, right = dense.reshape(-1, dense.shape[-1]), target.reshape(-1, target.shape[-1])
    known = left.isfinite()
    left_out = known.numel() - int(known.sum())
    if left_out == known.numel() or not torch.equal(known, right.isfinite()):
        return _not_finite(len(left), silent=left_out == known.numel())
    if left_out:
        # equal in both models and nobody's choice
        low, some = -left[known].abs().max(), known.any(-1)
        left, right = (x.where(known, low)[some] for x in (left, right))
    scale = left.abs().max().item()
    diff = kl = 0.0
    agreed = disputed = 0
    for a, b in zip(torch.split(left, _ROWS), torch.split(right, _ROWS), strict=True):
        diff = max(diff, (a - b).abs().max().item())
        same = a.argmax(-1) == b.argmax(-1)
        best = a.topk(min(2, a.shape[-1]), dim=-1).values
        # of one class alone the choice is always the same
        clear = best[:, 0] - best[:, -1] > 2 * tolerance * scale
        agreed += int(same.sum())
        disputed += int((~same & clear).sum())
        kl += _kl(a, b)
    tokens = len(left)
    return LogitDifference(
        max_abs_diff=diff,
        max_abs_logit=scale,
        argmax_agreement=agreed / tokens,
        disputed=disputed,
        kl=max(kl / tokens, 0.0),
        tokens=tokens,
        left_out=left_out,
    )


def _kl(dense: torch.Tensor, target: torch.Tensor) -> float:
    p, q = dense.double().log_softmax(-1), target.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


def _not_finite(tokens: int, *, silent: bool) -> LogitDifference:
    inf = float("inf")
    return LogitDifference(
        max_abs_diff=inf,
        max_abs_logit=inf,
        argmax_agreement=0.0,
        disputed=tokens,
        kl=inf,
        tokens=tokens,
        silent=silent,
    )


def hidden_difference(dense: torch.Tensor, target: torch.Tensor) -> float:
    """Return the largest relative difference of one token's hidden state; both [B, S, H].

    Taken per token, because single tokens of real models have states thousands of times larger than
    the rest. A model whose norms remove the mean may carry states that lack it (an OLMo-1 put into
    a host with RMS norms does), so a constant added to all of a token's H values does not count.
    """
    plain = _relative(dense, target)
    centred = _relative(_centred(dense), _centred(target))
    return min(plain, centred)


def _relative(dense: torch.Tensor, target: torch.Tensor) -> float:
    scale = dense.norm(dim=-1).clamp_min(1e-30)
    worst = ((dense - target).norm(dim=-1) / scale).max().item()
    return worst if worst == worst else float("inf")


def _centred(hidden: torch.Tensor) -> torch.Tensor:
    return hidden - hidden.mean(dim=-1, keepdim=True)
