"""Settings of a model with null experts, from the margins of its real experts.

A share is the mean number of real experts per token over k, the number a token of the source runs.
A real expert runs where its margin is at least the block's bias, and margins do not depend on the
bias, so that any share is reached by a quantile of the margins: of a block's own, each with a bias
of its own, or of all blocks' together, with one step away from the biases the model holds.

Shapes: T tokens, J the most real experts a token may run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from adaconvert.evaluate.risk import Floats
from adaconvert.evaluate.sweep import Select, Setting, of_counts

#: what a share is a share of.
WHOLE: Final = "the source's experts"
#: what a share may miss the smallest reachable one by and still be made.
_SLACK = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class NullSite:
    """A block with null experts.

    Attributes:
        source_k: experts a token of the source runs.
        forced: real experts that run whatever their margin is, 0 or 1.
        bias: the one the model holds.
    """

    source_k: int
    forced: int
    bias: float

    @staticmethod
    def of(module: Any) -> NullSite:
        """Return the facts of a block in memory."""
        spec = module.adaptive_spec
        return NullSite(
            source_k=int(spec["mixture"]["top_k"]),
            forced=int(spec["null"]["min_real"]),
            bias=float(module.null_experts.bias.item()),
        )


class NullGrid:
    """Makes settings of a model with null experts.

    Args:
        sites: by path.
        margins: site path -> [T, J], infinite where no null expert competes.
    """

    def __init__(self, sites: Mapping[str, NullSite], margins: Mapping[str, Floats]) -> None:
        self.sites = dict(sites)
        self._margins = {path: _Margins.of(margins[path], sites[path].forced) for path in sites}

    def uniform(self, rule: str, share: float) -> Setting | None:
        """Return the setting in which every block runs this share of its k real experts, None when
        one cannot, or when it would run them all."""
        name = f"{rule}, {share:.0%} of {WHOLE} in every block"
        return self.per_site(rule, dict.fromkeys(self.sites, share), name=name, share=share)

    def pooled(self, share: float) -> Setting | None:
        """Return the setting in which the blocks together run this share of their k real experts,
        all biases moved by the same step; None when they cannot."""
        moved = [self._margins[path].moved(-site.bias) for path, site in self.sites.items()]
        wanted = sum(
            share * site.source_k * len(self._margins[path]) for path, site in self.sites.items()
        )
        step = _Margins.joined(moved).step(wanted)
        if step is None:
            return None
        biases = {path: float(np.float32(site.bias + step)) for path, site in self.sites.items()}
        how = f"biases moved by {step:+.4g}"
        if len(set(biases.values())) == 1:
            how = f"bias {next(iter(biases.values())):.4g} in every block"
        name = f"null, {share:.0%} of {WHOLE}, {how}"
        return Setting(rule="null", name=name, share=share, select=_null(biases))

    def per_site(
        self, rule: str, shares: Mapping[str, float], *, name: str, share: float | None = None
    ) -> Setting | None:
        """Return the setting in which each block runs its own share of its k real experts, None
        when one cannot; at a share of 1 the source's choice holds, without null experts."""
        if rule == "top-k":
            counts = {p: _count(shares[p], site.source_k) for p, site in self.sites.items()}
            if all(counts[path] == site.source_k for path, site in self.sites.items()):
                return None
            return _top_k(counts, name, share)
        select: Select = {}
        for path, site in self.sites.items():
            if shares[path] >= 1:
                select[path] = {"rule": "all"}
                continue
            margins = self._margins[path]
            bias = margins.bias(shares[path] * site.source_k * len(margins))
            if bias is None:
                return None
            select[path] = {"rule": "null", "bias": bias}
        return Setting(rule=rule, name=name, share=share, select=select)

    def levels(self, path: str, levels: Collection[float]) -> tuple[float, ...]:
        """Return shares between the smallest a block can reach and 1, spaced as `levels` are."""
        margins = self._margins[path]
        least = margins.always / (len(margins) * self.sites[path].source_k)
        return tuple(least + (1 - least) * level for level in levels) if least < 1 else ()


#: what the model does by itself.
STORED = Setting(rule="null", name="null, biases as stored", select={"*": {"rule": "null"}})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Margins:
    """Margins of some blocks.

    Attributes:
        ordered: float64, the finite ones, rising.
        always: how many real experts run whatever the bias is.
        tokens: T, summed over the blocks.
    """

    ordered: Floats
    always: int
    tokens: int

    def __len__(self) -> int:
        return self.tokens

    @staticmethod
    def of(margins: Floats, forced: int) -> _Margins:
        free = np.asarray(margins, dtype=np.float64)[:, forced:].ravel()
        finite = np.sort(free[np.isfinite(free)])
        always = margins.size - finite.size
        return _Margins(ordered=finite, always=always, tokens=len(margins))

    @staticmethod
    def joined(parts: Collection[_Margins]) -> _Margins:
        return _Margins(
            ordered=np.sort(np.concatenate([part.ordered for part in parts])),
            always=sum(part.always for part in parts),
            tokens=sum(part.tokens for part in parts),
        )

    def moved(self, step: float) -> _Margins:
        return _Margins(ordered=self.ordered + step, always=self.always, tokens=self.tokens)

    def bias(self, wanted: float) -> float | None:
        """Return the float32 bias with which so many real experts run, None when more always do.

        It lies midway between two margins where they differ, so that rounding moves no expert.
        """
        found = self.step(wanted)
        return None if found is None else _not_below(found)

    def step(self, wanted: float) -> float | None:
        """Return such a bias in float64, to be rounded when it has been added to another."""
        if wanted < self.always - _SLACK * self.tokens:
            return None
        if not len(self.ordered):
            return 0.0
        running = min(len(self.ordered), max(0, round(wanted) - self.always))
        if running == 0:
            # a float32 step, so that adding it to another bias does not lose it
            return float(np.nextafter(np.float32(self.ordered[-1]), np.float32(np.inf)))
        if running == len(self.ordered):
            return float(self.ordered[0])
        below, above = self.ordered[-running - 1], self.ordered[-running]
        middle = float((below + above) / 2)
        return middle if below < middle <= above else float(above)


def _not_below(value: float) -> float:
    """Return the smallest float32, which biases are, that is not below a number; no float32 margin
    lies between them, so that it lets the same experts run."""
    nearest = np.float32(value)
    # compared in float64
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))


def _top_k(counts: Mapping[str, int], name: str, share: float | None) -> Setting:
    """Return the static setting of so many real experts in each block."""
    if len(set(counts.values())) == 1:
        name = f"top-k, k {next(iter(counts.values()))}"
    return Setting(rule="top-k", name=name, share=share, select=of_counts(counts))


def _count(share: float, source_k: int) -> int:
    return min(source_k, max(1, round(share * source_k)))


def _null(biases: Mapping[str, float]) -> Select:
    """Return the selection of a bias for each block, in short where they are the same."""
    if len(set(biases.values())) == 1:
        return {"*": {"rule": "null", "bias": next(iter(biases.values()))}}
    return {path: {"rule": "null", "bias": bias} for path, bias in biases.items()}
