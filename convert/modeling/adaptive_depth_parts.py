"""What a routed block has besides the stock one: its router, and what skipped tokens run instead.

Routers compute in float32 (float64 for a float64 model). Their matrices are plain parameters, so
that nothing that adapts or counts linears by class takes them for some of the block's.

Shapes: B sequences, S positions, d hidden size, w width of an inner layer, r width of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from .adaptive_routers import Router, _wide

_EPSILON = 1e-6
#: of routers at the start: every token runs.
OPEN = 1.0


def unit_scale(x: Tensor) -> Tensor:
    """Return hidden states over their root mean square, in float32 or float64."""
    wide = _wide(x)
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)


class Scores(Router):
    """One logit per token: linear, or behind an inner layer with SiLU.

    Args:
        hidden: d.
        width: w, None for a linear one.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, hidden: int, width: int | None) -> None:
        super().__init__()
        self.inner: Inner | None = None if width is None else Inner(hidden, width)
        self.add("weight", 1, hidden if width is None else width)
        self.add("bias", 1)
        inside = 0 if width is None else 2 * hidden * width
        self.flops = inside + 2 * (hidden if width is None else width)

    def forward(self, x: Tensor, *, order_only: bool = False) -> Tensor:
        """Return the logits, [B, S, d] -> [B, S]; autocast would leave so few values of them that
        many tokens are alike."""
        with torch.autocast(x.device.type, enabled=False):
            wide = unit_scale(x)
            if self.inner is not None:
                wide = self.inner(wide)
            logits: Tensor = functional.linear(
                wide, self.weight.to(wide.dtype), self.bias.to(wide.dtype)
            )
        return logits[..., 0]


class Inner(Router):
    """The inner layer of `Scores`."""

    weight: Tensor

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.add("weight", width, hidden)

    def forward(self, x: Tensor, *, order_only: bool = False) -> Tensor:
        """Return silu(weight x), [..., d] -> [..., w]."""
        return functional.silu(functional.linear(x, self.weight.to(x.dtype)))


class DepthRouter(Scores):
    """The router of a block, and the causal predictor of its choices where it has one.

    Args:
        spec: of the block.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__(int(spec["hidden"]), spec["router"]["width"])
        predictor = spec["predictor"]
        self.predictor: Scores | None = None
        if predictor is not None:
            self.predictor = Scores(int(spec["hidden"]), int(predictor["width"]))

    def deciding(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """Return what decides where later tokens are not known, [B, S, d] -> [B, S]: the router's
        logits, and with a predictor what it adds to them; its loss reaches it alone.

        Args:
            x: hidden states.
            logits: the router's, where they are known.
        """
        known = self(x) if logits is None else logits
        if self.predictor is None:
            return known
        found: Tensor = known.detach() + self.predictor(x.detach())
        return found


class Small(nn.Module):
    """A matrix of an adapter.

    Args:
        out, into: its sizes.
    """

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out, into))

    def forward(self, x: Tensor) -> Tensor:
        """Return weight x."""
        return functional.linear(x, self.weight)


class DepthAdapter(nn.Module):
    """What tokens that skip a block get in its place (FlexiDepth, 2503.23798), here of low rank.

    Args:
        hidden: d.
        width: r.
    """

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.down, self.up = Small(width, hidden), Small(hidden, width)
        self.flops = 4 * hidden * width

    def forward(self, x: Tensor) -> Tensor:
        """Return up(silu(down(x / rms(x)))), [..., d]."""
        found: Tensor = self.up(functional.silu(self.down(unit_scale(x).to(x.dtype))))
        return found


class Depth(nn.Module):
    """The parts of one routed block.

    Args:
        spec: its "layer" slot.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        self.router = DepthRouter(spec)
        self.adapter: DepthAdapter | None = None
        if spec["adapter"] is not None:
            self.adapter = DepthAdapter(int(spec["hidden"]), int(spec["adapter"]["width"]))

    def skipped(self, x: Tensor) -> Tensor:
        """Return what skipped tokens hand on, [..., d]."""
        return x if self.adapter is None else x + self.adapter(x)

    def costs(self) -> tuple[int, int, int, int]:
        """Return FLOPs and bytes that every token costs, and those of a token that skips."""
        routers = [self.router, *([self.router.predictor] if self.router.predictor else [])]
        flops = sum(router.flops for router in routers)
        size = sum(p.numel() * p.element_size() for p in self.router.parameters())
        if self.adapter is None:
            return flops, size, 0, 0
        own = sum(p.numel() * p.element_size() for p in self.adapter.parameters())
        return flops, size, self.adapter.flops, own


def init_depth(module: Depth) -> None:
    """Fill the parts so that every token runs the block, as the dense model does."""
    scores = [module.router, *([module.router.predictor] if module.router.predictor else [])]
    for one in scores:
        init.zeros_(one.weight)
        init.constant_(one.bias, OPEN if one is module.router else 0.0)
        if one.inner is not None:
            init.normal_(one.inner.weight, mean=0.0, std=0.02)
    if module.adapter is not None:
        init.normal_(module.adapter.down.weight, mean=0.0, std=0.02)
        init.zeros_(module.adapter.up.weight)
