"""The plan of a standalone checkpoint: every tensor of the model, and adapters beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaconvert.arch.adapters import LORA
from adaconvert.methods.beside import config_beside
from adaconvert.methods.moefy.plan import dropped, target, whole
from adaconvert.methods.molora.parts import Adapters, Placed
from adaconvert.methods.sources import Described
from adaconvert.planning.ops import Plan, TargetTensor


def standalone_plan(
    adapters: Adapters,
    options: dict[str, object],
    item: Described,
    sources: Sequence[str],
    *,
    notes: Sequence[str] = (),
) -> Plan:
    """Return the plan of an adaptive checkpoint with routed adapters; not checked.

    Args:
        adapters: what its linears get.
        options: resolved options, JSON values only.
        item: the model, stock or adaptive.
        sources: fingerprints.
        notes: what the user should know besides.
    """
    return Plan(
        method="molora",
        options=options,
        sources=tuple(sources),
        targets=tuple(_targets(adapters, item)),
        drops=dropped(item),
        config=_config(adapters, item),
        exactness=adapters.exactness,
        notes=(*adapters.notes, *notes),
    )


def _targets(adapters: Adapters, item: Described) -> Iterator[TargetTensor]:
    own = {f"{one.linear.stored}.weight": one for one in adapters.placed}
    gone = {f"{one.linear.stored}.{name}" for one in adapters.placed for name in one.values}
    for tensor in item.spec.tensors:
        ref = item.source.tensors.get(tensor.name)
        if ref is None or tensor.name in gone:
            continue
        yield target(tensor.name, ref.dtype, ref.shape, whole(ref), tensor.layer)
        if tensor.name in own:
            yield from own_targets(own[tensor.name])


def own_targets(one: Placed) -> Iterator[TargetTensor]:
    """Yield the tensors of a linear's adapters under the names of a standalone checkpoint."""
    for name, value in one.values.items():
        full = f"{one.linear.stored}.{name}"
        yield target(full, value.dtype, value.expr.shape, value.expr, one.linear.layer)


def _config(adapters: Adapters, item: Described) -> dict[str, object]:
    return config_beside(item, {one.linear.path: {"linear": one.slot} for one in adapters.placed})


def dtypes_with(adapters: Adapters, item: Described) -> dict[str, str]:
    """Return the stored dtype of every tensor of the standalone form by name."""
    return {one.name: one.dtype for one in _targets(adapters, item)}


def config_with(adapters: Adapters, item: Described) -> dict[str, object]:
    """Return the config.json of the standalone form, whatever is written."""
    return _config(adapters, item)


def parameters(adapters: Adapters) -> int:
    """Return how many numbers adapters and routers hold."""
    values = (value for one in adapters.placed for value in one.values.values())
    return sum(math.prod(value.expr.shape) for value in values)


def uniform_rank(slot: Mapping[str, Any]) -> int:
    """Return the rank of the one LoRA that uniform gates are: E r."""
    adapters = slot["adapters"]
    assert adapters["kind"] == LORA
    return int(adapters["count"] * adapters["rank"])
