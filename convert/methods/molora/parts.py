"""Adapters as a plan makes them: what each linear has, and the expression of each of its tensors.

Letters: n inputs and m outputs of a linear, E adapters of rank r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaconvert.arch.adapter_targets import named_by, targets
from adaconvert.arch.adapters import (
    IA3,
    LORA,
    Linear,
    adapted,
    feedforward,
    linears,
    shapes_of,
    sites_of,
)
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.methods.moefy.plan import whole
from adaconvert.methods.molora.config import (
    ALPHA,
    EXPERTS,
    RANK,
    READS,
    MoloraOptions,
)
from adaconvert.methods.sources import Described
from adaconvert.planning.ops import Apply, Exactness, Expr, Init
from adaconvert.planning.seeds import seed_for

#: standard deviation of A and of routers, MoLoRA's own (`src/molora.py`, `src/routing.py`).
INIT_STD = 0.02
#: keys of an adapter_config.json that say what adapters are, all the same for every linear.
SAME = ("num_experts", "r", "lora_alpha", "scaling", "experts_kind", "share", "router", "select")


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """Where a tensor comes from, and how it is stored."""

    dtype: str
    expr: Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """The adapters of one linear.

    Attributes:
        linear: where it lies.
        slot: its "linear" slot in `config.adaptive.sites`.
        values: its tensors by their names after the linear's, as `arch.adapters.shapes_of` has
            them.
    """

    linear: Linear
    slot: Mapping[str, Any]
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """All adapters of a model.

    Attributes:
        placed: by linear, in the order of the modules.
        config: the part of an adapter_config.json that says what they are; None where they differ
            from linear to linear in what such a file says once.
        exactness: what a model with them promises against its base.
        notes: what the user should know.
        options: resolved options of what makes them.
    """

    placed: tuple[Placed, ...]
    config: Mapping[str, Any] | None
    exactness: Exactness
    notes: tuple[str, ...] = ()
    options: Mapping[str, object]

    @property
    def first(self) -> Mapping[str, Any]:
        """Return the "adapters" of the first linear."""
        found: Mapping[str, Any] = self.placed[0].slot["adapters"]
        return found


def fresh(options: MoloraOptions, item: Described) -> Adapters:
    """Return new adapters of a model, which add nothing yet.

    Raises:
        OptionError: a target is no linear of it, or an option does not fit.
    """
    spec = item.spec
    paths = targets(spec, options.target_modules, options.experts_kind)
    config = config_of(options, item, paths)
    known = linears(spec)
    sites = sites_of(config, {p: known[p].sizes for p in paths}, hidden=spec.hidden)
    return Adapters(
        placed=tuple(
            Placed(
                linear=known[path],
                slot=sites[path]["linear"],
                values=_drawn(options.seed, item, known[path], sites[path]["linear"]),
            )
            for path in paths
        ),
        config=config,
        exactness=Exactness(kind="exact", why=_why_exact(options)),
        notes=_notes(options),
        options=resolved(options, config),
    )


def config_of(options: MoloraOptions, item: Described, paths: Sequence[str]) -> dict[str, Any]:
    """Return what an adapter_config.json says of new adapters.

    Args:
        options: of the run.
        item: the model.
        paths: of the linears that get some.
    """
    experts = options.experts or EXPERTS
    is_lora = options.experts_kind == LORA
    scaled = None if is_lora else named_by(item.spec, feedforward(item.spec, paths))
    return {
        "target_modules": named_by(item.spec, paths),
        "num_experts": experts,
        "r": options.rank or RANK,
        "lora_alpha": ALPHA if options.alpha is None else options.alpha,
        "scaling": None,
        "experts_kind": options.experts_kind,
        "share": options.share,
        "feedforward_modules": scaled,
        "dropout": options.dropout,
        "init_std": INIT_STD,
        "router": router_of(options),
        "select": options.select(experts),
    }


def router_of(options: MoloraOptions, **more: object) -> dict[str, object]:
    """Return what an adapter_config.json says of routers."""
    kind = "none" if options.routing == "uniform" else "linear"
    usual = {"score": "dot", "norm": "none", "scale": 1.0}
    return {"kind": kind, "reads": READS[options.router], **usual, **more}


def resolved(options: MoloraOptions, config: Mapping[str, Any]) -> dict[str, object]:
    """Return the options of adapters that are made, every default spelled out."""
    is_lora = config["experts_kind"] == LORA
    return {
        "experts": config["num_experts"],
        "rank": config["r"] if is_lora else None,
        "alpha": config["lora_alpha"] if is_lora else None,
        "k": config["select"].get("k"),
        "p": config["select"].get("p"),
        "renormalize": config["select"].get("renormalize", False),
    }


def _drawn(seed: int, item: Described, linear: Linear, slot: Mapping[str, Any]) -> dict[str, Value]:
    """Return the first tensors of a linear: random A and router, all else zero."""
    dtype = item.source.tensors[linear.weight].dtype
    found = {}
    for name, shape in shapes_of(linear.path, slot).items():
        is_random = name in ("adapters.a", "router.weight")
        expr = drawn(seed, f"{linear.path}.{name}", shape) if is_random else zeros(shape)
        found[name] = Value(dtype="F32" if name == "router.weight" else dtype, expr=expr)
    return found


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> Apply:
    """Return normal numbers that depend on the seed and the name alone."""
    size = 1
    for side in shape:
        size *= side
    params = (("size", size), ("std", INIT_STD))
    return Apply(fn="normal", shape=shape, args=(), params=params, seed=seed_for(seed, name))


def zeros(shape: tuple[int, ...]) -> Init:
    """Return a tensor of zeros."""
    return Init(kind="constant", shape=shape, params=(("value", 0.0),))


def _why_exact(options: MoloraOptions) -> str:
    if options.experts_kind == IA3:
        return "every vector is zero, so each linear is scaled by one"
    return "every B is zero, so adapters add nothing until they are trained"


def _notes(options: MoloraOptions) -> tuple[str, ...]:
    if options.experts_kind == IA3:
        return ("at the first step only the vectors have a gradient, not the routers",)
    return ("at the first step only B has a gradient: those of A and of routers are zero",)


def stored(item: Described) -> Adapters:
    """Return the adapters of a standalone checkpoint, or of the view of an adapter folder.

    Raises:
        SourceError: config.json describes them wrongly.
    """
    spec, tensors = item.spec, item.source.tensors
    placed = []
    for linear, slot in adapted(spec, spec.adaptive or {}):
        names = {name: f"{linear.stored}.{name}" for name in shapes_of(linear.path, slot)}
        values = {
            name: Value(dtype=tensors[full].dtype, expr=whole(tensors[full]))
            for name, full in names.items()
        }
        placed.append(Placed(linear=linear, slot=slot, values=values))
    return Adapters(
        placed=tuple(placed),
        config=_common(item, placed),
        exactness=Exactness(kind="exact", why="the same adapters in another form"),
        options={},
    )


def holds_adapters(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json has routed adapters."""
    adaptive = config.get("adaptive")
    sites = adaptive.get("sites") if isinstance(adaptive, dict) else None
    return any(
        "adapters" in (slots.get("linear") or {})
        for slots in (sites.values() if isinstance(sites, dict) else ())
        if isinstance(slots, dict)
    )


