"""The plan of a checkpoint whose tokens may skip blocks: every tensor of the model, and routers.

As written no token skips: routers score every token alike and above their threshold, and adapters
add nothing. Letters: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from adaconvert.arch import routed_layers
from adaconvert.arch.recursion import recursion_of
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.names import escape
from adaconvert.methods.beside import config_beside
from adaconvert.methods.depth.config import MOD, DepthOptions
from adaconvert.methods.moefy.plan import dropped, target, whole
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Apply, Exactness, Expr, Init, Plan, TargetTensor
from adaconvert.planning.seeds import seed_for

METHOD = "depth"
#: what a router adds to every logit at the start, see `modeling.adaptive_depth_parts`.
_OPEN = 1.0
_STD = 0.02
#: width of a predictor as a share of the hidden size; our choice.
_PREDICTOR = 4


def routed_plan(options: DepthOptions, item: Described) -> Plan:
    """Return the checked plan of an adaptive checkpoint with routed blocks.

    Raises:
        SourceError: no block of the model can be routed, or some are already.
        OptionError: a block does not exist.
    """
    check_source(item)
    blocks = options.routed(item.spec.layers)
    slots = slots_of(options, item, blocks)
    gone = options.named(item.spec.layers) or ()
    plan = Plan(
        method=METHOD,
        options={**asdict(options), "layers": ",".join(map(str, blocks)), "every": None},
        sources=(item.source.fingerprint,),
        targets=tuple(_targets(slots, item, options.seed)),
        drops=dropped(item),
        config=config_beside(item, {path: {"layer": dict(s)} for path, s in slots.items()}),
        exactness=_exactness(gone, item.spec.layers),
        notes=_notes(options, item, slots),
    )
    check_plan(plan, [item.source.tensors])
    return plan


def _exactness(gone: tuple[int, ...], blocks: int) -> Exactness:
    if not gone:
        return Exactness(kind="exact", why="every token runs every block as written")
    return Exactness(
        kind="approximate",
        why=f"no token runs {len(gone)} of {blocks} blocks as written; every token runs the others",
    )


def check_source(item: Described) -> None:
    """Refuse a model whose tokens cannot skip blocks.

    Raises:
        SourceError: it is no decoder, its attention cannot be masked by block, or blocks are routed
            or share matrices already.
    """
    where = f"{escape(item.source.label)}/config.json"
    why = routed_layers.refusal(item.spec)
    if why is not None:
        raise SourceError(f"cannot have blocks that tokens skip: {why}", where=where)
    if routed_layers.routed_of(item.spec.adaptive):
        raise SourceError(
            "has blocks that tokens skip already",
            where=where,
            hint="Start from the checkpoint they were added to.",
        )
    if recursion_of(item.spec.adaptive) is not None:
        raise SourceError(
            "has blocks that share matrices",
            where=where,
            hint="Route the blocks of the checkpoint it was made of.",
        )


def slots_of(
    options: DepthOptions, item: Described, blocks: tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """Return the "layer" slots by path."""
    paths = routed_layers.blocks_of(item.spec)
    missing = [index for index in blocks if index >= len(paths)]
    if missing:
        raise OptionError("has no linears of its own", where="--layers", found=missing[0])
    return {paths[index]: _slot(options, item, index) for index in blocks}


def _slot(options: DepthOptions, item: Described, index: int) -> dict[str, Any]:
    is_mod = options.kind == MOD
    hidden = item.spec.hidden
    gone = index in (options.named(item.spec.layers) or ())
    # where nobody runs, nobody asks for keys
    keeps = not is_mod and options.kv == "keep" and not gone
    predicts = is_mod and options.predictor == "mlp"
    adapts = not is_mod and options.adapter_width > 0
    select = {"rule": "none"} if gone else {"rule": "threshold", "threshold": 0.0}
    return {
        "kind": options.kind,
        "index": index,
        "hidden": hidden,
        "router": {"width": None if is_mod else options.router_width or None},
        "predictor": {"width": max(hidden // _PREDICTOR, 1)} if predicts else None,
        "gate": options.gate if is_mod else 0.0,
        "adapter": {"width": options.adapter_width} if adapts else None,
        "kv": "keep" if keeps else "skip",
        "keys": routed_layers.keys_of(item.spec, index) if keeps else [],
        "capacity": options.capacity if is_mod else None,
        "select": select,
    }


def _targets(
    slots: Mapping[str, Mapping[str, Any]], item: Described, seed: int
) -> Iterator[TargetTensor]:
    """Yield every tensor of the source as it is, and behind the last of a block what is added."""
    stored = [t for t in item.spec.tensors if t.name in item.source.tensors]
    last = {tensor.layer: tensor.name for tensor in stored}
    own = {slot["index"]: slot for slot in slots.values()}
    for tensor in stored:
        ref = item.source.tensors[tensor.name]
        yield target(tensor.name, ref.dtype, ref.shape, whole(ref), tensor.layer)
        if tensor.layer in own and last[tensor.layer] == tensor.name:
            yield from _added(own[tensor.layer], item, ref.dtype, seed)


def _added(
    slot: Mapping[str, Any], item: Described, dtype: str, seed: int
) -> Iterator[TargetTensor]:
    block = routed_layers.stored_block(item.spec, slot["index"])
    for name, shape in routed_layers.shapes_of(slot).items():
        full = f"{block}.depth.{name}"
        is_router = routed_layers.role_of(name) == routed_layers.ROUTER
        own = "F32" if is_router else dtype
        yield target(full, own, shape, _expr(full, shape, seed), slot["index"])


def _expr(name: str, shape: tuple[int, ...], seed: int) -> Expr:
    """Return what a tensor begins as: layers that read hidden states are drawn, what they lead to
    is zero, and biases of routers leave every block open."""
    if name.endswith((".inner.weight", ".down.weight")):
        params = (("size", shape[0] * shape[1]), ("std", _STD))
        return Apply(fn="normal", shape=shape, args=(), params=params, seed=seed_for(seed, name))
    value = _OPEN if name.endswith(".router.bias") else 0.0
    return Init(kind="constant", shape=shape, params=(("value", value),))


def _notes(
    options: DepthOptions, item: Described, slots: Mapping[str, Mapping[str, Any]]
) -> tuple[str, ...]:
    """Return what the user should know: which blocks, what they cost, what comes next."""
    indices = [slot["index"] for slot in slots.values()]
    shapes = [shape for s in slots.values() for shape in routed_layers.shapes_of(s).values()]
    count = sum(math.prod(shape) for shape in shapes)
    gone = options.named(item.spec.layers) or ()
    told = [
        f"tokens may skip {len(indices)} of {item.spec.layers} blocks "
        f"({routed_layers.listed(indices)}); {count:,} parameters are added",
        "routers know nothing until they are trained: as written every token runs every block"
        + (f" but {routed_layers.listed(gone)}, which no token runs" if gone else ""),
    ]
    if options.kind != MOD and options.kv == "keep":
        told.append(
            "skipped tokens still make queries, keys and values, so that everyone sees them; "
            "--kv skip spares these too"
        )
    return tuple(told)
