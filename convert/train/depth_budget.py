"""The budget of blocks that tokens may skip, held while a model is trained.

A share of all (token, block) pairs is to run. Blocks of kind "skip" divide it among themselves,
each by what running one more of its tokens is worth to the loss where that is in doubt, its
`Price`: the gradient of the share that runs, which the straight-through mask gives. Shares move
from blocks whose price is low to those where it is high. Within a block the best tokens run, so
what its logits have in common decides nothing, and the price is taken out of their gradient. Every
block has a threshold, where its share of training text is above it while thresholds
decide. Nothing of this is published; Router-Tuning (2410.13184) and FlexiDepth (2503.23798) add a
penalty to the loss instead, whose factor has to be found for every target.

Shapes: N (token, block) pairs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaconvert.errors import OptionError

#: logits beyond which nothing is; any finite number that float32 has.
BEYOND = 1e30
#: how far below the lowest logit a threshold lies where every token runs; our choice.
_MARGIN = 1.0
#: share of what was known that an estimate keeps at each step; our choice.
_MEMORY = 0.9
#: rounds after which shares are as even as they get, and how far their mean may be off.
_ROUNDS = 100
_EVEN = 1e-9
#: of the interval in which shares of equal cost are looked for.
_HALVINGS = 30
#: tokens of the passes that say what skipping saves.
_PROBE = 16


def threshold_for(logits: Tensor, share: float) -> float:
    """Return what a share of logits is strictly above, as close as ties allow; from above, so that
    of equal ones all run. Where all are to run it lies below them by a margin.

    Args:
        logits: [N].
        share: 0 to 1.
    """
    found = logits.detach().flatten().sort().values
    below = min(max(round((1 - share) * len(found)), 0), len(found))
    if below == 0:
        return float(found[0]) - _MARGIN
    edge = found[below - 1]
    if below < len(found) and found[below] == edge:
        return _under(edge)
    return float(edge)


def _under(value: Tensor) -> float:
    return float(torch.nextafter(value, value.new_tensor(-torch.inf)))


def share_for(
    model: Any, paths: Sequence[str], compute: float, *, bf16: bool = False
) -> tuple[float, float]:
    """Return the share of every block's tokens that may run within a budget, and how much more than
    linear the cost of a share is: p + bend p^2.

    The model says itself what it costs to run every one of the blocks and none of them. Between the
    two the cost is linear in the share; where tokens that run see one another alone, their
    attention falls with its square, so a third point is asked for.

    Args:
        model: adaptive.
        paths: of the blocks whose tokens are chosen.
        compute: FLOPs per token as a fraction of the reference's.
        bf16: multiply matrices in bfloat16.

    Raises:
        OptionError: no share is within it, or running everything costs less.
    """
    low, high = (
        _cost(model, "threshold", dict.fromkeys(paths, value), bf16) for value in (BEYOND, -BEYOND)
    )
    if not low < compute < high:
        raise OptionError(
            f"the {len(paths)} blocks that tokens may skip reach {low:.3f} to {high:.3f}",
            where="--depth-compute",
            expected=f"above {low:.3f} and below {high:.3f}",
            found=compute,
            hint="`adaconvert depth` with more --layers, or --kv skip, reaches less."
            if compute <= low
            else "Leave it out: running every block costs no more.",
        )
    bend = 0.0
    blocks = model.adaptive_depth()
    if all(blocks[path].adaptive_layer["kv"] == "skip" for path in paths):
        half = _cost(model, "capacity", dict.fromkeys(paths, 0.5), bf16)
        bend = 2 * (low + high - 2 * half)
    # low + slope p + bend p^2 = compute
    slope, over = high - low - bend, compute - low
    root = math.sqrt(max(slope * slope + 4 * bend * over, 0.0))
    share = min(max(2 * over / (slope + root), 0.0), 1.0)
    return share, max(bend, 0.0) / slope if slope > 0 else 0.0


def _cost(model: Any, rule: str, values: Mapping[str, float], bf16: bool) -> float:
    given: dict[str, Any] = {rule: dict(values)}
    was_training = model.training
    model.eval()
    ids = torch.zeros(1, _PROBE, dtype=torch.long, device=model.device)
    with (
        _restored(model, was_training),
        torch.no_grad(),
        torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16),
        model.set_depth(rule, **given),
        model.account() as account,
    ):
        model(input_ids=ids, use_cache=False)
    return float(account.compute())


@contextmanager
def _restored(model: Any, training: bool) -> Iterator[None]:
    """Put a model back into a mode, whatever happens inside the body."""
    try:
        yield
    finally:
        model.train(training)


@dataclass
class Price:
    """What running one more token of a block is worth to the loss, in nats.

    Attributes:
        value: mean over the steps so far, the last ones counting most.
    """

    value: float = 0.0
    _weight: float = 0.0
    _gains: list[Tensor] = field(default_factory=list)
    _slopes: list[Tensor] = field(default_factory=list)

    def watch(self, scores: Tensor, slopes: Tensor, share: Tensor) -> None:
        """Take note of the gradient of a micro-batch as it goes back through a block's logits.

        Args:
            scores: [B, S] logits, with a gradient.
            slopes: [T] how much the share of real tokens that run grows with each of their logits.
            share: of the step's tokens, [].
        """
        known, inside = self.value, (slopes.sum() * share).detach()

        def note(gradient: Tensor) -> None:
            # the penalty's own part is in the gradient too
            self._gains.append((known * inside - gradient.sum()).detach())
            self._slopes.append(inside)

        watched: Any = scores
        watched.register_hook(note)

    def step_done(self) -> None:
        """Take the step's micro-batches into account."""
        gains = sum(float(one) for one in self._gains)
        slopes = sum(float(one) for one in self._slopes)
        self._gains, self._slopes = [], []
        if slopes <= 0:
            return
        self._weight = _MEMORY * self._weight + 1 - _MEMORY
        part = (1 - _MEMORY) / self._weight
        self.value += part * (gains / slopes - self.value)

    def state(self) -> list[float]:
        """Return what `restore` needs."""
        return [self.value, self._weight]

    def restore(self, kept: Sequence[float]) -> None:
        """Go on from what `state` returned."""
        self.value, self._weight = kept


