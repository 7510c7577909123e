"""Budgets of blocks that decide token by token how much they run, and the control of their biases.

A block runs the j-th choice of a token where its margin m_j is at least the block's bias b, and m_j
does not grow with j. The share a block spends, the mean number of choices that run over `unit` (the
number of the model without any choice), is therefore a falling step function of b, and quantiles of
the margins say which b gives which share.

What is published: a bias joins the choice and a proportional controller holds its budget without a
gradient (LongCat-Flash, 2509.01322, section 2.1, one bias for each expert; DeepSeek's balance
without a loss, Wang et al. 2024, 2408.15664, moves by sign). Ours: one bias for the whole group of
null experts, errors measured in shares and turned into logits by the local slope of the quantiles,
so that a rate means the same in every model, and moves of the target fed forward.

Shapes: N tokens, J choices of a token, L blocks. torch is imported only where numbers are computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from adaconvert.errors import OptionError
from adaconvert.io.names import escape

if TYPE_CHECKING:
    from torch import Tensor

#: distance on both sides of a share between which the slope of the bias is taken.
WIDTH: Final = 0.1
_LAYERS: Final = re.compile(r"\s*(\d+)(?:\s*(-)\s*(\d+)?)?\s*=\s*(\S+)\s*")


class Quantiles:
    """Which share of their budget the tokens of a block spend at which bias.

    Args:
        margins: [N, J], of every token; choices with +inf always run.
        unit: choices of a token that cost a share of 1.
        min_real: the best choices of a token that run whatever the bias is.

    Raises:
        ValueError: there is no token, or a margin is NaN.
    """

    def __init__(self, margins: Tensor, unit: int, *, min_real: int = 0) -> None:
        import torch

        if not len(margins) or bool(torch.isnan(margins).any()):
            raise ValueError("budgets need tokens, and margins that are numbers")
        free = margins.detach()[:, min_real:].reshape(-1)
        bound = torch.isposinf(free)
        self._values = free[~bound].sort(descending=True).values
        self._always = len(margins) * min(min_real, margins.shape[1]) + int(bound.sum())
        self._scale = len(margins) * unit

    @property
    def reach(self) -> tuple[float, float]:
        """Return the least and the largest share these tokens can spend."""
        return self._always / self._scale, (self._always + len(self._values)) / self._scale

    def share(self, bias: float) -> float:
        """Return the share that is spent at a bias."""
        return (self._always + int((self._values >= bias).sum())) / self._scale

    def bias(self, share: float) -> float:
        """Return the bias, a float32 number, at which the share spent is nearest to `share`.

        It lies in the middle between the last margin that runs and the first that does not, or
        beyond all of them by their mean distance. Margins that are equal run together or not.
        """
        import numpy

        values = self._values
        count = min(max(round(share * self._scale) - self._always, 0), len(values))
        if not len(values):
            return 0.0
        top, bottom = float(values[0]), float(values[-1])
        beyond = (top - bottom) / max(len(values) - 1, 1) or 1.0
        last = float(values[count - 1]) if count else top + 2 * beyond
        first = float(values[count]) if count < len(values) else bottom - 2 * beyond
        middle = float(numpy.float32((last + first) / 2))
        if first < middle <= last:
            return middle
        running, above = int((values >= last).sum()), int((values > last).sum())
        at = numpy.float32(last)
        nearer = running - count <= count - above
        return float(at if nearer else numpy.nextafter(at, numpy.float32(math.inf)))


def bias_for(margins: Tensor, share: float, unit: int, *, min_real: int = 0) -> float:
    """Return the bias at which the tokens of a block spend `share`; see `Quantiles`.

    Args:
        margins: [N, J].
        share: mean number of choices that run over `unit`.
        unit: experts a token runs in the model without null ones.
        min_real: choices that run whatever the bias is.

    Raises:
        ValueError: there is no token, or a margin is NaN.
    """
    return Quantiles(margins, unit, min_real=min_real).bias(share)


def slope_at(
    margins: Tensor, share: float, unit: int, *, min_real: int = 0, width: float = WIDTH
) -> Tensor:
    """Return by how much the bias falls per unit of share around `share`, [], 0 or more.

    It is the chord of the quantiles between `width` below and above, within what these tokens
    reach. Nothing waits for an accelerator.

    Args:
        margins, share, unit, min_real: as for `bias_for`.
        width: on both sides.
    """
    import torch

    free = margins.detach()[:, min_real:].reshape(-1)
    scale, forced = len(margins) * unit, len(margins) * min(min_real, margins.shape[1])
    if not len(free):
        return free.new_zeros(())
    asked = (share - width, share + width)
    first, last = (min(max(round(s * scale) - forced, 1), len(free)) for s in asked)
    values = free.sort(descending=True).values
    # what runs whatever the bias is has no margin to speak of
    most = torch.where(torch.isposinf(values), -math.inf, values).amax()
    fall = values[first - 1].minimum(most) - values[last - 1].minimum(most)
    return fall.nan_to_num(0.0).clamp_min(0.0) * (scale / max(last - first, 1))


@dataclass(kw_only=True)
class BudgetController:
    """Moves the bias of every block towards its share.

    A step is rate x slope x clip(share - target): a rate of 1 is Newton's step, were the margins
    those of the last tokens alone; less averages over about 1 / rate steps. Source: LongCat-Flash,
    2509.01322, for one group; slope, clip, decay and the fed-forward moves of `aim` are ours.

    A proportional controller stays behind a drift, which training is, and follows the last tokens:
    `note` and `settled` give the mean of what single steps would have set, to end with.

    Attributes:
        targets: share of each block; NaN for one that is left alone.
        rate: 0 moves nothing.
        clip: errors count as at most this.
        decay: the rate of update u is rate / (1 + decay x u).
        updates: how many there have been.
    """

    targets: Sequence[float]
    rate: float = 0.2
    clip: float = 0.1
    decay: float = 0.0
    updates: int = 0
    _moved: list[float] = field(default_factory=list, repr=False)
    _noted: list[list[float]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.targets = [float(target) for target in self.targets]
        self._moved = [0.0] * len(self.targets)
        self._noted = [[0.0, 0.0] for _ in self.targets]

    def aim(self, targets: Sequence[float]) -> None:
        """Set other targets; the next update adds what the move alone asks for."""
        pairs = zip(targets, self.targets, strict=True)
        moves = [float(new) - old for new, old in pairs]
        added = zip(self._moved, moves, strict=True)
        self._moved = [old + (move if math.isfinite(move) else 0.0) for old, move in added]
        self.targets = [float(target) for target in targets]

    def update(self, shares: Sequence[float], slopes: Sequence[float]) -> list[float]:
        """Return what is added to the bias of each block.

        Args:
            shares: [L] spent since the last update, before the targets of `aim`; NaN where no token
                was seen.
            slopes: [L] of the same tokens, `slope_at`; 0 counts as 1.
        """
        rate = self.rate / (1.0 + self.decay * self.updates)
        rows = zip(shares, slopes, self.targets, self._moved, strict=True)
        found = [self._step(rate, *row) for row in rows]
        self.updates += 1
        self._moved = [0.0] * len(self.targets)
        return found

    def _step(self, rate: float, share: float, slope: float, target: float, moved: float) -> float:
        if not rate or math.isnan(share) or math.isnan(target):
            return 0.0
        # the error against what was aimed at when these tokens ran
        error = share - (target - moved)
        return (slope or 1.0) * (rate * min(max(error, -self.clip), self.clip) - moved)

    def note(
        self, biases: Sequence[float], shares: Sequence[float], slopes: Sequence[float]
    ) -> None:
        """Take note of the bias at which each block would have spent its target in one step.

        Args:
            biases: [L] of the step.
            shares, slopes: as for `update`.
        """
        rows = zip(self._noted, biases, shares, slopes, self.targets, strict=True)
        for noted, bias, share, slope, target in rows:
            wanted = bias + slope * min(max(share - target, -self.clip), self.clip)
            if math.isfinite(wanted):
                noted[0] += wanted
                noted[1] += 1

    def settled(self) -> list[float]:
        """Return the mean of what was noted of each block, NaN where nothing was."""
        return [total / count if count else math.nan for total, count in self._noted]

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON data."""
        kept = {"targets": list(self.targets), "updates": self.updates, "moved": list(self._moved)}
        return {**kept, "noted": [list(pair) for pair in self._noted]}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.targets = [float(target) for target in kept["targets"]]
        self.updates = int(kept["updates"])
        self._moved = [float(move) for move in kept["moved"]]
        self._noted = [[float(number) for number in pair] for pair in kept["noted"]]


