"""A language model run one block at a time, so that its size is no limit.

    model = LayerwiseModel(folder)
    hidden = model.embed(ids)                 # [B, S] -> [B, S, H]
    for block in model.blocks():              # one in memory at a time
        hidden = block(hidden)                # [B, S, H] -> [B, S, H]
    logits = model.head(hidden)               # [B, S, H] -> [B, S, V]

What comes out equals a forward pass of the whole model: each block is the only one of a model that
transformers itself builds and fills from the checkpoint, with the whole model's masks, positions
and rope. `block.module` is the stock module; hooks and fits attach there. Whatever a caller carries
between blocks is a plain tensor, so a run resumes from a saved one with `model.blocks(start=i)`. In
memory at a time: one block in `dtype` (while it is loaded, its experts up to twice more), or the
head.

Shapes: B sequences, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import VerificationError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.build import KeyReport, causal_class, find_blocks, load
from adaconvert.layerwise.configs import depth_of, load_config, one_block, without_sites
from adaconvert.layerwise.ends import ends_class, seam_of
from adaconvert.layerwise.likeness import check_likeness
from adaconvert.layerwise.names import as_block, block_of
from adaconvert.layerwise.quiet import quiet
from adaconvert.layerwise.stored import ReadCount, StoredRows, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

#: rows of the embedding and the head of a model that is built for a block alone.
_FEW_ROWS = 8


class Block:
    """One loaded block.

    Attributes:
        index: its position in the whole model.
        module: the stock module.
    """

    def __init__(self, index: int, model: PreTrainedModel) -> None:
        self.index = index
        self.module: nn.Module = find_blocks(model)[0]
        self._backbone: Any = model.base_model

    def to(self, device: str) -> None:
        """Move weights and buffers; hidden states must lie there too."""
        self._backbone.to(device)

    def release(self) -> None:
        """Free the weights; the block cannot be run any more."""
        del self.module, self._backbone

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the block makes of `hidden`, [B, S, H] -> [B, S, H]; positions start at 0."""
        import torch

        seen: list[torch.Tensor] = []
        with _replaced_input(self.module, hidden, seen), torch.no_grad():
            self._backbone(**self._inputs(hidden))
        return seen[0]

    def _inputs(self, hidden: torch.Tensor) -> dict[str, Any]:
        """Return what the backbone is called with, so that its block runs on `hidden`."""
        return {"inputs_embeds": hidden, "use_cache": False}


