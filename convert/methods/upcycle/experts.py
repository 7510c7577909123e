"""Where the bytes of experts, shared experts and routers come from.

Shapes: H hidden size, I neurons of the dense FFN, m neurons of one expert, s of the shared expert,
N experts. gate and up are [neurons, H], down is [H, neurons]; neurons of the dense FFN are cut as
[0, s) shared (only "split") | shard 0 | shard 1 | ... | shard G-1, and expert e holds shard e mod
G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from adaconvert.arch.base import HostLayout, HostTensor, ModelSpec, Rows
from adaconvert.dtypes import BY_NAME
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.methods.upcycle.config import UpcycleConfig
from adaconvert.planning.ops import Apply, Bytes, Expr, Fitted, Init, Piece
from adaconvert.planning.seeds import seed_for

_PARTS = {"gate": ("gate",), "up": ("up",), "down": ("down",), "gate_up": ("gate", "up")}


def scales(granularity: int) -> dict[str, float]:
    """Return the factor on each matrix of a granular expert; their product on the linear path is G.

    The k chosen experts' weights sum to 1 while k/G copies of every shard are chosen, so the sum of
    experts is 1/G of the dense FFN before scaling. The gate stays untouched because SiLU is not
    homogeneous.
    Source: 2410.07524, section 3.2, for the total; up and down instead of its cube root on all
        three.
    """
    power = granularity.bit_length() - 1
    return {"gate": 1.0, "up": 2.0 ** math.ceil(power / 2), "down": 2.0 ** (power // 2)}


def concat(exprs: Sequence[Expr], shape: tuple[int, ...]) -> Expr:
    """Return the expressions one behind the other as one tensor of `shape`; copies stay copies."""
    if len(exprs) == 1 and exprs[0].shape == shape:
        return exprs[0]
    plain = [e for e in exprs if isinstance(e, Bytes)]
    if len(plain) == len(exprs) and len({e.dtype for e in plain}) == 1:
        pieces = tuple(piece for e in plain for piece in e.pieces)
        return Bytes(dtype=plain[0].dtype, shape=shape, pieces=pieces)
    return Apply(fn="concat", shape=shape, args=tuple(exprs))


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertBuilder:
    """Builds the expressions of everything a converted block holds instead of its dense FFN.

    Attributes:
        config: the run's options.
        specs, stored: for each source, its description and its tensors by name.
        layout: the host's layout.
        expert_width: m.
        first_routed: s when the shared expert holds neurons of its own, else 0.
        prompts_digest: identity of the prompts of `router_init` "hidden".
        rows: where the matrices of each FFN lie, found once; filled on use.
    """

    config: UpcycleConfig
    specs: Sequence[ModelSpec]
    stored: Sequence[Mapping[str, TensorRef]]
    layout: HostLayout
    expert_width: int
    first_routed: int
    prompts_digest: str = ""
    rows: dict[tuple[int, int], dict[str, Rows]] = field(default_factory=dict)

    def build(self, tensor: HostTensor) -> Expr:
        """Return the expression of one host tensor that is not carried over."""
        role = tensor.role
        if role == "router":
            return self._router(tensor)
        if role == "shared_router":
            return Init(kind="constant", shape=tensor.shape, params=(("value", 0.0),))
        if role.startswith("shared_"):
            return self._shared(tensor, role.removeprefix("shared_"))
        if role in {"expert_gate_up", "expert_downs"}:
            return self._fused(tensor)
        assert tensor.expert is not None, role
        assert role.startswith("expert_"), role
        return self._expert(tensor, role.removeprefix("expert_"), tensor.expert)

    def source_of(self, expert: int) -> int:
        """Return the source whose FFN becomes this expert: equal, consecutive shares for every
        source."""
        group, groups = (
            expert // self.config.granularity,
            self.config.experts // self.config.granularity,
        )
        return group * len(self.specs) // groups

    def _rows(self, source: int, layer: int) -> dict[str, Rows]:
        if (source, layer) not in self.rows:
            self.rows[source, layer] = self.specs[source].ffn_rows(layer)
        return self.rows[source, layer]

    def _slice(self, source: int, layer: int, part: str, first: int, count: int) -> Bytes:
        """Return neurons [first, first + count) of one matrix of a source's dense FFN."""
        rows = self._rows(source, layer)[part]
        ref = self.stored[source][rows.tensor]
        width, item = ref.shape[1], BY_NAME[ref.dtype].nbytes
        if part == "down" and count < width:
            shape: tuple[int, ...] = (rows.count, count)
            piece = Piece(
                source=source,
                tensor=rows.tensor,
                start=(rows.start * width + first) * item,
                nbytes=count * item,
                stride=width * item,
                count=rows.count,
            )
        else:
            taken = rows.count if part == "down" else count
            shape = (taken, width)
            start = rows.start + (0 if part == "down" else first)
            piece = Piece(
                source=source,
                tensor=rows.tensor,
                start=start * width * item,
                nbytes=taken * width * item,
            )
        return Bytes(dtype=ref.dtype, shape=shape, pieces=(piece,))

    def _expert(self, tensor: HostTensor, part: str, expert: int) -> Expr:
        """Return one matrix of one expert: cut, then dropped, noised and scaled as asked."""
        assert tensor.layer is not None
        shard = expert % self.config.granularity
        first = self.first_routed + shard * self.expert_width
        source = self.source_of(expert)
        expr: Expr = self._slice(source, tensor.layer, part, first, self.expert_width)
        shape = expr.shape
        name = f"layer.{tensor.layer}.expert.{expert}.{part}"
        if part == "down" and self.layout.down_fn is not None:
            expr = Apply(fn=self.layout.down_fn, shape=shape, args=(expr,))
        if self.config.drop > 0:
            expr = Apply(
                fn="drop",
                shape=shape,
                args=(expr,),
                params=(
                    ("axis", 1 if part == "down" else 0),
                    ("index_seed", self._index_seed(tensor.layer, expert, part)),
                    ("ratio", self.config.drop),
                ),
                seed=seed_for(self.config.seed, f"{name}.drop"),
            )
        if self.config.noise > 0:
            expr = Apply(
                fn="noise",
                shape=shape,
                args=(expr,),
                params=(("std", self.config.noise),),
                seed=seed_for(self.config.seed, f"{name}.noise"),
            )
        return self._scaled(expr, scales(self.config.granularity)[part])

    def _index_seed(self, layer: int, expert: int, part: str) -> int:
        own = f".{part}" if self.config.drop_index == "per-matrix" else ""
        return seed_for(self.config.seed, f"layer.{layer}.expert.{expert}{own}.index")

    def _scaled(self, expr: Expr, factor: float) -> Expr:
        if factor == 1.0:
            return expr
        return Apply(fn="scale", shape=expr.shape, args=(expr,), params=(("factor", factor),))

    def _fused(self, tensor: HostTensor) -> Expr:
        """Return all experts of a block as one tensor: [N, 2m, H] (gate, then up) or [N, H, m]."""
        parts = ("gate", "up") if tensor.role == "expert_gate_up" else ("down",)
        exprs = [self._expert(tensor, part, e) for e in range(tensor.shape[0]) for part in parts]
        return concat(exprs, tensor.shape)

    def _shared(self, tensor: HostTensor, role: str) -> Expr:
        """Return one matrix of the shared expert.

        A neutral one holds the first neurons' gate and up and a zero down, so that it contributes
        nothing and still receives gradients. A split one holds neurons of its own; where the host
        multiplies it by sigmoid(shared_router . x), the zero shared_router gives 1/2, which a
        factor 2 on down takes back.
        """
        assert tensor.layer is not None
        split = self.config.shared_experts == "split"
        if role == "down" and not split:
            return Init(kind="constant", shape=tensor.shape, params=(("value", 0.0),))
        width = tensor.shape[1] if role == "down" else tensor.shape[0] // len(_PARTS[role])
        exprs: list[Expr] = [self._slice(0, tensor.layer, part, 0, width) for part in _PARTS[role]]
        expr = concat(exprs, tensor.shape)
        if role != "down":
            return expr
        if self.layout.down_fn is not None:
            expr = Apply(fn=self.layout.down_fn, shape=tensor.shape, args=(expr,))
        return self._scaled(expr, 2.0 if self.layout.shared_gated else 1.0)

    def _router(self, tensor: HostTensor) -> Expr:
        """Return a router [N, H] whose rows are equal within each group of G experts."""
        assert tensor.layer is not None
        kind = self.config.router_init
        if kind == "zeros":
            return Init(kind="constant", shape=tensor.shape, params=(("value", 0.0),))
        if kind == "hidden":
            return Fitted(
                key=f"router.{tensor.layer}", shape=tensor.shape, digest=self.prompts_digest
            )
        return Apply(
            fn="router",
            shape=tensor.shape,
            args=self._ffn_norm(tensor.layer),
            params=(
                ("columns", tensor.shape[1]),
                ("kind", kind),
                ("repeat", self.config.granularity),
                ("rows", tensor.shape[0]),
            ),
            seed=seed_for(self.config.seed, f"layer.{tensor.layer}.router"),
        )

    def _ffn_norm(self, layer: int) -> tuple[Expr, ...]:
        """Return the weight of the norm before the FFN, or nothing where there is none."""
        for spec in self.specs[0].tensors:
            if spec.layer == layer and spec.role == "ffn_norm":
                ref = self.stored[0][spec.name]
                piece = Piece(source=0, tensor=ref.name, start=0, nbytes=ref.nbytes)
                expr: Expr = Bytes(dtype=ref.dtype, shape=ref.shape, pieces=(piece,))
                if self.specs[0].traits.norm == "rms_plus_one":
                    expr = Apply(fn="plus_one", shape=ref.shape, args=(expr,))
                return (expr,)
        return ()
