"""Stage 1 of D2DMoE: another activation, and a penalty that makes its outputs sparse.

The penalty is added in the backward pass of the activation itself: its gradient joins the one that
arrives there, and its value is counted there. A checkpointed segment may run forward twice but
backward once, so nothing is counted twice and nothing is lost, and no second graph is kept.

Networks that stand in for attention projections (stage 5) are watched too. As in the published
code, their mean penalty is added to that of the feed-forward networks with the same coefficient.

Shapes: T tokens of a micro-batch, f neurons, L watched networks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.registry import FAMILIES
from adaconvert.arch.sites import ffn_site
from adaconvert.errors import OptionError
from adaconvert.train.config import Sparsity
from adaconvert.train.losses import PENALTIES, gradient_of

Activation = Callable[[Tensor], Tensor]


def replaced(spec: ModelSpec, settings: Sparsity) -> Activation | None:
    """Return the activation of `spec` that fades out, None when none does."""
    from transformers.activations import ACT2FN

    if settings.activation == "keep" or settings.blend == 0:
        return None
    found: Activation = ACT2FN[spec.traits.activation]
    return found


def with_activation(config: Mapping[str, Any], spec: ModelSpec, activation: str) -> dict[str, Any]:
    """Return what changes in a config.json when every feed-forward network gets `activation`.

    Args:
        config: config.json, of a stock model or an adaptive one.
        spec: what it describes.
        activation: transformers name, or "keep".
    """
    if activation == "keep":
        return {}
    key = FAMILIES[spec.model_type].keys["act"]
    changed: dict[str, Any] = dict.fromkeys(
        (key.name, *(set(key.aliases) & set(config))), activation
    )
    if isinstance(config.get("adaptive"), dict):
        adaptive = copy.deepcopy(config["adaptive"])
        for slots in adaptive["sites"].values():
            if "ffn" in slots:
                slots["ffn"]["activation"] = activation
        changed["adaptive"] = adaptive
    return changed


@dataclass(frozen=True)
class _Now:
    """What the present micro-batch adds.

    Attributes:
        coefficient: of the penalty; 0 only measures.
        share: of the optimiser step's tokens that are in the micro-batch.
        mask: [T] real tokens, None when all are.
        newness: share of the new activation, the rest is the old one's.
    """

    coefficient: float
    share: float | Tensor
    mask: Tensor | None
    newness: float = 1.0


class Meter:
    """Adds the penalty to the gradients of watched activations, and remembers what it saw.

    Attributes:
        ffn, projections: how many feed-forward networks and networks in place of projections are
            watched; the latter are numbered after the former.
    """

    def __init__(self, settings: Sparsity) -> None:
        self.settings = settings
        self.ffn = self.projections = 0
        self._now = _Now(0.0, 1.0, None)
        self._penalties: dict[int, Tensor] = {}
        self._zeros: dict[int, Tensor] = {}

    def begin(
        self,
        *,
        coefficient: float,
        share: float | Tensor,
        mask: Tensor | None,
        newness: float = 1.0,
    ) -> None:
        """Say what the next forward and backward pass are worth."""
        flat = None if mask is None else mask.reshape(-1)
        self._now = _Now(coefficient, share, flat, newness)

    def blend(self, x: Tensor, activated: Tensor, old: Activation) -> Tensor:
        """Return what is between `old` and the new activation of `x`."""
        share = self._now.newness
        return activated if share >= 1 else torch.lerp(old(x), activated, share)

    def watch(self, activated: Tensor, network: int) -> Tensor:
        """Return the activation's output, [..., f]; going back through it adds the penalty."""
        if not (torch.is_grad_enabled() and activated.requires_grad):
            return activated
        flat = activated.reshape(-1, activated.shape[-1])
        watched: Tensor = _Watched.apply(flat, self, network, self._now)  # type: ignore[no-untyped-call]
        return watched.reshape(activated.shape)

    def gradient(self, a: Tensor, network: int, now: _Now) -> Tensor | None:
        """Return the penalty's gradient by `a`, [T, f]; counts its value and the zeros."""
        penalty = PENALTIES[self.settings.penalty]
        scale = 1.0 / a.shape[-1] if self.settings.norm == "width" else 1.0
        mask = now.mask if now.mask is not None and now.mask.numel() == a.shape[0] else None
        real = torch.ones(a.shape[0], device=a.device) if mask is None else mask.float()
        weights = real * (now.share * scale / real.sum().clamp_min(1.0))
        with torch.no_grad():
            self._add(self._penalties, network, (penalty(a) * weights).sum())
            zeros = (a == 0).float().mean(dim=-1)
            self._add(self._zeros, network, (zeros * weights).sum() / scale)
        if not now.coefficient:
            return None
        return gradient_of(penalty, a, weights * (now.coefficient / self._alike(network)))

    def _alike(self, network: int) -> int:
        """Return how many watched networks are of one's kind."""
        return self.ffn if network < self.ffn else self.projections

    @staticmethod
    def _add(where: dict[int, Tensor], network: int, value: Tensor) -> None:
        where[network] = where[network] + value if network in where else value

    def drain(self, steps: int) -> tuple[float, list[float], list[float]]:
        """Return the penalty, a mean over the networks of each kind, and the share of exact zeros
        of each feed-forward network and of each in place of a projection, averaged over the
        optimiser steps since the last call."""
        if not self._penalties:
            return 0.0, [], []
        order = sorted(self._penalties)
        penalties = torch.stack([self._penalties[i] for i in order]).tolist()
        zeros = (torch.stack([self._zeros[i] for i in order]) / steps).tolist()
        ffn = sum(i < self.ffn for i in order)
        self._penalties, self._zeros = {}, {}
        kinds = [kind for kind in (penalties[:ffn], penalties[ffn:]) if kind]
        penalty = sum(sum(kind) / len(kind) for kind in kinds)
        return penalty / steps, zeros[:ffn], zeros[ffn:]


