"""The penalty that makes activations sparse: the square Hoyer measure.

Shapes: T tokens, I neurons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: added to the sum of squares, so that a token without any activation has measure 0 and gradient 0.
EPSILON = 1e-15


def square_hoyer(activations: torch.Tensor, *, normalised: bool = False) -> torch.Tensor:
    """Return (sum |a|)^2 / (sum a^2) of each token, [..., I] -> [...], in float32.

    It is 1 when one neuron is active, I when all are equally, 0 when none is. Scaling a token's
    activations does not change it.

    Args:
        activations: any float dtype; 16-bit ones are widened first, as their sums of squares leave
            the range (EPSILON alone underflows in float16).
        normalised: divide by I, so that a coefficient carries over between widths. The paper does
            not: its 0.2 for I = 3072 is 614 here.

    Source: Szatkowski et al. 2024, arXiv 2310.04361; `relu_hoyer` in the official
        code, methods/dynamic_sparsification/sparse_finetuning.py, from where EPSILON is. Paper and
        code differ: the text describes this measure throughout, the scripts for BERT and GPT-2 use
        the sum of absolute values.
    """
    wide = activations.float()
    measure = wide.abs().sum(dim=-1).square() / (wide.square().sum(dim=-1) + EPSILON)
    return measure / wide.shape[-1] if normalised else measure


def mean_square_hoyer(
    activations: torch.Tensor, kept: torch.Tensor | None = None, *, normalised: bool = False
) -> torch.Tensor:
    """Return the mean of `square_hoyer` over tokens, a scalar; 0 when there is no token.

    Args:
        activations: [..., I].
        kept: bool [...], False at padding; all tokens count when None.
        normalised: as for `square_hoyer`.
    """
    measure = square_hoyer(activations, normalised=normalised)
    if kept is None:
        return measure.mean() if measure.numel() else measure.sum()
    weights = kept.to(measure.dtype)
    return (measure * weights).sum() / weights.sum().clamp_min(1)
