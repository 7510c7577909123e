"""Mean inputs of the feed-forward networks of a dense model, block by block.

Shapes: S positions of one prompt, H hidden size, P groups of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.arch.registry import describe
from adaconvert.layerwise.runner import Block, LayerwiseModel

if TYPE_CHECKING:
    import numpy
    import torch

    Array = numpy.ndarray[Any, numpy.dtype[Any]]


def ffn_input_means(
    folder: Path, groups: Sequence[Sequence[Sequence[int]]], layers: frozenset[int]
) -> dict[int, list[Array]]:
    """Return, for each block asked for, one mean FFN input [H] per group of prompts.

    Args:
        folder: dense checkpoint.
        groups: token ids: P groups of prompts; the mean is over all positions of a group's prompts.
        layers: blocks to report on.
    """
    import torch

    model = LayerwiseModel(folder)
    spec = describe(model.source.config, model.source.tensors)
    ids = [[torch.tensor([list(prompt)]) for prompt in group] for group in groups]
    hidden = [[model.embed(prompt) for prompt in group] for group in ids]
    means: dict[int, list[Array]] = {}
    last = max(layers)
    for block in model.blocks():
        path = _ffn_path(spec.ffn_rows(block.index)["up"].tensor, block.index)
        rows = []
        for number, group in enumerate(hidden):
            inputs: list[torch.Tensor] = []
            hidden[number] = [_run(block, path, prompt, inputs) for prompt in group]
            rows.append(torch.cat(inputs).mean(dim=0).numpy())
        if block.index in layers:
            means[block.index] = rows
        if block.index == last:
            break
    return means


def _ffn_path(tensor: str, layer: int) -> str:
    """Return the FFN's path inside its block, from the name of one of its weights."""
    inside = tensor.split(f".{layer}.", 1)[1]
    return inside.rsplit(".", 2)[0]


def _run(block: Block, path: str, hidden: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Return the block's output [1, S, H]; append the FFN's input [S, H] to `inputs`."""

    def keep(_: object, args: tuple[Any, ...]) -> None:
        inputs.append(args[0].detach().float().reshape(-1, args[0].shape[-1]))

    hook = block.module.get_submodule(path).register_forward_pre_hook(keep)
    try:
        return block(hidden)
    finally:
        hook.remove()
