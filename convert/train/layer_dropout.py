"""Layer dropout: blocks that some sequences of a batch go around while training.

Shapes: B sequences, S positions, d hidden size, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaconvert.modeling.adaptive_context import current


def probabilities(layers: int, most: float) -> list[float]:
    """Return how likely each of L blocks is left out: most x (2^(l / (L - 1)) - 1).

    Source: LayerSkip, 2404.16710, equation 2, without its curriculum over time, which is for
    training from scratch.
    """
    return [most * (2.0 ** (layer / max(layers - 1, 1)) - 1.0) for layer in range(layers)]


class LayerTaps:
    """Hooks on blocks that leave blocks out and keep what each gives; the blocks stay as they are.

    What a block would have added is computed and thrown away for the sequences that skip it, so
    that a step costs what it costs without dropout.

    Attributes:
        states: blocks before it -> [B, S, d], of the pass that was `watched` last.
    """

    def __init__(self, blocks: Sequence[nn.Module], most: float, seed: int) -> None:
        self.states: dict[int, Tensor] = {}
        self._wanted: frozenset[int] = frozenset()
        self._chances = probabilities(len(blocks), most)
        self._seed, self._step = seed, -1
        self._generator = torch.Generator()
        self._kept: Tensor | None = None
        for index, block in enumerate(blocks):
            block.register_forward_hook(_Hook(self, index))

    def draw(self, batch: int, step: int) -> Tensor:
        """Return bool [B, L], which sequences the next pass runs through which blocks.

        The same for every run: draws depend on seed and step, and on how many came before in it.
        """
        if step != self._step:
            # two numbers become one seed without meeting another pair soon
            self._generator.manual_seed(self._seed * 1_000_003 + step)
            self._step = step
        drawn = torch.rand(batch, len(self._chances), generator=self._generator)
        self._kept = drawn >= torch.tensor(self._chances)
        return self._kept

    def watch(self, wanted: Sequence[int]) -> None:
        """Keep what the next pass gives after `wanted` blocks."""
        self.states, self._wanted = {}, frozenset(wanted)

    def forget(self) -> None:
        """Keep nothing any more."""
        self.states, self._wanted = {}, frozenset()

    def seen(self, index: int, module: nn.Module, before: Tensor, after: Any) -> Any:
        """Return what a block gives, as a hook of it.

        Args:
            index: of the block.
            module: the block.
            before: [B, S, d] what it read.
            after: what it gave, or a tuple that begins with it.
        """
        hidden: Tensor = after[0] if isinstance(after, tuple) else after
        kept = self._kept
        stage = current().stage
        # a pass that takes a state through the tail runs no block
        runs = stage is None or stage.start < stage.stop
        drops = kept is not None and self._chances[index] > 0 and runs
        if module.training and drops:
            # recomputed going back it meets the same draw: the next comes with the next pass
            assert kept is not None
            rows = kept[:, index].to(hidden.device).view(-1, *[1] * (hidden.dim() - 1))
            hidden = torch.where(rows, hidden, before)
        if index + 1 in self._wanted:
            self.states[index + 1] = hidden
        return (hidden, *after[1:]) if isinstance(after, tuple) else hidden


class _Hook:
    """A hook that pickles."""

    def __init__(self, taps: LayerTaps, index: int) -> None:
        self._taps, self._index = taps, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._taps.seen(self._index, module, args[0], output)
