"""Which settings of a model are worth measuring: ways to spend a share of the experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.evaluate.allocation import allocate
from adaconvert.evaluate.null_grid import WHOLE, NullGrid
from adaconvert.evaluate.sweep import ALL, Grid, Setting

#: shares of the experts that are tried first.
COARSE: Final = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
#: further shares between the two that enclose the limit.
FINE: Final = 3

#: rules of models with null experts; "top-k" of the real experts alone is the static baseline.
NULL_RULES: Final = ("null", "top-k")

#: share of the experts -> the setting of one way to spend it; None when it cannot.
Family = Callable[[float], Setting | None]


def default_rules(specs: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the rules worth sweeping for the routers of a model, the best first.

    Predicted contributions are made for dynamic-k (D2DMoE). For every other router an absolute
    threshold per layer loses less than top-k at equal compute: on SmolLM2-135M with single neurons
    and its own gate as the router, +0.16 at 31 % of the neurons, against more for top-k at 30 %.

    Raises:
        OptionError: there is no router, or no site.
    """
    kinds = {spec["router"]["kind"] for spec in specs.values()}
    if not kinds or "none" in kinds:
        raise OptionError(
            "the model has no router that could choose experts",
            where="calibrate",
            hint="Convert it with a router, such as `adaconvert moefy --router param-center`.",
        )
    if "mixture" in kinds:
        return NULL_RULES
    return ("dynamic-k", "threshold") if kinds == {"contribution"} else ("threshold", "top-k")


def rules_for(specs: Mapping[str, Mapping[str, Any]], asked: Sequence[str]) -> tuple[str, ...]:
    """Return the rules to sweep: those asked for, or those that suit.

    Raises:
        OptionError: there is no router, or a rule is not for it.
    """
    suited = default_rules(specs)
    nulled = suited == NULL_RULES
    for rule in asked:
        if rule not in NULL_RULES if nulled else rule == "null":
            raise OptionError(
                "is not for a model with null experts"
                if nulled
                else "is for models with null experts alone",
                where=f"--rule {rule}",
                expected=" or ".join(NULL_RULES if nulled else suited),
            )
    return tuple(asked) or suited


def uniform(grid: Grid | NullGrid, rule: str) -> Family:
    """Return the family in which every site runs the same share."""

    def family(share: float) -> Setting | None:
        return grid.uniform(rule, share)

    return family


def per_layer(
    grid: Grid | NullGrid,
    rule: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    cost: Mapping[str, float],
) -> Family:
    """Return the family that takes most from the sites that suffer least.

    Args:
        grid: makes the settings.
        rule: of every site.
        curves: per site (share, rise in loss), see `allocation.sensitivities`.
        cost: per site, of all its experts.
    """

    whole = WHOLE if isinstance(grid, NullGrid) else "the experts"

    def family(share: float) -> Setting | None:
        found = allocate(curves, cost, [share]).get(share)
        if found is None:
            return None
        name = f"{rule} per layer, {share:.0%} of {whole}"
        return grid.per_site(rule, found, name=name, share=share)

    return family


def of_these_alone(setting: Setting, sites: Collection[str], name: str = "") -> Setting:
    """Return a setting in which every site but `sites` runs all of its experts."""
    own = {path: setting.select.get(path) or setting.select["*"] for path in sites}
    return replace(setting, name=name or setting.name, select={**ALL, **own})


def ffn_alone(grid: Grid, rule: str, sites: Collection[str]) -> Family:
    """Return the family in which feed-forward networks run the same share, and the networks in
    place of projections run whole: these are small, so leaving experts out saves little there.

    Args:
        grid: makes the settings.
        rule: of the feed-forward networks.
        sites: their paths.
    """
    own = grid.part(sites)

    def family(share: float) -> Setting:
        setting = own.uniform(rule, share)
        return of_these_alone(setting, sites, f"{setting.name}, projections in full")

    return family


def coarse(family: Family) -> list[Setting]:
    """Return the settings of a family that are tried first."""
    return [setting for share in COARSE if (setting := family(share)) is not None]


def between(family: Family, fits: Callable[[Setting], bool], *, first: bool) -> list[Setting]:
    """Return finer settings around the share where fitting begins or ends.

    A limit on the loss is kept first and broken as the share falls. What can be certified lies a
    little above the share that just keeps it, so the step above the crossing is refined as well.

    Args:
        family: of the settings.
        fits: whether a coarse setting keeps to what was asked for.
        first: whether running everything does: true for a limit on the loss, false for a budget.
    """
    points = [(1.0, first)]
    for share in COARSE:
        setting = family(share)
        if setting is not None:
            points.append((share, fits(setting)))
    for at, ((_, kept), (_, then)) in enumerate(pairwise(points)):
        if kept == first and then != first:
            around = [share for share, _ in points[max(0, at - first) : at + 2]]
            shares = [share for pair in pairwise(around) for share in _inside(*pair)]
            return [setting for share in shares if (setting := family(share)) is not None]
    return []


def _inside(above: float, below: float) -> list[float]:
    step = (above - below) / (FINE + 1)
    return [above - step * (n + 1) for n in range(FINE)]
