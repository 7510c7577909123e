"""Losses of a fine-tune; each is a mean over tokens, computed in float32.

Shapes: B sequences, S positions, V vocabulary, T tokens, f neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

#: label of positions whose token is not to be predicted.
IGNORED = -100
#: keeps 0/0 away from a token that activates nothing; the published value, which needs float32.
_EPSILON = 1e-15


def square_hoyer(a: Tensor) -> Tensor:
    """Return (sum |a|)^2 / sum a^2 of each token, [T, f] -> [T].

    1 for one active neuron, f for equal ones, 0 with zero gradient where nothing is active.

    Source: Szatkowski et al. 2024, 2310.04361, equation 2, and its published code.
    """
    wide = a.float()
    return wide.abs().sum(dim=-1).square() / (wide.square().sum(dim=-1) + _EPSILON)


def l1(a: Tensor) -> Tensor:
    """Return sum |a| of each token, [T, f] -> [T]."""
    return a.float().abs().sum(dim=-1)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"hoyer": square_hoyer, "l1": l1}


def language_model(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next tokens, [B, S, V] and [B, S] -> [].

    Position s predicts label s + 1; labels that are `IGNORED` do not count.
    """
    predicted = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    wanted = labels[:, 1:].reshape(-1)
    return functional.cross_entropy(predicted, wanted, ignore_index=IGNORED)


def distillation(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 x mean KL(teacher || student) over the predicted positions, [].

    Source: Hinton et al. 2015, 1503.02531, section 2; the square keeps gradients comparable.
    """
    counted = labels[:, 1:] != IGNORED
    ours = (logits[:, :-1][counted].float() / temperature).log_softmax(dim=-1)
    theirs = (teacher[:, :-1][counted].float() / temperature).log_softmax(dim=-1)
    total = functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return total * (temperature**2 / max(int(ours.shape[0]), 1))


def gradient_of(penalty: Callable[[Tensor], Tensor], a: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of sum(weights x penalty(a)) by `a`, in float32.

    Args:
        penalty: [T, f] -> [T].
        a: [T, f].
        weights: [T].
    """
    with torch.enable_grad():
        leaf = a.detach().float().requires_grad_()
        (found,) = torch.autograd.grad((penalty(leaf) * weights).sum(), leaf)
    return found
