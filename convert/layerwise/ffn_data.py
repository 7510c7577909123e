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

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.registry import describe
from adaconvert.errors import OptionError, ResourceError, SourceError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.dense_view import dense_view
from adaconvert.layerwise.ffn_weights import FfnWeights, ffn_path, ffn_weights
from adaconvert.layerwise.runner import Block, LayerwiseModel
from adaconvert.layerwise.work import WorkFolder
from adaconvert.progress import Bar, bar
from adaconvert.units import human_bytes

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import nn

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: hidden states larger than this go to a work folder.
IN_MEMORY = 4 << 30
#: tokens a block computes at a time.
BATCH_TOKENS = 4096

Replacement = Callable[["torch.Tensor"], "torch.Tensor"]


class Tokens(Protocol):
    """Token ids to run a model on; `adaconvert.data.tokens.TokenBlocks` is one.

    Attributes:
        ids: int64 [N, L].
        weights: bool [N, L]; False at padding, which stands at the ends of rows.
        digest: sha256 of both.
    """

    @property
    def ids(self) -> Array: ...

    @property
    def weights(self) -> Array: ...

    @property
    def digest(self) -> str: ...


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


def run_digest(source: Source, tokens: Tokens, *facts: object) -> str:
    """Return the sha256 that a work folder of such a run is opened with.

    Args:
        source: the model; told by its headers and the identity of its files.
        tokens: what it runs on.
        facts: whatever else the caller's results depend on; their `repr` counts.
    """
    files = [(s.file, s.size, s.mtime_ns, s.inode) for s in source.shards]
    text = repr((source.fingerprint, files, tokens.digest, facts))
    return hashlib.sha256(text.encode()).hexdigest()


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
        where: a dense or adaptive decoder checkpoint.
        tokens: what to run it on.
        layers: blocks to yield; all when None. Blocks behind the last are not run.
        work: where hidden states are kept and a killed run goes on; blocks before
            `work.next_block` are not yielded again. In memory when None.
        memory: bytes of hidden states that may be kept in memory.
        dtype: torch name of the dtype blocks compute in; what is yielded is float32.
        device: torch device blocks compute on; what is yielded lies there too.
        progress: show a bar on a terminal.

    Raises:
        OptionError: the model is no dense decoder, or the tokens do not fit it.
        SourceError: the checkpoint cannot be read, or its hidden states are not finite.
        ResourceError: the states need more than `memory` and there is no work folder.
    """
    model = LayerwiseModel(dense_view(where), dtype=dtype)
    spec = _decoder(model.source)
    ids, kept = _checked(tokens, spec)
    wanted = sorted(set(range(spec.layers)) if layers is None else set(layers))
    if not wanted or (work is not None and work.next_block > wanted[-1]):
        return
    states = _States(ids, kept, spec.hidden, dtype, work, memory, device)
    start = states.begin(model)
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


class _States:
    """The hidden states of all token blocks: what the current block receives and what it gives."""

    def __init__(
        self,
        ids: torch.Tensor,
        kept: torch.Tensor,
        hidden: int,
        dtype: str,
        work: WorkFolder | None,
        memory: int,
        device: str,
    ) -> None:
        import torch

        self.ids, self.kept, self.device = ids, kept, device
        self._work = work
        self._shape = (*ids.shape, hidden)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._nbytes = ids.numel() * hidden * self._dtype.itemsize
        if work is None and 3 * self._nbytes > memory:
            raise ResourceError(
                f"the hidden states of {ids.numel()} positions take {human_bytes(3 * self._nbytes)}"
                f", more than {human_bytes(memory)} of memory",
                hint="Name a work folder to keep them on disk, or use fewer tokens.",
            )

    def __len__(self) -> int:
        return len(self.batches())

    def batches(self) -> list[slice]:
        """Return the runs of sequences that are computed together."""
        step = max(BATCH_TOKENS // self._shape[1], 1)
        return [slice(i, i + step) for i in range(0, self._shape[0], step)]

    def begin(self, model: LayerwiseModel) -> int:
        """Return the first block to run, whose inputs are now at hand."""
        start = self._work.next_block if self._work else 0
        if start and self._work and self._work.has(f"hidden.{start}", self._nbytes):
            self.arriving = self._tensor(f"hidden.{start}")
        elif start:
            raise OptionError(
                "the hidden states of the interrupted run are missing",
                where="--work",
                hint="Delete the folder to start again.",
            )
        else:
            self.arriving = self._tensor("hidden.0")
            self.arriving.copy_(model.embed(self.ids))
        self.leaving = self._tensor(f"hidden.{start + 1}")
        return start

    def advance(self, block: int) -> None:
        """What `block` gave is what the next one receives."""
        if self._work is not None:
            self._work.sync(f"hidden.{block + 1}")
            self._work.finish(block)
            self.arriving = self.leaving
            self.leaving = self._tensor(f"hidden.{block + 2}")
        else:
            self.arriving, self.leaving = self.leaving, self.arriving

    def inputs(self) -> torch.Tensor:
        """Return room for the FFN inputs of every unpadded token, float32 [T, H]."""
        import torch

        shape = (int(self.kept.sum()), self._shape[2])
        if self._work is None:
            return torch.empty(shape)
        return self._work.tensor("inputs", shape, torch.float32)

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        if self._work is None:
            return torch.empty(self._shape, dtype=self._dtype)
        return self._work.tensor(name, self._shape, self._dtype)


def _run(
    block: Block, spec: ModelSpec, states: _States, wanted: bool, shown: Bar
) -> FfnLayer | None:
    """Run the block on all states; return its FFN with what it received when it is `wanted`."""
    ffn = block.module.get_submodule(ffn_path(spec, block.index))
    inputs = states.inputs() if wanted else None
    filled = 0
    for batch in states.batches():
        with _arriving(ffn) as seen:
            states.leaving[batch] = block(states.arriving[batch].to(states.device)).cpu()
        if inputs is not None:
            rows = seen[0].cpu()[states.kept[batch]]
            inputs[filled : filled + len(rows)] = rows
            filled += len(rows)
        shown.update()
    _check_finite(states, block.index)
    if inputs is None:
        return None
    return FfnLayer(
        index=block.index,
        inputs=inputs.to(states.device),
        weights=ffn_weights(block.module, spec, block.index),
    )


def _rerun(block: Block, spec: ModelSpec, states: _States, replacement: Replacement) -> None:
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
    _check_finite(states, block.index)


@contextmanager
def _arriving(ffn: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that receives what the FFN is called with."""
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())

    hook = ffn.register_forward_pre_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


