"""What the kernels compute, in the plainest torch there is: ground truth and fallback.

Any device and float dtype, differentiable in everything, no path chosen by speed.

Shapes: T tokens, d hidden size, f neurons, E experts, m = `width` neurons of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear


def expert_ffn(
    x: Tensor,
    mask: Tensor,
    *,
    up: Tensor,
    down: Tensor,
    width: int,
    activation: Callable[[Tensor], Tensor],
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: int = 0,
    gated: Tensor | None = None,
    weights_per_expert: Tensor | None = None,
) -> Tensor:
    """Return the feed-forward output of each token's selected experts, [T, d].

    Expert e is the neurons [shared + e*m, shared + (e+1)*m); the first `shared` always run, each
    expert's part counts `weights_per_expert` times (once when not given), the output bias once.

    Args:
        x: [T, d].
        mask: [T, E] bool, which experts run.
        up, gate: [f, d]; without gate the activation is that of `up`.
        down: [d, f].
        gate_bias, up_bias: [f].
        down_bias: [d].
        gated: [T, f] activated gate (activated `up` without gate) where it is known already.
        weights_per_expert: [T, E].

    Source: dynamic-k gating of experts with weight one is D2DMoE, Szatkowski et al. 2024,
    arXiv 2310.04361, section 3.
    """
    if gated is None:
        first = (up, up_bias) if gate is None else (gate, gate_bias)
        gated = activation(linear(x, *first))
    hidden = gated if gate is None else gated * linear(x, up, up_bias)
    factors = mask.to(hidden.dtype)
    if weights_per_expert is not None:
        factors = factors * weights_per_expert.to(hidden.dtype)
    routed = factors.repeat_interleave(width, dim=-1)
    always = routed.new_ones(routed.shape[0], shared)
    return linear(hidden * torch.cat([always, routed], dim=-1), down, down_bias)
