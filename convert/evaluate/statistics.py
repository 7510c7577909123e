"""Means over tokens with an error that respects that tokens of one document belong together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean per token, or per text.

    Attributes:
        value: sum over sum.
        error: its standard error over documents, None with fewer than two of them.
    """

    value: float
    error: float | None

    @staticmethod
    def of(sums: numpy.ndarray[Any, Any], counts: numpy.ndarray[Any, Any]) -> Mean:
        """Return the mean of sums over counts, where each document is one independent draw.

        Args:
            sums: [D] total of each document.
            counts: [D] tokens of each document.

        Source: linearised variance of a ratio estimator, Cochran, Sampling Techniques (1977),
            equation 6.4 without the finite-population factor.
        """
        used = counts > 0
        sums, counts = sums[used].astype("float64"), counts[used].astype("float64")
        total, documents = float(counts.sum()), len(counts)
        value = float(sums.sum()) / total
        if documents < 2 or not math.isfinite(value):
            return Mean(value=value, error=None)
        spread = float(((sums - value * counts) ** 2).sum()) * documents / (documents - 1)
        return Mean(value=value, error=math.sqrt(spread) / total)

    def to_json(self) -> dict[str, float | None]:
        """Return value and error; None where there is none or it is infinite."""
        return {"mean": finite(self.value), "standard_error": finite(self.error)}

    def text(self, digits: int = 4) -> str:
        """Return the mean with its error, such as "3.4612 +- 0.0021"."""
        shown = f"{self.value:.{digits}f}"
        return shown if self.error is None else f"{shown} +- {self.error:.{digits}f}"


def finite(value: float | None) -> float | None:
    """Return a number JSON can hold, None for infinities and NaN."""
    return value if value is not None and math.isfinite(value) else None


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity where a float cannot hold it."""
    return math.exp(loss) if loss < 700 else math.inf
