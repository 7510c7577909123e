"""The closed list of methods; each name maps to the function that plans it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.config import UpcycleConfig
from adaconvert.methods.upcycle.hidden import fit_routers, read_prompts
from adaconvert.methods.upcycle.plan import UpcyclePlan, build_plan

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A planned run: the plan, and how to compute its `Fitted` leaves when it comes to executing
    it."""

    planned: UpcyclePlan
    fit: Callable[[], Mapping[str, Array]]


def make_config(method: str, options: Mapping[str, object]) -> UpcycleConfig:
    """Return the checked options of a method.

    Raises:
        OptionError: the method or an option is unknown, or a value is wrong.
    """
    if method != "upcycle":
        raise OptionError("unknown method", where="method", expected="upcycle", found=repr(method))
    known = [field.name for field in fields(UpcycleConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise OptionError(
                "unknown option",
                where=f"{method}: {name}",
                hint=f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}.",
            )
    return UpcycleConfig(**options)  # type: ignore[arg-type]


def prepare(config: UpcycleConfig, described: Sequence[Described]) -> Prepared:
    """Return the planned run of a method over opened sources; reads no weights."""
    if config.router_prompts is None:
        return Prepared(planned=build_plan(config, described), fit=dict)
    prompts, digest = read_prompts(config.router_prompts, config.experts // config.granularity)
    planned = build_plan(config, described, digest)

    def fit() -> Mapping[str, Array]:
        return fit_routers(
            described[0].source.root, prompts, planned.request.moe_layers, config.granularity
        )

    return Prepared(planned=planned, fit=fit)
