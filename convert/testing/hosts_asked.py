"""What a host is asked for, and its answer, for families in their tiny form."""

from __future__ import annotations

from typing import Any

from adaconvert.arch import registry
from adaconvert.arch.base import HostLayout, HostRequest, ModelSpec
from adaconvert.arch.host import HOSTS
from adaconvert.testing.tiny_models import VARIANTS, config_values


def describe(family: str, layers: int = 4, **overrides: Any) -> ModelSpec:
    """Return what a tiny model of a family, or of a variant of one, is."""
    family, variant = VARIANTS.get(family, (family, {}))
    values = {**config_values(family, layers=layers), **variant, **overrides}
    return registry.describe({"model_type": family, **values})


def ask(spec: ModelSpec, **changes: Any) -> HostRequest:
    """Return a request for four experts of the dense width, two of them a token."""
    width = spec.intermediate
    values: dict[str, Any] = {"num_experts": 4, "top_k": 2, "expert_width": width, **changes}
    return HostRequest(**values)


def layout(family: str, host: str, dtype: str = "bfloat16", **overrides: Any) -> HostLayout:
    """Return how a host would hold a tiny model."""
    spec = describe(family, **overrides)
    return HOSTS[host].layout(spec, ask(spec), dtype)
