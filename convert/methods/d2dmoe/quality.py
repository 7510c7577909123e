"""How well router scores match true contributions.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterQuality:
    """Scores against contributions on held-out tokens.

    Attributes:
        r2: share of the variance of the contributions, each token's divided by its root mean
            square (a tenth of the median token's at least), that the scores explain beyond each
            expert's mean; 1 is perfect, 0 is a constant score per expert, below 0 is worse.
        spearman: rank correlation over the experts of a token, mean over tokens.
        captured: share of the choosable contribution that the scores' choice holds, by share of
            experts chosen: sum of the chosen experts' contributions over that of as many chosen by
            the contributions themselves.
        constant: the same when every token chooses the experts that contribute most on average.
        tokens: number of tokens.
    """

    r2: float
    spearman: float
    captured: dict[str, float]
    constant: dict[str, float]
    tokens: int

    def to_json(self) -> dict[str, object]:
        """Return the numbers as JSON data."""
        return {
            "r2": self.r2,
            "spearman": self.spearman,
            "captured": dict(self.captured),
            "constant": dict(self.constant),
            "tokens": self.tokens,
        }

    def line(self) -> str:
        """Return the numbers as text."""
        shares = ", ".join(
            f"{self.captured[key]:.1%} of the oracle's at {key} (fixed choice "
            f"{self.constant[key]:.1%})"
            for key in sorted(self.captured, reverse=True)
        )
        return f"R2 {self.r2:.3f}, rank correlation {self.spearman:.3f}, captures {shares}"


def measure(scores: torch.Tensor, true: torch.Tensor) -> RouterQuality:
    """Return the quality of scores [T, E] for contributions [T, E], both >= 0."""
    scale = true.square().mean(dim=1, keepdim=True).sqrt()
    scale = scale.clamp_min(max(0.1 * float(scale.median()), 1e-30))
    target, guess = (true / scale).double(), (scores / scale).double()
    mean = target.mean(dim=0, keepdim=True)
    variance = float((target - mean).square().sum())
    rest = float((target - guess).square().sum())
    experts = true.shape[1]
    counts = {"E/4": max(experts // 4, 1), "E/2": max(experts // 2, 1)}
    fixed = mean.expand_as(target)
    return RouterQuality(
        r2=1 - rest / variance if variance > 0 else float(rest == 0),
        spearman=_spearman(scores, true),
        captured={name: _captured(scores, target, k) for name, k in counts.items()},
        constant={name: _captured(fixed, target, k) for name, k in counts.items()},
        tokens=len(true),
    )


def _captured(scores: torch.Tensor, target: torch.Tensor, k: int) -> float:
    """Return the contribution of the k best experts by score over that of the k best there are."""
    chosen = target.gather(1, scores.topk(k, dim=1).indices).sum()
    best = target.topk(k, dim=1).values.sum()
    return float(chosen / best) if float(best) > 0 else 1.0


def _spearman(scores: torch.Tensor, true: torch.Tensor) -> float:
    """Return the mean over tokens of the rank correlation over experts; 0 for one expert."""
    import torch

    experts = true.shape[1]
    if experts < 2:
        return 0.0
    ranks = torch.arange(experts, dtype=torch.float64, device=true.device)
    centred = ranks - ranks.mean()
    first = centred[scores.argsort(dim=1).argsort(dim=1)]
    second = centred[true.argsort(dim=1).argsort(dim=1)]
    return float((first * second).sum(dim=1).mean() / centred.square().sum())
