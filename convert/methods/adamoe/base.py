"""The mixture that gets null experts: a stock one as it is stored, or one made of dense sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from adaconvert.arch import registry
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.mixture import Mixture, mixtures, refusal
from adaconvert.errors import OptionError, SourceError
from adaconvert.methods import moefy, upcycle
from adaconvert.methods.adamoe.config import (
    BOTH_OPTIONS,
    MOEFY_OPTIONS,
    UPCYCLE_OPTIONS,
    AdamoeConfig,
)
from adaconvert.methods.moefy.config import MoefyConfig
from adaconvert.methods.moefy.plan import dropped, target, whole
from adaconvert.methods.options import option, parse_layers
from adaconvert.methods.planned import Fitted, Prepared
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.config import UpcycleConfig
from adaconvert.planning.ops import Drop, Exactness, Plan, TargetTensor


def _nothing(progress: bool) -> Fitted:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A mixture as a plan would write it, before it has null experts.

    Attributes:
        spec: what it is.
        blocks: those that get null experts.
        targets: every tensor.
        drops: source tensors it does not use.
        config: its config.json.
        exactness: what it promises against the first source; None for a stock one, which is it.
        notes: what the user should know of how it is made.
        options: resolved options of what makes it, by our names.
        fit: computes its `Fitted` leaves.
        fresh: its experts were made of one dense network each.
    """

    spec: ModelSpec
    blocks: tuple[Mixture, ...]
    targets: tuple[TargetTensor, ...]
    drops: tuple[Drop, ...]
    config: Mapping[str, object]
    exactness: Exactness | None = None
    notes: tuple[str, ...] = ()
    options: Mapping[str, object]
    fit: Callable[[bool], Fitted] = _nothing

    @property
    def fresh(self) -> bool:
        """Tell whether its experts were just made of a dense network."""
        return self.exactness is not None


def stock(config: AdamoeConfig, item: Described) -> Base:
    """Return a stock mixture as it is stored.

    Raises:
        SourceError: its routing is not covered, or it is none.
        OptionError: an option is given that is for dense models.
    """
    why = refusal(item.spec)
    if why is not None:
        raise SourceError(
            f"its routing is not covered: {why}",
            where=f"{item.source.label}/config.json",
            hint="Null experts are defined for a softmax of all experts' logits, of which the best "
            "are taken.",
        )
    given = config.given_for_dense()
    if given:
        raise OptionError(
            f"is for a dense source, and this is a mixture ({item.spec.model_type})",
            where=option(given[0]),
        )
    return Base(
        spec=item.spec,
        blocks=_chosen(config, item),
        targets=tuple(stored_targets(item.spec, item)),
        drops=dropped(item),
        config=item.spec.config,
        options={},
    )


def _chosen(config: AdamoeConfig, item: Described) -> tuple[Mixture, ...]:
    """Return the blocks `layers` names.

    Raises:
        OptionError: one of them is dense, or a stock mixture is to be written.
    """
    blocks = mixtures(item.spec)
    if config.layers is None:
        return blocks
    if config.materialize:
        raise OptionError(
            "does not go with --materialize: a stock mixture has as many experts in every block",
            where="--layers",
            found=config.layers,
        )
    asked = parse_layers(config.layers, item.spec.layers)
    plain = sorted(asked - {block.layer for block in blocks})
    if plain:
        raise OptionError(
            "names a block without experts",
            where="--layers",
            expected=", ".join(str(block.layer) for block in blocks[:8]),
            found=plain[0],
        )
    return tuple(block for block in blocks if block.layer in asked)


def stored_targets(spec: ModelSpec, item: Described) -> list[TargetTensor]:
    """Return copies of a checkpoint's tensors, one expert's next to each other."""
    stored = item.source.tensors
    found = []
    for tensor in spec.tensors:
        if tensor.name not in stored:
            continue
        ref = stored[tensor.name]
        made = target(tensor.name, ref.dtype, ref.shape, whole(ref), tensor.layer)
        if tensor.expert is not None:
            group = f"layer.{tensor.layer}.expert.{tensor.expert}"
            made = replace(made, group=group, expert=tensor.expert)
        found.append(made)
    return found


def from_dense(config: AdamoeConfig, described: Sequence[Described]) -> Base:
    """Return the mixture that `via` makes of dense sources.

    Raises:
        OptionError: its options do not fit them.
    """
    inner = config.inner()
    made = _prepared(inner, described)
    return _of_plan(config, made.planned.plan, made.fit)


def again(config: AdamoeConfig, described: Sequence[Described]) -> Base:
    """Return the same from the options of a finished run, whose texts are digests."""
    inner = config.inner()
    plan = _replanned(inner, described)
    return _of_plan(config, plan, _nothing)


def _prepared(inner: UpcycleConfig | MoefyConfig, described: Sequence[Described]) -> Prepared:
    if isinstance(inner, UpcycleConfig):
        return upcycle.prepare(inner, described)
    return moefy.prepare(inner, described)


def _replanned(inner: UpcycleConfig | MoefyConfig, described: Sequence[Described]) -> Plan:
    given = {name: getattr(inner, name) for name in inner.__dataclass_fields__}
    if isinstance(inner, UpcycleConfig):
        return upcycle.replan(given, described)
    return moefy.replan(given, described)


def _of_plan(config: AdamoeConfig, plan: Plan, fit: Callable[[bool], Fitted]) -> Base:
    spec = registry.describe(plan.config, {tensor.name for tensor in plan.targets})
    why = refusal(spec)
    if why is not None:
        raise OptionError(
            f"makes a mixture whose routing is not covered: {why}",
            where="--target",
            hint="Name another host with --target, such as mixtral.",
        )
    return Base(
        spec=spec,
        blocks=mixtures(spec),
        targets=plan.targets,
        drops=plan.drops,
        config=plan.config,
        exactness=plan.exactness,
        notes=plan.notes,
        options=_resolved(config, plan),
        fit=fit,
    )


def _resolved(config: AdamoeConfig, plan: Plan) -> dict[str, object]:
    """Return the resolved options of what made the mixture, by our names."""
    own = UPCYCLE_OPTIONS if plan.method == "upcycle" else MOEFY_OPTIONS
    names = {**own, **BOTH_OPTIONS}
    found = {ours: plan.options[theirs] for ours, theirs in names.items()}
    if len(plan.sources) == 1:
        # with one source there is nothing to choose from
        found.pop("base", None)
    if plan.method == "moefy":
        found["data"] = plan.options["data"]
    return {"via": plan.method, **found}