class _Watched(torch.autograd.Function):
    """The identity, whose backward pass adds a penalty's gradient."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, meter: Meter, network: int, now: _Now) -> Tensor:
        ctx.save_for_backward(a)
        ctx.meter, ctx.network, ctx.now = meter, network, now
        return a.view_as(a)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, None, None, None]:
        (a,) = ctx.saved_tensors
        own = ctx.meter.gradient(a, ctx.network, ctx.now)
        if own is None:
            return arriving, None, None, None
        return (arriving.float() + own).to(arriving.dtype), None, None, None


def attach(model: Any, spec: ModelSpec, meter: Meter, old: Activation | None = None) -> None:
    """Every feed-forward network of `model`, and every network in place of a projection, has its
    activation watched afterwards.

    Args:
        model: with the new activation.
        spec: what the model is.
        meter: watches.
        old: the activation that the new one of feed-forward networks takes the place of little by
            little; None for none.

    Raises:
        OptionError: a network has no activation of its own to watch.
    """
    sites = model.adaptive_sites() if hasattr(model, "adaptive_sites") else {}
    for layer in range(spec.layers):
        path = ffn_site(spec, layer).path
        _attach(model.get_submodule(path), path, meter, layer, old)
    replaced = [path for path, site in sites.items() if site.adaptive_slot == "linear"]
    for number, path in enumerate(replaced, start=spec.layers):
        _attach(sites[path], path, meter, number, None)
    meter.ffn, meter.projections = spec.layers, len(replaced)


def _attach(module: Any, path: str, meter: Meter, network: int, old: Activation | None) -> None:
    _activation(module, path).register_forward_hook(_hook(meter, network, old))
    if hasattr(module, "adaptive_activation"):
        # what runs when experts are selected; the router keeps the plain one
        own = _watching(module, meter, network, old)
        object.__setattr__(module, "adaptive_activation", own)


def _activation(module: nn.Module, path: str) -> nn.Module:
    for name, child in module.named_children():
        if "act" in name and next(child.parameters(), None) is None:
            return child
    raise OptionError(
        f"{path} has no activation that can be watched",
        where="--sparsity",
        hint="Stage 1 works on dense feed-forward networks and their adaptive form.",
    )


def _hook(
    meter: Meter, network: int, old: Activation | None
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if old is not None and module.training:
            output = meter.blend(inputs[0], output, old)
        return meter.watch(output, network)

    return hook


def _watching(module: Any, meter: Meter, network: int, old: Activation | None) -> Activation:
    activation = module.adaptive_activation

    def run(x: Tensor) -> Tensor:
        activated = activation(x)
        if old is not None and module.training:
            activated = meter.blend(x, activated, old)
        return meter.watch(activated, network)

    return run
