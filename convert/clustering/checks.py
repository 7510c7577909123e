"""What every split refuses: counts that do not divide, matrices that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaconvert.errors import OptionError, SourceError

#: more divisors than this are cut to those nearest to what was asked for.
SHOWN = 16


def divisors_hint(size: int, wanted: int) -> str:
    """Return a sentence with the numbers of experts that `size` neurons can be cut into.

    Args:
        size: routed neurons, f.
        wanted: number of experts that was asked for; of many divisors, those nearest to it are
            listed.
    """
    divisors = [count for count in range(1, size + 1) if size % count == 0]
    nearest = sorted(divisors, key=lambda count: (abs(count - wanted), count))[:SHOWN]
    named = ", ".join(str(count) for count in sorted(nearest))
    more = "" if len(nearest) == len(divisors) else " (others are further off)"
    return f"{size} neurons divide into {named} experts{more}."


def check_experts(size: int, num_experts: int) -> int:
    """Return the width of an expert, `size / num_experts`.

    Raises:
        OptionError: the number is below 1 or does not divide `size`; the hint lists those that do.
    """
    if num_experts < 1 or size < 1 or size % num_experts:
        raise OptionError(
            "does not cut the neurons of the layer into equal experts",
            where="number of experts",
            expected=f"a divisor of {size}",
            found=num_experts,
            hint=divisors_hint(size, num_experts) if size > 0 else None,
        )
    return size // num_experts


def check_matrix(matrix: NDArray[Any], where: str) -> None:
    """Return when `matrix` is a finite matrix with at least one row and one column.

    Raises:
        SourceError: it is not; `where` names it, and the first bad row is told.
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise SourceError(
            "has the wrong shape",
            where=where,
            expected="a matrix with rows and columns",
            found=list(matrix.shape),
        )
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if len(bad):
        raise SourceError(
            f"NaN or infinity in {len(bad)} of {len(matrix)} rows, the first is row {bad[0]}",
            where=where,
            hint="Neurons are grouped by these numbers, so all of them must be finite.",
        )
