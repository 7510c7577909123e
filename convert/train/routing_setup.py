"""Which routers a fine-tune trains, balances and watches, decided once the model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adaconvert.errors import OptionError, SourceError
from adaconvert.methods.sources import Described
from adaconvert.modeling.adaptive_select import runs_all
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.goals import goals_of
from adaconvert.train.health import LayerHealth, last_steps
from adaconvert.train.health import notes as health_notes
from adaconvert.train.parts import Chosen
from adaconvert.train.routing import Routers
from adaconvert.train.routing_adapters import AdaptersRouter, adapters_routers
from adaconvert.train.routing_config import BALANCE, CORRECTION, Routing
from adaconvert.train.routing_sites import (
    AdaptiveRouter,
    AnyRouter,
    NullRouter,
    StockRouter,
    find_routers,
    unwrapped,
)
from adaconvert.train.shards import is_sharded

#: what of config.json is the strength of transformers' own balance loss.
_COEFFICIENT = "router_aux_loss_coef"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What comes out of the decision.

    Attributes:
        chosen: what is trained; routers no loss reaches are not.
        routers: None where there are none to watch.
        notes: what the user should know.
    """

    chosen: Chosen
    routers: Routers | None
    notes: tuple[str, ...]

    def summary(
        self, layers: Sequence[LayerHealth], steps: int, held: Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Return what a run records of its routers: "notes", and "routing" where any routed.

        Args:
            layers: over the last steps.
            steps: of the whole run.
            held: share of every block with null experts on held-out text, after training.
        """
        if self.routers is None or not layers:
            return {"notes": list(self.notes)}
        budgets = self.routers.budgets
        settings = self.routers.settings
        routing = {
            "balance": settings.balance,
            "kind": settings.kind,
            "steps": last_steps(steps),
            "layers": [layer.to_json() for layer in layers],
            **({"budgets": budgets.to_json(layers, held)} if budgets.routers else {}),
        }
        unbalanced = not settings.balance and settings.kind == "loss"
        isolated = ["no balance loss was used; watch the load of the experts"]
        told = isolated if unbalanced and self.routers.are_stock else []
        return {"routing": routing, "notes": [*self.notes, *told, *health_notes(routing)]}


def prepare(model: Any, item: Described, config: FinetuneConfig, chosen: Chosen) -> Prepared:
    """Return what is trained of the routers of `model`; they are watched afterwards.

    Args:
        model: loaded, with `chosen` asking for gradients.
        item: the checkpoint.
        config: the fine-tune.
        chosen: what `--train` says.

    Raises:
        OptionError: an option does not fit the routers.
        SourceError: config.json has a coefficient that is no number.
    """
    found = find_routers(model)
    settings = config.routing
    # those of one adapter choose nothing
    alone = [router for router in adapters_routers(model) if router.experts == 1]
    if not found:
        chosen = _settled(model, alone, settings, chosen, {})
        if alone and "router" in config.train and not _are_trained(alone):
            raise _unmoved(())
        _refuse_without_routers(item, settings)
        note = f"no router of {item.spec.model_type} was found, so none was watched or balanced"
        return Prepared(chosen=chosen, routers=None, notes=(note,) if item.spec.num_experts else ())
    _check_kinds(found, item, config)
    _check_selection(model, found, settings)
    trained = _are_trained(found)
    even_adapters = settings.balance is not None
    mixtures = [router for router in found if not isinstance(router, AdaptersRouter)]
    balance = _balance(item, settings, mixtures, _are_trained(mixtures))
    settings = replace(settings, balance=balance)
    if getattr(model.config, "output_router_logits", False):
        # the model's own balance loss would be computed for nothing
        model.config.output_router_logits = False
    if settings.regression and not trained:
        raise OptionError(
            "routers are not trained", where="--router-regression", hint="Add --train router."
        )
    goals = goals_of(item.spec.adaptive, config)
    for router in found:
        if isinstance(router, NullRouter) and router.path in goals:
            router.own()
    settled = _settled(model, [*found, *alone], settings, chosen, goals)
    left = trained and not _are_trained(found)
    if left and "router" in config.train and not _are_trained(alone):
        raise _unmoved(mixtures)
    note = "routers stay as they were: no loss of this run reaches them"
    moved = trained and not left
    routers = Routers(found, settings, trained=moved, goals=goals, even_adapters=even_adapters)
    return Prepared(chosen=settled, routers=routers, notes=(note,) if left else ())


def _unmoved(mixtures: Sequence[AnyRouter]) -> OptionError:
    return OptionError(
        "nothing that is trained changes the loss of routers",
        where="--train router",
        hint="Adapters under the rule uniform, or of which one alone weighs one, weigh the same "
        "whatever routers say."
        if not mixtures
        else "Experts of adaptive checkpoints weigh one, so their routers get no gradient from "
        "the language-model loss: add --router-regression or --balance, or fit them by "
        "`adaconvert d2dmoe`.",
    )


def _refuse_without_routers(item: Described, settings: Routing) -> None:
    asked = {
        "--balance": settings.balance,
        "--balance-kind bias": settings.kind == "bias",
        "--z-loss": settings.z_loss,
        "--router-regression": settings.regression,
    }
    for flag, value in asked.items():
        if value:
            raise OptionError(f"{item.source.label} has no routers with tensors", where=flag)


def _check_kinds(found: Sequence[AnyRouter], item: Described, config: FinetuneConfig) -> None:
    settings = config.routing
    family = item.spec.model_type
    if settings.z_loss and not all(_has_logits(router) for router in found):
        raise OptionError(
            f"the routers of {family} have no softmax logits",
            where="--z-loss",
            hint="It keeps the logits of softmax routers of stock mixtures small.",
        )
    if settings.kind == "bias" and any(router.bias is None for router in found):
        raise OptionError(
            f"a checkpoint of {family} cannot store a bias for its routers",
            where="--balance-kind bias",
            expected="glm4_moe, dots1, ernie4_5_moe, or analytic routers of adaptive checkpoints",
            hint="Use --balance-kind loss.",
        )
    if settings.kind == "bias" and config.machine.sharded:
        raise OptionError("cannot be combined with --fsdp", where="--balance-kind bias")
    if settings.kind == "bias" and any(is_sharded(router.bias) for router in found):
        raise OptionError(
            f"cannot be combined with --expert-parallel for {family}, whose bias is a parameter",
            where="--balance-kind bias",
            hint="Use --balance-kind loss, or leave --expert-parallel out.",
        )
    shared = [r for r in found if isinstance(r, AdaptersRouter) and r.blocks > 1]
    if shared and config.machine.sharded:
        raise OptionError(
            "cannot be combined with a router for the adapters of several blocks, each of which "
            "gathers its own parameters alone",
            where="--fsdp",
        )
    adaptive = [router for router in found if isinstance(router, AdaptiveRouter)]
    if settings.regression and not any(router.predicts_norms for router in adaptive):
        raise OptionError(
            f"{item.source.label} has no contribution routers",
            where="--router-regression",
            hint="`adaconvert d2dmoe` makes them.",
        )


def _has_logits(router: AnyRouter) -> bool:
    """Return whether a router chooses by a softmax."""
    if isinstance(router, AdaptersRouter):
        return bool(router.select["rule"] != "sigmoid")
    return isinstance(router, NullRouter) or (
        isinstance(router, StockRouter) and not router.sigmoid
    )


def _check_selection(model: Any, found: Sequence[AnyRouter], settings: Routing) -> None:
    """Return only when what is to be balanced chooses anything."""
    if not settings.balance and settings.kind == "loss":
        return
    for router in found:
        if not isinstance(router, AdaptiveRouter):
            continue
        knobs = model._adaptive_knobs
        select = knobs.get(router.path) or knobs.get("*") or router.site.adaptive_spec["select"]
        if runs_all(select, router.experts):
            raise OptionError(
                f"every expert of {router.path} runs, which is even already",
                where="--balance",
                hint="Say which experts run meanwhile: --select rule=top-k,k=K, or --compute X.",
            )


def _balance(
    item: Described, settings: Routing, found: Sequence[AnyRouter], trained: bool
) -> float:
    """Return the factor of the balance loss, as `Routing.balance` says."""
    if settings.balance is not None:
        return settings.balance
    mixture = bool(found) and not any(isinstance(router, AdaptiveRouter) for router in found)
    if not (mixture and trained and settings.kind == "loss"):
        return 0.0
    stated = item.source.config.get(_COEFFICIENT)
    if stated is None:
        return BALANCE
    if (
        isinstance(stated, bool)
        or not isinstance(stated, int | float)
        or not 0 <= stated < math.inf
    ):
        raise SourceError(
            "is no coefficient",
            where=f"{item.source.label}/config.json: {_COEFFICIENT}",
            expected="a number, 0 or more",
            found=stated,
        )
    slots = max((r.slots for r in found if isinstance(r, NullRouter)), default=item.spec.top_k)
    return float(stated) * max(slots, 1)


def _are_trained(found: Sequence[AnyRouter]) -> bool:
    return any(p.requires_grad for router in found for p in _module_of(router).parameters())


def _module_of(router: AnyRouter) -> Any:
    """Return what holds the parameters of a router."""
    if isinstance(router, NullRouter):
        return router
    return router.site.router if isinstance(router, AdaptiveRouter) else router.module


def _settled(
    model: Any,
    found: Sequence[AnyRouter],
    settings: Routing,
    chosen: Chosen,
    goals: Mapping[str, float],
) -> Chosen:
    """Return `chosen` without the router tensors no gradient reaches, which are frozen."""
    out: dict[int, Any] = {}
    for router in found:
        if isinstance(router, StockRouter):
            # it moves by a rule of its own, if at all
            own = unwrapped(router.module).named_parameters()
            out |= {id(p): p for name, p in own if name.endswith(CORRECTION)}
        elif isinstance(router, NullRouter):
            held = settings.null_rate and router.path in goals
            out |= {id(router.null_bias): router.null_bias} if held else {}
        elif not _is_reached(router, settings):
            out |= {id(p): p for p in router.site.router.parameters()}
    lost = {n: p for n, p in model.named_parameters() if id(p) in out and p.requires_grad}
    if not lost:
        return chosen
    size = 0
    for parameter in lost.values():
        parameter.requires_grad_(False)
        size += parameter.numel()
    parts = dict(chosen.by_part)
    parts["router"] = parts.get("router", 0) - size
    return replace(
        chosen,
        trained=chosen.trained - size,
        frozen=chosen.frozen + size,
        by_part={part: count for part, count in parts.items() if count > 0},
        routers=chosen.routers - set(lost),
    )


def _is_reached(router: AdaptiveRouter | AdaptersRouter, settings: Routing) -> bool:
    """Return whether a loss reaches an adaptive router; experts that weigh one send nothing."""
    if isinstance(router, AdaptersRouter):
        balanced = settings.balance and router.experts > 1
        return router.is_reached or bool(balanced and router.select["rule"] != "uniform")
    return bool(settings.balance) or bool(settings.regression and router.predicts_norms)
