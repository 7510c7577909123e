"""How evenly the experts of a feed-forward network were used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUsage:
    """Use of the routed experts of one site.

    Attributes:
        path: the site.
        experts: how many it has.
        tokens: tokens that reached it.
        active: mean number of experts a token ran.
        least, most: smallest and largest share of the tokens that one expert ran.
        entropy: of the distribution of uses over experts, in units of its maximum: 1 is even use, 0
            a single expert for everything.
        dead: experts no token ran.
        shares: for each expert, the share of the tokens that ran it.
        source_k: where null experts take slots, experts a token of the source runs; 0 elsewhere.
        idle: there, the share of the tokens that ran no real expert.
    """

    path: str
    experts: int
    tokens: int
    active: float
    least: float
    most: float
    entropy: float
    dead: int
    shares: tuple[float, ...]
    source_k: int = 0
    idle: float = 0.0

    @staticmethod
    def of(
        path: str, uses: numpy.ndarray[Any, Any], tokens: int, *, source_k: int = 0, idle: int = 0
    ) -> SiteUsage:
        """Return the use of a site.

        Args:
            path: the site.
            uses: [E] tokens that ran each expert.
            tokens: tokens that reached the site.
            source_k: as the attribute.
            idle: tokens that ran none.
        """
        counts = [int(count) for count in uses]
        shares = tuple(count / max(tokens, 1) for count in counts)
        return SiteUsage(
            path=path,
            experts=len(counts),
            tokens=tokens,
            active=sum(counts) / max(tokens, 1),
            least=min(shares),
            most=max(shares),
            entropy=_entropy(counts),
            dead=counts.count(0),
            shares=shares,
            source_k=source_k,
            idle=idle / max(tokens, 1),
        )

    @property
    def realised(self) -> float:
        """Return the mean number of real experts as a share of those a token of the source runs."""
        return self.active / self.source_k if self.source_k else 1.0

    def to_json(self) -> dict[str, object]:
        """Return the use by name."""
        null = {"of": self.source_k, "realised": self.realised, "idle_share": self.idle}
        return {
            "site": self.path,
            "experts": self.experts,
            "tokens": self.tokens,
            "mean_active": self.active,
            "least_share": self.least,
            "most_share": self.most,
            "entropy": self.entropy,
            "dead_experts": self.dead,
            "shares": list(self.shares),
            **(null if self.source_k else {}),
        }

    def line(self) -> str:
        """Return the use as one line of text."""
        dead = f", {self.dead} dead" if self.dead else ""
        return (
            f"{self.path}: {self._active()}, used by "
            f"{100 * self.least:.2f} to {100 * self.most:.2f} % of tokens, "
            f"entropy {self.entropy:.3f}{dead}"
        )

    def _active(self) -> str:
        """Return how many experts a token ran."""
        if not self.source_k:
            return f"{self.active:.4g} of {self.experts} active"
        return (
            f"{self.active:.4f} of {self.source_k} real experts ({100 * self.realised:.1f} %), "
            f"none for {100 * self.idle:.2f} % of tokens; each of {self.experts}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RealShare:
    """What null experts leave of the source's experts, over all the blocks that have them.

    Attributes:
        active: mean number of real experts a token ran in a block.
        of: mean number a token of the source runs.
        idle: share of (token, block) pairs without a real expert.
        blocks: how many there are.
    """

    active: float
    of: float
    idle: float
    blocks: int

    @staticmethod
    def of_sites(usage: Sequence[SiteUsage]) -> RealShare | None:
        """Return the means over the blocks with null experts, None without any."""
        found = [site for site in usage if site.source_k]
        if not found:
            return None
        means = ([s.active for s in found], [s.source_k for s in found], [s.idle for s in found])
        active, of, idle = (sum(values) / len(found) for values in means)
        return RealShare(active=active, of=of, idle=idle, blocks=len(found))

    @property
    def share(self) -> float:
        """Return the real experts as a share of the source's."""
        return self.active / self.of

    def to_json(self) -> dict[str, object]:
        """Return the means by name."""
        values = {"mean": self.active, "of": self.of, "share": self.share, "idle_share": self.idle}
        return {**values, "blocks": self.blocks}

    def line(self) -> str:
        """Return the means as text."""
        return (
            f"{self.active:.4f} per token and block, {100 * self.share:.2f} % of {self.of:g}; none "
            f"for {100 * self.idle:.2f} % (mean of {self.blocks} blocks)"
        )


def _entropy(counts: list[int]) -> float:
    """Return the entropy of counts over that of even counts; 1 for a single expert."""
    total = sum(counts)
    if len(counts) < 2:
        return 1.0
    parts = [count / total for count in counts if count] if total else []
    return -sum(part * math.log(part) for part in parts) / math.log(len(counts)) + 0.0
