"""A stock model whose FFNs run only the neurons a cell of the granularity table chooses.

All neurons are computed and those not chosen set to zero, which is what skipping them computes.
Shapes: N blocks, L positions, T tokens, f neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bench import granularity_fit
from bench.granularity_cells import GATES, Cell, Shape
from bench.granularity_fit import Arrays

from adaconvert.arch.registry import describe
from adaconvert.arch.sites import ffn_site
from adaconvert.data.tokens import TokenBlocks
from adaconvert.io.source import Source
from adaconvert.layerwise.ffn_weights import activation_of

#: sequences computed together.
BATCH = 4


@dataclass(slots=True)
class Count:
    """How many (token, neuron) pairs there were, and how many ran."""

    chosen: float = 0.0
    all: float = 0.0

    @property
    def share(self) -> float:
        """Return the share that ran; 1 when nothing was counted."""
        return self.chosen / self.all if self.all else 1.0


@dataclass(slots=True)
class _Layer:
    """One FFN: its modules, what it was last given, and what to choose with."""

    ffn: Any
    down: Any
    gate: Any
    norms: torch.Tensor
    arrays: Arrays
    seen: dict[str, torch.Tensor] = field(default_factory=dict)


def shape_of(folder: Path) -> Shape:
    """Return the sizes of a checkpoint's FFNs."""
    source = Source.open(folder)
    spec = describe(source.config, source.tensors)
    return Shape(hidden=spec.hidden, neurons=spec.intermediate, gated=spec.traits.ffn == "glu")


class Masked:
    """A model that runs cells.

    Args:
        folder: dense decoder checkpoint.
        layers: what `granularity_fit.fit` found.
        dtype: torch name of the dtype to compute in; scores and losses are float32.
    """

    def __init__(self, folder: Path, layers: list[Arrays], dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        source = Source.open(folder)
        spec = describe(source.config, source.tensors)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self.model.eval()
        self._arrays = layers
        self._activation = activation_of(spec)
        self.shape = shape_of(folder)
        transposed = any(t.role == "down" and t.transposed for t in spec.tensors)
        self._layers = []
        for index in range(spec.layers):
            site = ffn_site(spec, index)
            ffn = self.model.get_submodule(site.path)
            parts = {role: ffn.get_submodule(child) for role, child in site.weights.items()}
            down = parts["down"].weight.detach().float()
            norms = down.norm(dim=1 if transposed else 0)
            gate = parts.get("gate", parts.get("gate_up"))
            self._layers.append(
                _Layer(ffn, parts["down"], gate if self.shape.gated else None, norms, layers[index])
            )

    def losses(self, cell: Cell, blocks: TokenBlocks) -> tuple[dict[int, list[float]], float]:
        """Return, by document, the sum of token losses in nats and the number of tokens predicted;
        and the share of neurons that ran.

        Args:
            cell: the setting.
            blocks: text; each block predicts its tokens from the second on.
        """
        found: dict[int, list[float]] = {}
        with self._running(cell) as count, torch.inference_mode():
            for start in range(0, len(blocks), BATCH):
                rows = slice(start, start + BATCH)
                # padding is at the ends, where causal attention keeps it from the rest
                longest = int(blocks.weights[rows].sum(axis=1).max())
                ids = torch.from_numpy(blocks.ids[rows, :longest])
                kept = torch.from_numpy(blocks.weights[rows, 1:longest])
                logits = self.model(ids, use_cache=False).logits[:, :-1]
                for row in range(len(ids)):
                    loss = torch.nn.functional.cross_entropy(
                        logits[row].float(), ids[row, 1:], reduction="none"
                    )[kept[row]]
                    entry = found.setdefault(int(blocks.document[start + row]), [0.0, 0.0])
                    entry[0] += float(loss.sum())
                    entry[1] += len(loss)
        return found, count.share

    @contextmanager
    def _running(self, cell: Cell) -> Iterator[Count]:
        count = Count()
        hooks = []
        if cell.split != "dense":
            share = cell.level if cell.split == "static" else self.shape.share(cell)
            limit = self._limit(cell, share)
            for layer in self._layers:
                hooks += self._hook(layer, cell, share, limit, count)
        try:
            yield count
        finally:
            for hook in hooks:
                hook.remove()

    def _limit(self, cell: Cell, share: float) -> float:
        if cell.rule == "dynamic-k":
            return granularity_fit.tau(self._arrays, cell, share)
        return 0.0

    def _hook(
        self, layer: _Layer, cell: Cell, share: float, limit: float, count: Count
    ) -> Iterator[Any]:
        def arrive(_: Any, args: tuple[Any, ...]) -> None:
            layer.seen["x"] = args[0].reshape(-1, args[0].shape[-1])

        def gated(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            gate = output.reshape(-1, output.shape[-1])[:, : self.shape.neurons]
            layer.seen["activated"] = self._activation(gate)

        def choose(_: Any, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
            hidden = args[0].reshape(-1, args[0].shape[-1])
            mask = self._mask(layer, cell, share, limit, hidden)
            count.chosen += float(mask.sum())
            count.all += mask.numel()
            return ((hidden * mask).view_as(args[0]),)

        if cell.router in ("contribution", "param-center"):
            yield layer.ffn.register_forward_pre_hook(arrive)
        if cell.router in GATES and layer.gate is not None:
            yield layer.gate.register_forward_hook(gated)
        yield layer.down.register_forward_pre_hook(choose)

    def _mask(
        self, layer: _Layer, cell: Cell, share: float, limit: float, hidden: torch.Tensor
    ) -> torch.Tensor:
        """Return which neurons run for which token, bool [T, f] or [1, f]."""
        neurons = self.shape.neurons
        if cell.split == "static":
            best = torch.from_numpy(layer.arrays["importance"]).topk(round(share * neurons)).indices
            fixed = torch.zeros(1, neurons, dtype=torch.bool)
            fixed[0, best] = True
            return fixed
        values = granularity_fit.scores(
            cell,
            layer.arrays,
            x=layer.seen.get("x", hidden),
            hidden=hidden,
            activated=layer.seen.get("activated", hidden),
            norms=layer.norms,
        )
        run = _select(values, cell, share, limit, layer.arrays)
        if cell.split == "none":
            return run
        # position j of the order is neuron order[j], of expert j // width
        order = torch.from_numpy(layer.arrays[granularity_fit.key("order", *cell.partition)])
        mask = torch.zeros(len(hidden), neurons, dtype=torch.bool)
        mask[:, order] = run.repeat_interleave(cell.width, dim=1)
        return mask


def _select(
    values: torch.Tensor, cell: Cell, share: float, limit: float, arrays: Arrays
) -> torch.Tensor:
    """Return which experts run for which token, bool [T, E]; at least one."""
    best = values.amax(dim=1, keepdim=True)
    if cell.rule == "top-k":
        k = max(int(share * values.shape[1]), 1)
        chosen = values.topk(k, dim=1, sorted=False).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, chosen, True)
    if cell.rule == "dynamic-k":
        return values >= limit * best
    limit = granularity_fit.threshold(arrays, cell, share)
    # what contributes nothing need not run
    return ((values >= limit) & (values > 0)) | (values == best)
