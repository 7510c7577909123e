"""What routed adapters should do, by a loop over adapters; shares nothing with the runtime.

Shapes: T tokens, E adapters of rank r, n inputs and m outputs of a linear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.modeling.loading import load_model

Select = Mapping[str, Any]
#: every rule of gates, as `set_adapters` takes it, for four adapters.
RULES: dict[str, dict[str, Any]] = {
    "soft": {"rule": "soft"},
    "uniform": {"rule": "uniform"},
    "sigmoid": {"rule": "sigmoid"},
    "top-1": {"rule": "top-k", "k": 1},
    "top-2": {"rule": "top-k", "k": 2, "renormalize": True},
    "top-4": {"rule": "top-k", "k": 4},
    "top-p": {"rule": "top-p", "p": 0.6},
    "top-p-renormalized": {"rule": "top-p", "p": 0.6, "renormalize": True},
}


class Looped:
    """The dense model of a checkpoint in float64, with a loop over adapters at every site.

    Args:
        dense: the checkpoint without adapters.
        folder: the standalone checkpoint.
        select: selection in place of the stored one.

    Attributes:
        model: the model.
        values: the tensors of adapters and routers by name.
        inputs: path of a block -> what it received last.
    """

    def __init__(self, dense: Path, folder: Path, select: Select | None = None) -> None:
        # products of stacked experts know no float64
        self.model: Any = load_model(dense, dtype="float64", experts_implementation="eager")
        self.values = {
            name: nn.Parameter(value.double())
            for name, value in load_file(folder / "model.safetensors").items()
            if ".adapters." in name or name.endswith(".router.weight")
        }
        self.inputs: dict[str, Tensor] = {}
        config = json.loads((folder / "config.json").read_text())
        for path, slots in config["adaptive"]["sites"].items():
            spec = {**slots["linear"], **({"select": select} if select else {})}
            block = _block_of(path)
            hook = self._keep(block)
            self.model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)
            parent, _, name = path.rpartition(".")
            linear = _Linear(self.model.get_submodule(path), self, path, spec)
            setattr(self.model.get_submodule(parent), name, linear)

    def _keep(self, block: str) -> Any:
        def keep(module: Any, args: Any, kwargs: Any) -> None:
            self.inputs[block] = args[0] if args else kwargs["hidden_states"]

        return keep

    def gradients(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the gradient of every tensor of adapters and routers, for the usual loss."""
        for value in self.values.values():
            value.grad = None
        self.model(ids, labels=ids).loss.backward()
        return {name: v.grad for name, v in self.values.items() if v.grad is not None}


def _block_of(path: str) -> str:
    parts = path.split(".")
    number = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: number + 1])


class _Linear(nn.Module):
    """A linear and its adapters, one after the other."""

    def __init__(self, linear: nn.Module, whole: Looped, path: str, spec: Select) -> None:
        super().__init__()
        self.linear, self.path = linear, path
        self.adapters, self.router, self.select = (
            spec[name] for name in ("adapters", "router", "select")
        )
        object.__setattr__(self, "whole", whole)

    def value(self, name: str) -> Tensor:
        whole: Any = self.whole
        found: Tensor = whole.values[f"{self.path}.adapters.{name}"]
        return found

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        gates = self.gates(flat)
        if self.adapters["kind"] == "ia3":
            factor: Any = 1
            for e in range(self.adapters["count"]):
                factor = factor + gates[:, e, None] * self.value("vectors")[e]
            before = self.adapters["on"] == "input"
            out: Tensor = self.linear(flat * factor) if before else self.linear(flat) * factor
        else:
            out = self.linear(flat)
            for e in range(self.adapters["count"]):
                out = out + gates[:, e, None] * self.one(flat, e)
        return out.reshape(*x.shape[:-1], -1)

    def one(self, x: Tensor, e: int) -> Tensor:
        """Return what adapter e adds at the gate 1, [T, m]."""
        scaling: Any = self.adapters["scaling"]
        scaling = scaling[e] if isinstance(scaling, list) else scaling
        a = self.value("a")[0 if self.adapters["share"] else e]
        added: Tensor = scaling * (x @ a.T @ self.value("b")[e].T)
        return added

    def gates(self, x: Tensor) -> Tensor:
        """Return the weight of every adapter for every token, [T, E]."""
        count, rule = self.adapters["count"], self.select["rule"]
        if rule == "uniform" or self.router["kind"] == "none":
            return x.new_full((x.shape[0], count), 1 / count)
        whole: Any = self.whole
        if self.router["reads"] != "module":
            x = whole.inputs[_block_of(self.path)].reshape(x.shape[0], -1)
        if self.router["norm"] == "layernorm":
            x = functional.layer_norm(x, x.shape[-1:])
        rows: Tensor = whole.values[f"{self.router.get('of') or self.path}.router.weight"]
        logits = x @ rows.T
        logits = (logits.abs() if self.router["score"] == "abs" else logits) * self.router["scale"]
        if rule == "sigmoid":
            gates: Tensor = logits.sigmoid()
            return gates
        shares: Tensor = logits.softmax(dim=-1)
        mask = torch.zeros_like(shares)
        for token, row in enumerate(shares.tolist()):
            mask[token, self.kept(row)] = 1
        shares = shares * mask
        if self.select.get("renormalize"):
            shares = shares / shares.sum(dim=-1, keepdim=True)
        return shares

    def kept(self, shares: list[float]) -> list[int]:
        """Return the adapters a token takes."""
        order = sorted(range(len(shares)), key=lambda e: -shares[e])
        if self.select["rule"] == "top-k":
            return order[: self.select["k"]]
        if self.select["rule"] == "soft":
            return order
        count, total = 0, 0.0
        while count < len(order) and total < self.select["p"]:
            total += shares[order[count]]
            count += 1
        return order[:count]