def _common(item: Described, placed: Sequence[Placed]) -> dict[str, Any] | None:
    """Return what an adapter_config.json says of adapters; None where they differ."""
    first = placed[0]
    adapters, router = first.slot["adapters"], first.slot["router"]
    is_lora = adapters["kind"] == LORA
    kept = {name: router[name] for name in ("reads", "score", "norm", "scale") if name in router}
    paths = [one.linear.path for one in placed]
    scaled = [one.linear.path for one in placed if one.slot["adapters"].get("on") == "input"]
    scaling = adapters.get("scaling")
    alpha = scaling * adapters["rank"] if isinstance(scaling, int | float) else ALPHA
    # alpha says it where division gives it back
    plain = not is_lora or alpha / adapters["rank"] == scaling
    found = {
        "target_modules": named_by(item.spec, paths),
        "num_experts": adapters["count"],
        "r": adapters.get("rank", RANK),
        "lora_alpha": alpha,
        "scaling": None if plain else scaling,
        "experts_kind": adapters["kind"],
        "share": adapters.get("share"),
        "feedforward_modules": None if is_lora else named_by(item.spec, scaled),
        "dropout": 0.0,
        "init_std": INIT_STD,
        "router": {
            **{"reads": "module", "score": "dot", "norm": "none", "scale": 1.0},
            **kept,
            "kind": router["kind"],
        },
        "select": dict(first.slot["select"]),
    }
    sizes = {one.linear.path: one.linear.sizes for one in placed}
    again = sites_of(found, sizes, hidden=item.spec.hidden)
    same = all(_same(again[one.linear.path]["linear"], one.slot) for one in placed)
    return found if same else None


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Tell whether two slots say the same; keys that are null and those that lack are alike."""

    def bare(slot: Mapping[str, Any]) -> dict[str, Any]:
        return {
            part: {key: value for key, value in slot[part].items() if value not in (None, False)}
            for part in ("adapters", "router", "select")
        }

    a, b = bare(left), bare(right)
    if a["router"].get("reads") == "module":
        # its input is that of the linear, said or not
        for one in (a, b):
            one["router"].pop("of", None)
            one["router"].pop("input", None)
    return a == b


def check_alike(adapters: Adapters, item: Described) -> Mapping[str, Any]:
    """Return what an adapter_config.json says of adapters.

    Raises:
        SourceError: they differ from linear to linear.
    """
    if adapters.config is None:
        raise SourceError(
            "adapters differ from linear to linear in rank, number, scaling or routing, which an "
            "adapter folder says once for all",
            where=f"{escape(item.source.label)}/config.json",
            hint="--standalone holds them as they are.",
        )
    return adapters.config