def tilted(
    shares: Mapping[str, float], prices: Mapping[str, float], most: float
) -> dict[str, float]:
    """Return shares after blocks whose price is above the median took from the others.

    Args:
        shares: of blocks, by path, 0 to 1.
        prices: of blocks.
        most: that a share moves: where a price is as far from the median as they are on average, or
            farther.
    """
    middle = statistics.median(prices.values())
    usual = sum(abs(price - middle) for price in prices.values()) / len(prices)
    if not usual:
        return dict(shares)
    moves = {path: min(max((prices[path] - middle) / usual, -1.0), 1.0) for path in shares}
    return {path: min(max(s + most * moves[path], 0.0), 1.0) for path, s in shares.items()}


def spread(shares: Mapping[str, float], target: float) -> dict[str, float]:
    """Return shares whose mean is the target, each moved by the same or to its bound of 0 or 1.

    Args:
        shares: of blocks, by path.
        target: 0 to 1.
    """
    found = dict(shares)
    for _ in range(_ROUNDS):
        left = target - sum(found.values()) / len(found)
        free = [path for path, share in found.items() if (share < 1 if left > 0 else share > 0)]
        if abs(left) < _EVEN or not free:
            break
        step = left * len(found) / len(free)
        found |= {path: min(max(found[path] + step, 0.0), 1.0) for path in free}
    return found


def within(shares: Mapping[str, float], target: float, bend: float) -> dict[str, float]:
    """Return shares moved as `spread` does, which together cost what the target costs where all
    have it: with a bend, uneven ones cost more.

    Args:
        shares: of blocks, by path.
        target: 0 to 1.
        bend: as `share_for` gives it.
    """
    found = spread(shares, target)
    if not bend:
        return found
    low, high = 0.0, target
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = spread(shares, middle)
        cost = sum(share + bend * share * share for share in found.values()) / len(found)
        low, high = (low, middle) if cost > target + bend * target * target else (middle, high)
    return found


def share_above(logits: Mapping[str, Tensor], thresholds: Mapping[str, float]) -> float:
    """Return the share of pairs above their blocks' thresholds.

    Args:
        logits: path -> [N].
        thresholds: by path.
    """
    above = sum(int((values > thresholds[path]).sum()) for path, values in logits.items())
    return above / max(sum(map(len, logits.values())), 1)
