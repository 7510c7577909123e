"""A forward pass that runs some of a model's blocks, in stock code.

Early exits, decoding with a draft of the model's own first blocks, and blocks that run later for
several tokens at once are all the same thing: the stock forward, in which only the blocks of a
range compute and all others hand on what they are given. Rotary embeddings, masks, kinds of layers,
what scales logits: all of it stays the stock class's.

Shapes: B sequences, S positions of a pass, d hidden size, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adaptive_context import current, entered
from .adaptive_exit_cache import KeysKept
from .adaptive_mixed import mixed_class


class Tapped(NamedTuple):
    """What the network in a block read and gave.

    Attributes:
        read, gave: [B, S, d].
        run: bool [B, S] which tokens it is about, None for all.
    """

    read: Tensor
    gave: Tensor
    run: Tensor | None = None


@dataclass
class Stage:
    """Which blocks a pass runs, and what it found.

    Attributes:
        start, stop: blocks start .. stop - 1 compute; the others hand on what they get.
        exit: block after which the pass leaves: norm, head and the rest of the tail are those of
            the exit there, and what they read is its state; None for the model's own.
        entering: [B, S, d] what block `start` reads in place of what it is given; with
            start = stop = L, what the tail reads.
        wanted: exits whose states are to be kept.
        watched: exits at which `leave` is called, with the exit and its state.
        leave: decides who leaves; it sets `kept`.
        kept: bool [B, S] tokens that left: their hidden states stay as they are.
        trace: [B, S, d] what each block gave, kept where a list is given.
        depth: [B, S] blocks each token runs, in a pass that only counts: sites then see the tokens
            that reach them, and what blocks give is taken from `trace`.
        hidden: [B, S, d] what block `stop` - 1 gave.
        states: exit -> [B, S, d] what the exit's tail reads.
        taps: exit -> what the network in its host block read and gave.
        end: blocks the stock loop goes through, None for L; `generate(assistant_early_exit=...)`
            lowers it.
    """

    start: int
    stop: int
    exit: int | None = None
    entering: Tensor | None = None
    wanted: tuple[int, ...] = ()
    watched: tuple[int, ...] = ()
    leave: Callable[[int, Tensor], None] | None = None
    kept: Tensor | None = None
    trace: list[Tensor] | None = None
    depth: Tensor | None = None
    hidden: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    taps: dict[int, Tapped] = field(default_factory=dict)
    end: int | None = None

    @property
    def exits(self) -> tuple[int, ...]:
        """Return the exits whose states this pass makes."""
        own = () if self.exit is None else (self.exit,)
        return tuple(dict.fromkeys((*self.wanted, *self.watched, *own)))

    def going(self, index: int) -> Tensor | None:
        """Return the tokens that run a block, bool [B, S]; None where all do."""
        if self.depth is not None:
            return self.depth > index
        return None if self.kept is None or not bool(self.kept.any()) else ~self.kept

    def traced(self, index: int, given: Tensor) -> Tensor:
        """Return what a block hands on, from what it gave."""
        if self.trace is None:
            return given
        if self.depth is not None:
            return self.trace[index]
        self.trace.append(given)
        return given


@contextmanager
def _among(going: Tensor | None) -> Iterator[None]:
    """Run the body among some of the tokens, [B, S]; to sites the others are padding."""
    if going is None:
        yield
        return
    call = current()
    real = call.token_mask
    mask = going if real is None else going & real.to(going.device)
    with entered(replace(call, token_mask=mask)):
        yield


class StagedLayer(nn.Module):
    """Mixed into every block of a model with exits.

    Attributes:
        adaptive_place: (index of the block, L).
        adaptive_exits: exit -> its module, the same mapping in every block; empty where no exit has
            parts of its own.
    """

    adaptive_place: tuple[int, int]
    adaptive_exits: Mapping[int, Any]

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the block as stock code does, or hand on what it got, as the pass's stage says."""
        stage = current().stage
        if stage is None:
            return super().forward(hidden_states, *args, **kwargs)
        index, count = self.adaptive_place
        last = (stage.end or count) - 1
        if stage.entering is not None and index == min(stage.start, last):
            hidden_states = stage.entering
        if stage.start <= index < stage.stop:
            before = hidden_states
            # a block whose cache wants keys and values alone ends there: what comes in goes on
            with _among(stage.going(index)), suppress(KeysKept):
                hidden_states = super().forward(hidden_states, *args, **kwargs)
            if stage.kept is not None:
                hidden_states = torch.where(stage.kept[..., None], before, hidden_states)
            hidden_states = stage.traced(index, hidden_states)
            if index == stage.stop - 1:
                stage.hidden = hidden_states
            if index + 1 in stage.exits:
                own = self.adaptive_exits.get(index + 1)
                tapped = stage.taps.pop(index + 1, None)
                stage.states[index + 1] = (
                    hidden_states if own is None else own.branch(hidden_states, tapped)
                )
            if index + 1 in stage.watched and stage.leave is not None:
                stage.leave(index + 1, stage.states[index + 1])
        if index < last or stage.start > last:
            return hidden_states
        for place, state in stage.states.items():
            # a block of an exit is a copy of the last one: it wants the last one's masks
            own = self.adaptive_exits.get(place)
            block = None if own is None else own.part("block")
            if block is not None:
                stage.states[place] = block(state, *args, **kwargs)
        return hidden_states if stage.exit is None else stage.states[stage.exit]


class StagedTail(nn.Module):
    """Mixed into what follows the blocks: final norm, pooler, head.

    Attributes:
        adaptive_role: which part of the tail this is, such as "norm" or "head".
        adaptive_exits: exit -> its module.
    """

    adaptive_role: str
    adaptive_exits: Mapping[int, Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute with the part of the exit this pass leaves at, where it has one of its own."""
        stage = current().stage
        if stage is not None and stage.exit is not None:
            own = self.adaptive_exits.get(stage.exit)
            part = None if own is None else own.part(self.adaptive_role)
            if part is not None:
                return part(*args, **kwargs)
        return super().forward(*args, **kwargs)


def stage_blocks(
    blocks: nn.ModuleList, tail: Mapping[str, nn.Module], exits: Mapping[int, Any]
) -> None:
    """Let the blocks of a model and what follows them obey stages.

    Args:
        blocks: L of them.
        tail: role -> module.
        exits: exit -> module with its own parts.
    """
    for index, block in enumerate(blocks):
        block.__class__ = mixed_class(StagedLayer, type(block))
        block.__dict__["adaptive_place"] = (index, len(blocks))
        block.__dict__["adaptive_exits"] = exits
    for role, module in tail.items():
        stage_tail(role, module, exits)


def stage_tail(role: str, module: nn.Module, exits: Mapping[int, Any]) -> None:
    """Let one module that follows the blocks obey stages.

    Args:
        role: which part of the tail it is.
        module: of a stock class, or one that does already.
        exits: exit -> module with its own parts.
    """
    if not isinstance(module, StagedTail):
        module.__class__ = mixed_class(StagedTail, type(module))
    module.__dict__["adaptive_role"] = role
    module.__dict__["adaptive_exits"] = exits
