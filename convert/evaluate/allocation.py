"""Which sites can do with fewer experts: shares per site at equal cost, found greedily.

Each site is reduced alone and the rise in loss is noted; rises are taken to add up. Then, from all
experts everywhere, the step that costs the least loss per FLOP saved is taken again and again, and
the allocation is noted whenever the model reaches one of the wanted shares. What comes out is only
a candidate: it is measured like every other setting.

Source: the greedy form of the layer-wise budget search of EvoPress (2410.14649), which mutates
allocations under a fixed total; ours needs sites x levels short measurements and no generations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

#: shares each site is tried at.
LEVELS: Final = (0.75, 0.5, 0.25, 0.1)


def sensitivities(
    sites: Sequence[str],
    increase: Callable[[Mapping[str, float]], float],
    levels: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, list[tuple[float, float]]]:
    """Return per site the (share, rise in loss) of running it at each level, all others in full.

    Args:
        sites: their paths.
        increase: shares of all sites -> mean rise in loss.
        levels: shares each site is tried at, falling; `LEVELS` for all when not given.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for site in sites:
        full = dict.fromkeys(sites, 1.0)
        own = LEVELS if levels is None else levels[site]
        curve = [(level, increase({**full, site: level})) for level in own]
        found[site] = _rising(curve)
    return found


def _rising(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the curve with noise that lets the loss fall levelled out."""
    highest = 0.0
    smooth = []
    for share, loss in curve:
        highest = max(highest, loss)
        smooth.append((share, highest))
    return smooth


def allocate(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    cost: Mapping[str, float],
    targets: Sequence[float],
) -> dict[float, dict[str, float]]:
    """Return the shares per site for each target that can be reached.

    Args:
        curves: per site (share, rise in loss), shares falling from just below 1.
        cost: per site, of all its experts.
        targets: wanted shares of the total cost.
    """
    shares = dict.fromkeys(curves, 1.0)
    losses = dict.fromkeys(curves, 0.0)
    left = {site: list(curve) for site, curve in curves.items()}
    total = sum(cost[site] for site in curves)
    found: dict[float, dict[str, float]] = {}
    todo = sorted((target for target in targets if target < 1), reverse=True)
    while todo and any(left.values()):
        site, steps = _best_step(left, shares, losses, cost)
        share, losses[site] = left[site][steps]
        del left[site][: steps + 1]
        while todo and _spent(shares, cost, site, share) <= todo[0] * total:
            target = todo.pop(0)
            found[target] = {**shares, site: _exact(shares, cost, site, target * total)}
        shares[site] = share
    return found


def _spent(
    shares: Mapping[str, float], cost: Mapping[str, float], site: str, share: float
) -> float:
    return sum(cost[s] * (share if s == site else shares[s]) for s in shares)


def _exact(
    shares: Mapping[str, float], cost: Mapping[str, float], site: str, wanted: float
) -> float:
    """Return the share of one site that makes the total exactly `wanted`."""
    others = sum(cost[s] * shares[s] for s in shares if s != site)
    return (wanted - others) / cost[site]


def _best_step(
    left: Mapping[str, Sequence[tuple[float, float]]],
    shares: Mapping[str, float],
    losses: Mapping[str, float],
    cost: Mapping[str, float],
) -> tuple[str, int]:
    """Return the site and how many levels at once lose least per cost saved.

    Looking several levels ahead keeps a flat step behind a steep one from being overlooked.
    """
    choices = [
        ((loss - losses[site]) / (cost[site] * (shares[site] - share)), site, index)
        for site, curve in left.items()
        for index, (share, loss) in enumerate(curve)
    ]
    _, site, index = min(choices)
    return site, index
