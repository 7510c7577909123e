"""Where sequences of different lengths end, by stock criteria that know a batch of one length.

Shapes: B sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


class RowStops:
    """Stock stopping criteria, asked for one row and one token after another.

    Args:
        criteria: of `generate`.
        longest: tokens a sequence has at most, where no criterion says less.
    """

    def __init__(self, criteria: Any, longest: int) -> None:
        #: tokens that end a sequence.
        self.ends: set[int] = set()
        self._others: list[Any] = []
        lengths = [longest]
        for criterion in criteria:
            if type(criterion) is EosTokenCriteria:
                self.ends |= set(torch.as_tensor(criterion.eos_token_id).reshape(-1).tolist())
            elif type(criterion) is MaxLengthCriteria:
                lengths.append(int(criterion.max_length))
            else:
                self._others.append(criterion)
        #: tokens a sequence has at most, its prompt included.
        self.longest = min(lengths)

    @property
    def plain(self) -> bool:
        """Return whether only lengths and tokens end a row."""
        return not self._others

    def cut(self, row: Tensor, end: int, tokens: list[int]) -> tuple[int, bool]:
        """Return how many of a row's new tokens it keeps, and whether it ends with them.

        Args:
            row: [1, more] its tokens, the new ones included.
            end: how many it had before.
            tokens: the new ones.
        """
        for count, token in enumerate(tokens, start=1):
            if token in self.ends or end + count >= self.longest:
                return count, True
            seen = row[:, : end + count]
            if any(bool(torch.as_tensor(stop(seen, None)).any()) for stop in self._others):
                return count, True
        return len(tokens), False
