"""`--as-moe`: a stock mixture whose experts are the dense network plus one adapter each.

Source: Branch-Train-MiX, Sukhbaatar et al. 2024, 2403.07816, with low-rank branches; the other
direction is MixLoRA's (2404.15159), which keeps the network shared. Experts are mixed by their
outputs, where adapters are mixed matrix by matrix; with one expert a token both are the same.
Letters: E adapters of rank r, n inputs and m outputs of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from adaconvert.arch.adapters import DOWN
from adaconvert.arch.base import Carry, HostTensor, ModelSpec, RuntimeVerdict
from adaconvert.arch.projections import stock_spec
from adaconvert.arch.runtimes import verdicts
from adaconvert.dtypes import BY_NAME
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.names import escape
from adaconvert.methods.hosting import Carrier, check_runs, rounds
from adaconvert.methods.molora.config import MoloraOptions
from adaconvert.methods.molora.parts import Adapters, Placed
from adaconvert.methods.sources import Described
from adaconvert.methods.upcycle.config import UpcycleConfig
from adaconvert.methods.upcycle.experts import ExpertBuilder
from adaconvert.methods.upcycle.plan import choose_host, exactness_of, host_targets
from adaconvert.planning.accounting import pieces_of
from adaconvert.planning.ops import (
    Apply,
    Drop,
    Exactness,
    Expr,
    Param,
    Plan,
    TargetTensor,
)

_FFN = ("gate", "up", "gate_up", "down")
#: linears of a feed-forward network that read what its router reads, the first that has adapters.
_LIKE_ROUTER = ("gate", "up", "gate_up")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRankExperts(ExpertBuilder):
    """Experts of a mixture: the dense matrix plus an adapter's B A.

    Attributes:
        placed: (block, role) -> adapters of a linear of its network.
    """

    placed: Mapping[tuple[int, str], Placed] = field(default_factory=dict)

    def _expert(self, tensor: HostTensor, part: str, expert: int) -> Expr:
        assert tensor.layer is not None
        expr: Expr = self._slice(0, tensor.layer, part, 0, self.expert_width)
        fused = (tensor.layer, "gate_up")
        found = self.placed.get((tensor.layer, part), self.placed.get(fused))
        if found is not None and (part != "down" or found.linear.role in DOWN):
            first = expr.shape[0] if part == "up" and found.linear.role == "gate_up" else 0
            expr = _added(expr, found, [_factor(found, expert)], first=first, expert=expert)
        if part == "down" and self.layout.down_fn is not None:
            expr = Apply(fn=self.layout.down_fn, shape=expr.shape, args=(expr,))
        return expr

    def _router(self, tensor: HostTensor) -> Expr:
        assert tensor.layer is not None
        like = router_like(self.placed, tensor.layer)
        if like is None:
            return ExpertBuilder._router(self, tensor)
        expr = like.values["router.weight"].expr
        scale = float(like.slot["router"]["scale"])
        if scale == 1.0:
            return replace(expr, shape=tensor.shape)
        return Apply(fn="scale", shape=tensor.shape, args=(expr,), params=(("factor", scale),))


@dataclass(frozen=True, slots=True, kw_only=True)
class MergingCarrier(Carrier):
    """Carries tensors over; what the adapters of other linears add with equal weights is added.

    Attributes:
        placed: name of a weight -> its linear's adapters.
    """

    placed: Mapping[str, Placed] = field(default_factory=dict)

    def _read(self, index: int, carry: Carry) -> Expr:
        expr = Carrier._read(self, index, carry)
        found = self.placed.get(str(carry.tensor))
        if found is None:
            return expr
        count = found.slot["adapters"]["count"]
        factors = [_factor(found, expert) / count for expert in range(count)]
        return _added(expr, found, factors, first=(carry.rows or (0, 0))[0])


def _factor(one: Placed, expert: int) -> float:
    scaling = one.slot["adapters"]["scaling"]
    return float(scaling[expert] if isinstance(scaling, list | tuple) else scaling)


def _added(
    expr: Expr, one: Placed, factors: Sequence[float], *, first: int, expert: int = 0
) -> Apply:
    """Return rows of a matrix plus those of adapters, each times its factor.

    Args:
        expr: rows of the matrix.
        one: the linear's adapters.
        factors: of adapters `expert`, `expert` + 1, ...
        first: first of the rows.
        expert: first adapter that is taken.
    """
    params: tuple[tuple[str, Param], ...] = (
        ("expert", expert),
        ("factors", ",".join(map(repr, factors))),
        ("first", first),
        ("transposed", one.linear.transposed),
    )
    args = (expr, one.values["adapters.a"].expr, one.values["adapters.b"].expr)
    return Apply(fn="add_low_rank", shape=expr.shape, args=args, params=params)


def router_like(placed: Mapping[tuple[int, str], Placed], layer: int) -> Placed | None:
    """Return the linear whose router can be that of a block's mixture: it reads the same input, and
    its logits are a product; None for none."""
    for role in _LIKE_ROUTER:
        one = placed.get((layer, role))
        if one is not None and "router.weight" in one.values:
            router = one.slot["router"]
            plain = router.get("score") == "dot" and router.get("norm") == "none"
            if router["reads"] == "module" and plain:
                return one
    return None


def moe_plan(
    options: MoloraOptions, adapters: Adapters, said: dict[str, object], item: Described
) -> Plan:
    """Return the plan of the mixture; not checked.

    Args:
        options: of the run.
        adapters: what its experts differ by.
        said: resolved options, JSON values only.
        item: the dense model, or it with its adapters.

    Raises:
        OptionError: no host holds it exactly, or the options do not fit.
        SourceError: no adapters are on feed-forward networks, or these are split.
    """
    spec = stock_spec(item.spec)
    _check(adapters, item, spec)
    config = _upcycling(options, adapters)
    request, host = choose_host(config, spec)
    main = item.source.tensors[spec.ffn_rows(0)["up"].tensor].dtype
    check_runs(request, main, where="intermediate_size")
    layout = host.layout(spec, request, BY_NAME[main].config_name)
    inner = _inner(adapters)
    outer = {one.linear.weight: one for one in adapters.placed if one.linear.role not in _FFN}
    stored = [item.source.tensors]
    builder = LowRankExperts(
        config=config,
        specs=[spec],
        stored=stored,
        layout=layout,
        expert_width=request.expert_width,
        first_routed=0,
        placed=inner,
    )
    carrier = MergingCarrier(stored=stored, base=0, placed=outer)
    targets = host_targets(config, layout, builder, carrier)
    lossy = any(rounds(target.expr, target.dtype) for target in targets)
    trained = all(router_like(inner, layer) for layer in range(spec.layers))
    return Plan(
        method="molora",
        options={**said, "target": host.model_type, "top_k": config.top_k},
        sources=(item.source.fingerprint,),
        targets=targets,
        drops=tuple(_drops(item, targets)),
        config=layout.config,
        exactness=_exactness(adapters, config, lossy, trained),
        notes=(*_told(adapters), *layout.notes, *_notes(outer, trained)),
    )


def _inner(adapters: Adapters) -> dict[tuple[int, str], Placed]:
    found = (one for one in adapters.placed if one.linear.role in _FFN)
    return {(one.linear.layer, one.linear.role): one for one in found}


def _check(adapters: Adapters, item: Described, spec: ModelSpec) -> None:
    where = escape(item.source.label)
    if spec.num_experts:
        raise SourceError(
            "is a mixture already, whose experts have no adapters", where=f"{where}/config.json"
        )
    sites = (item.spec.adaptive or {}).get("sites")
    split = [path for path, s in (sites if isinstance(sites, dict) else {}).items() if "ffn" in s]
    if split:
        raise SourceError("has split feed-forward networks", where=where, found=escape(split[0]))
    kinds = {one.slot["adapters"]["kind"] for one in adapters.placed}
    if kinds != {"lora"}:
        raise SourceError(
            "its adapters are vectors that scale (ia3), not a part of a matrix", where=where
        )
    if not _inner(adapters):
        raise SourceError(
            "no adapters are on feed-forward networks, so all experts would be the same",
            where=where,
            expected="adapters on linears such as up_proj",
        )
    counts = {one.slot["adapters"]["count"] for one in adapters.placed}
    if len(counts) > 1:
        raise SourceError("linears have several numbers of adapters", where=where)


def _upcycling(options: MoloraOptions, adapters: Adapters) -> UpcycleConfig:
    count = adapters.first["count"]
    selects = [one.slot["select"] for one in adapters.placed]
    usual = min((s["k"] for s in selects if s["rule"] == "top-k"), default=count)
    top_k = options.top_k or usual
    if top_k > count:
        raise OptionError(
            "is more experts than there are adapters", where="--top-k", expected=count, found=top_k
        )
    return UpcycleConfig(experts=count, top_k=top_k, target=options.target, seed=options.seed)


def _drops(item: Described, targets: Sequence[TargetTensor]) -> Iterator[Drop]:
    used = {piece.tensor for target in targets for piece in pieces_of(target.expr)}
    for name in item.source.tensors:
        if name not in used:
            usual = "a mixture has one router a block"
            yield Drop(source=0, tensor=name, reason=item.audit.dropped.get(name, usual))


def _exactness(adapters: Adapters, config: UpcycleConfig, lossy: bool, trained: bool) -> Exactness:
    if adapters.options and adapters.exactness.kind == "exact":
        return exactness_of(config, 1, lossy)
    if adapters.exactness.kind == "needs-training":
        return adapters.exactness
    if not trained:
        why = "experts of adapters behind routers that are not trained (Branch-Train-MiX)"
        return Exactness(kind="needs-training", why=why)
    return Exactness(
        kind="approximate",
        why="experts are mixed by their outputs, where adapters were mixed matrix by matrix and "
        "every linear by its own router",
    )


def _told(adapters: Adapters) -> tuple[str, ...]:
    """Return notes of the adapters; those of new ones are about training them as adapters."""
    is_new = bool(adapters.options) and adapters.exactness.kind == "exact"
    return () if is_new else adapters.notes


def _notes(outer: Mapping[str, Placed], trained: bool) -> Iterator[str]:
    if outer:
        yield (
            f"adapters of {len(outer)} linears outside feed-forward networks are merged into them "
            "with equal weights: a stock mixture routes nowhere else"
        )
    if trained:
        yield "the router of a block is that of its first linear with adapters, on the same input"
    else:
        yield (
            "routers are random: those of the adapters read another input, or are no plain product"
        )


def runtimes(plan: Plan) -> tuple[RuntimeVerdict, ...]:
    """Return what each runtime does with the mixture."""
    return verdicts(plan.config)
