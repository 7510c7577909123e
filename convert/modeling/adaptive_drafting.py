"""Parts of decoding with drafts: choices, their acceptance, and how many drafts pay.

Sources: speculative sampling 2211.17192.

Shapes: R rows, W positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: share of what was seen before that counts as much as the newest round.
_MEMORY = 0.9
#: rounds without drafts before one is tried again.
_PATIENCE = 8
#: share of a pass that each further position adds to it: 0.05 was measured on a CPU in bfloat16,
#: where drafts should rather be too few than too many.
_PER_POSITION = 0.1


class Processors:
    """Stock logits processors, for rows of different lengths and several positions.

    Some know rows by their number, so each is asked about its row in a batch of the size it was
    made for; the others in it are of the same length.

    Args:
        processors: of `generate`; functions of tokens and scores that keep nothing in between.
        batch: rows they were made for.
    """

    def __init__(self, processors: Any, batch: int) -> None:
        self._run, self._batch = processors, batch
        self._some = len(processors) > 0

    def __call__(self, ids: Tensor, ends: list[int], logits: Tensor, rows: list[int]) -> Tensor:
        """Return scores, [R, W, V]: the logits themselves when nothing processes them.

        Args:
            ids: [R, more] tokens; position i of row r sees the first `ends[r]` + i of them.
            ends: by row.
            logits: [R, W, V].
            rows: number each row had at first.
        """
        if not self._some:
            return logits
        scores = logits.to(torch.float32, copy=True)
        if len(rows) == self._batch and len(set(ends)) == 1:
            for position in range(scores.shape[1]):
                scores[:, position] = self._run(ids[:, : ends[0] + position], scores[:, position])
            return scores
        for end in sorted(set(ends)):
            mine = [r for r, found in enumerate(ends) if found == end]
            source = [mine[0]] * self._batch
            for row in mine:
                source[rows[row]] = row
            back = [rows[row] for row in mine]
            for position in range(scores.shape[1]):
                found = self._run(ids[source, : end + position], scores[source, position])
                scores[mine, position] = found[back]
        return scores


class Draws:
    """Choices from scores.

    Args:
        scores: [R, W, V].
        sampling: drawn from their softmax, else the best.
    """

    def __init__(self, scores: Tensor, *, sampling: bool) -> None:
        self.scores, self._sampling = scores, sampling
        #: [R, W, V] when sampling, else empty.
        self.probabilities = scores.float().softmax(-1) if sampling else scores[..., :0]

    def draft(self) -> tuple[Tensor, Tensor]:
        """Return one choice for every row, and how likely the likeliest token is, [R, 1] each.

        W is 1. What was drawn has no part in the second: were a draft given up for being an
        unlikely token, the likely ones would be drawn too often.
        """
        if self._sampling:
            chances = self.probabilities[:, 0]
            return torch.multinomial(chances, 1), chances.amax(-1, keepdim=True)
        scores = self.scores[:, 0].float()
        best, token = scores.max(-1, keepdim=True)
        return token, (best - scores.logsumexp(-1, keepdim=True)).exp()

    def settle(self, drafts: Tensor | None, given: Tensor | None) -> list[list[int]]:
        """Return the tokens each row takes: drafts it accepts, and one more.

        Args:
            drafts: [R, W - 1], None for W of 1.
            given: [R, W - 1, V] what they were drawn from, when sampling.
        """
        if not self._sampling:
            chosen = self.scores.argmax(-1)
            taken = _run_of(chosen[:, :-1] == drafts) if drafts is not None else None
            counts = [0] * len(chosen) if taken is None else taken.tolist()
            found: list[list[int]] = chosen.tolist()
            return [row[: count + 1] for row, count in zip(found, counts, strict=True)]
        if drafts is None or given is None:
            return torch.multinomial(self.probabilities[:, 0], 1).tolist()
        return self._sampled(drafts, given)

    def _sampled(self, drafts: Tensor, given: Tensor) -> list[list[int]]:
        wanted = self.probabilities
        named = drafts[..., None]
        ours = wanted[:, :-1].gather(-1, named)[..., 0]
        theirs = given.gather(-1, named)[..., 0]
        taken = _run_of(torch.rand_like(ours) * theirs < ours)
        at = taken[:, None, None].expand(-1, 1, wanted.shape[-1])
        left = wanted.gather(1, at)[:, 0]
        # behind the last draft nothing was drawn, so nothing is taken off
        padded = torch.cat([given, torch.zeros_like(given[:, :1])], dim=1).gather(1, at)[:, 0]
        rest = (left - padded).clamp_min(0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, left)
        last = torch.multinomial(rest, 1)[:, 0].tolist()
        rows = zip(drafts.tolist(), taken.tolist(), last, strict=True)
        return [[*row[:count], token] for row, count, token in rows]


def _run_of(right: Tensor) -> Tensor:
    """Return how many leading entries of each row are True."""
    return right.long().cumprod(-1).sum(-1)


@dataclass(frozen=True)
class Costs:
    """What decoding reads, in shares of a plain step: weights are what a small batch waits for.

    Attributes:
        shallow: blocks below the exit, once per position.
        head: of the exit, once per draft.
        deep: the other blocks and the model's head, once per round.
    """

    shallow: float
    head: float
    deep: float

    def of(self, width: int) -> float:
        """Return the cost of a round of W positions, W - 1 of them drafts."""
        if width == 1:
            return self.shallow + self.deep
        deep = self.deep * (1 + _PER_POSITION * (width - 1))
        return width * self.shallow + (width - 1) * self.head + deep

    def gain(self, chance: float, width: int) -> float:
        """Return the tokens per cost of rounds of W positions, plain decoding being 1.

        Args:
            chance: of each draft of being accepted, below 1.
            width: W.
        """
        return (1 - chance**width) / (1 - chance) / self.of(width)

    def best(self, chance: float, most: int) -> tuple[float, int]:
        """Return the greatest gain, and the drafts per round that give it, 1 to `most`."""
        few = {drafts: self.gain(min(chance, 0.999), drafts + 1) for drafts in range(1, most + 1)}
        drafts = max(few, key=lambda number: few[number])
        return few[drafts], drafts


def costs_of(model: Any, draft: Any) -> Costs:
    """Return the costs of drafting at an exit."""
    exits = model.adaptive_runtime.exits
    blocks = model.get_submodule(exits["blocks"])
    whole = model.get_submodule(exits["tail"]["head"])
    exit_head = model.adaptive_exits()[draft.at]
    own = exit_head.part("head")
    head = _size(whole)
    cut = (
        1.0 if draft.vocab is None else len(draft.vocab) / model.config.get_text_config().vocab_size
    )
    extra = _size(exit_head) - (0 if own is None else _size(own))
    shallow = sum(_size(block) for block in blocks[: draft.at])
    deep = sum(_size(block) for block in blocks[draft.at :]) + head
    total = max(shallow + deep, 1)
    return Costs(shallow / total, (head * cut + extra) / total, deep / total)


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class DraftLength:
    """How many positions a round should have, from the drafts accepted so far.

    Each draft is taken to be accepted with one probability; a round of W positions then gives
    (1 - p^W) / (1 - p) tokens. The W with the most tokens per cost is best; 1 is plain decoding,
    and then now and then a draft is tried, to see whether that has changed.

    Args:
        most: drafts at most.
        costs: of a round.
        adaptive: False for always the most.
    """

    def __init__(self, most: int, costs: Costs, *, adaptive: bool) -> None:
        self._most, self._costs, self._adaptive = most, costs, adaptive
        self._right, self._tried, self._idle = 4.0, 5.0, 0

    def width(self) -> int:
        """Return W of the next round."""
        if not self._adaptive:
            return self._most + 1
        chance = min(self._right / self._tried, 0.999)
        found = max(range(1, self._most + 2), key=lambda width: self._costs.gain(chance, width))
        if found > 1:
            return found
        self._idle += 1
        if self._idle < _PATIENCE:
            return 1
        self._idle = 0
        return 2

    def saw(self, accepted: list[int], offered: int) -> None:
        """Take note of a round.

        Args:
            accepted: drafts, by row.
            offered: drafts of each row.
        """
        if not offered:
            return
        rows = len(accepted)
        self._right = _MEMORY * self._right + sum(accepted) / rows
        self._tried = _MEMORY * self._tried + sum(min(n + 1, offered) for n in accepted) / rows
