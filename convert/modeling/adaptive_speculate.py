"""Lossless decoding with drafts of a model's own first blocks.

The blocks below an exit and its head draft tokens; one pass of the other blocks checks them all.
Blocks below the exit run once per token: their keys, values and states serve the check. Greedy
tokens are those of plain decoding, sampled ones have its distribution. Of a batch every sequence
accepts what it accepts; nothing waits for the shortest.

Sources: self-speculation of LayerSkip 2404.16710; speculative sampling 2211.17192.

Shapes: B sequences, R of them unfinished, W positions of a round (the last token and W - 1
drafts), V vocabulary, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adaptive_drafting import DraftLength, Draws, Processors, costs_of
from .adaptive_exit_cache import ExitCache
from .adaptive_exit_passes import Passes, reduced_head
from .adaptive_row_stops import RowStops
from .adaptive_stages import Stage

#: logit of a token that drafts do not choose among.
_NEVER = -1e30


@dataclass(frozen=True)
class Draft:
    """How to draft.

    Attributes:
        at: exit, by the blocks before it.
        tokens: drafts per round at most.
        threshold: drafting ends where every sequence's likeliest token is no likelier.
        vocab: int64, tokens to choose among, None for all.
        adaptive: rounds are as long as pays with the acceptance seen so far.
    """

    at: int
    tokens: int
    threshold: float
    vocab: Tensor | None = None
    adaptive: bool = True


@dataclass
class DraftCount:
    """What the drafts of a generation came to.

    Attributes:
        rounds: passes that checked drafts, those without any included.
        drafted, accepted: tokens, over all sequences.
    """

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


class Speculation:
    """One generation.

    Args:
        model: adaptive, with exits.
        draft: how to draft.
        ids: [B, P] the prompts.
        config: of the generation, as `generate` prepared it.
        processors, criteria: as well.
        streamer: told of tokens, of one sequence only; None for nobody.
    """

    def __init__(
        self,
        model: Any,
        draft: Draft,
        ids: Tensor,
        *,
        config: Any,
        processors: Any,
        criteria: Any,
        streamer: Any = None,
    ) -> None:
        self.model, self.draft, self.config, self.streamer = model, draft, config, streamer
        self.cache = ExitCache()
        self.passes = Passes(model, self.cache, (draft.at,))
        self.processors = Processors(processors, len(ids))
        self.stops = RowStops(criteria, int(config.max_length))
        self.sampling = bool(config.do_sample)
        self.length = DraftLength(draft.tokens, costs_of(model, draft), adaptive=draft.adaptive)
        self.count = DraftCount()
        self.scores: list[Tensor] | None = None
        self.raw: list[Tensor] | None = None
        if config.return_dict_in_generate and config.output_scores:
            self.scores = []
        if config.return_dict_in_generate and config.output_logits:
            self.raw = []
        self._reduced: Callable[[Tensor], Tensor] | None = None
        if draft.vocab is not None:
            self._reduced = reduced_head(model, draft.at, draft.vocab)
        batch, prompt = ids.shape
        self._ids = ids.new_zeros(batch, max(self.stops.longest, prompt) + draft.tokens + 2)
        self._ids[:, :prompt] = ids
        self._ends = [prompt] * batch
        self._rows = list(range(batch))
        self._done: dict[int, Tensor] = {}
        self.cache.room = self.stops.longest - prompt

    def run(self, kwargs: dict[str, Any]) -> Tensor:
        """Return the sequences, [B, longest].

        Args:
            kwargs: of the stock loop: mask, positions and the like.
        """
        prompt = self._ids[:, : self._ends[0]]
        logits = self.passes.prefill(prompt, self.config, kwargs)[:, None]
        choices = self._draws(logits, 0)
        self._take(choices.settle(None, None), logits, choices.scores)
        while self._rows:
            self._round()
        if self.streamer is not None:
            self.streamer.end()
        return self._gathered()

    # -- one round

    def _round(self) -> None:
        room = max(self.stops.longest - end for end in self._ends)
        width = min(self.length.width(), room)
        if width == 1:
            logits, drafts, given = self._plain(), None, None
        else:
            logits, drafts, given = self._checked(width)
        choices = self._draws(logits, 0)
        new = choices.settle(drafts, given)
        offered = 0 if drafts is None else drafts.shape[1]
        self.count.rounds += 1
        self.count.drafted += offered * len(new)
        self.count.accepted += sum(len(tokens) - 1 for tokens in new)
        self.length.saw([len(tokens) - 1 for tokens in new], offered)
        self.cache.lengths = [
            length + len(tokens) for length, tokens in zip(self.cache.lengths, new, strict=True)
        ]
        self._take(new, logits, choices.scores)

    def _plain(self) -> Tensor:
        """Run the last token of every row through all blocks; return logits, [R, 1, V]."""
        places = self.cache.places(self.cache.lengths, 1, None)
        stage = Stage(0, self.passes.count, wanted=self.passes.with_block)
        return self.passes.run(stage, places, ids=self._last())

    def _checked(self, width: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Draft and check; return logits [R, W, V], drafts [R, W - 1], and when sampling the
        distributions these were drawn from, [R, W - 1, V]."""
        at, start = self.draft.at, self.cache.lengths
        token, states, drafts, given = self._last(), [], [], []
        for step in range(width):
            places = self.cache.places([n + step for n in start], 1, None)
            if step == width - 1:
                stage = Stage(0, at, wanted=self.passes.with_block)
                self.passes.fill(stage, places, ids=token)
                states.append(stage.hidden)
                break
            stage = Stage(0, at, exit=at)
            logits = self._drafted(stage, places, token)
            self.passes.account(torch.full((len(start),), self.passes.count), (at,))
            states.append(stage.hidden)
            drawn = self._draws(logits, step)
            token, sure = drawn.draft()
            # a comparison with nan, too, ends it
            if not bool((sure > self.draft.threshold).any()):
                break
            drafts.append(token)
            given.append(drawn.probabilities)
            self._write(token, step)
        hidden: Any = torch.cat([state for state in states if state is not None], dim=1)
        stage = Stage(at, self.passes.count, entering=hidden)
        logits = self.passes.run(stage, self.cache.places(start, hidden.shape[1], None))
        if not drafts:
            return logits, None, None
        asked = torch.cat(given, dim=1) if self.sampling else None
        return logits, torch.cat(drafts, dim=1), asked

    def _drafted(self, stage: Stage, places: Any, token: Tensor) -> Tensor:
        """Return an exit's logits for the next token, [R, 1, V]."""
        if self._reduced is None:
            return self.passes.run(stage, places, ids=token)
        few = self._reduced(self.passes.fill(stage, places, ids=token))
        vocab = self.draft.vocab
        assert vocab is not None
        size = self.model.config.get_text_config().vocab_size
        # finite when divided by a temperature too: a processor may forbid all tokens of the few
        never = max(_NEVER, torch.finfo(few.dtype).min)
        whole = few.new_full((*few.shape[:-1], size), never)
        whole[..., vocab] = few
        return whole

    def _draws(self, logits: Tensor, step: int) -> Draws:
        """Return choices from logits [R, W, V] whose first position sees `step` drafts."""
        ends = [end + step for end in self._ends]
        scores = self.processors(self._ids, ends, logits, self._rows)
        return Draws(scores, sampling=self.sampling)

    # -- rows

    def _last(self) -> Tensor:
        """Return the token of every row that has not run yet, [R, 1]."""
        if all(end == self._ends[0] for end in self._ends):
            return self._ids[:, self._ends[0] - 1 : self._ends[0]]
        where = torch.tensor(self._ends, device=self._ids.device)[:, None] - 1
        return self._ids.gather(1, where)

    def _write(self, token: Tensor, step: int) -> None:
        """Put a draft [R, 1] behind what processors will see next."""
        where = torch.tensor(self._ends, device=self._ids.device)[:, None] + step
        self._ids.scatter_(1, where, token)

    def _take(self, new: list[list[int]], logits: Tensor, scores: Tensor) -> None:
        """Append tokens, row by row, up to where a row ends; rows that ended leave the batch."""
        going = []
        for row, tokens in enumerate(new):
            end = self._ends[row]
            added = torch.tensor(tokens, dtype=self._ids.dtype, device=self._ids.device)
            self._ids[row, end : end + len(tokens)] = added
            kept, ended = self.stops.cut(self._ids[row : row + 1], end, tokens)
            self._ends[row] = end + kept
            self.cache.lengths[row] -= len(tokens) - kept
            if self.streamer is not None:
                self.streamer.put(added[:kept].cpu())
            for found, kind in ((self.scores, scores), (self.raw, logits)):
                if found is not None:
                    found.extend(kind[row : row + 1, i].float() for i in range(kept))
            if ended:
                self._done[self._rows[row]] = self._ids[row, : end + kept]
            else:
                going.append(row)
        if len(going) < len(new):
            self._keep(going)

    def _keep(self, going: list[int]) -> None:
        rows = self._rows
        self._rows = [rows[row] for row in going]
        self._ends = [self._ends[row] for row in going]
        if going:
            which = torch.tensor(going, device=self._ids.device)
            self._ids = self._ids[which]
            self.cache.batch_select_indices(which)

    def _gathered(self) -> Tensor:
        """Return all sequences, padded behind their ends as the stock loop pads."""
        batch = len(self._done)
        longest = max(len(row) for row in self._done.values())
        pad = self.config._pad_token_tensor
        found = self._ids.new_full((batch, longest), 0 if pad is None else int(pad))
        for index, row in self._done.items():
            found[index, : len(row)] = row
        return found
