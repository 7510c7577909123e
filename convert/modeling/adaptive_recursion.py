"""Blocks that share their matrices, each depth with a small residual of its own.

Source: relaxed recursive transformers, Bae et al. 2024, 2410.20672. There norms are shared as well;
here norms and biases stay each depth's own, so that residuals of full rank give back the source.

Every depth keeps its modules, and with them its place in caches, its mask and its rotary positions;
of the matrices there is one parameter for all depths of a group. Stock code knows these as tied
weights, as it knows an embedding tied to the head: it saves them once and ties them when loading.

Shapes: in and out are inputs and outputs of a linear, r the rank of its residuals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.pytorch_utils import Conv1D

from .adaptive_linear import sizes_of
from .adaptive_mixed import mixed_class
from .adaptive_recursion_schema import rank_of, shared_depths
from .adaptive_schema import AdaptiveConfigError

#: standard deviation of a residual's first factor where no checkpoint holds one.
_STD = 0.02


class Residual(nn.Module):
    """What a depth adds to a shared matrix: up (down x).

    Args:
        inputs, outputs: of the linear.
        rank: r.
        dtype, device: of the matrix, which may be on meta.
    """

    def __init__(
        self, inputs: int, outputs: int, rank: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.empty(outputs, rank, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.down), self.up)


def init_residual(module: Residual) -> None:
    """Fill a residual so that it adds nothing yet and can be trained."""
    init.normal_(module.down, mean=0.0, std=_STD)
    init.zeros_(module.up)


class RecursiveLinear(nn.Module):
    """A linear whose matrix other depths use too; mixed into the stock class."""

    residual: Residual

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        found: Tensor = out + self.residual(x)
        return found


def fill_recursion(model: nn.Module, recursion: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Let depths of a stock model share their matrices; return what is tied to what, by name.

    Args:
        model: the stock model; call it before its sites are filled.
        recursion: a checked `config.adaptive.model.recursion`.
        prefix: name of the backbone; it is left out of paths when `model` is the backbone alone.

    Raises:
        AdaptiveConfigError: a module is not there or is no linear, or matrices differ in size.
    """
    bare = bool(prefix) and not hasattr(model, prefix)
    path = recursion["blocks"].removeprefix(f"{prefix}.") if bare else recursion["blocks"]
    blocks: Any = _at(model, path)
    if len(blocks) != len(recursion["base"]):
        raise AdaptiveConfigError(
            f"config.adaptive.model.recursion is of {len(recursion['base'])} blocks, this model "
            f"has {len(blocks)}"
        )
    tied: dict[str, str] = {}
    for first, depths in shared_depths(recursion).items():
        for name in recursion["linears"]:
            owner = f"{path}.{first}.{name}"
            for depth in depths:
                own = f"{path}.{depth}.{name}"
                if depth != first:
                    _share(_at(model, own), _at(model, owner), own)
                    tied[f"{own}.weight"] = f"{owner}.weight"
                _relax(_at(model, own), recursion, own)
    return tied


def _share(module: Any, owner: Any, path: str) -> None:
    """Let a linear use the matrix of another one."""
    if _sizes(module, path) != sizes_of(owner):
        raise AdaptiveConfigError(
            f"{path} is a linear of (inputs, outputs) {sizes_of(module)}, and the one it would "
            f"share with of {sizes_of(owner)}"
        )
    module.weight = owner.weight
    # saving asks every module for these names, so that it keeps one of those that share storage
    module._tied_weights_keys = {"weight": "weight"}


def _relax(module: Any, recursion: Mapping[str, Any], path: str) -> None:
    """Put a residual beside a linear's matrix, unless the rank is 0."""
    inputs, outputs = _sizes(module, path)
    rank = rank_of(recursion, inputs, outputs)
    if not rank:
        return
    weight = module.weight
    module.__class__ = mixed_class(RecursiveLinear, type(module))
    module.residual = Residual(inputs, outputs, rank, dtype=weight.dtype, device=weight.device)
    if not weight.is_meta:
        init_residual(module.residual)


def _sizes(module: Any, path: str) -> tuple[int, int]:
    found = sizes_of(module)
    if found is None:
        raise AdaptiveConfigError(f"config.adaptive.model.recursion: {path} is no linear")
    return found


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise AdaptiveConfigError(
            f"config.adaptive.model.recursion names {path!r}, which {type(model).__name__} lacks"
        ) from None


def residuals(model: nn.Module) -> Iterator[tuple[str, Residual]]:
    """Yield the residuals of a model with their paths, depth by depth."""
    for path, module in model.named_modules():
        if isinstance(module, Residual):
            yield path, module


class RecursionMixin:
    """The part of an adaptive model that is about blocks that share matrices."""

    #: name of a matrix -> name of the one it is.
    adaptive_tied: Mapping[str, str] = {}

    def _fill_recursion(self, adaptive: Mapping[str, Any]) -> None:
        """Let blocks share matrices as the configuration says."""
        own: Any = self
        recursion = (adaptive.get("model") or {}).get("recursion")
        if recursion:
            own.adaptive_tied = fill_recursion(own, recursion, own.base_model_prefix)
            own.all_tied_weights_keys.update(own.adaptive_tied)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Return which tensors are others, as stock code asks for before it ties, saves or loads;
        shared matrices are whether or not the embedding is tied."""
        stock: Any = super()
        found: dict[str, str] = stock.get_expanded_tied_weights_keys(all_submodels)
        return {**found, **self.adaptive_tied}

    def _adjust_bias(self, output_embeddings: Any, input_embeddings: Any) -> None:
        """Let a bias follow the rows of a matrix that was tied, as stock code does; rows of a
        `Conv1D` are its inputs, which its bias has nothing to do with."""
        if not isinstance(output_embeddings, Conv1D):
            stock: Any = super()
            stock._adjust_bias(output_embeddings, input_embeddings)
