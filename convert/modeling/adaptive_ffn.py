"""Feed-forward networks split into experts of which each token runs some.

A site keeps the stock module, its child modules and every tensor name; its class becomes a subclass
of the stock class that knows experts. Expert e holds the neurons [shared + e*m, shared + (e+1)*m)
of the stock matrices, whose neurons the conversion has put in that order; the first `shared`
neurons always run, selected experts weigh one, and the output bias is added once. With every expert
on, the stock forward runs, so the result is the dense network's.

Shapes: T tokens, d hidden size, f neurons, E experts, m = neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from .adaptive_context import Call, SiteAccount, current
from .adaptive_costs import matrix_size
from .adaptive_decode import RULES as DECODED
from .adaptive_execution import (
    Decoder,
    ExpertWeights,
    gathered_pairs,
    run_experts,
    run_routed,
)
from .adaptive_gather import observed, unrecorded
from .adaptive_knobs import neuron_flops
from .adaptive_linear import AdaptiveLinear
from .adaptive_routers import Router, grouped, make_router
from .adaptive_schema import RULES
from .adaptive_select import runs_all, select_experts
from .adaptive_tensors import Made, is_hooked, is_untouched, tensors_of


class AdaptiveFFN(nn.Module):
    """What a stock feed-forward class becomes a subclass of; see the module docstring.

    Attributes:
        adaptive_slot: which slot of the site it fills.
        adaptive_path: the site's path in the model.
        adaptive_spec: what the slot holds.
    """

    adaptive_slot = "ffn"
    adaptive_path: str
    adaptive_spec: dict[str, Any]
    adaptive_gated: bool
    adaptive_activation: Callable[[Tensor], Tensor]
    router: Router | None

    def adaptive_init(self, path: str, spec: Mapping[str, Any]) -> None:
        """Add the site's own tensors to the stock module."""
        self.adaptive_path = path
        self.adaptive_spec = dict(spec)
        names = spec["weights"]
        self.adaptive_gated = "gate" in names or "gate_up" in names
        # activations are stateless; kept out of the module tree so that the stock one stays alone
        object.__setattr__(self, "adaptive_activation", ACT2FN[spec["activation"]])
        self.router = make_router(
            spec["router"],
            spec["hidden"],
            spec["experts"]["count"],
            gated=self.adaptive_gated,
            activation=self.adaptive_activation,
        )
        if spec["partition"].get("permuted", True):
            order = torch.arange(spec["intermediate"], dtype=torch.int32)
            self.register_buffer("neuron_order", order)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = current()
        select = call.select(self.adaptive_path) or self.adaptive_spec["select"]
        wanted = "router_scores" in call.collected
        if runs_all(select, self.adaptive_spec["experts"]["count"]) and not wanted:
            if call.account is not None and not call.recomputing:
                self._count_all(call, hidden_states)
            stock: Tensor = super().forward(hidden_states, *args, **kwargs)
            return stock
        return self._routed(call, select, hidden_states)

    def _routed(self, call: Call, select: Mapping[str, Any], hidden_states: Tensor) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        real = call.flat_mask(x.shape[0])
        if real is None and not call.collected:
            found = self._in_one(x, select)
            if found is not None:
                out, chosen = found
                if call.account is not None and not call.recomputing:
                    self._count(call, chosen, None, self._pairs(chosen))
                return self._after(out).reshape(*hidden_states.shape[:-1], out.shape[-1])
        exact = select["rule"] == "top-k"
        gated, scores = self._scores(x, order_only=exact and not call.collected)
        chosen = select_experts(scores.detach(), select)
        selected = min(select["k"], chosen.shape[1]) if exact else None
        if real is not None:
            chosen, selected = chosen & real[:, None], None
        if call.collected:
            # recomputation must repeat every operation, so only the keeping is left out there
            self._collect(call, scores if real is None else scores[real])
        out, executed = self._run(x, chosen, gated, selected)
        if call.account is not None and not call.recomputing:
            self._count(call, chosen, real, executed)
        return out.reshape(*hidden_states.shape[:-1], out.shape[-1])

    def _in_one(self, x: Tensor, select: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
        """Return output and mask by one compiled graph; None where there is none."""
        if select["rule"] not in DECODED or not x.is_cpu:
            return None
        if self.router is None:
            # a graph does not round activations to 16 bits, so it would choose other neurons
            exact = x.dtype in (torch.float32, torch.float64)
            if self.adaptive_spec["router"]["kind"] != "gate" or not exact:
                return None
        if not unrecorded() or observed() or not self._all_untouched():
            return None
        decoder = self._decoder(self.router)
        if decoder is None:
            return None
        return run_routed(x, decoder, select["rule"], select[str(RULES[select["rule"]])])

    def _pairs(self, chosen: Tensor) -> int:
        """Return how many (token, neuron) pairs the graph of `_in_one` has computed."""
        weights = self._weights()
        if len(chosen) > 1 or weights is None:
            return len(chosen) * int(self.adaptive_spec["intermediate"])
        known = self.router is None
        return gathered_pairs(weights, [int(chosen.sum())], gate_known=known)

    def _decoder(self, router: Router | None) -> Decoder | None:
        """Return what compiles the step for the parameters as they are, None where nothing can."""

        def make() -> Decoder | None:
            weights = self._weights()
            return None if weights is None else Decoder(weights, router)

        found: Decoder | None = self._kept("decoder", self._own_tensors(), make)
        return found

    def _kept(self, name: str, tensors: list[Any], make: Callable[[], Any]) -> Any:
        """Return what was made of some parameters, made again where they or the split changed."""
        if torch.compiler.is_compiling() or observed():
            # stand-ins for parameters have no address
            return make()
        kept: dict[tuple[object, ...], Made] = self.__dict__.setdefault("adaptive_kept", {})
        # the same network is measured in several splits by giving it another `adaptive_spec`
        key = (name, self.adaptive_spec["experts"]["width"], self.adaptive_spec.get("shared", 0))
        known = kept.get(key)
        if known is None or not known.holds(tensors):
            known = kept[key] = Made(make(), tensors)
        return known.made

    def _own_tensors(self) -> list[Any]:
        """Return the parameters a compiled step is made of, to notice when one is replaced."""
        return [*tensors_of(self._matrices()), *self._router_tensors()]

    def _matrices(self) -> list[Any]:
        """Return the modules of the matrices that are this network's own."""
        own = vars(self)["_modules"]
        return [own[name] for name in self.adaptive_spec["weights"].values()]

    def _all_untouched(self) -> bool:
        hooked = self.router is not None and is_hooked(self.router)
        return not hooked and all(map(is_untouched, self._matrices()))

    def _scores(self, x: Tensor, *, order_only: bool = False) -> tuple[Tensor | None, Tensor]:
        """Return the activated gate where the router computes it, [T, f], and scores [T, E], or
        something cheaper that orders each token's experts alike."""
        spec = self.adaptive_spec
        experts, shared = spec["experts"]["count"], spec.get("shared", 0)
        kind = spec["router"]["kind"]
        if self.router is not None:
            return None, self.router(x, order_only=order_only)
        if kind == "gate":
            gated = self.adaptive_activation(self._gate(x))
            return gated, grouped(gated.abs().float(), experts, shared)
        if kind == "oracle":
            hidden = self._hidden(x).float() * self._down_norms(x.device)
            return None, grouped(hidden * hidden, experts, shared).sqrt()
        return None, x.new_ones(x.shape[0], experts, dtype=torch.float32)

    def _run(
        self, x: Tensor, chosen: Tensor, gated: Tensor | None, selected: int | None
    ) -> tuple[Tensor, int]:
        weights = None if torch.is_grad_enabled() else self._weights()
        if weights is not None:
            out, executed = run_experts(x, weights, chosen, gated=gated, selected=selected)
            return self._after(out), executed
        # what is left out may be infinite, and infinity times nothing is not nothing
        hidden = self._hidden(x, gated).masked_fill(~self._neuron_mask(chosen), 0)
        down = self.adaptive_spec["weights"].get("down")
        if down is not None:
            hidden = self._after(getattr(self, down)(hidden))
        return hidden, x.shape[0] * self.adaptive_spec["intermediate"]

    def _after(self, out: Tensor) -> Tensor:
        if self.training:
            for child in self.children():
                if isinstance(child, nn.Dropout):
                    out = child(out)
        return out

    def _gate(self, x: Tensor) -> Tensor:
        """Return what goes into the activation, [T, f]: of the gate, or of a plain network's up."""
        names = self.adaptive_spec["weights"]
        if "gate_up" in names:
            child = getattr(self, names["gate_up"])
            if type(child) is nn.Linear and is_untouched(child):
                # up runs for the chosen neurons alone
                weight, bias = child.weight.chunk(2)[0], child.bias
                return nn.functional.linear(x, weight, None if bias is None else bias.chunk(2)[0])
            fused: Tensor = child(x)
            return fused.chunk(2, dim=-1)[0]
        gate: Tensor = getattr(self, names.get("gate", names.get("up")))(x)
        return gate

    def _hidden(self, x: Tensor, gated: Tensor | None = None) -> Tensor:
        """Return what goes into the down projection, [T, f]; runs the modules, so adapters,
        quantised weights and hooks take part."""
        names = self.adaptive_spec["weights"]
        if "gate_up" in names:
            fused: Tensor = getattr(self, names["gate_up"])(x)
            gate, up = fused.chunk(2, dim=-1)
            return (self.adaptive_activation(gate) if gated is None else gated) * up
        if gated is None:
            gated = self.adaptive_activation(self._gate(x))
        if not self.adaptive_gated:
            return gated
        plain: Tensor = getattr(self, names["up"])(x)
        return gated * plain

    def _neuron_mask(self, chosen: Tensor) -> Tensor:
        """Return which neurons run, [T, f]."""
        spec = self.adaptive_spec
        routed = chosen.repeat_interleave(spec["experts"]["width"], dim=-1)
        shared = spec.get("shared", 0)
        if not shared:
            return routed
        return torch.cat([routed.new_ones(routed.shape[0], shared), routed], dim=-1)

    def _child_weights(self) -> dict[str, tuple[Tensor, Tensor | None]] | None:
        """Return (weight [out, in], bias) by role; None when a child is not an untouched matrix."""
        found = {}
        for role, name in self.adaptive_spec["weights"].items():
            child = getattr(self, name)
            if not is_untouched(child):
                return None
            weight = child.weight.T if type(child) is Conv1D else child.weight
            found[role] = (weight, child.bias)
        return found

    def _weights(self) -> ExpertWeights | None:
        """Return the experts' matrices; None when the modules themselves must run."""
        if "down" not in self.adaptive_spec["weights"]:
            return None
        children = self._matrices()
        if not all(map(is_untouched, children)):
            # what was made of matrices that are quantised or wrapped now would keep them alive
            self.__dict__.pop("adaptive_kept", None)
            return None
        found: ExpertWeights = self._kept("weights", tensors_of(children), self._new_weights)
        return found

    def _new_weights(self) -> ExpertWeights:
        found = self._child_weights()
        assert found is not None
        gate, gate_bias = found.get("gate", (None, None))
        if "gate_up" in found:
            weight, bias = found["gate_up"]
            (gate, up) = weight.chunk(2)
            gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
        else:
            up, up_bias = found["up"]
        down, down_bias = found["down"]
        spec = self.adaptive_spec
        return ExpertWeights(
            gate=gate,
            up=up,
            down=down,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
            activation=self.adaptive_activation,
            width=spec["experts"]["width"],
            shared=spec.get("shared", 0),
        )

    def _down_norms(self, device: torch.device) -> Tensor:
        """Return the norm of each neuron's output column, [f]; ones where the down projection is no
        matrix at hand (quantised, offloaded), so that the oracle then knows hidden units alone."""
        down = self._down()
        # what routed adapters add is left out
        known = down is not None and (is_untouched(down) or isinstance(down, AdaptiveLinear))
        if not known or not down.weight.is_floating_point() or down.weight.is_meta:
            return torch.ones(self.adaptive_spec["intermediate"], device=device)
        weight: Any = down.weight.T if isinstance(down, Conv1D) else down.weight
        norms: Tensor = torch.linalg.vector_norm(weight.float(), dim=0)
        return norms

    def _down(self) -> Any:
        """Return the module of the down projection, here or (BERT) in another module."""
        name = self.adaptive_spec["weights"].get("down")
        return self.__dict__.get("adaptive_down") if name is None else getattr(self, name)

    def _account(self, call: Call) -> SiteAccount:
        assert call.account is not None
        site = call.account.sites.get(self.adaptive_path)
        if site is None:
            site = call.account.sites[self.adaptive_path] = self._new_account()
        return site

    def _new_account(self) -> SiteAccount:
        spec = self.adaptive_spec
        d, f = spec["hidden"], spec["intermediate"]
        sizes = self._matrix_bytes()
        full = spec["router"]["kind"] == "gate"
        whole = sizes.get("gate_up", 0) // 2 or sizes.get("gate", sizes.get("up", 0))
        router_bytes = sum(t.numel() * t.element_size() for t in self._router_tensors())
        return SiteAccount(
            slot=self.adaptive_slot,
            neuron_flops=neuron_flops(spec),
            router_flops=0 if self.router is None else self.router.flops,
            gate_flops=2 * d * f if full else 0,
            neuron_bytes=(sum(sizes.values()) - whole * full) // f,
            router_bytes=router_bytes,
            gate_bytes=whole if full else 0,
        )

    def _matrix_bytes(self) -> dict[str, int]:
        """Return the weight bytes of the site's matrices by role."""
        modules = {r: getattr(self, n) for r, n in self.adaptive_spec["weights"].items()}
        sizes = {role: matrix_size(m) for role, m in {**modules, "down": self._down()}.items()}
        return {role: size[1] for role, size in sizes.items() if size is not None}

    def _router_tensors(self) -> list[Tensor]:
        if self.router is None:
            return []
        own = vars(self.router)
        return [*own["_parameters"].values(), *own["_buffers"].values()]

    def _count(self, call: Call, chosen: Tensor, real: Tensor | None, executed: int) -> None:
        spec = self.adaptive_spec
        site = self._account(call)
        tokens = chosen.shape[0] if real is None else int(real.sum())
        uses = chosen.sum(dim=0).cpu()
        site.tokens += tokens
        site.routed_tokens += tokens
        site.neurons += int(uses.sum()) * spec["experts"]["width"]
        site.neurons += tokens * spec.get("shared", 0)
        if executed == chosen.shape[0] * spec["intermediate"]:
            executed = tokens * spec["intermediate"]
        site.executed += executed
        site.experts = uses if site.experts is None else site.experts + uses

    def _count_all(self, call: Call, hidden_states: Tensor) -> None:
        spec = self.adaptive_spec
        site = self._account(call)
        total = hidden_states.numel() // hidden_states.shape[-1]
        real = call.flat_mask(total)
        tokens = total if real is None else int(real.sum())
        site.tokens += tokens
        site.neurons += tokens * spec["intermediate"]
        site.executed += tokens * spec["intermediate"]
        uses = torch.full((spec["experts"]["count"],), tokens, dtype=torch.int64)
        site.experts = uses if site.experts is None else site.experts + uses

    def _collect(self, call: Call, scores: Tensor) -> None:
        kept = call.collected.get("router_scores")
        if kept is not None and not call.recomputing:
            kept.setdefault(self.adaptive_path, []).append(scores)
