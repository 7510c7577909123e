"""How evenly the experts of a feed-forward network were used."""

from __future__ import annotations

import math
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

    @staticmethod
    def of(path: str, uses: numpy.ndarray[Any, Any], tokens: int) -> SiteUsage:
        """Return the use of a site.

        Args:
            path: the site.
            uses: [E] tokens that ran each expert.
            tokens: tokens that reached the site.
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
        )

    def to_json(self) -> dict[str, object]:
        """Return the use by name."""
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
        }

    def line(self) -> str:
        """Return the use as one line of text."""
        dead = f", {self.dead} dead" if self.dead else ""
        return (
            f"{self.path}: {self.active:.4g} of {self.experts} active, used by "
            f"{100 * self.least:.2f} to {100 * self.most:.2f} % of tokens, "
            f"entropy {self.entropy:.3f}{dead}"
        )


def _entropy(counts: list[int]) -> float:
    """Return the entropy of counts over that of even counts; 1 for a single expert."""
    total = sum(counts)
    if len(counts) < 2:
        return 1.0
    parts = [count / total for count in counts if count] if total else []
    return -sum(part * math.log(part) for part in parts) / math.log(len(counts)) + 0.0
