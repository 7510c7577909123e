"""Keys and values of a model whose tokens do not all run all blocks at the same time.

Each sequence has slots, one per token, in order. A pass says which slots of which sequences its
tokens have; what they write there replaces what was there, so a rejected draft needs no removal,
and a token sees the slots up to its own. Blocks that a token left out are filled in by a later pass
over its slot: states that wait for one are kept here too.

Shapes: B sequences, S positions of a pass, C slots, d hidden size, D size of a head, H heads, P
slots of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

#: slots added when there are too few, besides half of what there was.
_ROOM = 64


@dataclass(frozen=True)
class Places:
    """Where the tokens of a pass are; token i of a row is at slot `starts` + i.

    Attributes:
        rows: the sequences of the pass, None for all of them.
        starts: first slot, one per row of the pass.
        width: S. Rows with fewer tokens write what nobody reads behind their last one.
        slots: [rows, S] the same as a tensor, None where all rows start alike.
    """

    rows: Tensor | None
    starts: Sequence[int]
    width: int
    slots: Tensor | None

    @property
    def extent(self) -> int:
        """Return how many slots the pass may look at."""
        return max(self.starts) + self.width


class KeysKept(Exception):  # noqa: N818 (no error: it ends a block whose output nobody wants)
    """Raised from inside a block as soon as its keys and values are kept; the block, see
    `adaptive_stages`, then hands on what it was given."""


class ExitCache(Cache):  # type: ignore[misc]
    """A cache with slots that passes name; without a name it is filled as a dynamic one is.

    Attributes:
        lengths: slots in use, by sequence.
        visible: [B, P] False for padding in the prompt, None when there is none.
        offsets: by sequence, slot minus position of its tokens.
        room: tokens a sequence gets behind its prompt at most, None for any number. What a pass
            computes behind them is thrown away; it is given the last one's position, so that
            models with a table of positions need none beyond it.
        held: first block of a segment -> [B, n, d] states that wait to enter it.
        waiting: first block of a segment -> how many of them each sequence has, the last slots.
        depths: blocks that the tokens of each decoding step ran, [B] each.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._filled: dict[int, int] = {}
        self._places: Places | None = None
        self._keys_only = False
        self.lengths: list[int] = []
        self.visible: Tensor | None = None
        self.offsets: list[int] = []
        self.room: int | None = None
        self._end: int | None = None
        self.held: dict[int, Tensor] = {}
        self.waiting: dict[int, list[int]] = {}
        self.depths: list[Tensor] = []

    # -- passes

    @contextmanager
    def at(self, places: Places) -> Iterator[None]:
        """Let the passes of the body write at slots, and see all up to the last of them."""
        before, self._places = self._places, places
        try:
            yield
        finally:
            self._places = before

    @contextmanager
    def keys_only(self) -> Iterator[None]:
        """Let blocks end as soon as their keys and values are kept; each hands on its input."""
        self._keys_only = True
        try:
            yield
        finally:
            self._keys_only = False

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep what a block computed and return all it may attend to.

        Args:
            key_states, value_states: [rows, H, S, D] of this pass.
            layer_idx: of the block.
        """
        places = self._places
        if places is None:
            start, width = self._filled.get(layer_idx, 0), key_states.shape[-2]
            places = Places(None, (start,), width, None)
            self._filled[layer_idx] = start + width
        pair = (
            _put(self._keys, layer_idx, key_states, places),
            _put(self._values, layer_idx, value_states, places),
        )
        if self._keys_only:
            raise KeysKept
        if places.rows is None:
            return pair[0][:, :, : places.extent], pair[1][:, :, : places.extent]
        rows = places.rows.to(key_states.device)
        return (
            pair[0][:, :, : places.extent].index_select(0, rows),
            pair[1][:, :, : places.extent].index_select(0, rows),
        )

    def begin(self, mask: Tensor | None, positions: Tensor | None) -> None:
        """Say what the prompt that has just run was.

        Args:
            mask: [B, P] 1 for real tokens, None when all are.
            positions: [B, P] of its tokens, None when they are counted from 0.
        """
        batch, length = self.batch, self._filled[0]
        self.lengths = [length] * batch
        last = [length - 1] * batch
        if positions is not None:
            last = [int(p) for p in positions[..., -1].reshape(-1).expand(batch).tolist()]
        self.offsets = [length - 1 - p for p in last]
        self._end = None if self.room is None else length + self.room
        self.visible = None
        if mask is not None and not bool(mask.all()):
            self.visible = mask.to(torch.bool)

    def places(self, starts: Sequence[int], width: int, rows: Sequence[int] | None) -> Places:
        """Return the places of a pass.

        Args:
            starts: first slot, one per row of the pass.
            width: S.
            rows: the sequences of the pass, None for all of them.
        """
        device = self._keys[0].device
        which = None if rows is None else torch.tensor(list(rows), device=device)
        slots = None
        if which is not None or any(start != starts[0] for start in starts):
            first = torch.tensor(list(starts), device=device)
            slots = first[:, None] + torch.arange(width, device=device)
        return Places(which, tuple(starts), width, slots)

    def positions(self, places: Places) -> Tensor:
        """Return the positions of a pass's tokens, [rows, S]."""
        device = self._keys[0].device
        rows = range(self.batch) if places.rows is None else places.rows.tolist()
        starts = torch.tensor(list(places.starts), device=device)[:, None]
        slots = starts + torch.arange(places.width, device=device)
        if self._end is not None:
            slots = slots.clamp_max(self._end - 1)
        return slots - torch.tensor([self.offsets[r] for r in rows], device=device)[:, None]

    def mask(self, places: Places, dtype: torch.dtype, window: int | None = None) -> Tensor:
        """Return what the tokens of a pass see, [rows, 1, S, C], to be added to scores.

        Args:
            places: of the pass.
            dtype: of the scores.
            window: how many slots a token sees, its own one included, None for all before it.
        """
        device = self._keys[0].device
        keys = torch.arange(places.extent, device=device)
        slots = places.slots
        if slots is None:
            slots = places.starts[0] + torch.arange(places.width, device=device)[None]
        seen = keys <= slots[..., None]
        if window is not None:
            seen &= keys > slots[..., None] - window
        if self.visible is not None:
            real = self.visible if places.rows is None else self.visible[places.rows]
            prompt = real.shape[1]
            seen = seen.expand(real.shape[0], -1, -1).clone()
            seen[:, :, :prompt] &= real[:, None]
        added = torch.zeros(seen.shape, dtype=dtype, device=device)
        added.masked_fill_(~seen, torch.finfo(dtype).min)
        return added[:, None].expand(len(places.starts), -1, -1, -1)

    def seen_mask(self, width: int) -> Tensor | None:
        """Return which slots hold real tokens with `width` new ones, [B, slots]; None for all."""
        if self.visible is None:
            return None
        new = self.get_seq_length() + width - self.visible.shape[1]
        return torch.cat([self.visible, self.visible.new_ones(self.batch, new)], dim=1)

    def hold(
        self, block: int, rows: Sequence[int] | None, states: Tensor, counts: list[int]
    ) -> None:
        """Let states wait for a segment, behind those that wait already.

        Args:
            block: the segment's first one.
            rows: their sequences, None for all.
            states: [rows, S, d].
            counts: how many of the S are real, by row.
        """
        which = range(self.batch) if rows is None else rows
        waiting = self.waiting.setdefault(block, [0] * self.batch)
        need = max(waiting[row] + count for row, count in zip(which, counts, strict=True))
        held = self.held.get(block)
        if held is None or held.shape[1] < need:
            grown = states.new_zeros(self.batch, 2 * need, states.shape[-1])
            if held is not None:
                grown[:, : held.shape[1]] = held
            self.held[block] = held = grown
        for index, (row, count) in enumerate(zip(which, counts, strict=True)):
            held[row, waiting[row] : waiting[row] + count] = states[index, :count]
            waiting[row] += count

    # -- what transformers asks

    @property
    def batch(self) -> int:
        """Return B; 0 before anything is in it."""
        return int(self._keys[0].shape[0]) if self._keys else 0

    def __len__(self) -> int:
        return len(self._keys)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many slots the longest sequence uses."""
        return max(self.lengths) if self.lengths else self._filled.get(layer_idx, 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the slot where a prompt that comes next begins."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return how many slots a mask for a prompt covers, and the first of them."""
        return self.get_seq_length(layer_idx) + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: there is no end."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """Return that it grows."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Return whether anything is in it."""
        return bool(self._keys)

    # -- sequences change places, tokens go

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence go on from another one, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences, in the order given; one may be named more than once."""
        for store in (self._keys, self._values):
            for index, kept in store.items():
                store[index] = kept[indices.to(kept.device)]
        for block, kept in self.held.items():
            self.held[block] = kept[indices.to(kept.device)]
        if self.visible is not None:
            self.visible = self.visible[indices.to(self.visible.device)]
        self.depths = [found[indices.to(found.device)] for found in self.depths]
        named = torch.arange(len(self.lengths))[indices.cpu()].tolist() if self.lengths else []
        self.lengths = [self.lengths[i] for i in named]
        self.offsets = [self.offsets[i] for i in named]
        self.waiting = {b: [found[i] for i in named] for b, found in self.waiting.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sequence several times, the copies side by side."""
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every sequence.

        Args:
            tokens_to_remove: how many, as a negative number; a positive one is the length to keep.
        """
        gone = -tokens_to_remove
        if tokens_to_remove > 0:
            gone = max(self.get_seq_length() - tokens_to_remove, 0)
        self.lengths = [length - gone for length in self.lengths]
        self._filled = {index: length - gone for index, length in self._filled.items()}
        self.waiting = {b: [max(n - gone, 0) for n in found] for b, found in self.waiting.items()}
        self.depths = self.depths[: len(self.depths) - gone] if gone else self.depths

    def as_dynamic(self) -> DynamicCache | None:
        """Return a copy that stock code can go on with; None where sequences have different lengths
        or blocks have yet to run for some tokens."""
        waits = any(any(counts) for counts in self.waiting.values())
        if waits or len(set(self.lengths)) != 1:
            return None
        made = DynamicCache()
        for index in sorted(self._keys):
            pair = (store[index][:, :, : self.lengths[0]] for store in (self._keys, self._values))
            made.update(*(kept.clone() for kept in pair), index)
        return made

    def reset(self) -> None:
        """Forget everything."""
        for kept in (self._keys, self._values, self._filled, self.held, self.waiting):
            kept.clear()
        self.lengths, self.offsets, self.depths, self.visible = [], [], [], None


def _put(store: dict[int, Tensor], layer: int, states: Tensor, places: Places) -> Tensor:
    """Write [rows, H, S, D] at its slots, with room made for them; return what holds all."""
    kept, need = store.get(layer), places.extent
    if kept is None or kept.shape[2] < need:
        had = 0 if kept is None else kept.shape[2]
        batch = states.shape[0] if kept is None else kept.shape[0]
        # zeros: what no token wrote is multiplied by a weight of zero
        grown = states.new_zeros(
            batch, states.shape[1], max(need, had + had // 2) + _ROOM, states.shape[3]
        )
        if kept is not None:
            grown[:, :, :had] = kept
        store[layer] = kept = grown
    if places.slots is None:
        start = places.starts[0]
        kept[:, :, start : start + places.width] = states
        return kept
    rows = places.rows
    if rows is None:
        rows = torch.arange(kept.shape[0], device=kept.device)
    rows, slots = rows.to(kept.device), places.slots.to(kept.device)
    kept[rows[:, None], :, slots] = states.transpose(1, 2)
    return kept
