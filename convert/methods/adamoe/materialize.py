"""`--materialize`: null experts as experts of zeros in a stock mixture, which saves nothing.

Its router has n + M rows, its k is K', and the chosen experts of zeros take their part of the
weights. Where null rows are copies, each real expert shares its weight with M/n of them, which a
factor 1 + M/n on `down` takes back; so the result computes what the source computes, in every
runtime of the architecture.
Letters: n real experts of m neurons, M null ones, K' slots, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adaconvert.arch import adaptive, registry
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.null_experts import MODULE, NullExperts, nulled
from adaconvert.dtypes import BY_NAME, nbytes_of
from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.methods.adamoe.base import Base, stored_targets
from adaconvert.methods.adamoe.plan import copies
from adaconvert.methods.hosting import rounds
from adaconvert.methods.moefy.plan import whole
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.experts import concat
from adaconvert.planning.ops import (
    Apply,
    Bytes,
    Drop,
    Exactness,
    Expr,
    Init,
    Plan,
    TargetTensor,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros:
    """The experts of zeros a mixture gets.

    Attributes:
        base: the mixture.
        nulls: M, K' and the factor on `down`.
        rows: block -> what its null rows are.
    """

    base: Base
    nulls: NullExperts
    rows: Mapping[int, Expr]


def copied_rows(base: Base, nulls: NullExperts) -> dict[int, Expr]:
    """Return null rows that are copies of the routers' rows, by block."""
    routers = {tensor.name: tensor for tensor in base.targets}
    found = {}
    for block in base.blocks:
        router = routers[block.router_tensor]
        found[block.layer] = copies(router.expr, (nulls.count, *router.shape[1:]))
    return found


def zeros_of(item: Described) -> Zeros:
    """Return what a checkpoint with null experts becomes as a stock mixture.

    Raises:
        OptionError: a stock mixture cannot hold it; says why.
    """
    assert item.spec.adaptive is not None
    spec = registry.describe(_stock_config(item), item.source.tensors)
    found = list(nulled(spec, item.spec.adaptive))
    _check_same(item, [nulls for _, nulls in found])
    blocks = tuple(block for block, _ in found)
    if len(blocks) < len({t.layer for t in spec.tensors if t.role == "router"}):
        raise _refused(item, "only some of its sparse blocks have null experts")
    names = {t.name for t in spec.tensors}
    base = Base(
        spec=spec,
        blocks=blocks,
        targets=tuple(stored_targets(spec, item)),
        drops=tuple(
            Drop(source=0, tensor=name, reason="null experts; their rows are in the router")
            for name in item.source.tensors
            if name not in names and not name.endswith(f".{MODULE}.weight")
        ),
        config=spec.config,
        options={},
    )
    stored = item.source.tensors
    rows = {b.layer: whole(stored[f"{b.stored}.{MODULE}.weight"]) for b in blocks}
    return Zeros(base=base, nulls=found[0][1], rows=rows)


def _stock_config(item: Described) -> dict[str, object]:
    return adaptive.dense_config(item.source.config)


def _check_same(item: Described, found: Sequence[NullExperts]) -> None:
    """Hold blocks to null experts that a stock mixture can hold, the same in all of them.

    Raises:
        OptionError: naming what it cannot hold.
    """
    first = found[0]
    for nulls in found:
        if replace(nulls, target=None, start=None) != replace(first, target=None, start=None):
            raise _refused(item, "its blocks differ in their null experts")
    reasons = {
        f"null experts of kind {first.kind}": first.kind != "zero",
        "weights of the real experts alone (null.weights 'real')": first.weights != "selected",
        "a real expert in every token (null.min_real 1)": first.min_real != 0,
        f"the rule {escape(first.select.get('rule'), 40)}": first.select.get("rule") != "null",
        "a null bias of its own in the rule": first.select.get("bias") is not None,
    }
    for what, is_held in reasons.items():
        if is_held:
            raise _refused(item, f"it has {what}")
    if first.start is not None and first.gain > 1 and first.slots % first.gain:
        raise _refused(
            item, f"its {first.slots} slots cut groups of {first.gain:g} rows that are still equal"
        )


