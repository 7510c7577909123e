"""The hidden states between the blocks of a model that is run block by block on given tokens.

They are kept in memory, or in a work folder from which a killed run goes on. Blocks of tokens may
be padded at their ends: causal attention keeps padding away from the tokens before it, and padded
positions are left out of what modules are seen to receive.

Shapes: N sequences, L positions, T unpadded tokens, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.registry import describe
from adaconvert.errors import OptionError, ResourceError, SourceError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.runner import Block, LayerwiseModel
from adaconvert.layerwise.work import WorkFolder
from adaconvert.progress import Bar
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


@runtime_checkable
class Pixels(Tokens, Protocol):
    """Images to run a model on, each a block of positions; `adaconvert.data.images.ImageBlocks` is
    one. Their ids mean nothing."""

    def pixels(self, rows: Iterable[int]) -> torch.Tensor:
        """Return pixel values of some of them, [B, C, P, Q]."""


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


class States:
    """The hidden states of all token blocks: what the current block receives and what it gives.

    Args:
        ids, kept: from `checked`.
        hidden: H.
        dtype: torch name of the dtype they are kept in.
        work: where they are kept; in memory when None.
        memory: bytes they may take there.
        device: torch device blocks compute on.
        rooms: tensors of their size that are held beside them.

    Raises:
        ResourceError: they need more than `memory`.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        kept: torch.Tensor,
        hidden: int,
        dtype: str,
        work: WorkFolder | None,
        memory: int,
        device: str,
        rooms: int = 1,
    ) -> None:
        import torch

        self.ids, self.kept, self.device = ids, kept, device
        self._work = work
        self._shape = (*ids.shape, hidden)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._nbytes = ids.numel() * hidden * self._dtype.itemsize
        whole = (2 + rooms) * self._nbytes
        if work is None and whole > memory:
            raise ResourceError(
                f"the hidden states of {ids.numel()} positions take {human_bytes(whole)}"
                f", more than {human_bytes(memory)} of memory",
                hint="Name a work folder to keep them on disk, or use fewer tokens.",
            )

    def __len__(self) -> int:
        return len(self.batches())

    def batches(self) -> list[slice]:
        """Return the runs of sequences that are computed together."""
        step = max(BATCH_TOKENS // self._shape[1], 1)
        return [slice(i, i + step) for i in range(0, self._shape[0], step)]

    def begin(self, model: LayerwiseModel, images: Pixels | None = None) -> int:
        """Return the first block to run, whose inputs are now at hand.

        Args:
            model: what is run.
            images: what it is run on; tokens when None.
        """
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
            self._embed(model, images)
        self.leaving = self._tensor(f"hidden.{start + 1}")
        return start

    def _embed(self, model: LayerwiseModel, images: Pixels | None) -> None:
        if images is None:
            self.arriving.copy_(model.embed(self.ids))
            return
        for batch in self.batches():
            rows = range(*batch.indices(self._shape[0]))
            self.arriving[batch] = model.embed(images.pixels(rows))

    def advance(self, block: int) -> None:
        """What `block` gave is what the next one receives."""
        if self._work is not None:
            self._work.sync(f"hidden.{block + 1}")
            self._work.finish(block)
            self.arriving = self.leaving
            self.leaving = self._tensor(f"hidden.{block + 2}")
        else:
            self.arriving, self.leaving = self.leaving, self.arriving

    def room(self, name: str, width: int) -> torch.Tensor:
        """Return room for what a module receives of every unpadded token, float32 [T, width]."""
        import torch

        shape = (int(self.kept.sum()), width)
        if self._work is None:
            return torch.empty(shape)
        return self._work.tensor(name, shape, torch.float32)

    def _tensor(self, name: str) -> torch.Tensor:
        import torch

        if self._work is None:
            return torch.empty(self._shape, dtype=self._dtype)
        return self._work.tensor(name, self._shape, self._dtype)


def run_block(
    block: Block, states: States, watched: Mapping[str, nn.Module], shown: Bar
) -> dict[str, torch.Tensor]:
    """Return what modules of a block receive when it runs on all states, float32 [T, width].

    Args:
        block: loaded, on the device of the states.
        states: `leaving` is what the block gives, afterwards.
        watched: modules by the name their inputs are kept under.
        shown: updated for each batch.

    Raises:
        SourceError: what the block gives is not finite.
    """
    inputs: dict[str, torch.Tensor] = {}
    filled = 0
    for batch in states.batches():
        with _arriving(watched) as seen:
            states.leaving[batch] = block(states.arriving[batch].to(states.device)).cpu()
        kept = states.kept[batch]
        for name, arrived in seen.items():
            rows = arrived.cpu()[kept]
            if name not in inputs:
                inputs[name] = states.room(name, rows.shape[1])
            inputs[name][filled : filled + len(rows)] = rows
        filled += int(kept.sum())
        shown.update()
    check_finite(states, block.index)
    return inputs


@contextmanager
def _arriving(watched: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a mapping that receives what each module is called with."""
    seen: dict[str, torch.Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].detach()

        return keep

    hooks = [module.register_forward_pre_hook(keeper(name)) for name, module in watched.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def check_finite(states: States, index: int) -> None:
    """Return only when what block `index` gave is finite.

    Raises:
        SourceError: it is not.
    """
    for batch in states.batches():
        kept = states.leaving[batch][states.kept[batch]]
        if not bool(kept.isfinite().all()):
            raise SourceError(
                f"hidden states after block {index} hold NaN or infinity",
                where="calibration data",
                hint="Check the source with `adaconvert inspect`; in float16, use a wider dtype.",
            )


def decoder_of(source: Source, what: str, *, on_images: bool = False) -> ModelSpec:
    """Return the description of a dense decoder, or of a model of images.

    Args:
        source: the checkpoint.
        what: its parts that are to be run, for the message.
        on_images: they are run on images.

    Raises:
        OptionError: it is an encoder, a vision model to be run on text, or a mixture of experts.
    """
    spec = describe(source.config, source.tensors)
    if on_images and spec.kind == "vision":
        return spec
    if spec.kind != "decoder" or spec.num_experts:
        kinds = {"encoder": "is an encoder", "vision": "is a vision model"}
        kind = kinds.get(spec.kind, "is a mixture of experts")
        raise OptionError(
            f"{kind}; its {what} cannot be run layer by layer on text",
            where=escape(source.label),
            expected="a dense decoder",
        )
    return spec


def checked(tokens: Tokens, spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask as tensors after checking that the model can run on them.

    Raises:
        OptionError: it cannot.
    """
    import numpy
    import torch

    ids = torch.from_numpy(numpy.ascontiguousarray(tokens.ids, dtype=numpy.int64))
    kept = torch.from_numpy(numpy.ascontiguousarray(tokens.weights, dtype=bool))
    where = "calibration data"
    if ids.ndim != 2 or ids.shape != kept.shape or not bool(kept.any()):
        raise OptionError("holds no tokens", where=where)
    if spec.kind == "vision":
        return ids, kept
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
