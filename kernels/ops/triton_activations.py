"""The activations of experts and their derivatives, for use in Triton kernels."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(values, ACTIVATION: tl.constexpr):
    """Returns the activation of the values, as `expert_activations` defines it."""
    if ACTIVATION == "silu":
        return values * tl.sigmoid(values)
    elif ACTIVATION == "gelu":
        return values * 0.5 * (1.0 + tl.erf(values * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh u) = sigmoid(2u)
        return values * tl.sigmoid(_twice_inner(values))
    elif ACTIVATION == "relu":
        # NaN stays NaN
        return tl.where(values < 0, 0.0, values)
    else:
        positive = tl.where(values < 0, 0.0, values)
        return positive * positive


@triton.jit
def derived(above, values, ACTIVATION: tl.constexpr):
    """Returns the gradient of the values from that of the activated values."""
    if ACTIVATION == "silu":
        share = tl.sigmoid(values)
        return above * share * (1.0 + values * (1.0 - share))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(values * values * -0.5)
        return above * (0.5 * (1.0 + tl.erf(values * 0.7071067811865476)) + values * density)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(_twice_inner(values))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * values * values)
        return above * share * (1.0 + values * (1.0 - share) * inner)
    elif ACTIVATION == "relu":
        return tl.where(values <= 0, 0.0, above)
    else:
        return above * 2.0 * tl.where(values < 0, 0.0, values)


@triton.jit
def _twice_inner(values):
    """Returns 2 u, u = sqrt(2 / pi) (values + 0.044715 values^3)."""
    return 1.5957691216057308 * (values + 0.044715 * values * values * values)
