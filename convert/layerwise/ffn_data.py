"""What every feed-forward network of a model receives on given tokens, block by block.

    for layer in ffn_layers(folder, tokens):          # one block in memory at a time
        hidden = layer.weights.hidden(layer.inputs)   # [T, H] -> [T, I]
        layer.pass_on(replacement)                    # optional: feed converted outputs forward

Hidden states between blocks are kept in memory, or in a work folder from which a killed run goes
on. Blocks of tokens may be padded at their ends: causal attention keeps padding away from the
tokens before it, and padded positions are left out of what is yielded.

Shapes: N sequences, L positions, T unpadded tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.arch.base import ModelSpec
from adaconvert.io.source import Source
from adaconvert.layerwise.dense_view import dense_view
from adaconvert.layerwise.ffn_weights import FfnWeights, ffn_path, ffn_weights
from adaconvert.layerwise.runner import Block, LayerwiseModel
from adaconvert.layerwise.states import (
    IN_MEMORY,
    Pixels,
    States,
    Tokens,
    check_finite,
    checked,
    decoder_of,
    run_block,
)
from adaconvert.layerwise.states import run_digest as run_digest
from adaconvert.layerwise.vision import LayerwiseVision
from adaconvert.layerwise.work import WorkFolder
from adaconvert.progress import Bar, bar

if TYPE_CHECKING:
    import torch
    from torch import nn

#: name of the file that holds them in a work folder.
_INPUTS = "inputs"

Replacement = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(slots=True, kw_only=True)
class FfnLayer:
    """The feed-forward network of one block, and what it receives; valid until the next is asked
    for.

    Attributes:
        index: of the block.
        inputs: float32 [T, H], unpadded tokens in the order of the token blocks.
        weights: its matrices.
    """

    index: int
    inputs: torch.Tensor
    weights: FfnWeights
    replacement: Replacement | None = field(default=None, repr=False)

    def pass_on(self, replacement: Replacement) -> None:
        """Later blocks receive what the model computes with `replacement` [T, H] -> [T, H] as this
        FFN."""
        self.replacement = replacement

    def chunks(self, size: int | None = None) -> Iterator[torch.Tensor]:
        """Yield the inputs in runs of tokens, by default as many as keep [T, I] small."""
        import torch

        yield from torch.split(self.inputs, size or self.weights.chunk())


def ffn_layers(
    where: Path | Source,
    tokens: Tokens,
    *,
    layers: Collection[int] | None = None,
    work: WorkFolder | None = None,
    memory: int = IN_MEMORY,
    dtype: str = "float32",
    device: str = "cpu",
    progress: bool = False,
) -> Iterator[FfnLayer]:
    """Yield the feed-forward network of each block with its inputs, in order.

    An adaptive checkpoint runs as the dense model it was made of, its neurons in their new order.

    Args:
        where: a dense or adaptive checkpoint: a decoder, or a classifier of images.
        tokens: what to run it on.
        layers: blocks to yield; all when None. Blocks behind the last are not run.
        work: where hidden states are kept and a killed run goes on; blocks before
            `work.next_block` are not yielded again. In memory when None.
        memory: bytes of hidden states that may be kept in memory.
        dtype: torch name of the dtype blocks compute in; what is yielded is float32.
        device: torch device blocks compute on; what is yielded lies there too.
        progress: show a bar on a terminal.

    Raises:
        OptionError: the model is neither, or the tokens do not fit it.
        SourceError: the checkpoint cannot be read, or its hidden states are not finite.
        ResourceError: the states need more than `memory` and there is no work folder.
    """
    images = tokens if isinstance(tokens, Pixels) else None
    kind = LayerwiseModel if images is None else LayerwiseVision
    model = kind(dense_view(where), dtype=dtype)
    spec = decoder_of(model.source, "feed-forward networks", on_images=images is not None)
    ids, kept = checked(tokens, spec)
    wanted = sorted(set(range(spec.layers)) if layers is None else set(layers))
    if not wanted or (work is not None and work.next_block > wanted[-1]):
        return
    states = States(ids, kept, spec.hidden, dtype, work, memory, device)
    start = states.begin(model, images)
    todo = range(start, wanted[-1] + 1)
    with bar(len(todo) * len(states), "layers", "blocks", enabled=progress) as shown:
        for block in model.blocks(start):
            block.to(device)
            layer = _run(block, spec, states, block.index in wanted, shown)
            if layer is not None:
                yield layer
                if layer.replacement is not None:
                    _rerun(block, spec, states, layer.replacement)
                layer.inputs = layer.inputs.new_empty(0, spec.hidden)
            states.advance(block.index)
            if block.index == wanted[-1]:
                return


def _run(
    block: Block, spec: ModelSpec, states: States, wanted: bool, shown: Bar
) -> FfnLayer | None:
    """Run the block on all states; return its FFN with what it received when it is `wanted`."""
    ffn = block.module.get_submodule(ffn_path(spec, block.index))
    inputs = run_block(block, states, {_INPUTS: ffn} if wanted else {}, shown)
    if not wanted:
        return None
    return FfnLayer(
        index=block.index,
        inputs=inputs[_INPUTS].to(states.device),
        weights=ffn_weights(block.module, spec, block.index),
    )


def _rerun(block: Block, spec: ModelSpec, states: States, replacement: Replacement) -> None:
    """Run the block on all states once more, with another function in place of its FFN."""
    ffn = block.module.get_submodule(ffn_path(spec, block.index))

    def replace(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        flat = args[0].reshape(-1, args[0].shape[-1])
        return replacement(flat.float()).to(output.dtype).view_as(output)

    hook = ffn.register_forward_hook(replace)
    try:
        for batch in states.batches():
            states.leaving[batch] = block(states.arriving[batch].to(states.device)).cpu()
    finally:
        hook.remove()
    check_finite(states, block.index)
