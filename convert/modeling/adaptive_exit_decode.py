"""Generation in which tokens leave early, and blocks they left out run later for several at once.

The prompt runs all blocks. A new token runs to the first exit that is sure enough; its sequence's
next token that goes deeper takes it along, so keys and values are exact (EE-LLM, FREE). Sequences
of a batch leave where they want; those that go on run together, each with what it has waiting.

With "propagate" the blocks behind an exit get keys and values of the state the token left with
(CALM), at once.

Sources: CALM 2207.07061, EE-LLM 2312.04916, FREE 2310.05424.

Shapes: B sequences, R of them in a pass, S positions of it, V vocabulary, d hidden size, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from .adaptive_exit_cache import ExitCache
from .adaptive_exit_decide import Decision
from .adaptive_exit_passes import Passes, StandIn
from .adaptive_stages import Stage

#: states that may wait for a segment; then its sequence runs on, to no other end.
MAX_PENDING = 16


class Leaver:
    """One generation whose tokens leave early.

    Args:
        model: adaptive, with exits.
        rule: {"measure", "thresholds", "decay", "patience", "kv"}.
    """

    def __init__(self, model: Any, rule: Mapping[str, Any]) -> None:
        self.model, self.cache = model, ExitCache()
        self.rule = rule
        self.exits = Decision.exits(model, rule)
        self.passes = Passes(model, self.cache, self.exits)
        # a block of a later exit would read what no frozen state has: there all is computed
        self.propagate = rule["kv"] == "propagate" and not self.passes.with_block

    def stand_in(self) -> StandIn:
        """Return what the stock loop is to run in place of the model."""
        return StandIn(self.model, self._forward)

    def exit_layers(self, sequences: Tensor, prompt: int, ends: set[int]) -> Tensor:
        """Return the blocks each new token ran, [B, new tokens]; 0 behind a sequence's end.

        Args:
            sequences: [B, prompt + new tokens].
            prompt: tokens of the prompt.
            ends: tokens that end a sequence.
        """
        new = sequences[:, prompt:]
        first = torch.full_like(new[:, :1], self.passes.count)
        steps = [depth.to(new.device)[:, None] for depth in self.cache.depths]
        found = torch.cat([first, *steps], dim=1)[:, : new.shape[1]]
        ended = torch.isin(new, torch.tensor(sorted(ends), device=new.device)).long()
        return found.masked_fill(ended.cumsum(1) > ended, 0)

    # -- passes

    def _forward(self, prompt: bool, **inputs: Any) -> Any:
        if prompt:
            return self.passes.prompt(**inputs)
        ids, mask, positions = (
            inputs.get(k) for k in ("input_ids", "attention_mask", "position_ids")
        )
        assert ids is not None
        if ids.shape[1] > 1:
            return self._again(inputs)
        if not self.cache.lengths:
            seen = self.cache.get_seq_length()
            before = None if positions is None else positions[..., -1:] - 1
            self.passes.begin(None if mask is None else mask[:, :seen], before)
        logits, depths = self._step(ids)
        self.passes.account(depths, self.exits)
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        self.cache.depths.append(depths)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=self.cache)

    def _again(self, inputs: dict[str, Any]) -> Any:
        """Run all tokens anew, as a stock class asks for by itself where its angles change."""
        depths = self.cache.depths
        self.cache.reset()
        output = self.passes.prompt(**inputs)
        full = torch.full_like(inputs["input_ids"][:, 0], self.passes.count)
        self.cache.depths = [*depths, full]
        return output

    def _step(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run one token of every sequence; return logits [B, V] and blocks run [B]."""
        cache, batch, count = self.cache, ids.shape[0], self.passes.count
        decision = Decision(self.model, self.rule, self.exits, cache)
        depths = torch.full((batch,), count, device=ids.device)
        output: Tensor | None = None
        rows: list[int] = list(range(batch))
        settled = [False] * batch
        stops = [*self.exits, count]
        for start, stop in zip([0, *self.exits], stops, strict=True):
            logits, state = self._segment(start, stop, rows, ids)
            if output is None:
                output = logits.new_zeros(batch, logits.shape[-1])
            leaves = [True] * len(rows)
            if stop < count:
                leaves = decision.leave(stop, rows, logits, state)
            ending = [i for i, row in enumerate(rows) if leaves[i] and not settled[row]]
            if ending:
                which = torch.tensor([rows[i] for i in ending], device=ids.device)
                output[which] = logits[torch.tensor(ending, device=ids.device)]
                depths[which] = stop
            for i in ending:
                settled[rows[i]] = True
            if stop < count:
                if self.propagate and ending:
                    self._propagate(stop, [rows[i] for i in ending])
                waiting = cache.waiting[stop]
                rows = [r for r in rows if not settled[r] or waiting[r] >= MAX_PENDING]
            if not rows:
                break
        assert output is not None
        return output, depths

    def _propagate(self, at: int, rows: list[int]) -> None:
        """Give the blocks from `at` on keys and values of the states that wait there."""
        cache = self.cache
        places = cache.places([cache.lengths[row] for row in rows], 1, rows)
        states = cache.held[at][rows, :1]
        with cache.keys_only():
            self.passes.fill(Stage(at, self.passes.count, entering=states), places)
        for row in rows:
            cache.waiting[at][row] = 0

    def _segment(
        self, start: int, stop: int, rows: list[int], ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Run blocks start .. stop - 1 for the new token of some rows and for all that waits there.

        Returns:
            logits [R, V] of the exit at `stop` (or of the model) for the new tokens, and what its
            tail read, [R, d].
        """
        cache, whole = self.cache, len(rows) == self.cache.batch
        at = stop if stop < self.passes.count else None
        stage = Stage(start, stop, exit=at)
        counts = [1] * len(rows)
        if start > 0:
            counts = [cache.waiting[start][row] for row in rows]
            held = cache.held[start]
            stage.entering = held[:, : max(counts)] if whole else held[rows, : max(counts)]
        width = max(counts)
        begins = [cache.lengths[row] + 1 - n for row, n in zip(rows, counts, strict=True)]
        places = cache.places(begins, width, None if whole else rows)
        real, keep = None, sorted({n - 1 for n in counts})
        ends = torch.tensor(counts, device=ids.device) - 1
        if len(keep) > 1:
            real = torch.arange(width, device=ids.device) <= ends[:, None]
        tokens = None if start > 0 else ids if whole else ids[rows]
        found = self.passes.run(
            stage,
            places,
            ids=tokens,
            keep=1 if len(keep) == 1 else torch.tensor(keep, device=ids.device),
            real=real,
        )
        every = torch.arange(len(rows), device=ids.device)
        among = torch.tensor([keep.index(n - 1) for n in counts], device=ids.device)
        hidden: Any = stage.hidden
        if start > 0:
            for row in rows:
                cache.waiting[start][row] = 0
        if at is not None:
            cache.hold(stop, None if whole else rows, hidden, counts)
        state = hidden if at is None else stage.states[at]
        return found[every, among], state[every, ends.to(state.device)]