def _refused(item: Described, why: str) -> OptionError:
    return OptionError(
        f"cannot be written as a stock mixture: {why}",
        where="--materialize",
        found=item.source.label,
        hint="A stock mixture holds null experts of kind zero, with --null-weights selected, no "
        "bias and --min-real 0.",
    )


def check_rows(item: Described, zeros: Zeros) -> None:
    """Hold the slots to whole groups of equal logits where null rows are still copies; reads them.

    An adaptive model gives a cut group's slots to the real expert, a stock router to any of it.

    Raises:
        OptionError: slots cut a group, or only some null rows are copies.
    """
    from adaconvert.io.reader import read_torch

    stored = item.source.tensors
    for block in zeros.base.blocks:
        router = read_torch(item.source, stored[block.router_tensor])
        rows = read_torch(item.source, stored[f"{block.stored}.{MODULE}.weight"])
        why = _cut(router, rows.to(router.dtype), zeros.nulls.slots)
        if why:
            raise _refused(item, f"in {block.path} {why}")


def _cut(router: torch.Tensor, rows: torch.Tensor, slots: int) -> str:
    """Return why slots cut groups of equal rows that hold a real expert; "" when they do not.

    Args:
        router: [n, d].
        rows: [M, d] of null experts.
        slots: K'.
    """
    import torch

    both: Any = torch.cat([router, rows])
    _, group, sizes = both.unique(dim=0, return_inverse=True, return_counts=True)
    held = group[: len(router)].unique()
    if int(sizes[held].max()) == 1:
        return ""
    size = int(sizes[held[0]])
    if bool((sizes != size).any()):
        return "only some rows of null experts are copies of real ones, whose logits tie"
    if slots % size:
        return f"{slots} slots cut groups of {size} equal rows, whose logits tie"
    return ""


def check_biases(item: Described) -> None:
    """Hold the null biases of a checkpoint to zero, which a stock router has; reads them.

    Raises:
        OptionError: one is not.
    """
    from adaconvert.io.reader import read_torch

    for name, ref in item.source.tensors.items():
        if not name.endswith(f".{MODULE}.bias"):
            continue
        value = float(read_torch(item.source, ref)[0])
        if value != 0.0:
            raise _refused(item, f"{name} is {value:g}, and a stock router has no bias")


def stock_plan(
    zeros: Zeros,
    options: dict[str, object],
    sources: Sequence[str],
    *,
    exactness: Exactness,
    notes: Sequence[str],
) -> Plan:
    """Return the plan of the stock mixture of n + M experts; not checked.

    Args:
        zeros: the mixture and its experts of zeros.
        options: resolved options, JSON values only.
        sources: fingerprints.
        exactness: what step 0 promises before the stored dtype rounds anything.
        notes: what the user should know.
    """
    targets = tuple(_targets(zeros))
    return Plan(
        method="adamoe",
        options=options,
        sources=tuple(sources),
        targets=targets,
        drops=zeros.base.drops,
        config=config_of(zeros.base.spec, zeros.nulls),
        exactness=_stored(exactness, zeros, targets),
        notes=tuple(notes),
    )


def _stored(exactness: Exactness, zeros: Zeros, targets: Sequence[TargetTensor]) -> Exactness:
    """Return what is left of a promise in the dtypes of the stored tensors."""
    if exactness.kind not in {"exact", "exact-fp32"}:
        return exactness
    routers = {block.router_tensor for block in zeros.base.blocks}
    reasons = []
    if exactness.kind == "exact" and any(rounds(t.expr, t.dtype) for t in targets):
        reasons.append("the stored dtype rounds the scaled down projections")
    if any(t.name in routers and BY_NAME[t.dtype].nbytes < 4 for t in targets):
        reasons.append(
            "run in the 16 bits the router is stored in, logits of two experts can tie, and a "
            "token then gets a part of one"
        )
    if not reasons:
        return exactness
    return Exactness(kind="exact-fp32", why="; ".join([exactness.why, *reasons]))


