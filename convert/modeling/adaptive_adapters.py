"""Routed adapters on a linear: E low-rank adapters, or E scales, weighed token by token.

"lora": y = W x + sum_e g_e s_e B_e A_e x (MoLoRA, Zadouri et al. 2023, arXiv 2309.05444, section
3.2; with one A for all: HydraLoRA, Tian et al. 2024, arXiv 2404.19245). "ia3": y = (W x) (1 + sum_e
g_e v_e), or the input scaled so (MoV, 2309.05444, section 3.1; v_e is what IA3's vector differs
from one by, so that any gates start as the plain linear). B = 0 and v = 0 add exactly nothing.

Gates are computed in float32 (float64 of a float64 input). Nothing loops over adapters: "every
adapter" is two products over all of them, "some adapters" is `adaconvert.kernels` where that is
installed, and else the same two products with the weight 0 for what is not selected.

Shapes: T tokens, n inputs and m outputs of the linear, E adapters of rank r, K slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    from adaconvert.kernels import lora as _lora
    from adaconvert.kernels.plan import route_plan as _route_plan
except ImportError:
    _kernels: Any = None
    _planned: Any = None
else:
    _kernels, _planned = _lora.grouped_lora, _route_plan

from .adaptive_routers import Router


class Gates(NamedTuple):
    """How much each adapter counts for each token.

    Attributes:
        weights: [T, K] float32.
        adapters: [T, K] which adapter a slot is of, below 0 for none; None: slot e is adapter e.
        plan: the slots in the order of the adapters, where kernels are to run them; see `planned`.
    """

    weights: Tensor
    adapters: Tensor | None = None
    plan: Any = None

    def dense(self, experts: int) -> Tensor:
        """Return the weight of every adapter, [T, E]."""
        if self.adapters is None:
            return self.weights
        # a slot of no adapter has the weight 0
        wide = self.weights.new_zeros(self.weights.shape[0], experts)
        return wide.scatter_add(1, self.adapters.clamp_min(0), self.weights)


def gates_of(logits: Tensor, select: Mapping[str, Any]) -> Gates:
    """Return the gates of a rule.

    Args:
        logits: [T, E] float32.
        select: {"rule", its value, "renormalize"}: "soft" is the softmax, "top-k" its k largest,
            "top-p" the fewest that reach p together, both divided by their sum with
            "renormalize"; "uniform" 1 / E; "sigmoid" one sigmoid each (PHATGOOSE's gate in
            training, 2402.05859, equation 3).
    """
    rule = select["rule"]
    if rule == "uniform":
        return Gates(torch.full_like(logits, 1 / logits.shape[-1]))
    if rule == "sigmoid":
        return Gates(logits.sigmoid())
    shares = logits.softmax(dim=-1)
    # shares that round away would leave the sum before an adapter at 1
    if rule == "soft" or (rule == "top-p" and select["p"] >= 1):
        return Gates(shares)
    if rule == "top-k":
        weights, adapters = shares.topk(min(int(select["k"]), shares.shape[-1]), dim=-1)
    else:
        weights, adapters = shares.sort(dim=-1, descending=True, stable=True)
        before = weights.detach().cumsum(dim=-1) - weights.detach()
        kept = before < select["p"]
        # the first is kept whatever p is
        kept = torch.cat((torch.ones_like(kept[:, :1]), kept[:, 1:]), dim=-1)
        weights, adapters = weights * kept, torch.where(kept, adapters, -1)
    if select.get("renormalize"):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Gates(weights, adapters)


def planned(gates: Gates, experts: int) -> Gates:
    """Return gates with the plan that all linears they hold for share, where kernels run them."""
    if _planned is None or gates.adapters is None or gates.plan is not None:
        return gates
    return gates._replace(plan=_planned(gates.adapters, experts))


def runs_selected(x: Tensor, gates: Gates, a: Tensor, b: Tensor) -> bool:
    """Return whether `add_adapters` computes nothing but what is selected."""
    if _kernels is None or gates.adapters is None or a.shape[0] != b.shape[0]:
        return False
    plan, device, dtype = planned(gates, b.shape[0]).plan, x.device.type, x.dtype
    # what the kernel computes in
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
    cast = x.new_empty(x.shape, dtype=dtype)
    return bool(_lora.choose_form(plan, cast, a, b)[0] == "sorted")


def add_adapters(
    x: Tensor,
    out: Tensor,
    gates: Gates,
    *,
    a: Tensor,
    b: Tensor,
    scaling: float | Sequence[float],
) -> Tensor:
    """Return out + sum_e g_e s_e B_e A_e x, [T, m] in the dtype of `out`.

    Args:
        x: [T, n].
        out: [T, m] of the linear itself.
        gates: of the T tokens.
        a: [E, r, n], or [1, r, n] where the adapters share one.
        b: [E, m, r].
        scaling: s of all, or of each.
    """
    experts = b.shape[0]
    if _kernels is not None and gates.adapters is not None and a.shape[0] == experts:
        plan = planned(gates, experts).plan
        each = scaling if isinstance(scaling, int | float) else x.new_tensor(scaling).float()
        found: Tensor = _kernels(x, out, plan, gates.weights, a=a, b=b, scaling=each)
        return found
    weights = gates.dense(experts)
    if isinstance(scaling, int | float):
        weights = weights * scaling
    else:
        weights = weights * weights.new_tensor(scaling)
    low = functional.linear(x, a.reshape(-1, a.shape[-1]).to(x.dtype))
    parts = low.reshape(x.shape[0], a.shape[0], -1)
    # [T, E, r]: shared ones are weighed E times
    weighed = (parts * weights[..., None]).to(low.dtype).reshape(x.shape[0], -1)
    wide = b.permute(1, 0, 2).reshape(b.shape[1], -1)
    return out + functional.linear(weighed, wide.to(weighed.dtype)).to(out.dtype)


def scale_by(x: Tensor, gates: Gates, vectors: Tensor) -> Tensor:
    """Return x (1 + sum_e g_e v_e), [T, n] in the dtype of `x`; `vectors` is [E, n]."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # autocast would round 1 + v to 1
    with torch.autocast(x.device.type, enabled=False):
        factor = 1 + gates.dense(vectors.shape[0]).to(wide) @ vectors.to(wide)
        return (x.to(wide) * factor).to(x.dtype)


