"""How null experts begin: their number, slots, weights, and what every token runs with them.

Letters: n real experts, M null ones, k experts per token of the source, K' slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adaconvert.arch.mixture import Mixture
from adaconvert.arch.null_experts import NullExperts
from adaconvert.errors import OptionError
from adaconvert.methods.adamoe.config import AdamoeConfig
from adaconvert.methods.budget import check_share, reach_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How null experts begin.

    Attributes:
        init: "exact" or "bias".
        nulls: of every block, without a target.
        same: every token runs the experts it runs in the source, with their weights.
        real: real experts a token runs: as many groups of equal logits as the slots begin, as
            ties go to real experts, or as many slots as a bias keeps free of null ones.
        copies: null and real rows that are equal, 1 + M/n; 1 where null rows are zeros.
    """

    init: str
    nulls: NullExperts
    same: bool
    real: int
    copies: int


def start_of(
    config: AdamoeConfig, mixture: Mixture, *, fresh: bool, shares: Sequence[float] = ()
) -> Start:
    """Return M, K' and the rest for the blocks of a model.

    Args:
        config: the options.
        mixture: one of its blocks; all have as many experts.
        fresh: it was just upcycled, so its experts are copies.
        shares: that blocks are meant to spend.

    Raises:
        OptionError: the numbers do not fit the model.
    """
    n, k = mixture.count, mixture.top_k
    init = config.null_init or ("exact" if k < n else "bias")
    count = config.null_experts or _default_count(init, n, k)
    if init == "exact":
        _check_exact(count, n, k)
    copies = 1 + count // n if init == "exact" else 1
    slots = _slots(config, k * copies, n, count)
    if config.materialize:
        _check_stock(init, slots, k * copies, n)
    selected = config.materialize or config.null_weights == "selected"
    nulls = NullExperts(
        count=count,
        slots=slots,
        kind=config.null_kind,
        weights="selected" if selected else "real",
        gain=float(copies) if selected else 1.0,
        min_real=_min_real(config, k, fresh, shares),
    )
    real = min(-(-slots // copies), n)
    return Start(init=init, nulls=nulls, same=slots == k * copies, real=real, copies=copies)


def _check_stock(init: str, slots: int, exact: int, experts: int) -> None:
    """Hold a stock mixture to the copied start that runs what the source runs.

    Raises:
        OptionError: it would compute something else.
    """
    if init != "exact":
        raise OptionError(
            f"every token runs all {experts} experts of the source, and a stock router has no "
            "bias that would keep experts of zeros from the slots",
            where="--materialize",
        )
    if slots != exact:
        raise OptionError(
            "does not go with --materialize: with other slots the stock mixture runs other "
            "experts than the source",
            where="--top-k",
            expected=exact,
            found=slots,
        )


def _slots(config: AdamoeConfig, exact: int, experts: int, nulls: int) -> int:
    """Return K', by default what an exact start takes.

    Raises:
        OptionError: there are fewer experts.
    """
    slots = config.top_k or exact
    if slots > experts + nulls:
        raise OptionError(
            f"more slots than experts: {experts} real and {nulls} null",
            where="--top-k",
            expected=f"1 to {experts + nulls}",
            found=slots,
        )
    return slots


def _min_real(config: AdamoeConfig, top_k: int, fresh: bool, shares: Sequence[float]) -> int:
    if config.min_real is not None:
        return config.min_real
    if config.materialize or config.null_weights == "selected":
        return 0
    return int(fresh or (top_k > 1 and all(share * top_k >= 1 for share in shares)))


def _default_count(init: str, experts: int, top_k: int) -> int:
    """Return M = c n with the least c at which a bias can leave no real expert: c (n - k) >= k."""
    if init == "bias":
        return experts
    return experts * max(1, -(-top_k // max(experts - top_k, 1)))


def _check_exact(count: int, experts: int, top_k: int) -> None:
    if count % experts:
        raise OptionError(
            f"an exact start copies each of the {experts} rows of the router equally often",
            where="--null-experts",
            expected=f"a multiple of {experts}",
            found=count,
            hint="--null-init bias takes any number.",
        )
    if top_k >= experts:
        raise OptionError(
            f"every token runs all {experts} experts, so copies of their rows can displace none",
            where="--null-init",
            expected="bias",
            found="exact",
        )


def check_target(where: str, share: float, nulls: NullExperts, mixture: Mixture) -> None:
    """Hold a share to what the slots allow.

    Raises:
        OptionError: it cannot be reached; says what can.
    """
    numbers = (mixture.top_k, nulls.slots, nulls.count, mixture.count)
    try:
        check_share(where, share, reach_of(*numbers, min_real=nulls.min_real))
    except OptionError as error:
        low, high = reach_of(*numbers)
        if not nulls.min_real or not low <= share <= high:
            raise
        raise OptionError(
            error.message,
            where=where,
            expected=error.expected,
            found=error.found,
            hint=f"--min-real 0 allows {low:.4g} to {high:.4g}.",
        ) from None
