"""Which budgets a fine-tune gives blocks with null experts; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError
from adaconvert.layerwise.names import block_of
from adaconvert.methods.budget import check_share, parse_layers, reach_of
from adaconvert.modeling.adaptive_schema import routed_specs

if TYPE_CHECKING:
    from adaconvert.train.config import FinetuneConfig


def goals_of(adaptive: Mapping[str, Any] | None, config: FinetuneConfig) -> dict[str, float]:
    """Return path -> share of every block with null experts that has a budget.

    Args:
        adaptive: `config.adaptive`, None for a stock model.
        config: the fine-tune; what it leaves out is what the checkpoint says, at blocks whose
            null experts compete there. Where it says which experts run no budget is held.

    Raises:
        OptionError: there are no null experts, or a share is out of reach.
    """
    settings = config.routing
    if config.select is not None or config.compute is not None:
        return {}
    specs = {} if adaptive is None else routed_specs(adaptive)
    nulled = {path: spec for path, spec in specs.items() if "mixture" in spec}
    if settings.budgets and not nulled:
        raise OptionError(
            "the checkpoint has no null experts",
            where=settings.budgets,
            hint="`adaconvert adamoe` gives them to a mixture of experts or a dense model.",
        )
    layers = {path: block_of(path) or 0 for path in nulled}
    named = parse_layers(settings.layers, list(layers.values())) if settings.layers else {}
    found = {}
    for path, spec in nulled.items():
        share, where = settings.target, "--target-compute"
        if layers[path] in named:
            share, where = named[layers[path]], f"--layer-budget, layer {layers[path]}"
        elif share is None and spec["select"]["rule"] == "null":
            share, where = spec["null"]["target"], f"config.json: target of {path}"
        if share is not None:
            check_share(where, share, _reach(spec))
            found[path] = float(share)
    if settings.ramp and not found:
        raise OptionError("does nothing without --target-compute", where="--compute-ramp")
    return found


def _reach(spec: Mapping[str, Any]) -> tuple[float, float]:
    nulls = spec["null"]
    return reach_of(
        *(spec["mixture"]["top_k"], nulls["slots"], nulls["count"], spec["experts"]["count"]),
        min_real=nulls["min_real"],
    )
