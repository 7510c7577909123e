"""Routers of blocks that tokens may skip, fitted in closed form before the first step.

A router that starts at zero tells no token from another, and a short fine-tune is over before it
has learned to. How far a token's hidden state is from what it would be is known, though, where both
are computed: in logarithms, ridge regression on what the router sees predicts it well. A token runs
the blocks it needs most, and what it needs has the same unit in every block, so one cut through all
of them also says how much of each block is to run. Nothing of this is published; A-MoD (2412.20875)
starts from other measures of what a block does. It is for blocks where everyone goes on seeing the
keys of who skips: a token that changes little may be one that all others look at.

Shapes: N tokens, d hidden size, w what a router's last layer sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from adaconvert.modeling.adaptive_depth_parts import OPEN, DepthRouter, unit_scale
from adaconvert.train.depth_budget import threshold_for

#: strengths of the ridge that are tried, as parts of the mean square of a feature.
RIDGES: Final = (1e-3, 1e-2, 1e-1, 1.0)
#: every so many tokens one decides between them.
HELD: Final = 8
#: share of the variance of tokens held out that a fit has to explain; our choice.
_GAIN: Final = 0.02
#: points a block's distribution is kept at.
_POINTS: Final = 512
#: squares below this are none.
_TINY: Final = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """What a fit knows of the tokens of one block.

    Attributes:
        need: [points] quantiles of the logarithm of what skipping changes, squared, as a part of
            the hidden state's square, as the router predicts it.
        logits: [points] of the router, which are the same in another unit.
        right: correlation of prediction and truth, on tokens held out.
    """

    need: Tensor
    logits: Tensor
    right: float

    def state(self) -> list[Any]:
        """Return what `restored` needs."""
        return [self.need.tolist(), self.logits.tolist(), self.right]

    @classmethod
    def restored(cls, kept: list[Any]) -> Ranked:
        """Return what `state` was made of."""
        need, logits = (torch.tensor(values, dtype=torch.float64) for values in kept[:2])
        return cls(need=need, logits=logits, right=kept[2])


class Ranks:
    """What a fit knows of all blocks of a run, and what it last said about their shares.

    Args:
        ranked: by path; empty where nothing was fitted.
    """

    def __init__(self, ranked: Mapping[str, Ranked]) -> None:
        self.ranked = dict(ranked)
        self._said: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self.ranked)

    def shares(self, target: float) -> dict[str, float]:
        """Return what of each block is to run, so that those run that need it most.

        Args:
            target: mean of the shares, 0 to 1, met within a point of the distributions.
        """
        cut = threshold_for(torch.cat([one.need for one in self.ranked.values()]), target)
        return {path: float((one.need > cut).double().mean()) for path, one in self.ranked.items()}

    def followed(self, known: Mapping[str, float], target: float) -> dict[str, float]:
        """Return shares moved by as much as what the fit says of them has since it was last asked.

        Args:
            known: shares by path, which may have moved otherwise besides.
            target: as for `shares`.
        """
        before, self._said = self._said, self.shares(target)
        if not before:
            return dict(self._said)
        moved = {path: share + self._said[path] - before[path] for path, share in known.items()}
        return {path: min(max(share, 0.0), 1.0) for path, share in moved.items()}

    def thresholds(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Return what the routers' logits are above for these shares of the text of the fit.

        Args:
            shares: by path.
        """
        return {p: threshold_for(one.logits, shares.get(p, 1.0)) for p, one in self.ranked.items()}

    def state(self) -> dict[str, Any]:
        """Return what `restored` needs, as JSON data."""
        return {
            "said": self._said,
            "ranked": {path: one.state() for path, one in self.ranked.items()},
        }

    @classmethod
    def restored(cls, kept: Mapping[str, Any]) -> Ranks:
        """Return what `state` was made of."""
        found = cls({path: Ranked.restored(one) for path, one in kept["ranked"].items()})
        found._said = dict(kept["said"])
        return found


@torch.no_grad()
def fit_router(router: DepthRouter, x: Tensor, ran: Tensor, skipped: Tensor) -> Ranked | None:
    """Set a router so that its logits rise with what skipping changes. One that cannot tell tokens
    held out apart stays as it is, and every token needs the block alike; None where there are too
    few tokens to say.

    Args:
        router: linear, or with an inner layer, which stays as it is.
        x: [N, d] in front of the block.
        ran: [N, d] behind it, of tokens that run it.
        skipped: the same of tokens that skip it.
    """
    scaled = unit_scale(x)
    features = wide(scaled if router.inner is None else router.inner(scaled))
    x, ran, skipped = (wide(values) for values in (x, ran, skipped))
    if len(x) < 2 * HELD or not bool((ran != skipped).any()):
        return None
    need = ((ran - skipped).square().sum(-1) / x.square().sum(-1).clamp_min(_TINY)).clamp_min(_TINY)
    found = _regressed(features, need.log())
    if found is None:
        alike = need.log().mean().cpu().repeat(_POINTS)
        return Ranked(need=alike, logits=wide(router.bias).cpu().repeat(_POINTS), right=0.0)
    slope, shift, right = found
    predicted = features @ slope + shift
    mean, spread = predicted.mean(), predicted.std()
    router.weight.copy_((slope / spread)[None])
    router.bias.copy_(OPEN + (shift - mean) / spread)
    points = torch.linspace(0, 1, _POINTS, dtype=torch.float64, device=mean.device)
    at = predicted.quantile(points)
    return Ranked(need=at.cpu(), logits=(OPEN + (at - mean) / spread).cpu(), right=right)


def wide(values: Tensor) -> Tensor:
    """Return values in float64, on the CPU where their device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _regressed(features: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Return slope [w], shift [] and correlation of the best ridge regression, None where none
    explains enough of tokens held out.

    Args:
        features: [N, w].
        wanted: [N].
    """
    held = torch.arange(len(wanted), device=wanted.device) % HELD == HELD - 1
    seen = ~held
    middle, mean = features[seen].mean(0), wanted[seen].mean()
    inside = features[seen] - middle
    gram, turned = inside.T @ inside, inside.T @ (wanted[seen] - mean)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    best, least = None, (1 - _GAIN) * float((wanted[held] - mean).square().sum())
    for strength in RIDGES:
        ridge = strength * gram.diagonal().mean() + _TINY
        slope = torch.linalg.solve(gram + ridge * eye, turned)
        predicted = features[held] @ slope + (mean - middle @ slope)
        missed = float((wanted[held] - predicted).square().sum())
        if missed < least:
            both = torch.stack([predicted, wanted[held]])
            best, least = (slope, mean - middle @ slope, float(torch.corrcoef(both)[0, 1])), missed
    return best
