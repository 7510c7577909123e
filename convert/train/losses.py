"""Losses of a fine-tune; each is a mean over tokens, computed in float32, or float64 in float64.

Losses of routers are means over the real tokens of each sequence. What they weigh against each
other decides the caller, so that one large batch and many small ones give the same sum.

Shapes: B sequences, S positions, V vocabulary, T tokens, f neurons, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

#: label of positions whose token is not to be predicted.
IGNORED = -100
#: keeps 0/0 away from a token that activates nothing; the published value, which needs float32.
_EPSILON = 1e-15
#: smallest size the error of a router's prediction is relative to, in the sequence's mean.
_FLOOR = 0.01


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


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
    predicted = wide(logits[:, :-1].reshape(-1, logits.shape[-1]))
    wanted = labels[:, 1:].reshape(-1)
    total = functional.cross_entropy(predicted, wanted, ignore_index=IGNORED, reduction="sum")
    # a batch of nothing but other people's turns teaches nothing, and must not be 0/0
    return total / (wanted != IGNORED).sum().clamp_min(1)


def distillation(logits: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 x mean KL(teacher || student) over the predicted positions, [].

    Source: Hinton et al. 2015, 1503.02531, section 2; the square keeps gradients comparable.
    """
    counted = labels[:, 1:] != IGNORED
    ours = (wide(logits[:, :-1][counted]) / temperature).log_softmax(dim=-1)
    theirs = (wide(teacher[:, :-1][counted]) / temperature).log_softmax(dim=-1)
    total = functional.kl_div(ours, theirs, log_target=True, reduction="sum")
    return total * (temperature**2 / max(int(ours.shape[0]), 1))


def hidden_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the mean of ||student - teacher||^2 / ||teacher||^2 over layers and predicted tokens.

    0 where they agree, 1 for a student that is zero: a coefficient carries over between layers and
    models, and the few tokens whose states are a thousand times as long do not decide.

    Args:
        ours, theirs: [B, S, d] of each layer.
        labels: [B, S]; positions count as in `language_model`.
    """
    counted = labels[:, 1:] != IGNORED
    total = wide(ours[0]).new_zeros(())
    for mine, goal in zip(ours, theirs, strict=True):
        wanted = wide(goal[:, :-1][counted])
        error = (wide(mine[:, :-1][counted]) - wanted).square().sum(dim=-1)
        length = wanted.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        total = total + (error / length).sum()
    return total / max(len(ours) * int(counted.sum()), 1)


def balance(probabilities: Tensor, counts: Tensor, mask: Tensor) -> Tensor:
    """Return E sum_e f_e P_e of each sequence, [B]; 1 when even, E when one expert has it all.

    Args:
        probabilities: [B, S, E], each token's sum to 1.
        counts: [B, E] how often the sequence's real tokens chose each expert.
        mask: [B, S] 1.0 for real tokens.

    Source: Fedus et al. 2021, 2101.03961, equation 4, for top-k as in GShard; over each sequence as
        in DeepSeek-V3, 2412.19437, equation 17. transformers sums f to K instead of 1.
    """
    mean = masked_mean(probabilities, mask)
    share = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return probabilities.shape[-1] * (share * mean).sum(dim=-1)


def null_balance(
    probabilities: Tensor, counts: Tensor, mask: Tensor, *, experts: int, share: Tensor
) -> Tensor:
    """Return sum_i f_i P_i / t_i of each sequence, [B], over n real experts and M null ones.

    f_i is the share of the sequence's choices that expert i got, in the null group the mean of the
    group; P_i its mean probability; t_i the share it is to get. It is 1 when every expert gets what
    it is to get. With t_i = 1 / (n + M) it is the loss of AdaMoE (Zeng et al. 2024, 2406.13233,
    section 3; its code averages over the wrong axis, so that nothing changes) over the choices of a
    token; the targets are ours. Where t_i is below a tenth of the mean, what is missing joins f_i
    and t_i, so that an expert which is to get nothing does not weigh infinitely.

    Args:
        probabilities: [B, S, n + M], each token's sum to 1; null experts last.
        counts: [B, n + M] how often the sequence's real tokens chose each expert.
        mask: [B, S] 1.0 for real tokens.
        experts: n.
        share: [B] or [] of the choices that real experts are to get.
    """
    mean = masked_mean(probabilities, mask)
    found = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1.0)
    nulls = counts.shape[-1] - experts
    real, null = found[:, :experts], found[:, experts:].mean(dim=-1, keepdim=True)
    share = share.to(found).reshape(-1, 1)
    floor = 0.1 / counts.shape[-1]
    goals = (share / experts, (1 - share) / max(nulls, 1))
    real, null = (
        (f + (floor - t).clamp_min(0)) / t.clamp_min(floor)
        for f, t in zip((real, null), goals, strict=True)
    )
    ratios = torch.cat([real, null.expand(-1, nulls)], dim=-1)
    return (ratios * mean).sum(dim=-1)


def router_z(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of logsumexp(logits)^2 of each sequence, [B, S, E] and [B, S] -> [B].

    Source: Zoph et al. 2022, 2202.08906, equation 5.
    """
    return masked_mean(wide(logits).logsumexp(dim=-1).square(), mask)


def regression(scores: Tensor, norms: Tensor, mask: Tensor) -> Tensor:
    """Return the relative squared error of predicted output norms of each sequence, [B].

    The error of a token is relative to its mean square over experts, at least to `_FLOOR` of the
    sequence's mean, as in `methods.d2dmoe.router.fit_router`, where it predicts best.

    Args:
        scores, norms: [B, S, E], predicted and true.
        mask: [B, S] 1.0 for real tokens.
    """
    size = norms.square().mean(dim=-1)
    least = _FLOOR * masked_mean(size, mask)[:, None]
    size = torch.maximum(size, least).clamp_min(torch.finfo(torch.float32).tiny)
    return masked_mean((scores - norms).square().mean(dim=-1) / size, mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the real positions of each sequence, [B, S, ...] -> [B, ...]."""
    mask = mask.to(values.dtype)
    weights = mask / mask.sum(dim=1, keepdim=True).clamp_min(1.0)
    return torch.einsum("bs,bs...->b...", weights, values)


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
