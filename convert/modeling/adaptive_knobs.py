"""The one compute knob: from a fraction of the reference's FLOPs to selections per site."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from .adaptive_schema import routed_layers, routed_specs

Select = Mapping[str, Any]
Knobs = dict[str, Select]
#: what a fraction may miss a row by before the row counts as above it (rounding of decimals).
SLACK = 1e-9
#: where knobs say how tokens leave at exits; {} for never. No site has this path.
EXITS = "*exits"
#: where knobs say which tokens skip blocks. No site has this path.
DEPTH = "*depth"


def has_exits(adaptive: Mapping[str, Any]) -> bool:
    """Return whether a model has exits."""
    return bool((adaptive.get("model") or {}).get("exits"))


class Setting:
    """Knobs that were just set; as a context manager it puts back what was there before."""

    def __init__(self, runtime: Any, before: tuple[Any, ...]) -> None:
        self._runtime, self._before = runtime, before

    def __enter__(self) -> Setting:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._runtime.restore(self._before)


def knobs_for(adaptive: Mapping[str, Any], compute: float) -> Knobs:
    """Return the selections that run at most `compute` of the reference's FLOPs per token.

    A calibrated model takes the largest row of its table that is not above `compute`; rows are
    never interpolated. Without a table every site runs the same share of its experts by top-k, the
    largest that stays within `compute`: a rule that knows nothing of the model, so calibrate. In a
    mixture with null experts that is the share of the experts a token runs without them.

    Raises:
        ValueError: nothing the model can do costs that little; the message gives the range.
    """
    number = isinstance(compute, int | float) and not isinstance(compute, bool)
    table = adaptive.get("calibration")
    # networks in place of projections may cost more than the matrices did
    most = max((1.0, *(row["compute"] for row in (table or {}).get("rows", ()))))
    if not number or not 0 < compute <= most + SLACK:
        raise ValueError(f"compute is {compute!r}, expected a fraction above 0 and up to {most:g}")
    if compute >= 1:
        whole: Knobs = {"*": {"rule": "all"}}
        whole |= {EXITS: {}} if has_exits(adaptive) else {}
        return whole | ({DEPTH: {"rule": "all"}} if routed_layers(adaptive) else {})
    return _uniform(adaptive, compute) if table is None else _row(table["rows"], compute)


def _up(fraction: float) -> str:
    """Return a lower bound as text, rounded so that it is within reach itself."""
    return f"{math.ceil(fraction * 10000) / 10000:.4f}"


def _row(rows: list[Mapping[str, Any]], compute: float) -> Knobs:
    fitting = [row for row in rows if row["compute"] <= compute + SLACK]
    if not fitting:
        low = min((row["compute"] for row in rows), default=1.0)
        raise ValueError(
            f"compute {compute:g} is below what this model was calibrated for: {_up(low)} to 1"
        )
    best = max(fitting, key=lambda row: (row["compute"], -row.get("loss", 0.0)))
    found = {**best.get("select", {}), **({EXITS: best["exits"]} if "exits" in best else {})}
    return {**found, **({DEPTH: best["depth"]} if "depth" in best else {})}


def _uniform(adaptive: Mapping[str, Any], compute: float) -> Knobs:
    sites = routed_specs(adaptive)
    if not sites and routed_layers(adaptive):
        raise ValueError(
            f"compute {compute:g}: which tokens skip blocks for it only data can tell; run "
            "`adaconvert calibrate`, or set a threshold by `set_depth`"
        )
    if not sites and has_exits(adaptive):
        raise ValueError(
            f"compute {compute:g}: how early tokens may leave for it only data can tell; run "
            "`adaconvert calibrate`, or set thresholds by `set_exits`"
        )
    if not sites:
        raise ValueError(
            f"compute {compute:g} is out of reach: this model has no experts to leave out"
        )
    whole = adaptive["reference"]["flops_per_token"]
    # what is not converted costs what it costs
    budget = compute * whole - (whole - sum(_dense_flops(spec) for spec in sites.values()))
    budget -= sum(_least_fixed(spec) for spec in sites.values())
    least = sum(_expert_flops(spec) for spec in sites.values())
    if budget < least:
        low = compute + (least - budget) / whole
        reach = f"this model can run {_up(low)} to 1 of the reference's FLOPs per token"
        if any("null" in spec for spec in sites.values()):
            reach = (
                f"without calibration, by top-k of real experts alone, {reach}; `adaconvert "
                "calibrate` measures what its null biases can do"
            )
        raise ValueError(f"compute {compute:g} is out of reach: {reach}")
    share = _share(list(sites.values()), budget)
    return {
        path: {"rule": "top-k", "k": max(1, int(share * _whole(spec) + SLACK))}
        if share < 1
        else {"rule": "all"}
        for path, spec in sites.items()
    }


def _share(specs: list[Mapping[str, Any]], budget: float) -> float:
    """Return the largest share of its experts that every site can run within a budget of FLOPs; a
    site of few experts runs one where that is more than the share."""
    while True:
        share = budget / sum(map(_routed_flops, specs))
        enough = [spec for spec in specs if share * _whole(spec) >= 1 - SLACK]
        if len(enough) == len(specs) or not enough:
            return share
        budget -= sum(_expert_flops(spec) for spec in specs if spec not in enough)
        specs = enough


def _whole(spec: Mapping[str, Any]) -> int:
    """Return how many experts a token runs at full compute."""
    return int(spec["mixture"]["top_k"] if "mixture" in spec else spec["experts"]["count"])


def _matrices(spec: Mapping[str, Any]) -> int:
    if "mixture" in spec:
        return 3 if spec["mixture"]["glu"] else 2
    names = spec["weights"]
    return 3 if "gate" in names or "gate_up" in names else 2


def _dense_flops(spec: Mapping[str, Any]) -> int:
    """Return the FLOPs for one token of what the site was in the dense model, or in the mixture
    without null experts."""
    if "mixture" in spec:
        return _routed_flops(spec) + stock_flops(spec)
    if "output" in spec:
        return 2 * int(spec["hidden"]) * int(spec["output"])
    return 2 * int(spec["hidden"]) * int(spec["intermediate"]) * _matrices(spec)


def neuron_flops(spec: Mapping[str, Any]) -> int:
    """Return the FLOPs of one neuron of a site for one token; a gate that is run in full is no part
    of it."""
    into = _matrices(spec) - 1 - int(spec["router"]["kind"] == "gate")
    return 2 * (int(spec["hidden"]) * into + int(spec.get("output", spec["hidden"])))


def _routed_flops(spec: Mapping[str, Any]) -> int:
    """Return the FLOPs of all experts of full compute together for one token."""
    return int(_whole(spec) * spec["experts"]["width"] * neuron_flops(spec))


def _expert_flops(spec: Mapping[str, Any]) -> int:
    """Return the FLOPs of one expert for one token."""
    return int(spec["experts"]["width"] * neuron_flops(spec))


def router_flops(spec: Mapping[str, Any]) -> int:
    """Return the FLOPs of a site's router for one token, a gate that is run in full left out."""
    hidden, experts = int(spec["hidden"]), int(spec["experts"]["count"])
    kind = spec["router"]["kind"]
    if kind == "mixture":
        return stock_flops(spec) + null_flops(spec)
    if kind in {"param-center", "similarity"}:
        return 2 * hidden * experts
    if kind == "analytic":
        return 2 * hidden * experts * (_matrices(spec) - 1)
    if kind == "contribution":
        return 2 * int(spec["router"]["width"]) * (hidden + experts)
    return 0


def stock_flops(spec: Mapping[str, Any]) -> int:
    """Return the FLOPs of a mixture's own router for one token."""
    return 2 * int(spec["hidden"]) * int(spec["experts"]["count"])


def null_flops(spec: Mapping[str, Any]) -> int:
    """Return the FLOPs of the rows of a mixture's null experts for one token."""
    return 2 * int(spec["hidden"]) * int(spec["null"]["count"])


def _least_fixed(spec: Mapping[str, Any]) -> int:
    """Return `fixed_flops` under top-k, which looks at no null experts."""
    return fixed_flops(spec) - (null_flops(spec) if "mixture" in spec else 0)


def fixed_flops(spec: Mapping[str, Any]) -> int:
    """Return what every token costs at a site before an expert is chosen: router, full gate,
    always-on neurons."""
    hidden = int(spec["hidden"])
    full = spec["router"]["kind"] == "gate"
    gate = 2 * hidden * int(spec["intermediate"]) if full else 0
    shared = int(spec.get("shared", 0)) * neuron_flops(spec)
    return int(router_flops(spec) + gate + shared)
