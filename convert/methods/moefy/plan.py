"""The plan of an adaptive checkpoint: neurons in another order, and a few tensors per layer more.

Any method that splits feed-forward networks builds its plan here: it says, per block, how the
network is partitioned and under which keys its fitted arrays come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adaconvert.arch import adaptive
from adaconvert.arch.adaptive import NEURON_ORDER, Partition
from adaconvert.arch.base import TensorSpec
from adaconvert.arch.sites import FfnSite, Part, ffn_site
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.estimate import reference
from adaconvert.planning.ops import (
    Bytes,
    Drop,
    Exactness,
    Expr,
    Fitted,
    Gather,
    Piece,
    Plan,
    TargetTensor,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitLayer:
    """How the network of one block is split.

    Attributes:
        layer: index of the block.
        partition: sizes, router and selection, as config.json states them.
        digest: sha256 of everything its arrays depend on besides the source weights.
        tensors: where a router tensor comes from, by its name after "router."; those that are not
            named here are fitted under `router_key`.
    """

    layer: int
    partition: Partition
    digest: str
    tensors: Mapping[str, Expr] = field(default_factory=dict)


def order_key(layer: int) -> str:
    """Return the key of the order of a block's neurons: int64 [f], see `ops.Gather`."""
    return f"order.{layer}"


def router_key(layer: int, name: str) -> str:
    """Return the key of a router tensor: float32, shaped as in `arch.adaptive.router_tensors`."""
    return f"router.{layer}.{name}"


def adaptive_plan(
    method: str,
    options: dict[str, object],
    item: Described,
    layers: Sequence[SplitLayer],
    *,
    exactness: Exactness,
    notes: Sequence[str] = (),
) -> Plan:
    """Return the checked plan of an adaptive checkpoint.

    Every tensor keeps its name, dtype and shape. Those that hold neurons of a split block are
    reordered bit for bit, all others are copies; a stored copy of a tied head stays too, so that
    `unmoefy` gives back what was there.

    Args:
        method: registered name.
        options: resolved options, JSON values only.
        item: the dense source.
        layers: the blocks that are split, each once.
        exactness: what step 0 promises.
        notes: what the user should know.
    """
    split = {layer.layer: layer for layer in layers}
    sites = {index: ffn_site(item.spec, index) for index in split}
    plan = Plan(
        method=method,
        options=options,
        sources=(item.source.fingerprint,),
        targets=tuple(_targets(item, split, sites)),
        drops=dropped(item),
        config=adaptive.config_of(
            item.spec,
            {index: layer.partition for index, layer in split.items()},
            reference(item.spec, frozenset(split)),
        ),
        exactness=exactness,
        notes=tuple(notes),
    )
    check_plan(plan, [item.source.tensors])
    return plan


def dropped(item: Described) -> tuple[Drop, ...]:
    """Return the source tensors no model reads, with the reasons; tied heads are not among them."""
    tied = {head for head, _ in item.audit.compare_ties}
    return tuple(
        Drop(source=0, tensor=name, reason=reason)
        for name, reason in item.audit.dropped.items()
        if name not in tied
    )


def _targets(
    item: Described, split: Mapping[int, SplitLayer], sites: Mapping[int, FfnSite]
) -> Iterator[TargetTensor]:
    stored = item.source.tensors
    parts = {
        part.tensor: (split[index], part) for index, site in sites.items() for part in site.parts
    }
    own = {
        index: list(adaptive.own_tensors(item.spec, sites[index], layer.partition))
        for index, layer in split.items()
    }
    last = {tensor.layer: tensor.name for tensor in item.spec.tensors if tensor.name in stored}
    for tensor in item.spec.tensors:
        if tensor.name not in stored:
            continue
        ref = stored[tensor.name]
        layer, part = parts.get(tensor.name, (None, None))
        expr: Expr = whole(ref)
        if layer is not None and part is not None and layer.partition.permuted:
            expr = permuted(ref, part, order_of(layer))
        yield target(tensor.name, ref.dtype, ref.shape, expr, tensor.layer)
        if tensor.layer in own and tensor.name == last[tensor.layer]:
            for extra in own[tensor.layer]:
                yield _own(split[tensor.layer], extra)


def order_of(layer: SplitLayer) -> Fitted:
    """Return the fitted order of a block's neurons."""
    sizes = layer.partition
    count = sizes.shared + sizes.experts * sizes.width
    return Fitted(key=order_key(layer.layer), shape=(count,), digest=layer.digest)


def _own(layer: SplitLayer, tensor: TensorSpec) -> TargetTensor:
    if tensor.role == NEURON_ORDER:
        return target(tensor.name, "I32", tensor.shape, order_of(layer), tensor.layer)
    name = tensor.name.rpartition(".router.")[2]
    expr = layer.tensors.get(name) or Fitted(
        key=router_key(layer.layer, name), shape=tensor.shape, digest=layer.digest
    )
    return target(tensor.name, "F32", tensor.shape, expr, tensor.layer)


def target(
    name: str, dtype: str, shape: tuple[int, ...], expr: Expr, layer: int | None
) -> TargetTensor:
    """Return a target tensor that may stand in any shard."""
    return TargetTensor(name=name, dtype=dtype, shape=shape, expr=expr, group=name, layer=layer)


def whole(ref: TensorRef) -> Bytes:
    """Return a stored tensor as it is."""
    piece = Piece(source=0, tensor=ref.name, start=0, nbytes=ref.nbytes)
    return Bytes(dtype=ref.dtype, shape=ref.shape, pieces=(piece,))


def permuted(ref: TensorRef, part: Part, order: Fitted | Bytes, *, inverse: bool = False) -> Gather:
    """Return a stored tensor with its neurons in another order."""
    return Gather(
        arg=whole(ref),
        shape=ref.shape,
        order=order,
        axis=part.axis,
        runs=part.runs,
        inverse=inverse,
    )
