"""Stage 5: attention projections replaced by networks of about the same FLOPs, split into experts.

What a plan says of them, for a dense source and for one whose feed-forward networks are split or
whose projections were replaced before. `projection_fit` computes their arrays.

Source: Szatkowski et al. 2024, arXiv 2310.04361, and its official code,
`architectures/moe/dsti.py`: a network for each of q, k, v and o of hidden width d o / (d + o),
which costs what the matrix costs; then split, routed and selected from like a feed-forward network.
Theirs are square matrices; with grouped queries k and v are not, and the same formula holds.

Letters: d inputs, o outputs, f neurons, E experts of m neurons, w router width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.projections import (
    FUSED,
    Network,
    ProjectionSite,
    networks_of,
    projection_sites,
    stock_spec,
)
from adaconvert.errors import OptionError
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.methods.d2dmoe.config import D2dmoeConfig
from adaconvert.methods.d2dmoe.reroute import words
from adaconvert.methods.moefy.plan import target
from adaconvert.methods.options import parse_layers
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Drop, Exactness, Fitted, Plan, TargetTensor

#: share of a projection's FLOPs that its router may cost. The published routers of width 128 would
#: cost a fifth of a 576 x 576 projection, and two thirds of a 576 x 192 one.
ROUTER_SHARE = 0.1
NARROWEST_ROUTER = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """One projection, or the network that took its place, and what a run makes of it.

    Attributes:
        site: where it lies.
        network: as it shall be.
        is_new: the projection is a matrix so far.
        fits_router: its router is fitted in this run.
    """

    site: ProjectionSite
    network: Network
    is_new: bool
    fits_router: bool

    def key(self, name: str) -> str:
        """Return the key of a fitted array, by its tensor's name after the site's."""
        return f"projection.{self.site.layer}.{self.site.role}.{name}"

    def fitted(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the arrays that are fitted, by their tensors' names after the
        site's."""
        return {
            name: shape
            for name, (_, shape) in self.network.shapes().items()
            if self.is_new or (self.fits_router and name.startswith("router."))
        }


def edits(config: D2dmoeConfig, item: Described) -> list[Edit]:
    """Return what a run does to the projections of a source, block by block.

    Raises:
        OptionError: a projection that shall be replaced is part of a fused matrix, was replaced
            before, or the options do not fit its size.
    """
    spec = item.spec
    asked = parse_layers(config.layers, spec.layers)
    present = {
        site.path: (site, network)
        for site, network in networks_of(stock_spec(spec), spec.adaptive or {})
    }
    changed = [
        _changed(config, site, network)
        for site, network in present.values()
        if site.layer in asked and (config.fits or "4" in config.stage_set)
    ]
    if not config.replaces:
        return changed
    _check_decoder(item)
    sites = {(site.layer, site.role): site for site in projection_sites(stock_spec(spec)).values()}
    found = []
    for layer in sorted(asked):
        for role in config.roles:
            site = sites.get((layer, role))
            if site is None:
                raise _fused(item, layer, role)
            if site.path in present:
                raise OptionError(
                    f"{site.path} was replaced before",
                    where="--stages",
                    expected="3, 4 or 3,4 for new routers or another tau",
                    found=config.stages,
                )
            found.append(_new(config, site))
    return [*changed, *found]


def _check_decoder(item: Described) -> None:
    if item.spec.kind != "decoder":
        kind = "an encoder" if item.spec.kind == "encoder" else "a vision model"
        raise OptionError(
            f"{item.spec.model_type} is {kind}; its projections cannot be run layer by layer on "
            "text",
            where="--stages 5",
            expected="a decoder",
        )


def _fused(item: Described, layer: int, role: str) -> OptionError:
    """Return the refusal of a projection that is no matrix of its own."""
    fused = next(
        (t.name for t in item.spec.tensors if t.role in FUSED and t.layer == layer), "another one"
    )
    return OptionError(
        f"{item.spec.model_type} keeps {role} in one matrix with others ({fused}), which cannot be "
        "replaced in parts",
        where=f"--projections {role}",
        expected="o",
        hint="Use --projections o, or convert a family that keeps q, k and v apart.",
    )


def _new(config: D2dmoeConfig, site: ProjectionSite) -> Edit:
    """Return the network that takes the place of a projection."""
    neurons = site.inputs * site.outputs / (site.inputs + site.outputs)
    experts = config.projection_experts
    if experts > neurons:
        raise OptionError(
            f"{site.path} has {site.inputs} inputs and {site.outputs} outputs: a network of as "
            f"many FLOPs has {round(neurons)} neurons",
            where="--projection-experts",
            expected=f"at most {int(neurons)}",
            found=experts,
        )
    biased = site.bias is not None
    network = Network(
        role=site.role,
        hidden=site.inputs,
        output=site.outputs,
        experts=experts,
        width=round(neurons / experts),
        up_bias=biased,
        down_bias=biased,
    )
    if experts > 1:
        network = replace(network, router=_router(config, network), select=_select(config))
    return Edit(site=site, network=network, is_new=True, fits_router=experts > 1)


def _changed(config: D2dmoeConfig, site: ProjectionSite, network: Network) -> Edit:
    """Return a network that took a projection's place before, with a new router or rule."""
    split = network.experts > 1
    if split and config.fits:
        network = replace(network, router=_router(config, network))
        if network.select.get("rule") == "threshold":
            # a threshold is in the units of the router it was set for
            network = replace(network, select={"rule": "all"})
    if split and "4" in config.stage_set:
        network = replace(network, select=config.select())
    return Edit(site=site, network=network, is_new=False, fits_router=split and config.fits)


