"""One matrix that computes what a linear and its routed adapters compute, where there is one.

Shapes: n inputs and m outputs of the linear, E adapters of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adaconvert.adapters.config import MoloraConfig
from adaconvert.modeling.adaptive_adapters import uniform_lora


class Part(NamedTuple):
    """One adapter set of a linear.

    Attributes:
        config: of it.
        on_input: of "ia3": the input is scaled.
        a, b: [E or 1, r, n] and [E, m, r] of "lora".
        vectors: [E, n or m] of "ia3".
    """

    config: MoloraConfig
    on_input: bool
    a: Tensor | None
    b: Tensor | None
    vectors: Tensor | None


def why_not(config: MoloraConfig) -> str | None:
    """Return why adapters cannot be merged, None where they can: every token weighs them alike."""
    rule = config.select["rule"]
    if rule == "uniform" or config.router["kind"] == "none":
        return None
    if config.num_experts == 1 and rule != "sigmoid":
        return None
    of = "a gate" if config.num_experts == 1 else f"{config.num_experts} adapters"
    return (
        f"every token weighs {of} by its own router ('{rule}'), and no single matrix computes that"
    )


def merged(
    weight: Tensor, bias: Tensor | None, parts: Sequence[Part]
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias that include some adapter sets, in the dtype they came in.

    Args:
        weight: [m, n].
        bias: [m] or None.
        parts: each has uniform gates; applied in order.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    offset = None if bias is None else bias.to(wide.dtype)
    for part in parts:
        if part.on_input:
            wide = wide * _factor(part, wide)
    # what follows reads the input unscaled, and scales all that came before
    for part in parts:
        if part.a is not None and part.b is not None:
            a, b = part.a.to(wide), part.b.to(wide)
            low, high = uniform_lora(a, b, part.config.scalings())
            wide = wide + high @ low
        elif not part.on_input:
            factor = _factor(part, wide)
            wide = wide * factor[:, None]
            offset = None if offset is None else offset * factor
    return wide.to(weight.dtype), None if bias is None or offset is None else offset.to(bias.dtype)


def _factor(part: Part, like: Tensor) -> Tensor:
    assert part.vectors is not None
    return 1 + part.vectors.to(like).mean(dim=0)