@contextmanager
def _replaced_input(
    module: nn.Module, hidden: torch.Tensor, seen: list[torch.Tensor]
) -> Iterator[None]:
    # what the backbone does before its first block (scaling, adding positions) is undone by the
    # swap
    def swap(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (hidden, *args[1:]), kwargs

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [
        module.register_forward_pre_hook(swap, with_kwargs=True),
        module.register_forward_hook(keep),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class LayerwiseModel:
    """A decoder checkpoint of which at most one block is in memory.

    Args:
        where: the checkpoint folder, or an opened source.
        dtype: torch name of the dtype everything is cast to and computed in.

    Attributes:
        source: the opened checkpoint.
        config: transformers' configuration of the whole model.
        count: how much has been read so far.
        keys: what transformers said about the names of everything loaded so far.

    Raises:
        SourceError: the checkpoint cannot be read.
        OptionError: it is no language model.
    """

    _class_of = staticmethod(causal_class)
    _block_class = Block

    def __init__(self, where: Path | Source, *, dtype: str = "float32") -> None:
        if not isinstance(where, Source):
            where = Source.open(where, ignore_unindexed=True)
        self.source = where
        self.config = load_config(self.source)
        self.dtype = dtype
        self.count = ReadCount()
        self.keys = KeyReport()
        self._class = self._class_of(self.config)

    @property
    def num_blocks(self) -> int:
        """Return the number of blocks."""
        return depth_of(self.config)

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        """The whole model without weights: what each single block is compared with."""
        import torch

        builder: Any = self._class
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = builder._from_config(self.config)
        return model

    def block(self, index: int) -> Block:
        """Return one block with its weights; they are freed with it.

        Raises:
            VerificationError: weights are missing, left over or of another shape, or transformers
                does not build the same block alone as in the whole model.
        """
        model, keys = load(
            self._class,
            self._config_of(index),
            stored_tensors(
                self.source,
                self.count,
                keep=lambda name: block_of(name) == index,
                rename=lambda name: as_block(name, 0),
            ),
            dtype=self.dtype,
        )
        self._note(_in_block(keys, index), index)
        loaded = self._block_class(index, model)
        check_likeness(loaded.module, find_blocks(self._skeleton)[index], index)
        return loaded

    def _config_of(self, index: int) -> PreTrainedConfig:
        """Return the configuration of the model that is built for one block."""
        return one_block(self.config, index, vocab_size=_FEW_ROWS)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Yield the blocks from `start` on, in order; each is dropped before the next is loaded."""
        for index in range(start, self.num_blocks):
            loaded = self.block(index)
            yield loaded
            # the caller's loop variable would keep it until the next one is loaded
            loaded.release()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return what the first block receives for token ids, [B, S] -> [B, S, H].

        Only the rows of the ids are kept in memory.
        """
        import torch

        rows, remapped = torch.unique(ids, return_inverse=True)
        model = self._ends(rows)
        with torch.no_grad():
            model.base_model(input_ids=remapped, use_cache=False)
        return seam_of(model).taken()

    def head(self, hidden: torch.Tensor, *, chunk: int = 256) -> torch.Tensor:
        """Return the logits of final hidden states, [B, S, H] -> [B, S, V].

        Args:
            hidden: output of the last block, before the final norm.
            chunk: positions per call.
        """
        import torch

        model: Any = self._ends(None)
        seam, pieces = seam_of(model), []
        for piece in torch.split(hidden, chunk, dim=1):
            seam.put(piece)
            with torch.no_grad():
                pieces.append(model(inputs_embeds=piece, use_cache=False).logits)
        return torch.cat(pieces, dim=1)

    def _ends(self, rows: torch.Tensor | None) -> PreTrainedModel:
        """Return a model without blocks: with these `rows` of the embedding, or with the head."""
        stored: dict[str, Any] = dict(
            stored_tensors(self.source, self.count, keep=lambda name: block_of(name) is None)
        )
        embedding, head = _ends_on_disk(self._skeleton, stored)
        if rows is not None:
            stored.pop(head or "", None)
            stored[embedding] = StoredRows(stored[embedding], rows.tolist())
        elif head is not None:
            stored[embedding] = _nothing(stored[embedding].get_shape())
        size = None if rows is None else len(rows)
        model, keys = load(
            ends_class(self._class),
            without_sites(one_block(self.config, 0, vocab_size=size)),
            stored,
            dtype=self.dtype,
        )
        if rows is None:
            self._note(keys, None)
        return model

    def _note(self, keys: KeyReport, index: int | None) -> None:
        self.keys |= keys
        if keys.missing or keys.mismatched:
            place = "outside the blocks" if index is None else f"in block {index}"
            names = ", ".join([*keys.missing, *keys.mismatched][:5])
            raise VerificationError(
                f"{place}, weights are missing or of another shape: {escape(names)}",
                where=escape(self.source.label),
            )


def _in_block(keys: KeyReport, index: int) -> KeyReport:
    """Return the part of a one-block model's report that is about the block, at its real index."""

    def kept(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(as_block(name, index) for name in names if block_of(name) is not None)

    return KeyReport(
        missing=kept(keys.missing),
        unexpected=kept(keys.unexpected),
        mismatched=kept(keys.mismatched),
    )


def _ends_on_disk(whole: PreTrainedModel, stored: Mapping[str, object]) -> tuple[str, str | None]:
    """Return the stored names of embedding and head; None for a head that is the embedding."""
    names = {id(parameter): name for name, parameter in whole.named_parameters()}
    found: list[str | None] = []
    for module in (whole.get_input_embeddings(), whole.get_output_embeddings()):
        wanted = names.get(id(module.weight)) if module is not None else None
        # files written from the bare backbone lack its prefix
        found.append(next((n for n in stored if wanted and f".{wanted}".endswith(f".{n}")), None))
    embedding, head = found
    if embedding is None:
        raise VerificationError("no file holds the embedding")
    return embedding, None if head == embedding else head


def _nothing(shape: list[int]) -> torch.Tensor:
    """Return zeros of any shape that take no memory."""
    import torch

    return torch.zeros(1).expand(shape)