def _check_finite(states: _States, index: int) -> None:
    for batch in states.batches():
        kept = states.leaving[batch][states.kept[batch]]
        if not bool(kept.isfinite().all()):
            raise SourceError(
                f"hidden states after block {index} hold NaN or infinity",
                where="calibration data",
                hint="Check the source with `adaconvert inspect`; in float16, use a wider dtype.",
            )


def _decoder(source: Source) -> ModelSpec:
    spec = describe(source.config, source.tensors)
    if spec.kind != "decoder" or spec.num_experts:
        kinds = {"encoder": "is an encoder", "vision": "is a vision model"}
        what = kinds.get(spec.kind, "is a mixture of experts")
        raise OptionError(
            f"{what}; its feed-forward networks cannot be run layer by layer on text",
            where=escape(source.label),
            expected="a dense decoder",
        )
    return spec


def _checked(tokens: Tokens, spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask as tensors after checking that the model can run on them."""
    import numpy
    import torch

    ids = torch.from_numpy(numpy.ascontiguousarray(tokens.ids, dtype=numpy.int64))
    kept = torch.from_numpy(numpy.ascontiguousarray(tokens.weights, dtype=bool))
    where = "calibration data"
    if ids.ndim != 2 or ids.shape != kept.shape or not bool(kept.any()):
        raise OptionError("holds no tokens", where=where)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.vocab:
        raise OptionError(
            "holds a token the model has no embedding for: another model's tokenizer made it",
            where=where,
            expected=f"ids from 0 to {spec.vocab - 1}",
            found=high if low >= 0 else low,
        )
    if bool((kept[:, 1:] & ~kept[:, :-1]).any()):
        raise OptionError("has padding before tokens", where=where, expected="padding at the end")
    if spec.max_positions and ids.shape[1] > spec.max_positions:
        raise OptionError(
            "has blocks longer than the model's positions",
            where=where,
            expected=f"at most {spec.max_positions}",
            found=ids.shape[1],
        )
    return ids, kept
