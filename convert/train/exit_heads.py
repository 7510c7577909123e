"""The exits of a model as training sees them: states of a pass, and the tail of each exit.

A stock checkpoint has the shared head after every block (LayerSkip): its blocks and what follows
them obey stages while it is trained, see `modeling.adaptive_stages`; nothing of that is written.

Shapes: B sequences, S positions, C positions of a chunk, d hidden size, V vocabulary, L blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from adaconvert.modeling.adaptive_context import current, entered
from adaconvert.modeling.adaptive_exits import NAME
from adaconvert.modeling.adaptive_stages import Stage, stage_blocks
from adaconvert.train.layer_dropout import LayerTaps


class Heads(Protocol):
    """What an exit is trained through.

    Attributes:
        layers: L.
        places: blocks before each exit, ascending; the model's own end is not one.
    """

    layers: int
    places: tuple[int, ...]

    def states(self, fed: Mapping[str, Any], places: Sequence[int]) -> dict[int, Tensor]:
        """Return what the tails of `places` read and, under L, what the last block gave.

        Args:
            fed: what the model is fed, ids [B, S].
            places: exits.
        """

    def logits(self, at: int, state: Tensor) -> Tensor:
        """Return the logits of an exit, or at L of the model, [C, d] -> [C, V]."""

    def tail(self) -> list[nn.Parameter]:
        """Return the parameters between states and logits, those that ask for gradients."""


class OwnHeads:
    """The exits of an adaptive model.

    Args:
        model: with exits.
        taps: keep what blocks give where they may be left out; every exit is then a shared one.
    """

    def __init__(self, model: Any, taps: LayerTaps | None = None) -> None:
        self._model, self._taps = model, taps
        exits = model.adaptive_runtime.exits
        self._paths = tuple(exits["tail"].values())
        blocks: Any = model.get_submodule(exits["blocks"])
        self.layers = len(blocks)
        if any(head["block"] for head in exits["heads"]):
            # blocks of exits run in its place; they recompute themselves, once
            blocks[-1].gradient_checkpointing = False
        self.places = tuple(model.adaptive_exits())

    def states(self, fed: Mapping[str, Any], places: Sequence[int]) -> dict[int, Tensor]:
        """See `Heads.states`."""
        if self._taps is not None:
            run = functools.partial(self._model.exit_states, ())
            return _tapped(run, self._taps, fed, (*places, self.layers))
        found: dict[int, Tensor] = self._model.exit_states(tuple(places), **fed)
        return found

    def logits(self, at: int, state: Tensor) -> Tensor:
        """See `Heads.logits`."""
        # each position alone: tails know nothing of others, and no mask or length is in the way
        found: Tensor = self._model.exit_logits(at, state[:, None])[:, 0]
        return found

    def tail(self) -> list[nn.Parameter]:
        """See `Heads.tail`."""
        heads = self._model.adaptive_exits().values()
        own = [head.part(role) for head in heads for role in head.roles]
        return _learning([*(self._model.get_submodule(path) for path in self._paths), *own])


class SharedHeads:
    """The shared head after every block of a stock model.

    Args:
        model: a causal language model of transformers.
        blocks: path of its blocks.
        tail: role -> path of what follows them.
        taps: keep what blocks give.
        places: blocks before each exit; the model's own end is left out.
    """

    def __init__(
        self,
        model: Any,
        blocks: str,
        tail: Mapping[str, str],
        taps: LayerTaps,
        places: Sequence[int],
    ) -> None:
        self._model, self._taps = model, taps
        modules: Any = model.get_submodule(blocks)
        self._tail = {role: model.get_submodule(path) for role, path in tail.items()}
        self.layers = len(modules)
        self.places = tuple(places)
        stage_blocks(modules, self._tail, {})

    def states(self, fed: Mapping[str, Any], places: Sequence[int]) -> dict[int, Tensor]:
        """See `Heads.states`."""
        run = functools.partial(self._model.base_model, use_cache=False)
        return _tapped(run, self._taps, fed, (*places, self.layers))

    def logits(self, at: int, state: Tensor) -> Tensor:
        """See `Heads.logits`."""
        stage = Stage(self.layers, self.layers, entering=state[:, None])
        with entered(replace(current(), stage=stage)):
            # as the class computes: Trainer may have put a cast of everything around the instance
            forward: Any = type(self._model).forward
            found: Tensor = forward(
                self._model, inputs_embeds=stage.entering, use_cache=False
            ).logits[:, 0]
        return found

    def tail(self) -> list[nn.Parameter]:
        """See `Heads.tail`."""
        return _learning(self._tail.values())


def _tapped(
    run: Callable[..., Any], taps: LayerTaps, fed: Mapping[str, Any], wanted: Sequence[int]
) -> dict[int, Tensor]:
    """Return what blocks give in one pass without a head, which `run` makes of what is fed."""
    taps.watch(wanted)
    try:
        run(**fed)
        return dict(taps.states)
    finally:
        taps.forget()


def _learning(modules: Any) -> list[nn.Parameter]:
    found = {id(p): p for module in modules if module is not None for p in module.parameters()}
    return [parameter for parameter in found.values() if parameter.requires_grad]


def is_exit(name: str) -> bool:
    """Return whether a parameter is one that an exit has of its own."""
    return name.startswith(f"{NAME}.")


def never_leaving(model: Any) -> Any:
    """Return a context in which every token passes all blocks; nothing changes for other models."""
    has_exits = hasattr(model, "adaptive_exits") and bool(model.adaptive_exits())
    if not has_exits or not hasattr(model, "set_exits"):
        return nullcontext()
    return model.set_exits(thresholds=None)
