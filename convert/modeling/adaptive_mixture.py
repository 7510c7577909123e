"""Mixtures of experts of transformers with null experts beside the real ones.

A site keeps the stock block, its child modules and every tensor name. The block gets a child
`null_experts`; the classes of its router and of its experts become subclasses of the stock ones.
The router then returns what the stock one does, in the stock order, with J slots in place of k and
index -1 where a slot has no real expert; the experts drop such slots before they dispatch. Under
the rule "all" the stock block runs as it is.

Shapes: T tokens, d hidden size, n real and M null experts, k experts of the source, K' slots, J =
min(K', n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive_context import Call, SiteAccount, current
from .adaptive_dispatch import MixtureExperts, block, inside
from .adaptive_knobs import neuron_flops, null_flops, stock_flops
from .adaptive_mixed import mixed_class
from .adaptive_null import COMPUTING, Decision, NullExperts, decide
from .adaptive_schema import AdaptiveConfigError


@dataclass(frozen=True)
class Returned:
    """What a stock router returns: the places of its three tensors, and the dtype of the weights.

    Attributes:
        logits, weights, index: places.
        weights_like: "logits", "input", or "" for float32 whatever those are.
    """

    logits: int
    weights: int
    index: int
    weights_like: str

    def dtype(self, logits: Tensor, x: Tensor) -> torch.dtype:
        """Return the dtype of the weights for given logits and input."""
        return {"logits": logits.dtype, "input": x.dtype}.get(self.weights_like, torch.float32)

    def tuple(self, logits: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        """Return the three in the stock order."""
        named = {self.logits: logits, self.weights: weights, self.index: index}
        return tuple(named[place] for place in range(3))


_RETURNED: dict[type, Returned] = {}


def returned_by(router: nn.Module) -> Returned:
    """Return what a stock router returns; found by running a twin of it without memory, once per
    class.

    Raises:
        AdaptiveConfigError: it does not return logits, weights and indices.
    """
    stock = type(router)
    if stock not in _RETURNED:
        try:
            _RETURNED[stock] = _look(router)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise AdaptiveConfigError(
                f"{stock.__name__} is no router this code knows: {error}"
            ) from error
    return _RETURNED[stock]


def _look(router: Any) -> Returned:
    # more rows than slots, so that logits and weights differ in shape; bfloat16, so that what is
    # float32 is so whatever the model's dtype
    rows, hidden = router.top_k + 1, router.weight.shape[-1]
    stock: Any = type(router)
    twin = stock.__new__(stock)
    twin.__dict__.update(router.__dict__)
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    twin.__dict__["_parameters"] = {"weight": torch.empty(rows, hidden, **meta)}
    with torch.no_grad():
        found = stock.forward(twin, torch.empty(1, hidden, **meta))
    (index,) = (i for i, t in enumerate(found) if not t.is_floating_point())
    (logits,) = (i for i, t in enumerate(found) if i != index and t.shape[-1] == rows)
    (weights,) = {*range(len(found))} - {index, logits}
    is_float = found[weights].dtype == torch.float32
    like = "logits" if found[logits].dtype == found[weights].dtype else "input"
    return Returned(logits, weights, index, "" if is_float else like)


class MixtureRouter(nn.Module):
    """What the stock class of a mixture's router becomes a subclass of; called by itself, outside
    a block, it is the stock router."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(hidden_states, *args, **kwargs)
        site: AdaptiveMixture | None = block()
        if site is None:
            return found
        return site.adaptive_routed(hidden_states.reshape(-1, hidden_states.shape[-1]), found)


