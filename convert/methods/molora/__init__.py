"""Routed adapters: a mixture of low-rank experts beside the linears of a model.

Sources: MoLoRA and MoV 2309.05444; HydraLoRA 2404.19245; Arrow 2405.11157; PHATGOOSE 2402.05859.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.exits import is_copied
from adaconvert.arch.recursion import recursion_of
from adaconvert.errors import OptionError
from adaconvert.methods.molora import folder, moe, parts
from adaconvert.methods.molora.config import OF_FITS, OF_NEW, MoloraOptions
from adaconvert.methods.molora.experts import experts
from adaconvert.methods.molora.parts import Adapters
from adaconvert.methods.molora.plan import standalone_plan
from adaconvert.methods.options import option
from adaconvert.methods.planned import Fitted, PlainPlan, Prepared
from adaconvert.methods.sources import Described, refuse_exits
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Plan

_SHARED = "a matrix that several depths share has adapters at the first of these depths alone"
_LOCAL = (
    "adapter_config.json names the base by its folder on the machine it was written on; --base "
    "ORG/NAME names a published one"
)


def prepare(options: MoloraOptions, described: Sequence[Described]) -> Prepared:
    """Return the planned run over opened sources; reads no weights.

    Raises:
        OptionError: the options do not fit the model.
        SourceError: the source's adapters cannot be written in the form that is asked for.
    """
    adapters, fit = _adapters(options, described[0])
    plan = _plan(options, adapters, described)
    return Prepared(planned=_planned(options, adapters, plan, described), fit=fit)


def replan(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest.

    Raises:
        OptionError: adapters that existed became experts; where they are is not recorded.
    """
    given: dict[str, Any] = dict(options)
    if given.get("adapters"):
        raise OptionError("names adapters, not where they are", where="--from")
    if parts.holds_adapters(described[0].source.config):
        # a folder of adapters may name a base that is not recorded; tensors do not depend on it
        given["base"] = "its base"
    config = MoloraOptions(**given)
    return _plan(config, _adapters(config, described[0])[0], described)


def _adapters(options: MoloraOptions, item: Described) -> tuple[Adapters, Callable[[bool], Fitted]]:
    """Return the adapters of the result, and what computes their fitted tensors: those the source
    has, those that are named, or new ones."""
    if parts.holds_adapters(item.source.config):
        _check_only_form(options)
        return parts.stored(item), _nothing
    if options.adapters:
        found = experts(options, item)
        _check_copies(found.adapters, item)
        return found.adapters, found.fit
    return parts.fresh(options, item), _nothing


def _check_copies(adapters: Adapters, item: Described) -> None:
    """Refuse adapters that add something to linears which exits of the model have copies of.

    Raises:
        SourceError: the copies would compute what the model no longer does.
    """
    for one in adapters.placed:
        if is_copied(item.spec, one.linear):
            refuse_exits(item, f"whose copies of {one.linear.path} would lack the adapters")


def _nothing(progress: bool) -> Fitted:
    return {}


def _check_only_form(options: MoloraOptions) -> None:
    """Hold the options to those that mean something for a source that has adapters.

    Raises:
        OptionError: another one was given, or none that asks for another form.
    """
    for name, default in asdict(MoloraOptions()).items():
        if name in OF_NEW and getattr(options, name) != default:
            where = "--from" if name == "adapters" else option(name)
            raise OptionError(
                "does nothing: the source has adapters already, which are kept as they are",
                where=where,
            )


def _plan(options: MoloraOptions, adapters: Adapters, described: Sequence[Described]) -> Plan:
    """Return the checked plan of the form that is asked for."""
    item = described[0]
    sources = [one.source.fingerprint for one in described]
    said = {**asdict(options), **adapters.options}
    if not adapters.options:
        # how they were made is in the history
        said = {name: value for name, value in said.items() if name not in (*OF_NEW, *OF_FITS)}
    # what a folder names as its base may be a path of this machine
    said |= {"base": None, "work": None}
    if "data" in said:
        said["data"] = adapters.options.get("data", ())
    if options.standalone:
        plan = standalone_plan(adapters, said, item, sources)
    elif options.as_moe:
        refuse_exits(item, "which a stock mixture cannot hold")
        plan = moe.moe_plan(options, adapters, said, item)
    else:
        make = folder.plain_plan if options.as_plain_lora else folder.folder_plan
        base = base_of(options, item)
        plan = make(adapters, said, item, sources, base)
        if Path(base).is_absolute():
            plan = replace(plan, notes=(*plan.notes, _LOCAL))
    if recursion_of(item.spec.adaptive) is not None:
        plan = replace(plan, notes=(*plan.notes, _SHARED))
    check_plan(plan, [one.source.tensors for one in described])
    return plan


def base_of(options: MoloraOptions, item: Described) -> str:
    """Return what an adapter folder names as its base: what was given, a hub id, or the folder.

    Raises:
        OptionError: the source holds adapters itself, and no base is given.
    """
    if options.base is not None:
        return options.base
    source = item.source
    if parts.holds_adapters(source.config):
        raise OptionError(
            "is needed: the source holds its base and the adapters, and an adapter folder names "
            "the base alone",
            where="--base",
            expected="the folder or hub id of the model they were put beside",
        )
    return source.label if source.revision is not None else str(source.root)


def _planned(
    options: MoloraOptions, adapters: Adapters, plan: Plan, described: Sequence[Described]
) -> PlainPlan:
    item = described[0]
    if options.standalone:
        return PlainPlan(
            plan=plan,
            described=tuple(described),
            target=str(plan.config["model_type"]),
            runtimes=adaptive.verdicts(),
            files={},
        )
    if options.as_moe:
        return PlainPlan(
            plan=plan,
            described=tuple(described),
            target=str(plan.config["model_type"]),
            runtimes=moe.runtimes(plan),
            files={},
        )
    peft_type = "LORA" if options.as_plain_lora else "MOLORA"
    return PlainPlan(
        plan=plan,
        described=tuple(described),
        target=f"a PEFT folder, {peft_type}",
        runtimes=folder.verdicts(peft_type),
        files={},
        folder=folder.folder_of(adapters, item, peft_type == "MOLORA", folder.names_of(adapters)),
    )