def uniform_lora(a: Tensor, b: Tensor, scaling: float | Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the one adapter that uniform gates are: A [E*r, n] and B [m, E*r], scaling in B."""
    experts, _, rank = b.shape
    each = torch.as_tensor(scaling, dtype=b.dtype, device=b.device).expand(experts) / experts
    stacked = (b * each[:, None, None]).permute(1, 0, 2).reshape(b.shape[1], -1)
    return a.expand(experts, -1, -1).reshape(experts * rank, -1), stacked


class AdapterRouter(Router):
    """Logits of each adapter from the input of the linear, or of its block.

    "dot" is a linear router; "abs" is the size of the projection on a prototype (Arrow, Ostapenko
    et al. 2024, arXiv 2405.11157, section 3.2). With "layernorm" the input is standardised first
    (PHATGOOSE, Muqeeth et al. 2024, arXiv 2402.05859, section 3.2; its rows are standardised when
    they are stored).
    """

    weight: Tensor

    def __init__(self, inputs: int, experts: int, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.add("weight", experts, inputs)
        self.score, self.norm = spec.get("score", "dot"), spec.get("norm", "none")
        self.scale = float(spec.get("scale", 1.0))
        self.flops = 2 * inputs * experts

    def forward(self, x: Tensor, *, order_only: bool = False) -> Tensor:
        """Return the logits, [..., n] -> [..., E] float32."""
        # of a router for every block, which may be on several devices
        x = x.to(self.weight.device)
        return logits_of(x, self.weight, score=self.score, norm=self.norm, scale=self.scale)


def logits_of(
    x: Tensor, weight: Tensor, *, score: str = "dot", norm: str = "none", scale: float = 1.0
) -> Tensor:
    """Return the logits of each adapter, [..., n] -> [..., E] in float32 (float64 of float64).

    Args:
        x: input.
        weight: [E, n].
        score: "dot" or "abs".
        norm: "none" or "layernorm".
        scale: factor of every logit.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    with torch.autocast(x.device.type, enabled=False):
        if norm == "layernorm":
            wide = functional.layer_norm(wide, wide.shape[-1:])
        logits = functional.linear(wide, weight.to(wide.dtype))
    return (logits.abs() if score == "abs" else logits) * scale


class RoutedAdapters(nn.Module):
    """The adapters of one linear.

    Attributes:
        a, b: [E, r, n] ([1, r, n] where shared) and [E, m, r] of "lora".
        vectors: [E, n or m] of "ia3".
    """

    def __init__(
        self, spec: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.kind, self.count = spec["kind"], int(spec["count"])
        self.scaling = spec.get("scaling", 1.0)
        self.on_input = spec.get("on") == "input"
        self._shares_a = spec.get("share") == "a"
        made: dict[str, tuple[int, ...]] = {}
        if self.kind == "lora":
            made["a"] = (1 if self._shares_a else self.count, spec["rank"], spec["input"])
            made["b"] = (self.count, spec["output"], spec["rank"])
        else:
            made["vectors"] = (self.count, spec["input" if self.on_input else "output"])
        for name, shape in made.items():
            zeros = torch.zeros(*shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(zeros))

    @property
    def takes_plans(self) -> bool:
        """Return whether `after` runs selected adapters by kernels."""
        return self.kind == "lora" and _kernels is not None and not self._shares_a

    def runs_selected(self, x: Tensor, gates: Gates) -> bool:
        """Return whether nothing but what is selected is computed for x, [T, n]."""
        parts: Any = self
        return self.kind == "lora" and runs_selected(x, gates, parts.a, parts.b)

    def before(self, x: Tensor, gates: Gates) -> Tensor:
        """Return what the linear gets, [T, n]."""
        if not self.on_input:
            return x
        vectors: Any = self.vectors
        return scale_by(x, gates, vectors)

    def after(self, x: Tensor, out: Tensor, gates: Gates) -> Tensor:
        """Return what the linear gives with its adapters, [T, m]; `out` is its own output."""
        if self.kind == "lora":
            parts: Any = self
            return add_adapters(x, out, gates, a=parts.a, b=parts.b, scaling=self.scaling)
        vectors: Any = self.vectors
        return out if self.on_input else scale_by(out, gates, vectors)
