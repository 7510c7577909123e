"""The closed list of methods; each name maps to its options and to what plans a run of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from adaconvert.errors import OptionError
from adaconvert.methods import adamoe, d2dmoe, depth, early_exit, moefy, molora, upcycle
from adaconvert.methods.adamoe.config import AdamoeConfig
from adaconvert.methods.d2dmoe.config import D2dmoeConfig
from adaconvert.methods.depth.config import DepthOptions
from adaconvert.methods.depth.search import decide
from adaconvert.methods.early_exit.config import EarlyExitOptions
from adaconvert.methods.moefy.config import MoefyConfig, UnmoefyConfig
from adaconvert.methods.molora.config import MoloraOptions
from adaconvert.methods.planned import Prepared as Prepared
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.config import UpcycleConfig
from adaconvert.planning.ops import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        config: dataclass of its options.
        prepare: plans a run over opened sources; reads no weights.
        replan: the plan of a finished run, from the options in its manifest.
        accepts: "dense" or "adaptive" checkpoints, or "any" of the two.
        mixtures: it also takes mixtures of experts, with null experts or without.
        exits: it also takes checkpoints with early exits, and keeps these.
        several: it can mix several sources.
        refusal: what is said of any other checkpoint.
        decide: finds options that need the weights before a run can be planned, where those given
            say `searches`; None where there are none. Gets the options, the source and whether to
            show progress.
    """

    config: type[Any]
    prepare: Callable[[Any, Sequence[Described]], Prepared]
    replan: Callable[[Mapping[str, object], Sequence[Described]], Plan]
    accepts: str = "dense"
    mixtures: bool = False
    exits: bool = False
    several: bool = False
    refusal: str = ""
    decide: Callable[[Any, Described, bool], Mapping[str, object]] | None = None


METHODS: dict[str, Method] = {
    "upcycle": Method(
        config=UpcycleConfig,
        prepare=upcycle.prepare,
        replan=upcycle.replan,
        several=True,
        refusal="upcycle needs a dense model.",
    ),
    "moefy": Method(
        config=MoefyConfig,
        prepare=moefy.prepare,
        replan=moefy.replan,
        refusal="moefy needs a dense model; `adaconvert unmoefy` makes one of an adaptive model.",
    ),
    "d2dmoe": Method(
        config=D2dmoeConfig,
        prepare=d2dmoe.prepare,
        replan=d2dmoe.replan,
        accepts="any",
        exits=True,
        refusal="d2dmoe needs a dense model, or one that was split.",
    ),
    "adamoe": Method(
        config=AdamoeConfig,
        prepare=adamoe.prepare,
        replan=adamoe.replan,
        accepts="any",
        mixtures=True,
        several=True,
        refusal="adamoe needs a mixture of experts or a dense model.",
    ),
    "molora": Method(
        config=MoloraOptions,
        prepare=molora.prepare,
        replan=molora.replan,
        accepts="any",
        mixtures=True,
        exits=True,
        refusal="molora needs a checkpoint, or a folder of routed adapters.",
    ),
    "early-exit": Method(
        config=EarlyExitOptions,
        prepare=early_exit.prepare,
        replan=early_exit.replan,
        accepts="any",
        mixtures=True,
        exits=True,
        refusal="early-exit needs a checkpoint.",
    ),
    "depth": Method(
        config=DepthOptions,
        prepare=depth.prepare,
        replan=depth.replan,
        accepts="any",
        mixtures=True,
        exits=True,
        refusal="depth needs a checkpoint of a model.",
        decide=decide,
    ),
    "unmoefy": Method(
        config=UnmoefyConfig,
        prepare=moefy.prepare_inverse,
        replan=moefy.replan_inverse,
        accepts="adaptive",
        refusal="unmoefy undoes moefy and d2dmoe; nothing of this checkpoint was split.",
    ),
}


def method_of(name: str) -> Method:
    """Return a method by name.

    Raises:
        OptionError: there is none of this name.
    """
    if name not in METHODS:
        raise OptionError(
            "unknown method", where="method", expected=" or ".join(METHODS), found=repr(name)
        )
    return METHODS[name]


def make_config(method: str, options: Mapping[str, object]) -> Any:
    """Return the checked options of a method, an instance of its `Method.config`.

    Raises:
        OptionError: the method or an option is unknown, or a value is wrong.
    """
    made = method_of(method).config
    known = [field.name for field in fields(made)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise OptionError(
                "unknown option",
                where=f"{method}: {name}",
                hint=f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}.",
            )
    return made(**options)


def prepare(config: Any, described: Sequence[Described]) -> Prepared:
    """Return the planned run of a method over opened sources; reads no weights."""
    for method in METHODS.values():
        if type(config) is method.config:
            return method.prepare(config, described)
    raise OptionError("belongs to no method", where="options", found=type(config).__name__)
