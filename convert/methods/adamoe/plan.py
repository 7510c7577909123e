"""The plan of a checkpoint with null experts: every tensor of the mixture, and a few more a block.

Letters: n real experts, M null ones, k experts per token of the source, K' slots, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adaconvert.arch import adaptive, null_experts
from adaconvert.arch.base import TensorSpec
from adaconvert.arch.mixture import Mixture
from adaconvert.arch.null_experts import NullExperts
from adaconvert.methods.adamoe.base import Base
from adaconvert.methods.adamoe.config import OFF
from adaconvert.methods.adamoe.start import Start
from adaconvert.methods.moefy.plan import target
from adaconvert.methods.upcycle.experts import concat
from adaconvert.planning.estimate import reference
from adaconvert.planning.ops import Exactness, Expr, Fitted, Init, Plan, TargetTensor


def bias_key(layer: int) -> str:
    """Return the key of a fitted null bias: float32 [1]."""
    return f"null_bias.{layer}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Nulling:
    """What is done to a mixture.

    Attributes:
        base: the mixture.
        start: M, K' and how null experts begin.
        targets: share of k of each block that has one, by block.
        data: sha256 of the text biases are fitted on; None when none are.
        digest: sha256 of all that fitted biases depend on besides the source weights.
    """

    base: Base
    start: Start
    targets: Mapping[int, float] = field(default_factory=dict)
    data: str | None = None
    digest: str | None = None

    def nulls_of(self, block: Mixture) -> NullExperts:
        """Return the null experts of a block."""
        target = self.targets.get(block.layer)
        is_fitted = target is not None and self.digest is not None
        real = None if is_fitted else self.start.real
        return replace(self.start.nulls, target=target, start=real)


def nulled_plan(
    nulling: Nulling,
    options: dict[str, object],
    sources: Sequence[str],
    *,
    exactness: Exactness,
    notes: Sequence[str],
) -> Plan:
    """Return the plan of an adaptive checkpoint; not checked.

    Args:
        nulling: what is done to which mixture.
        options: resolved options, JSON values only.
        sources: fingerprints.
        exactness: what step 0 promises.
        notes: what the user should know.
    """
    base = nulling.base
    sites = {
        block.path: {"ffn": null_experts.slot(base.spec, block, nulling.nulls_of(block))}
        for block in base.blocks
    }
    layers = frozenset(block.layer for block in base.blocks)
    return Plan(
        method="adamoe",
        options=options,
        sources=tuple(sources),
        targets=tuple(_targets(nulling)),
        drops=base.drops,
        config=adaptive.config_with(base.spec, sites, reference(base.spec, layers)),
        exactness=exactness,
        notes=tuple(notes),
    )


def _targets(nulling: Nulling) -> Iterator[TargetTensor]:
    base = nulling.base
    blocks = {block.layer: block for block in base.blocks}
    last = {tensor.layer: tensor.name for tensor in base.targets}
    routers = {tensor.name: tensor for tensor in base.targets}
    for tensor in base.targets:
        yield tensor
        block = blocks.get(tensor.layer) if tensor.layer is not None else None
        if block is not None and last[tensor.layer] == tensor.name:
            yield from _own(nulling, block, routers[block.router_tensor])


def _own(nulling: Nulling, block: Mixture, router: TargetTensor) -> Iterator[TargetTensor]:
    """Yield the tensors of a block's null experts."""
    nulls = nulling.nulls_of(block)
    for tensor in null_experts.tensors(nulling.base.spec, block, nulls):
        dtype = router.dtype if tensor.role == "router_null" else "F32"
        yield target(
            tensor.name, dtype, tensor.shape, _expr(nulling, block, router, tensor), block.layer
        )


def _expr(nulling: Nulling, block: Mixture, router: TargetTensor, tensor: TensorSpec) -> Expr:
    if tensor.role == "router_null" and nulling.start.init == "exact":
        return copies(router.expr, tensor.shape)
    if tensor.role == "null_bias" and block.layer in nulling.targets and nulling.digest:
        return Fitted(key=bias_key(block.layer), shape=tensor.shape, digest=nulling.digest)
    off = tensor.role == "null_bias" and nulling.start.init == "bias"
    return Init(kind="constant", shape=tensor.shape, params=(("value", OFF if off else 0.0),))


def copies(router: Expr, shape: tuple[int, ...]) -> Expr:
    """Return the rows of a router, one copy of all behind the other, as one tensor of `shape`."""
    return concat([router] * (shape[0] // router.shape[0]), shape)
