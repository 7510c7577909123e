"""The plan that gives an already split checkpoint other routers or another selection rule."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.adaptive import Partition
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.sites import FfnSite
from adaconvert.errors import OptionError
from adaconvert.io.regular import read_whole
from adaconvert.io.source import Source
from adaconvert.io.source_config import MAX_CONFIG_BYTES
from adaconvert.methods.d2dmoe.config import D2dmoeConfig
from adaconvert.methods.moefy.inverse import DENSE_CONFIG
from adaconvert.methods.moefy.plan import dropped, router_key, target, whole
from adaconvert.methods.options import parse_layers
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Drop, Exactness, Fitted, Plan, TargetTensor

Site = tuple[FfnSite, Partition]


def split_sites(config: D2dmoeConfig, item: Described) -> list[Site]:
    """Return the split networks of an adaptive checkpoint that `--layers` names, by block.

    Raises:
        OptionError: there is none among the blocks asked for.
    """
    assert item.spec.adaptive is not None
    asked = parse_layers(config.layers, item.spec.layers)
    found = [
        pair for pair in adaptive.sites_of(item.spec, item.spec.adaptive) if pair[0].layer in asked
    ]
    if not found:
        raise OptionError(
            "names no block that is split", where="--layers", found=repr(config.layers)
        )
    return found


def changed_sites(config: D2dmoeConfig, item: Described) -> list[Site]:
    """Return the split networks with their new routers and rules, by block.

    Raises:
        OptionError: the options ask for a split, or select by routers there are none of.
    """
    _check_stages(config)
    return [
        (site, _changed(config, item.spec, site, partition))
        for site, partition in split_sites(config, item)
    ]


def rerouted_plan(
    config: D2dmoeConfig,
    item: Described,
    sites: Sequence[Site],
    options: dict[str, object],
    digest: str,
) -> Plan:
    """Return the checked plan that keeps every weight and changes routers and selection alone.

    Args:
        config: the options, with stage 3, 4 or both.
        item: the split checkpoint.
        sites: its networks as they shall be.
        options: resolved options, JSON values only.
        digest: sha256 of everything fitted routers depend on besides the source weights.
    """
    after = {site.layer: (site, partition) for site, partition in sites}
    plan = Plan(
        method="d2dmoe",
        options=options,
        sources=(item.source.fingerprint,),
        targets=tuple(_targets(config, item, after, digest)),
        drops=(*dropped(item), *_old_routers(config, item, after)),
        config=_config(item, after),
        exactness=_exactness([partition for _, partition in after.values()]),
        notes=_notes(item),
    )
    check_plan(plan, [item.source.tensors])
    return plan


def _check_stages(config: D2dmoeConfig) -> None:
    if "2" in config.stage_set:
        raise OptionError(
            "the source is split already; stage 2 splits dense models",
            where="--stages",
            expected="3, 4, 5 or several of them",
            found=config.stages,
            hint="`adaconvert unmoefy` makes a dense model of it.",
        )


def _changed(
    config: D2dmoeConfig, spec: ModelSpec, site: FfnSite, partition: Partition
) -> Partition:
    """Return a site's partition with the new router and the new rule."""
    found = partition
    if config.fits:
        found = replace(found, router={"kind": "contribution", "width": config.width(spec)})
        if found.select.get("rule") == "threshold":
            # a threshold is in the units of the router it was set for
            found = replace(found, select={"rule": "all"})
    if "4" in config.stage_set:
        if found.router["kind"] == "none":
            raise OptionError(
                f"{site.path} has no router to select by",
                where="--stages",
                found=config.stages,
                hint="Run stage 3 too.",
            )
        found = replace(found, select=config.select())
    return found


def _targets(
    config: D2dmoeConfig, item: Described, after: Mapping[int, Site], digest: str
) -> Iterator[TargetTensor]:
    new = {
        site.layer: [
            tensor
            for tensor in adaptive.own_tensors(item.spec, site, partition)
            if tensor.role == "router"
        ]
        for site, partition in after.values()
    }
    old = {name for name, _ in _router_names(item, after)} if config.fits else set()
    for tensor in item.spec.tensors:
        if tensor.name in item.source.tensors and tensor.name not in old:
            ref = item.source.tensors[tensor.name]
            yield target(tensor.name, ref.dtype, ref.shape, whole(ref), tensor.layer)
    for layer, tensors in new.items() if config.fits else ():
        for tensor in tensors:
            name = tensor.name.rpartition(".router.")[2]
            expr = Fitted(key=router_key(layer, name), shape=tensor.shape, digest=digest)
            yield target(tensor.name, "F32", tensor.shape, expr, layer)


def _router_names(item: Described, after: Mapping[int, Site]) -> Iterator[tuple[str, str]]:
    """Yield the stored router tensors of the sites, with the name each has inside its router."""
    for site, _ in after.values():
        prefix = f"{site.stored}.router."
        for name in item.source.tensors:
            if name.startswith(prefix):
                yield name, name.removeprefix(prefix)


def _old_routers(
    config: D2dmoeConfig, item: Described, after: Mapping[int, Site]
) -> Iterator[Drop]:
    for name, _ in _router_names(item, after) if config.fits else ():
        yield Drop(source=0, tensor=name, reason="router; a fitted one takes its place")


def _config(item: Described, after: Mapping[int, Site]) -> dict[str, object]:
    """Return config.json with the new routers and rules; a calibration table would be stale."""
    config: dict[str, Any] = copy.deepcopy(item.source.config)
    config["auto_map"] = adaptive.auto_map(item.spec)
    config["adaptive"]["calibration"] = None
    for site, partition in after.values():
        slot = config["adaptive"]["sites"][site.path]["ffn"]
        slot["router"], slot["select"] = dict(partition.router), dict(partition.select)
    return config


def runs_all(partition: Partition) -> bool:
    """Return whether every expert of a site runs for every token."""
    rule = partition.select["rule"]
    everything = {"top-k": ("k", partition.experts), "top-p": ("p", 1.0)}
    key, value = everything.get(str(rule), ("tau", 0.0))
    return rule == "all" or partition.select.get(key) == value


def _exactness(partitions: list[Partition]) -> Exactness:
    if all(runs_all(partition) for partition in partitions):
        return Exactness(kind="exact", why="no weight changes, and every expert runs")
    return Exactness(
        kind="approximate",
        why=f"{words(partitions[0].select)}; with every expert on it is the dense model",
    )


def words(select: Mapping[str, object]) -> str:
    """Return a selection rule in words, such as "dynamic-k tau=0.1"."""
    numbers = [
        f"{key}={value:g}" for key, value in select.items() if isinstance(value, int | float)
    ]
    return " ".join([str(select["rule"]), *numbers])


def _notes(item: Described) -> tuple[str, ...]:
    assert item.spec.adaptive is not None
    if item.spec.adaptive.get("calibration") is None:
        return ()
    return ("the calibration of the source does not hold any more: run `adaconvert calibrate`",)


def kept_files(source: Source) -> dict[str, bytes]:
    """Return the dense model's config.json that a split checkpoint keeps for `unmoefy`."""
    if DENSE_CONFIG not in source.side_files:
        return {}
    return {DENSE_CONFIG: read_whole(source.path(DENSE_CONFIG), DENSE_CONFIG, MAX_CONFIG_BYTES)}
