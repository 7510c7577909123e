"""The plan of a checkpoint whose blocks share matrices, with a low-rank residual for each depth.

Relaxed recursive transformers, 2410.20672, section 2: the matrices of a group of depths become one,
their mean or one depth's; what each depth loses is given back by the best matrix of rank r, found
by singular values (equation 3 there). Here norms and biases stay each depth's own, which costs
next to nothing and makes full rank give back the source.

Letters: L depths, B loops, W' a shared matrix, n inputs and m outputs, r rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaconvert.arch import adaptive, recursion
from adaconvert.arch.adapters import Linear, block_of
from adaconvert.arch.base import TensorSpec
from adaconvert.arch.recursion import Shared
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.names import escape
from adaconvert.methods.depth.choose import check_stock
from adaconvert.methods.depth.config import FULL, DepthOptions
from adaconvert.methods.moefy.plan import dropped, target, whole
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.estimate import reference
from adaconvert.planning.ops import Apply, Drop, Exactness, Expr, Plan, TargetTensor

METHOD = "depth"


def recursive_plan(options: DepthOptions, item: Described) -> Plan:
    """Return the checked plan of an adaptive checkpoint whose blocks share matrices.

    Raises:
        SourceError: the model is adaptive, or its blocks have no linears alike.
        OptionError: the loops do not divide the blocks.
    """
    check_stock(item)
    made = _recursion(options, item)
    if not made["linears"]:
        raise SourceError(
            "has no linear that all of the blocks have alike, so none can be shared",
            where=f"{escape(item.source.label)}/config.json",
        )
    shared = list(recursion.shared_linears(item.spec, made))
    plan = Plan(
        method=METHOD,
        options=asdict(options),
        sources=(item.source.fingerprint,),
        targets=tuple(_targets(options, item, shared)),
        drops=(*dropped(item), *_drops(options, item, shared)),
        config=_config(item, made),
        exactness=_exactness(options, made),
        notes=_notes(options, item, made),
    )
    check_plan(plan, [item.source.tensors])
    return plan


def _recursion(options: DepthOptions, item: Described) -> dict[str, Any]:
    """Return `config.adaptive.model.recursion`."""
    assert options.loops is not None
    spec = item.spec
    known = recursion.loops_of(spec.layers, options.sharing)
    inner = len(recursion.depths_of(spec.layers, options.sharing))
    if not inner:
        raise OptionError(
            f"leaves no block to share: the model has {spec.layers}",
            where=f"--sharing {options.sharing}",
        )
    if options.loops not in known:
        outer = "" if inner == spec.layers else " between the first and the last"
        raise OptionError(
            f"does not divide the {inner} blocks{outer}",
            where="--loops",
            expected=" or ".join(map(str, [loops for loops in known if loops > 1])) or "none",
            found=options.loops,
        )
    base = recursion.base_of(spec.layers, options.loops, options.sharing)
    groups = recursion.shared_depths(base).values()
    depths = sorted(depth for group in groups for depth in group) or range(spec.layers)
    return {
        "blocks": recursion.blocks_of(spec),
        "base": base,
        "rank": options.own_rank,
        "linears": recursion.common_linears(spec, depths),
        "sharing": options.sharing,
        "start": options.start,
    }


def _targets(
    options: DepthOptions, item: Described, shared: Sequence[Shared]
) -> Iterator[TargetTensor]:
    """Yield every tensor of the source but shared matrices, these at the first depth of their
    group, and residuals behind what they are beside."""
    own = {each.linear.weight: each for each in shared}
    origins = _origins(options, item)
    alike: dict[str, dict[int, str]] = {}
    for each in shared:
        alike.setdefault(_inside(each.linear), {})[each.linear.layer] = each.linear.weight
    for tensor in item.spec.tensors:
        if tensor.name not in item.source.tensors:
            continue
        ref = item.source.tensors[tensor.name]
        one = own.get(tensor.name)
        if one is None:
            yield target(tensor.name, ref.dtype, ref.shape, whole(ref), tensor.layer)
            continue
        mean = _mean(item, alike[_inside(one.linear)], origins[one.owner.layer])
        if one.owner == one.linear:
            yield target(tensor.name, ref.dtype, ref.shape, mean, tensor.layer)
        for made, expr in _residual(item, one, mean) if one.rank else ():
            yield target(made.name, ref.dtype, made.shape, expr, tensor.layer)


def _inside(linear: Linear) -> str:
    """Return the path of a linear inside its block."""
    return linear.path.removeprefix(f"{block_of(linear.path)}.")


def _mean(item: Described, alike: Mapping[int, str], origins: Sequence[int]) -> Expr:
    """Return W' as it is stored.

    Args:
        item: the source.
        alike: depth -> name of its matrix.
        origins: depths whose mean it is.
    """
    refs = [item.source.tensors[alike[depth]] for depth in origins]
    if len(refs) == 1:
        return whole(refs[0])
    args = tuple(whole(ref) for ref in refs)
    mean = Apply(fn="mean", shape=refs[0].shape, args=args)
    # residuals make up for its rounding too
    params = (("dtype", refs[0].dtype),)
    return Apply(fn="rounded", shape=refs[0].shape, args=(mean,), params=params)


def _residual(item: Described, one: Shared, mean: Expr) -> Iterator[tuple[TensorSpec, Expr]]:
    """Yield the factors of the best matrix of rank r between a depth's own matrix and W'; one
    decomposition makes both."""
    own = whole(item.source.tensors[one.linear.weight])
    ups, downs = math.prod(one.up.shape), math.prod(one.down.shape)
    params = (("rank", one.rank), ("transposed", one.linear.transposed))
    both = Apply(fn="residual", shape=(ups + downs,), args=(own, mean), params=params)
    for made, first, size in ((one.down, ups, downs), (one.up, 0, ups)):
        where = (("first", first), ("size", size))
        yield made, Apply(fn="part", shape=made.shape, args=(both,), params=where)


def _drops(options: DepthOptions, item: Described, shared: Sequence[Shared]) -> Iterator[Drop]:
    """Yield the matrices that nothing is made of."""
    origins = _origins(options, item)
    used = {depth for depths in origins.values() for depth in depths}
    for one in shared:
        made = one.rank or one.linear.layer in used
        if not made and one.linear.weight in item.source.tensors:
            reason = f"shares a matrix of block {origins[one.owner.layer][0]}"
            yield Drop(source=0, tensor=one.linear.weight, reason=reason)


def _origins(options: DepthOptions, item: Described) -> dict[int, tuple[int, ...]]:
    """Return for the first depth of each group the depths whose mean its matrices begin as."""
    assert options.loops is not None
    return recursion.origins_of(item.spec.layers, options.loops, options.sharing, options.start)


def _config(item: Described, made: Mapping[str, Any]) -> dict[str, object]:
    found = copy.deepcopy(adaptive.config_with(item.spec, {}, reference(item.spec, frozenset())))
    own: Any = found["adaptive"]
    own["model"]["recursion"] = dict(made)
    return found


def _exactness(options: DepthOptions, made: Mapping[str, Any]) -> Exactness:
    if not recursion.shared_depths(made["base"]):
        return Exactness(kind="exact", why="one loop shares nothing")
    if options.own_rank == FULL:
        return Exactness(
            kind="exact-fp32",
            why="residuals of full rank give back every matrix, before the stored dtype rounds",
        )
    return Exactness(
        kind="needs-training",
        why=f"blocks share matrices, and residuals of rank {options.own_rank} give back a part",
    )


def _notes(options: DepthOptions, item: Described, made: Mapping[str, Any]) -> tuple[str, ...]:
    """Return how many numbers the result has, and what comes next."""
    groups = recursion.shared_depths(made["base"])
    stored = [t for t in item.spec.tensors if t.name in item.source.tensors]
    before = sum(math.prod(tensor.shape) for tensor in stored)
    saved = recursion.saved_parameters(item.spec, made)
    added = recursion.residual_parameters(item.spec, made)
    after = before - saved + added
    told = [
        f"{len(groups)} groups of {options.loops} blocks share their matrices: {after:,} "
        f"parameters in place of {before:,} ({after / before:.1%}), of these {added:,} of "
        "residuals; embeddings, norms and biases are counted, FLOPs do not fall",
    ]
    if options.own_rank != FULL and groups:
        told.append(
            "`adaconvert finetune --distill` with --teacher of the source teaches the shared "
            "matrices and residuals what was lost"
        )
    return tuple(told)