def config_of(spec: ModelSpec, nulls: NullExperts) -> dict[str, object]:
    """Return the config.json of the mixture with M experts more, in every spelling it has."""
    config = dict(spec.config)
    keys = registry.FAMILIES[spec.model_type].keys
    sizes = {"experts": spec.num_experts + nulls.count, "top_k": nulls.slots}
    for ours, size in sizes.items():
        names = [keys[ours].name, *keys[ours].aliases]
        for name in [name for name in names if name in config] or names[:1]:
            config[name] = size
    return config


def _targets(zeros: Zeros) -> Iterator[TargetTensor]:
    have = {tensor.name: tensor for tensor in zeros.base.targets}
    spec = registry.describe(config_of(zeros.base.spec, zeros.nulls), have)
    dtypes = {
        (t.layer, t.role): have[t.name].dtype for t in zeros.base.spec.tensors if t.name in have
    }
    for tensor in spec.tensors:
        if tensor.name not in have and tensor.optional:
            continue
        dtype = dtypes[tensor.layer, tensor.role]
        held = have.get(tensor.name)
        group = tensor.name
        if tensor.expert is not None:
            group = f"layer.{tensor.layer}.expert.{tensor.expert}"
        yield TargetTensor(
            name=tensor.name,
            dtype=dtype,
            shape=tensor.shape,
            expr=_expr(zeros, tensor, held, dtype),
            group=group,
            layer=tensor.layer,
            expert=tensor.expert,
        )


def _expr(zeros: Zeros, tensor: TensorSpec, held: TargetTensor | None, dtype: str) -> Expr:
    if held is None:
        return _zeros(tensor.shape)
    if tensor.role == "router" and tensor.layer is not None:
        return concat([held.expr, zeros.rows[tensor.layer]], tensor.shape)
    if tensor.role == "expert_down":
        return _scaled(held.expr, zeros.nulls.gain)
    if tensor.role in {"expert_gate_up", "expert_downs"}:
        factor = zeros.nulls.gain if tensor.role == "expert_downs" else 1.0
        parts = [_scaled(part, factor) for part in _experts(held.expr, held.shape[0])]
        parts += [_zeros(tensor.shape[1:])] * zeros.nulls.count
        return Apply(fn="concat", shape=tensor.shape, args=tuple(parts))
    return held.expr


def _zeros(shape: tuple[int, ...]) -> Init:
    return Init(kind="constant", shape=shape, params=(("value", 0.0),))


def _scaled(expr: Expr, factor: float) -> Expr:
    if factor == 1.0:
        return expr
    return Apply(fn="scale", shape=expr.shape, args=(expr,), params=(("factor", factor),))


def _experts(expr: Expr, count: int) -> list[Expr]:
    """Return the experts of a fused tensor one by one, so that none is computed with another."""
    if isinstance(expr, Apply) and expr.fn == "concat":
        return list(expr.args)
    if not isinstance(expr, Bytes):
        return [expr]
    pieces, shape = expr.pieces, expr.shape[1:]
    if len(pieces) == 1 and pieces[0].count == 1:
        size = nbytes_of(expr.dtype, shape)
        starts = [pieces[0].start + expert * size for expert in range(count)]
        pieces = tuple(replace(pieces[0], start=start, nbytes=size) for start in starts)
    each, over = divmod(len(pieces), count)
    if over:
        return [expr]
    parts = [pieces[each * expert : each * (expert + 1)] for expert in range(count)]
    return [Bytes(dtype=expr.dtype, shape=shape, pieces=part) for part in parts]
