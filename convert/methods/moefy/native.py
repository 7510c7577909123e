"""`--native`: the split as a stock mixture in which every expert runs, exact before training.

With k = N and a router of zeros each expert weighs 1/N, which a factor N on down takes back; the
router is then trained and k lowered (LLaMA-MoE, 2406.16554).
Letters: N experts of m neurons, f neurons of the dense network, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adaconvert.arch.base import HostLayout, HostRequest, HostTensor, ModelSpec, Rows
from adaconvert.arch.host import Host, choose
from adaconvert.dtypes import BY_NAME
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.methods.hosting import Carrier, check_runs, dtype_of, rounds
from adaconvert.methods.moefy.config import Sizes
from adaconvert.methods.moefy.plan import order_key
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.experts import concat
from adaconvert.planning.accounting import check_plan, pieces_of
from adaconvert.planning.ops import (
    Apply,
    Bytes,
    Drop,
    Exactness,
    Expr,
    Fitted,
    Gather,
    Init,
    Piece,
    Plan,
    TargetTensor,
)


def native_plan(
    item: Described,
    sizes: Sizes,
    layers: Sequence[int],
    *,
    target: str,
    permuted: bool,
    options: dict[str, object],
    digest: str,
) -> tuple[Plan, str]:
    """Return the checked plan of a stock mixture, and its model_type.

    Args:
        item: the dense source.
        sizes: N and m; nothing is shared.
        layers: blocks to split.
        target: host architecture, or "auto".
        permuted: the neurons come in fitted orders, see `moefy.plan.order_key`.
        options: resolved options, JSON values only.
        digest: sha256 of what the orders depend on.

    Raises:
        OptionError: no stock mixture holds this model exactly.
    """
    host, layout = _host(item, sizes, layers, target)
    targets = tuple(_targets(item, layout, _Experts(item, sizes, permuted, layout, digest)))
    used = {piece.tensor for t in targets for piece in pieces_of(t.expr)}
    plan = Plan(
        method="moefy",
        options={**options, "target": host.model_type},
        sources=(item.source.fingerprint,),
        targets=targets,
        drops=tuple(
            Drop(source=0, tensor=name, reason=reason)
            for name, reason in item.audit.dropped.items()
            if name not in used
        ),
        config=layout.config,
        exactness=_exactness(any(rounds(t.expr, t.dtype) for t in targets)),
        notes=(*layout.notes, "the routers are zero: every expert runs and weighs the same"),
    )
    check_plan(plan, [item.source.tensors])
    return plan, host.model_type


def _exactness(lossy: bool) -> Exactness:
    if lossy:
        return Exactness(
            kind="exact-fp32",
            why="the same function before the stored dtype rounds what is computed; a power of two "
            "of experts rounds nothing",
        )
    return Exactness(
        kind="exact",
        why="every expert runs with weight 1/N, and down is N times that of the dense network",
    )


def _host(
    item: Described, sizes: Sizes, layers: Sequence[int], target: str
) -> tuple[Host, HostLayout]:
    spec = item.spec
    request = HostRequest(
        num_experts=sizes.experts,
        top_k=sizes.experts,
        expert_width=sizes.width,
        moe_layers=frozenset(layers),
    )
    host = choose(spec, request, target)
    dtype = item.source.tensors[spec.ffn_rows(layers[0])["up"].tensor].dtype
    check_runs(request, dtype, "--num-experts or --expert-width")
    return host, host.layout(spec, request, BY_NAME[dtype].config_name)


def _targets(item: Described, layout: HostLayout, experts: _Experts) -> Iterator[TargetTensor]:
    carrier = Carrier(stored=[item.source.tensors], base=0)
    default = item.source.tensors[item.spec.ffn_rows(0)["up"].tensor].dtype
    for tensor in layout.tensors:
        if tensor.carry is not None:
            expr = carrier.build(tensor.carry, tensor.shape)
        else:
            expr = experts.build(tensor)
        group = tensor.name
        if tensor.expert is not None:
            group = f"layer.{tensor.layer}.expert.{tensor.expert}"
        yield TargetTensor(
            name=tensor.name,
            dtype=dtype_of(expr, None, default),
            shape=tensor.shape,
            expr=expr,
            group=group,
            layer=tensor.layer,
            expert=tensor.expert,
        )


@dataclass(frozen=True, slots=True)
class _Experts:
    """Builds the expressions of everything a split block holds instead of its dense network."""

    item: Described
    sizes: Sizes
    permuted: bool
    layout: HostLayout
    digest: str

    def build(self, tensor: HostTensor) -> Expr:
        """Return the expression of a host tensor that is not carried over."""
        role = tensor.role
        if role in {"router", "shared_router"}:
            return Init(kind="constant", shape=tensor.shape, params=(("value", 0.0),))
        assert tensor.layer is not None
        if tensor.expert is not None:
            return self._expert(tensor.layer, role.removeprefix("expert_"), tensor.expert)
        parts = ("gate", "up") if role == "expert_gate_up" else ("down",)
        return concat(
            [self._expert(tensor.layer, p, e) for e in range(tensor.shape[0]) for p in parts],
            tensor.shape,
        )

    def _expert(self, layer: int, part: str, expert: int) -> Expr:
        rows = self.item.spec.ffn_rows(layer)[part]
        ref = self.item.source.tensors[rows.tensor]
        first = expert * self.sizes.width
        if self.permuted:
            expr: Expr = self._taken(layer, part, rows, ref, first)
        else:
            expr = self._cut(part, rows, ref, first)
        if part != "down":
            return expr
        if self.layout.down_fn is not None:
            expr = Apply(fn=self.layout.down_fn, shape=expr.shape, args=(expr,))
        factor = float(self.sizes.experts)
        return Apply(fn="scale", shape=expr.shape, args=(expr,), params=(("factor", factor),))

    def _taken(self, layer: int, part: str, rows: Rows, ref: TensorRef, first: int) -> Gather:
        """Return the neurons at [first, first + m) of the fitted order."""
        width = self.sizes.width
        spec: ModelSpec = self.item.spec
        shape = (spec.hidden, width) if part == "down" else (width, spec.hidden)
        return Gather(
            arg=_rows(ref, rows.start, rows.count),
            shape=shape,
            order=Fitted(key=order_key(layer), shape=(spec.intermediate,), digest=self.digest),
            axis=1 if part == "down" else 0,
            first=first,
        )

    def _cut(self, part: str, rows: Rows, ref: TensorRef, first: int) -> Bytes:
        """Return the neurons [first, first + m) as they are stored."""
        width = self.sizes.width
        if part != "down":
            return _rows(ref, rows.start + first, width)
        item = BY_NAME[ref.dtype].nbytes
        row = ref.shape[1] * item
        piece = Piece(
            source=0,
            tensor=ref.name,
            start=first * item,
            nbytes=width * item,
            stride=row,
            count=rows.count,
        )
        if width == ref.shape[1]:
            return _rows(ref, 0, rows.count)
        return Bytes(dtype=ref.dtype, shape=(rows.count, width), pieces=(piece,))


def _rows(ref: TensorRef, start: int, count: int) -> Bytes:
    """Return `count` rows of a stored matrix from row `start` on."""
    row = ref.nbytes // ref.shape[0]
    piece = Piece(source=0, tensor=ref.name, start=start * row, nbytes=count * row)
    return Bytes(dtype=ref.dtype, shape=(count, *ref.shape[1:]), pieces=(piece,))
