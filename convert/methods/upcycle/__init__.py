"""Sparse upcycling: the dense feed-forward network becomes the experts of a mixture.

Sources: Sparse Upcycling 2212.05055; granular experts 2410.07524; Drop-Upcycling 2502.19261;
Branch-Train-MiX 2403.07816.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaconvert.methods.planned import Prepared
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.config import UpcycleConfig
from adaconvert.methods.upcycle.hidden import fit_routers, read_prompts
from adaconvert.methods.upcycle.plan import build_plan
from adaconvert.planning.ops import Plan

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]


def prepare(config: UpcycleConfig, described: Sequence[Described]) -> Prepared:
    """Return the planned run over opened sources; reads no weights."""
    if config.router_prompts is None:
        return Prepared(planned=build_plan(config, described))
    prompts, digest = read_prompts(config.router_prompts, config.experts // config.granularity)
    planned = build_plan(config, described, digest)

    def fit(progress: bool) -> Mapping[str, Array]:
        return fit_routers(
            described[0].source.root, prompts, planned.request.moe_layers, config.granularity
        )

    return Prepared(planned=planned, fit=fit)


def replan(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest."""
    config = UpcycleConfig(**options)  # type: ignore[arg-type]
    return build_plan(config, described, config.router_prompts or "").plan
