"""What routed adapters were chosen for the tokens of a batch.

Shapes: B sequences, S positions, T = B S tokens, E adapters of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaconvert.layerwise.names import block_of as number_of
from adaconvert.modeling.adaptive_adapters import gates_of
from adaconvert.modeling.adaptive_context import current
from adaconvert.modeling.adaptive_linear import block_of
from adaconvert.train import losses


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdaptersRouter:
    """The router of one linear with routed adapters, or of several that share it.

    Attributes:
        layer, experts: as in `StockRouter`; experts are adapters.
        path: of the linear that holds it.
        module: it.
        site: the linear.
        blocks: how many blocks it is asked in.
    """

    layer: int
    path: str
    module: nn.Module
    site: Any
    experts: int
    blocks: int

    @property
    def bias(self) -> Tensor | None:
        """Return None: gates have no bias."""
        return None

    @property
    def select(self) -> Mapping[str, Any]:
        """Return the rule of the gates now."""
        found: Mapping[str, Any] = current().adapters or self.site.adaptive_spec["select"]
        return found

    def routes(self, logits: Tensor, mask: Tensor) -> bool:
        """Return whether gates follow logits, [..., E], which are of the tokens of mask, [B, S]."""
        return self.select["rule"] != "uniform" and logits.shape[:-1].numel() == mask.numel()

    @property
    def is_reached(self) -> bool:
        """Return whether the gates follow the router, so that the model's loss reaches it; a share
        of one adapter, or one divided by itself, is one always."""
        select, rule = self.select, self.select["rule"]
        # the largest share is 1 / E at least
        one = (rule == "top-k" and select["k"] == 1) or (
            rule == "top-p" and select["p"] * self.experts <= 1
        )
        alone = self.experts == 1 and rule != "sigmoid"
        return rule != "uniform" and not alone and not (one and select.get("renormalize"))


def adapters_routers(model: Any) -> list[AdaptersRouter]:
    """Return every router of adapters, in the order of the linears that hold them."""
    sites = model.adaptive_adapters() if hasattr(model, "adaptive_adapters") else {}
    asked: dict[str, set[str | None]] = {}
    for path, site in sites.items():
        owner = site.adaptive_spec["router"].get("of") or path
        asked.setdefault(owner, set()).add(block_of(path))
    return [
        AdaptersRouter(
            layer=number_of(path) or 0,
            path=path,
            module=site.router,
            site=site,
            experts=site.adapters.count,
            blocks=len(asked[path]),
        )
        for path, site in sites.items()
        if site.router is not None
    ]


def chosen_of(router: AdaptersRouter, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return how likely every adapter is for each token, [B, S, E], and how much each sequence's
    real tokens use it, [B, E].

    Under a rule that leaves none out the uses are the probabilities themselves.

    Args:
        router: the router.
        logits: [..., E], what it said.
        mask: [B, S] 1.0 for real tokens.
    """
    shape = (*mask.shape, router.experts)
    flat = losses.wide(logits.reshape(-1, router.experts))
    if router.select["rule"] == "sigmoid":
        flat = flat.sigmoid()
        likely = flat / flat.sum(dim=-1, keepdim=True)
    else:
        likely = flat.softmax(dim=-1)
    with torch.no_grad():
        few = router.select["rule"] in ("top-k", "top-p")
        uses = gates_of(flat, router.select).dense(router.experts) > 0 if few else likely
        uses = uses.reshape(shape).to(likely.dtype) * mask[..., None]
    return likely.reshape(shape), uses.sum(dim=1)