def _router(config: D2dmoeConfig, network: Network) -> dict[str, object]:
    dense = network.hidden * network.output
    width = round(ROUTER_SHARE * dense / (network.hidden + network.experts))
    chosen = config.projection_router_width or max(width, NARROWEST_ROUTER)
    return {"kind": "contribution", "width": chosen}


def _select(config: D2dmoeConfig) -> dict[str, object]:
    if "4" in config.stage_set or config.tau is not None:
        return {"rule": "dynamic-k", "tau": config.tau or 0.0}
    return {"rule": "all"}


def edited(plan: Plan, item: Described, changes: Sequence[Edit], digest: str) -> Plan:
    """Return a plan that does to projections what `changes` say, and all else as it did.

    Args:
        plan: what the run does besides; it copies every projection.
        item: the source.
        changes: at most one for each projection.
        digest: sha256 of everything fitted arrays depend on besides the source weights.
    """
    if not changes:
        return plan
    found = replace(
        plan,
        targets=tuple(_targets(plan, item, changes, digest)),
        drops=(*plan.drops, *(drop for change in changes for drop in _drops(item, change))),
        config=_config(plan.config, changes),
        exactness=_exactness(plan, changes),
        notes=(*plan.notes, *_notes(changes)),
    )
    check_plan(found, [item.source.tensors])
    return found


def _drops(item: Described, change: Edit) -> Iterator[Drop]:
    """Yield the source tensors a change leaves out."""
    site = change.site
    if change.is_new:
        for name in filter(None, (site.weight, site.bias)):
            yield Drop(source=0, tensor=name, reason="a network trained to do the same replaces it")
    elif change.fits_router:
        for name in item.source.tensors:
            if name.startswith(f"{site.stored}.router."):
                yield Drop(source=0, tensor=name, reason="router; a fitted one takes its place")


def _targets(
    plan: Plan, item: Described, changes: Sequence[Edit], digest: str
) -> Iterator[TargetTensor]:
    gone = {drop.tensor for change in changes for drop in _drops(item, change)}
    # new tensors stand where the matrix stood, new routers behind their network
    anchors = {c.site.weight if c.is_new else f"{c.site.stored}.down.weight": c for c in changes}
    for old in plan.targets:
        if old.name not in gone:
            yield old
        change = anchors.get(old.name)
        if change is not None:
            stored = item.source.tensors[old.name]
            yield from _fitted_targets(change, stored, digest)


def _fitted_targets(change: Edit, stored: TensorRef, digest: str) -> Iterator[TargetTensor]:
    for name, shape in change.fitted().items():
        dtype = "F32" if name.startswith("router.") else stored.dtype
        expr = Fitted(key=change.key(name), shape=shape, digest=digest)
        yield target(f"{change.site.stored}.{name}", dtype, shape, expr, change.site.layer)


def _config(config: Mapping[str, object], changes: Sequence[Edit]) -> dict[str, object]:
    """Return config.json with the networks; a calibration table would be stale."""
    found: dict[str, Any] = copy.deepcopy(dict(config))
    adaptive = found["adaptive"]
    adaptive["calibration"] = None
    for change in changes:
        slots = adaptive["sites"].setdefault(change.site.path, {})
        slots["linear"] = {**slots.get("linear", {}), "mlp": change.network.content()}
        if change.is_new:
            flops = 2 * change.site.inputs * change.site.outputs
            known = adaptive["reference"].get("linear_flops_per_token", 0)
            adaptive["reference"]["linear_flops_per_token"] = known + flops
    return found


def _exactness(plan: Plan, changes: Sequence[Edit]) -> Exactness:
    """Return what step 0 promises: no network is the matrix it replaces."""
    new = [change for change in changes if change.is_new]
    if new:
        others = "" if plan.exactness.kind == "exact" else f", with {_bare(plan)}"
        roles = ", ".join(dict.fromkeys(change.site.role for change in new))
        blocks = len({change.site.layer for change in new})
        why = f"networks trained to do the same replace {roles} of {blocks} blocks{others}"
        return Exactness(kind="approximate", why=why)
    if all(_runs_all(change.network) for change in changes):
        return plan.exactness
    first = next(change.network for change in changes if not _runs_all(change.network))
    return Exactness(
        kind="approximate",
        why=f"{words(first.select)} in networks in place of projections"
        + ("" if plan.exactness.kind == "exact" else f", {_bare(plan)} in the others"),
    )


def _bare(plan: Plan) -> str:
    """Return why a plan is not exact, without what only holds where all projections stay."""
    return plan.exactness.why.partition("; with every expert on")[0]


def _runs_all(network: Network) -> bool:
    rule = network.select.get("rule")
    number = network.select.get("tau", network.select.get("k"))
    return (
        network.experts == 1
        or rule == "all"
        or (rule == "dynamic-k" and number == 0)
        or (rule == "top-k" and number == network.experts)
    )


def _notes(changes: Sequence[Edit]) -> Iterator[str]:
    new = [change for change in changes if change.is_new]
    if new:
        first = new[0].network
        split = "not split" if first.experts == 1 else f"{first.experts} experts each"
        yield (
            f"{len(new)} projections are two-layer networks now ({split}); their matrices are not "
            "kept, so `unmoefy` cannot bring the dense model back"
        )


def networks_in(spec: ModelSpec) -> bool:
    """Return whether networks have taken the place of projections."""
    if spec.adaptive is None:
        return False
    return next(networks_of(stock_spec(spec), spec.adaptive), None) is not None
