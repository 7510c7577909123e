"""Attention projections that were replaced by two-layer networks split into experts.

A site takes the place of one linear module (q, k, v or o): `down(act(up x))`, of about as many
FLOPs, trained to give what the module gave (D2DMoE, 2310.04361). Its neurons are split, routed and
counted as those of a feed-forward network are, with the same knobs. The matrix it replaces is gone;
so the module is no `nn.Linear` any more, and whoever looks for matrices (quantisation, adapters,
counts) finds `up` and `down`.

Shapes: T tokens, d inputs, o outputs, f neurons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from .adaptive_ffn import AdaptiveFFN
from .adaptive_schema import AdaptiveConfigError


class ProjectionMLP(nn.Module):
    """A two-layer network; the class an `AdaptiveProjection` is mixed into.

    Attributes:
        up, down: nn.Linear [f, d] and [o, f].
        act: between them.
    """

    up: nn.Module
    act: nn.Module
    down: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs with every neuron on, [..., d] -> [..., o]."""
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class AdaptiveProjection(AdaptiveFFN):
    """What a replaced projection becomes; see the module docstring."""

    adaptive_slot = "linear"
    #: the class it is mixed into, whatever the module was.
    adaptive_stock = ProjectionMLP

    def adaptive_init(self, path: str, spec: Mapping[str, Any]) -> None:
        """Replace the module's matrix by a network.

        Raises:
            AdaptiveConfigError: the slot holds none, or one of other sizes than the module.
        """
        mlp = spec.get("mlp")
        if mlp is None:
            raise AdaptiveConfigError(f"site {path!r}: its linear slot holds no network ('mlp')")
        sizes = (mlp["hidden"], mlp["output"])
        found = _sizes(self)
        if found != sizes:
            raise AdaptiveConfigError(
                f"site {path!r} stands for a matrix of (inputs, outputs) {found}, not {sizes}"
            )
        old: Any = self.weight
        made = {"dtype": old.dtype, "device": old.device}
        bias = mlp["bias"]
        for name in list(self._parameters):
            delattr(self, name)
        self.up = nn.Linear(sizes[0], mlp["intermediate"], bias=bias["up"], **made)
        self.act = ACT2FN[mlp["activation"]]
        self.down = nn.Linear(mlp["intermediate"], sizes[1], bias=bias["down"], **made)
        super().adaptive_init(path, mlp)


def _sizes(module: Any) -> tuple[int, int]:
    """Return inputs and outputs of what was a linear module, 0 of any other."""
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        return 0, 0
    rows, columns = weight.shape
    # transformers' Conv1D, told by an attribute of its own, holds [in, out]
    return (rows, columns) if "nx" in vars(module) else (columns, rows)


def _is_beside(name: str, parent: str) -> bool:
    """Return whether a plan's entry is for a child of the module `parent`, of a backbone too."""
    own = name.rpartition(".")[0]
    return bool(own) and f".{parent}".endswith(f".{own}")


def drop_plans(model: Any, paths: Iterable[str]) -> None:
    """Keep tensor parallelism away from attention whose projections were replaced.

    A plan splits q, k, v and o together by heads; a network in place of one cannot be split so.
    """
    parents = {re.sub(r"\.\d+\.", ".*.", path).rpartition(".")[0] for path in paths}
    for part in dict.fromkeys((model, model.base_model)):
        plan = getattr(part, "_tp_plan", None)
        if not plan or not parents:
            continue
        part._tp_plan = {
            name: style
            for name, style in plan.items()
            if not any(_is_beside(name, parent) for parent in parents)
        }