def reach_of(
    top_k: int, slots: int, nulls: int, experts: int, *, min_real: int = 0
) -> tuple[float, float]:
    """Return the least and the largest share a block with null experts can spend.

    Args:
        top_k: experts of a token without null ones, the unit of shares.
        slots: choices of a token, real and null.
        nulls, experts: numbers of null and of real experts.
        min_real: real experts a token runs in any case.
    """
    return max(min_real, slots - nulls, 0) / top_k, min(slots, experts) / top_k


def check_share(where: str, share: float, reach: tuple[float, float]) -> None:
    """Return only when a block can spend a share.

    Raises:
        OptionError: it cannot; says what can be reached.
    """
    low, high = reach
    if not low <= share <= high:
        raise OptionError(
            "cannot be reached with these slots and null experts",
            where=where,
            expected=f"{low:.4g} to {high:.4g}",
            found=f"{share:g}",
        )


def parse_layers(
    text: str, layers: Sequence[int], *, where: str = "--layer-budget"
) -> dict[int, float]:
    """Return layer -> share of what `0-4=0.9,5-=0.6` or `7=0.5` says.

    Args:
        text: ranges, both ends included; without a last layer to the end.
        layers: those that have a budget; a range may hold others too, but not only such.
        where: flag.

    Raises:
        OptionError: it says nothing, a layer twice, or names none of the layers.
    """
    found: dict[int, float] = {}
    for item in text.split(","):
        match = _LAYERS.fullmatch(item)
        share = _share(match[4]) if match else None
        if match is None or share is None:
            raise OptionError(
                "is no budget of layers",
                where=where,
                expected="ranges such as 0-4=0.9,5-=0.6",
                found=escape(item.strip() or "nothing"),
            )
        first = int(match[1])
        last = max(layers, default=-1) if match[2] else first
        last = int(match[3]) if match[3] else last
        named = [layer for layer in layers if first <= layer <= last]
        if not named:
            raise OptionError(
                "names no layer with null experts",
                where=where,
                expected=f"layers among {', '.join(map(str, layers)) or 'none'}",
                found=escape(item.strip()),
            )
        twice = next((layer for layer in named if layer in found), None)
        if twice is not None:
            raise OptionError(f"names layer {twice} twice", where=where, found=escape(text))
        found |= dict.fromkeys(named, share)
    return found


def _share(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
