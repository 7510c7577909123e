"""Routers: from the input of a feed-forward network to one score per expert.

They compute in float32 (float64 for a float64 model) whatever the model's dtype, because a rounded
score changes which expert runs. Shapes: T tokens, d hidden size, f neurons, E experts, w router
width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _unit(x: Tensor) -> Tensor:
    return nn.functional.normalize(x, dim=-1, eps=1e-12)


class Router(nn.Module):
    """A router with tensors of its own.

    Attributes:
        flops: of scoring one token.
    """

    flops: int

    def forward(self, x: Tensor, *, order_only: bool = False) -> Tensor:
        """Return the scores of each token, [T, d] -> [T, E]; not negative.

        Args:
            order_only: something cheaper will do that orders each token's experts as scores do.
        """
        raise TypeError(f"{type(self).__name__} has no forward")

    def add(self, name: str, *shape: int) -> None:
        """Make the float32 parameter `name`; it is filled from the checkpoint."""
        self.register_parameter(name, nn.Parameter(torch.zeros(*shape, dtype=torch.float32)))


class LinearRouter(Router):
    """Softmax of cosines with one vector per expert.

    "param-center" (MoEfication, 2110.01786, and EMoE, 2310.10908): the vector is the mean of the
    expert's normalised weight rows, its length kept; "similarity": the mean row, normalised.
    """

    weight: Tensor

    def __init__(self, hidden: int, experts: int, *, normalised: bool) -> None:
        super().__init__()
        self.normalised = normalised
        self.add("weight", experts, hidden)
        self.flops = 2 * hidden * experts

    def forward(self, x: Tensor, *, order_only: bool = False) -> Tensor:
        wide = _wide(x)
        weight = self.weight.to(wide.dtype)
        if self.normalised:
            weight = _unit(weight)
        if order_only:
            # neither the token's length nor the softmax changes the order
            return nn.functional.linear(wide, weight)
        return (_unit(wide) @ weight.T).softmax(dim=-1)


class AnalyticRouter(Router):
    """The activation of one representative neuron per expert (CMoE, 2502.04416, section 3.3).

    score = |up.x * act(gate.x)| on normalised rows and input, plus a bias that balances load; a
    plain network has no gate: |act(up.x)|.
    """

    gate: Tensor
    up: Tensor
    bias: Tensor

    def __init__(self, hidden: int, experts: int, *, gated: bool, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        if gated:
            self.add("gate", experts, hidden)
        self.add("up", experts, hidden)
        self.register_buffer("bias", torch.zeros(experts, dtype=torch.float32))
        self.gated = gated
        self.flops = 2 * hidden * experts * (2 if gated else 1)

    def forward(self, x: Tensor, *, order_only: bool = False) -> Tensor:
        unit = _unit(_wide(x))
        hidden = unit @ self.up.to(unit.dtype).T
        if self.gated:
            hidden = hidden * self.activation(unit @ self.gate.to(unit.dtype).T)
        else:
            hidden = self.activation(hidden)
        return (hidden.abs() + self.bias).clamp_min(0)


class ContributionRouter(Router):
    """Predicts the norm of each expert's output (D2DMoE, 2310.04361): |w2 relu(w1 x)|."""

    w1: Tensor
    w2: Tensor

    def __init__(self, hidden: int, experts: int, *, width: int) -> None:
        super().__init__()
        self.add("w1", width, hidden)
        self.add("w2", experts, width)
        self.flops = 2 * width * (hidden + experts)

    def forward(self, x: Tensor, *, order_only: bool = False) -> Tensor:
        wide = _wide(x)
        hidden = torch.relu(wide @ self.w1.to(wide.dtype).T)
        return (hidden @ self.w2.to(wide.dtype).T).abs()


def make_router(
    spec: Mapping[str, Any], hidden: int, experts: int, *, gated: bool, activation: Activation
) -> Router | None:
    """Return the router module of a site's spec, None for the kinds that have no tensors."""
    kind = spec["kind"]
    if kind in {"param-center", "similarity"}:
        return LinearRouter(hidden, experts, normalised=kind == "similarity")
    if kind == "analytic":
        return AnalyticRouter(hidden, experts, gated=gated, activation=activation)
    if kind == "contribution":
        return ContributionRouter(hidden, experts, width=int(spec["width"]))
    return None


def grouped(values: Tensor, experts: int, shared: int) -> Tensor:
    """Return per-neuron values summed over each routed expert, [T, f] -> [T, E]."""
    routed = values[:, shared:]
    if routed.shape[-1] == experts:
        return routed
    return routed.reshape(values.shape[0], experts, -1).sum(dim=-1)
