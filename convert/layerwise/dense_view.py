"""An adaptive checkpoint seen as the stock model it was made of: same tensors, permuted neurons.

A mixture with null experts is the mixture without them, one with routed adapters the model they are
beside, and one with early exits the model without them.
Projections that networks took the place of are gone from it, so those networks stay, with every
neuron on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.null_experts import MODULE, holds_nulls
from adaconvert.io.source import Source

#: what names of tensors of routed adapters hold.
ADAPTERS = ".adapters."
#: what names of the tensors hold that a converted FFN has besides its dense ones.
EXTRA = (f".{adaptive.NEURON_ORDER}", ".router.")
#: what names of tensors of early exits begin with.
EXITS = "exits."


def dense_view(where: Path | Source) -> Source:
    """Return a checkpoint as a stock one: an adaptive one without what its conversion added.

    A partition only permutes neurons, so the dense FFN computes what all experts together do. One
    with networks in place of projections stays adaptive, for them alone.

    Args:
        where: folder or opened source; a stock checkpoint is returned as it is.

    Raises:
        SourceError: config.json names no usable base model.
    """
    source = where if isinstance(where, Source) else Source.open(where, ignore_unindexed=True)
    if source.config.get("adaptive") is None:
        return source
    # the routers of a mixture are its own
    extra = (f".{MODULE}.",) if holds_nulls(source.config["adaptive"]) else EXTRA
    adapted = {name.partition(ADAPTERS)[0] for name in source.tensors if ADAPTERS in name}
    tensors = {
        name: ref
        for name, ref in source.tensors.items()
        if not any(part in name for part in (*extra, ADAPTERS))
        and name.removesuffix(".router.weight") not in adapted
        and not name.startswith(EXITS)
    }
    config = adaptive.dense_config(source.config)
    kept = _networks(source.config)
    if kept:
        own: Any = source.config["adaptive"]
        config["model_type"] = source.config["model_type"]
        without = {**(own.get("model") or {}), "exits": None}
        config["adaptive"] = {**own, "sites": kept, "model": without, "calibration": None}
    return replace(source, config=config, tensors=tensors)


def _networks(config: Mapping[str, Any]) -> dict[str, object]:
    """Return the sites of networks in place of projections, without routers, every neuron on."""
    whole = {"router": {"kind": "none"}, "select": {"rule": "all"}}
    sites = config["adaptive"].get("sites")
    return {
        path: {"linear": {"mlp": {**slots["linear"]["mlp"], **whole}}}
        for path, slots in (sites if isinstance(sites, dict) else {}).items()
        if "mlp" in (slots.get("linear") or {})
    }
