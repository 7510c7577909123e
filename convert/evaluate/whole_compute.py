"""What running every expert of a model costs, and at which sites there is something to choose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaconvert.modeling.adaptive_knobs import neuron_flops
from adaconvert.modeling.adaptive_schema import routed_specs


def chooses(spec: Mapping[str, Any]) -> bool:
    """Return whether there is something to choose at a site."""
    kind = spec["router"]["kind"]
    return kind == "mixture" or (int(spec["experts"]["count"]) > 1 and kind != "none")


def whole_flops(spec: Mapping[str, Any]) -> float:
    """Return the FLOPs for one token of a share of 1 at a site."""
    mixture = spec.get("mixture")
    width = int(spec["experts"]["width"])
    neurons = int(spec["intermediate"]) if mixture is None else int(mixture["top_k"]) * width
    return float(neuron_flops(spec)) * neurons


def whole_compute(adaptive: Mapping[str, Any]) -> float:
    """Return the FLOPs of running every expert of a model as a fraction of the reference's."""
    reference = adaptive["reference"]
    networks = [spec for spec in routed_specs(adaptive).values() if "output" in spec]
    found = sum(int(spec["intermediate"]) * neuron_flops(spec) for spec in networks)
    grown = found - int(reference.get("linear_flops_per_token", 0))
    return float(1 + grown / reference["flops_per_token"])