class AdaptiveMixture(nn.Module):
    """What the stock class of a sparse block becomes a subclass of; see the module docstring.

    Attributes:
        adaptive_slot: which slot of the site it fills.
        adaptive_path: the site's path in the model.
        adaptive_spec: what the slot holds.
        null_experts: the tensors of the null experts.
    """

    adaptive_slot = "ffn"
    adaptive_path: str
    adaptive_spec: dict[str, Any]
    adaptive_returned: Returned
    null_experts: NullExperts

    def adaptive_init(self, path: str, spec: Mapping[str, Any]) -> None:
        """Add the null experts to the stock block."""
        self.adaptive_path = path
        self.adaptive_spec = dict(spec)
        router, experts = self._child("router"), self._child("experts")
        self._check(router, experts)
        self.adaptive_returned = returned_by(router)
        self.null_experts = NullExperts(spec["null"], spec["hidden"], router.weight)
        router.__class__ = mixed_class(MixtureRouter, type(router))
        experts.__class__ = mixed_class(MixtureExperts, type(experts))

    # how many pairs there are depends on values, so under torch.compile blocks run between graphs
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with inside(self):
            return super().forward(*args, **kwargs)

    def _child(self, role: str) -> Any:
        name = self.adaptive_spec["mixture"][role]
        found = self._modules.get(name)
        if found is None:
            raise AdaptiveConfigError(f"{self.adaptive_path} has no {name}")
        return found

    def _check(self, router: Any, experts: Any) -> None:
        """Refuse a description that is not of this block."""
        spec = self.adaptive_spec
        wanted = (spec["experts"]["count"], spec["hidden"]), spec["mixture"]["top_k"]
        found = tuple(router.weight.shape), router.top_k
        if wanted != found or experts.num_experts != wanted[0][0]:
            raise AdaptiveConfigError(
                f"{self.adaptive_path} has a router of {list(found[0])} and {found[1]} experts per "
                f"token; its description says {list(wanted[0])} and {wanted[1]}"
            )
        mixture = spec["mixture"]
        # routers that have no such attribute have no choice
        for name, said in (
            ("norm_topk_prob", mixture["combine"] == "renorm"),
            ("routed_scaling_factor", mixture["scaling"]),
        ):
            does = getattr(router, name, said)
            if does != said:
                raise AdaptiveConfigError(
                    f"{self.adaptive_path} has a router with {name} {does!r}; its description says "
                    f"{said!r} (combine {mixture['combine']!r}, scaling {mixture['scaling']!r})"
                )

    @property
    def adaptive_router(self) -> nn.Module:
        """Return the router, without what may be wrapped around it (adapters)."""
        found: nn.Module = _base(self._child("router"))
        return found

    @property
    def adaptive_computes(self) -> bool:
        """Return whether null experts add to the output."""
        return self.adaptive_spec["null"]["kind"] in COMPUTING

    def adaptive_decide(self, x: Tensor, select: Mapping[str, Any] | None = None) -> Decision:
        """Return what the block decides for its input, with gradients where they are on. Rules
        without null experts have their logits as well, and margins of +inf.

        Args:
            x: [T, d].
            select: rule and value; what the call this runs in says when not given, or the
                configuration.
        """
        select = select or current().select(self.adaptive_path) or self.adaptive_spec["select"]
        with inside(None):
            found = self._child("router")(x)
        decision = self._decide(x, found, select)
        if select["rule"] == "null":
            return decision
        rows, _ = self._null(x)
        return replace(decision, null_logits=rows.to(decision.logits.dtype))

    def _null(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return null logits, [T, M], and their bias, [1]."""
        spec = self.adaptive_spec
        rows: tuple[Tensor, Tensor] = self.null_experts(
            x, experts=spec["experts"]["count"], wide=spec["mixture"]["float32"]
        )
        return rows

    def _decide(self, x: Tensor, stock: tuple[Tensor, ...], select: Mapping[str, Any]) -> Decision:
        """Return the decision, given what the stock router returns."""
        spec, at = self.adaptive_spec, self.adaptive_returned
        logits, first = stock[at.logits], stock[at.index]
        mixture, null, rule = spec["mixture"], spec["null"], select["rule"]
        source = {"combine": mixture["combine"], "scaling": mixture["scaling"], "first": first}
        if rule != "null":
            slots = mixture["top_k"] if rule == "all" else int(select["k"])
            slots = min(slots, spec["experts"]["count"])
            return decide(logits, logits[:, :0], slots=slots, **source)
        rows, bias = self._null(x)
        return decide(
            logits,
            rows,
            slots=null["slots"],
            beta=select.get("bias", bias),
            min_real=null["min_real"],
            weights_mode=null["weights"],
            gain=null["gain"],
            straight_through=torch.is_grad_enabled(),
            shares=self.adaptive_computes,
            **source,
        )

    def adaptive_routed(self, x: Tensor, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what the router returns, given what the stock router returned."""
        call = current()
        select = call.select(self.adaptive_path) or self.adaptive_spec["select"]
        at = self.adaptive_returned
        logits = found[at.logits]
        mask = call.flat_mask(len(x))
        stock = select["rule"] == "all"
        if stock and call.account is None and not call.collected:
            return self._with_null(found, logits, None)
        decision = self._decide(x, found, select)
        kept = decision.kept if mask is None else decision.kept & mask[:, None]
        if call.account is not None or call.collected:
            self._watch(call, x, found, select, decision, kept, mask)
        if stock:
            return self._with_null(found, logits, None)
        weights = decision.weights.masked_fill(~kept, 0).to(at.dtype(logits, x))
        index = decision.order.masked_fill(~kept, -1)
        shares = decision.null_weights
        if shares is not None and mask is not None:
            shares = shares.masked_fill(~mask[:, None], 0)
        return self._with_null(at.tuple(logits, weights, index), logits, shares)

    def _with_null(
        self, found: tuple[Tensor, ...], logits: Tensor, shares: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the router's tuple with a slot for every null expert that adds to the output;
        without shares it adds nothing."""
        if not self.adaptive_computes:
            return found
        at = self.adaptive_returned
        index, weights = found[at.index], found[at.weights]
        count = self.null_experts.weight.shape[0]
        null = torch.arange(-1, -1 - count, -1, device=index.device).expand(len(index), -1)
        if shares is None:
            shares = weights.new_zeros(len(weights), count)
        return at.tuple(
            logits,
            torch.cat([weights, shares.to(weights.dtype)], dim=-1),
            torch.cat([index, null.to(index.dtype)], dim=-1),
        )

    def _watch(
        self,
        call: Call,
        x: Tensor,
        stock: tuple[Tensor, ...],
        select: Mapping[str, Any],
        decision: Decision,
        kept: Tensor,
        mask: Tensor | None,
    ) -> None:
        """Count and collect.

        Recomputation must repeat every operation, so only the keeping is left out there.
        """
        found: dict[str, Any] = {"decisions": decision, "experts_run": kept.sum(dim=-1)}
        if "router_scores" in call.collected:
            known = select["rule"] == "null"
            rows = decision if known else self._decide(x, stock, {"rule": "null"})
            found["router_scores"] = rows.margins
        if call.recomputing:
            return
        for name, lists in call.collected.items():
            if name not in found:
                # what blocks or adapters tell
                continue
            value = found[name]
            if mask is not None and name != "decisions":
                value = value[mask]
            lists.setdefault(self.adaptive_path, []).append(value)
        if call.account is not None and not kept.is_meta:
            self._count(call.account.sites, decision.order, kept, mask, select["rule"])

    def _count(
        self,
        sites: dict[str, SiteAccount],
        order: Tensor,
        kept: Tensor,
        mask: Tensor | None,
        rule: str,
    ) -> None:
        spec = self.adaptive_spec
        site = sites.get(self.adaptive_path)
        if site is None:
            site = sites[self.adaptive_path] = self._new_account()
        tokens = len(kept) if mask is None else int(mask.sum())
        uses = torch.bincount(order[kept], minlength=spec["experts"]["count"]).cpu()
        site.tokens += tokens
        site.routed_tokens += tokens if rule == "null" else 0
        site.idle += tokens - int(kept.any(dim=-1).sum())
        run = int(uses.sum()) * spec["experts"]["width"]
        site.neurons += run
        site.executed += run
        site.experts = uses if site.experts is None else site.experts + uses

    def _new_account(self) -> SiteAccount:
        spec = self.adaptive_spec
        rows: Any = self.adaptive_router.weight
        null = self.null_experts
        matrices = sum(
            p.numel() * p.element_size() for p in _base(self._child("experts")).parameters()
        )
        return SiteAccount(
            neuron_flops=neuron_flops(spec),
            router_flops=null_flops(spec),
            gate_flops=stock_flops(spec),
            neuron_bytes=matrices // spec["intermediate"],
            router_bytes=sum(p.numel() * p.element_size() for p in null.parameters()),
            gate_bytes=rows.numel() * rows.element_size(),
        )


def _base(module: Any) -> Any:
    """Return the module under whatever adapters are wrapped around it, or the copy of it that is
    trained in its place."""
    while not isinstance(module, MixtureRouter | MixtureExperts):
        copies = getattr(module, "modules_to_save", None)
        module = module.base_layer if copies is None else copies[module.active_adapters[0]]
    return module
