"""Where the routers of a loaded model are, found by structure, in mixtures and adaptive sites."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_routers import AnalyticRouter, ContributionRouter
from adaconvert.train.losses import wide
from adaconvert.train.routing_adapters import AdaptersRouter, adapters_routers
from adaconvert.train.routing_config import CORRECTION

_NUMBER = re.compile(r"\.(\d+)\.")
#: attributes under which wrappers of peft keep what they wrap.
_WRAPPED = ("base_layer", "original_module")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StockRouter:
    """The router of one block of a stock mixture.

    Attributes:
        layer: index of the block.
        path: of the module that is called.
        module: it.
        experts: E.
        sigmoid: it scores by sigmoid, not by softmax.
    """

    layer: int
    path: str
    module: nn.Module
    experts: int
    sigmoid: bool

    @property
    def bias(self) -> Tensor | None:
        """Return the bias that joins when experts are chosen, None where there is none."""
        inner = unwrapped(self.module)
        holder = getattr(inner, "moe_statics", inner)
        found = getattr(holder, CORRECTION, None)
        return found if isinstance(found, Tensor) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdaptiveRouter:
    """The router of one adaptive feed-forward site.

    Attributes:
        layer, path, experts: as in `StockRouter`; the path is the site's.
        site: the module.
    """

    layer: int
    path: str
    site: Any
    experts: int

    @property
    def predicts_norms(self) -> bool:
        """Return whether its scores are predicted norms of the experts' outputs."""
        return isinstance(self.site.router, ContributionRouter)

    @property
    def bias(self) -> Tensor | None:
        """Return the bias that joins when experts are chosen, None where there is none."""
        router = self.site.router
        return router.bias if isinstance(router, AnalyticRouter) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NullRouter:
    """The router of one block of a mixture with null experts.

    Attributes:
        layer, path, experts: as in `StockRouter`; the path is the site's, experts are real ones.
        site: the module.
    """

    layer: int
    path: str
    site: Any
    experts: int

    @property
    def bias(self) -> Tensor | None:
        """Return None: the null bias moves towards a budget, none towards an even load."""
        return None

    @property
    def null_bias(self) -> nn.Parameter:
        """Return the bias on all null logits, [1] float32."""
        found: nn.Parameter = self.site.null_experts.bias
        return found

    @property
    def top_k(self) -> int:
        """Return the experts a token runs in the model without null ones."""
        return int(self.site.adaptive_spec["mixture"]["top_k"])

    @property
    def slots(self) -> int:
        """Return the choices of a token, real and null."""
        return int(self.site.adaptive_spec["null"]["slots"])

    @property
    def min_real(self) -> int:
        """Return the real experts a token runs in any case."""
        return int(self.site.adaptive_spec["null"]["min_real"])

    @torch.no_grad()
    def own(self) -> None:
        """Let the null bias decide from now on, from where the rule of the site has it."""
        select = self.site.adaptive_spec["select"]
        if select["rule"] == "null" and "bias" in select:
            self.null_bias.fill_(select["bias"])
        self.site.adaptive_spec = {**self.site.adaptive_spec, "select": {"rule": "null"}}

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the rows of real and null experts, and what else decides."""
        yield from self.site.adaptive_router.parameters()
        yield from self.site.null_experts.parameters()


AnyRouter = StockRouter | AdaptiveRouter | NullRouter | AdaptersRouter


def find_routers(model: Any) -> tuple[AnyRouter, ...]:
    """Return every router that chooses among more than one expert or adapter, by block; those of
    adapters come last."""
    sites = model.adaptive_sites() if hasattr(model, "adaptive_sites") else {}
    found: list[AnyRouter] = []
    for path, site in sites.items():
        kind = NullRouter if is_nulled(site) else AdaptiveRouter
        if kind is NullRouter or site.router is not None:
            count = int(site.adaptive_spec["experts"]["count"])
            found.append(kind(layer=layer_of(path), path=path, site=site, experts=count))
    nulled = {id(site) for site in sites.values() if is_nulled(site)}
    found += _stock(model, nulled)
    found += adapters_routers(model)
    return tuple(router for router in found if router.experts > 1)


def is_nulled(site: Any) -> bool:
    """Return whether an adaptive site is a block of a mixture with null experts."""
    return "mixture" in site.adaptive_spec


def _stock(model: nn.Module, nulled: Collection[int]) -> Iterator[StockRouter]:
    for path, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module) or id(module) in nulled:
            continue
        for name, child in module.named_children():
            count = _chooses_among(unwrapped(child), unwrapped(experts))
            if child is not experts and count:
                yield StockRouter(
                    layer=layer_of(path),
                    path=f"{path}.{name}",
                    module=child,
                    experts=count,
                    # the routers that score by sigmoid keep a correction bias of their own
                    sigmoid=hasattr(unwrapped(child), CORRECTION),
                )
                break


def _chooses_among(child: nn.Module, experts: nn.Module) -> int:
    """Return E when a module beside the experts is their router, else 0: a row for each of them."""
    weight = getattr(child, "weight", None)
    count = getattr(experts, "num_experts", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(count, int):
        return 0
    rows = int(weight.shape[0])
    # experts that are shared out over processes know of their own alone
    is_part = getattr(experts, "_is_expert_parallel", False) and rows % count == 0
    return rows if rows == count or is_part else 0


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the stock module under whatever adapters were put around it."""
    inner = next((module._modules[name] for name in _WRAPPED if name in module._modules), None)
    return module if inner is None else unwrapped(inner)


def layer_of(path: str) -> int:
    """Return the number of the block a module is in, 0 where its path has none."""
    found = _NUMBER.search(f"{path}.")
    return int(found[1]) if found else 0


def expert_norms(site: Any, x: Tensor) -> Tensor | None:
    """Return the norm of each routed expert's output, output bias left out, [T, d] -> [T, E].

    It is (h_e G_e h_e)^(1/2) with G_e the inner products of the expert's output columns. None where
    the output matrix is adapted, quantised or elsewhere.

    Args:
        site: an adaptive feed-forward network.
        x: what it receives.
    """
    found = site._child_weights()
    if found is None or "down" not in found:
        return None
    spec = site.adaptive_spec
    shared, width = spec.get("shared", 0), spec["experts"]["width"]
    with torch.no_grad():
        hidden = wide(site._hidden(x)[:, shared:])
        hidden = hidden.reshape(len(x), -1, width)
        columns = wide(found["down"][0])[:, shared:]
        # [E, d, m]
        columns = columns.reshape(len(columns), -1, width).transpose(0, 1)
        inner = columns.transpose(1, 2) @ columns
        squares = torch.einsum("tem,emn,ten->te", hidden, inner, hidden)
        return squares.clamp_min(0).sqrt()


def required_norms(router: AdaptiveRouter, x: Tensor) -> Tensor:
    """Return `expert_norms`, [T, d] -> [T, E].

    Raises:
        OptionError: there are none.
    """
    norms = expert_norms(router.site, x)
    if norms is None:
        raise OptionError(
            f"the experts of {router.path} have no plain output matrix to predict",
            where="--router-regression",
            hint="Train without adapters or quantised weights, or fit routers by "
            "`adaconvert d2dmoe`.",
        )
    return norms
