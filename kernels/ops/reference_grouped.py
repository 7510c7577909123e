"""What `grouped_ffn` computes, in the plainest torch there is: one expert at a time, by masks.

Any device and float dtype, differentiated by autograd, no plan and no grouping. Ground truth of the
tests.

Shapes: T tokens, K slots per token, E experts, d hidden size, i intermediate size of one expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda values: values * torch.sigmoid(values),
    "gelu": lambda values: values * 0.5 * (1 + torch.erf(values * 0.5**0.5)),
    "gelu_tanh": lambda values: functional.gelu(values, approximate="tanh"),
    "relu": lambda values: values.clamp(min=0),
    "relu2": lambda values: values.clamp(min=0) ** 2,
}


def grouped_ffn(
    x: Tensor,
    weights_of: Tensor,
    experts_of: Tensor,
    *,
    first: Tensor,
    down: Tensor,
    activation: str,
    glu: bool,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Return each token's weighted sum of its experts' outputs, [T, d].

    Args:
        x: [T, d].
        weights_of: [T, K].
        experts_of: [T, K] integers; below 0 or from E on: no expert.
        first: [E, 2i, d], gate over up, with `glu`, else [E, i, d].
        down: [E, d, i].
        activation: a key of `ACTIVATIONS`.
        first_bias: [E, 2i] or [E, i].
        down_bias: [E, d].

    Source: Shazeer et al. 2017, arXiv 1701.06538, equation 1, with the experts of Shazeer 2020,
    arXiv 2002.05202.
    """
    out = torch.zeros_like(x)
    for expert in range(first.shape[0]):
        pre = linear(x, first[expert], None if first_bias is None else first_bias[expert])
        gate, up = pre.chunk(2, -1) if glu else (pre, 1)
        hidden = ACTIVATIONS[activation](gate) * up
        result = linear(hidden, down[expert], None if down_bias is None else down_bias[expert])
        share = (weights_of * (experts_of == expert)).sum(-1, keepdim=True)
        out = out + share.to(x.dtype) * result
    return out
