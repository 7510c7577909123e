"""The gates of one adapter, trained with everything else frozen; see `phatgoose`.

The same sequences come in the same order whatever step a run goes on from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.layerwise.work import WorkFolder
from adaconvert.planning.seeds import seed_for
from adaconvert.progress import Bar

if TYPE_CHECKING:
    import numpy

    from adaconvert.data.tokens import TokenBlocks

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: share of the steps over which the rate rises.
_WARM_UP = 0.06
#: steps after which a run with a work folder keeps where it is.
_KEPT_EVERY = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """How gates are trained.

    Attributes:
        steps: optimiser steps of each adapter.
        length: tokens of a sequence.
        batch_tokens: of a step.
        learning_rate: after the warm-up.
        seed: of the order of sequences.
        device: torch device, or "auto" for the accelerator if there is one.
    """

    steps: int = 100
    length: int = 256
    batch_tokens: int = 1024
    learning_rate: float = 5e-3
    seed: int = 0
    device: str = "auto"


class Kept:
    """Where the training of one gate is kept between runs."""

    def __init__(self, work: WorkFolder, name: str) -> None:
        self._work, self._name = work, name

    def load(self) -> dict[str, Array]:
        """Return what was kept, nothing when there is none."""
        known = (self._work.path / f"{self._name}.npz").is_file()
        return self._work.load(self._name) if known else {}

    def save(self, arrays: Mapping[str, Array]) -> None:
        """`arrays` are on disk."""
        self._work.save(self._name, arrays)


class Batches(Iterator["Array"]):
    """Rows of one step after the other; every sequence is seen once before any is seen again.

    Args:
        blocks: the sequences.
        settings: how many make a step, and the seed of their order.
        index: of the adapter.
        first: step to begin at.
    """

    def __init__(
        self, blocks: TokenBlocks, settings: GateSettings, index: int, first: int = 0
    ) -> None:
        self._count, self._seed = len(blocks), seed_for(settings.seed, f"gate.{index}")
        self._each = max(settings.batch_tokens // blocks.length, 1)
        self._taken = first * self._each

    def __next__(self) -> Array:
        import numpy

        rows = [self._row(at) for at in range(self._taken, self._taken + self._each)]
        self._taken += self._each
        # of a text shorter than a step some come twice
        return numpy.array(rows)

    def _row(self, at: int) -> int:
        import numpy

        generator = numpy.random.Generator(numpy.random.Philox([self._seed, at // self._count]))
        return int(generator.permutation(self._count)[at % self._count])


class Training:
    """The training of one adapter's gates.

    Args:
        model: with the adapter in place.
        blocks: its text.
        settings: how.
        index: of the adapter.
        name: of the adapter, for messages.
    """

    def __init__(
        self, model: Any, blocks: TokenBlocks, settings: GateSettings, index: int, name: str
    ) -> None:
        import torch

        self._model, self._blocks, self._settings = model, blocks, settings
        self._index, self._name = index, name
        self._gates = {path: site.router.weight for path, site in model.adaptive_adapters().items()}
        rate = settings.learning_rate
        self._optimiser = torch.optim.AdamW(self._gates.values(), lr=rate, weight_decay=0.0)

    def trained(self, shown: Bar, kept: Kept | None) -> dict[str, Array]:
        """Return v by path, [n]."""
        done = 0 if kept is None else self._restore(kept.load())
        shown.update(done)
        batches = Batches(self._blocks, self._settings, self._index, done)
        for step in range(done, self._settings.steps):
            self._step(step, next(batches))
            shown.update()
            last = step + 1 == self._settings.steps
            if kept is not None and (last or (step + 1) % _KEPT_EVERY == 0):
                kept.save(self._state(step + 1))
        return {p: gate.detach().cpu().numpy()[0].copy() for p, gate in self._gates.items()}

    def _step(self, step: int, rows: Array) -> None:
        """Move the gates once.

        Raises:
            SourceError: the loss is not finite.
        """
        import torch

        steps, settings = self._settings.steps, self._settings
        warm = max(math.ceil(_WARM_UP * steps), 1)
        self._optimiser.param_groups[0]["lr"] = settings.learning_rate * min((step + 1) / warm, 1.0)
        device = self._model.device
        ids = torch.from_numpy(self._blocks.ids[rows]).to(device)
        mask = torch.from_numpy(self._blocks.weights[rows]).to(device)
        labels = ids.masked_fill(~mask, -100)
        loss = self._model(
            input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False
        ).loss
        if not bool(loss.isfinite()):
            raise SourceError(
                f"its loss is not finite at step {step + 1} of its gate", where=escape(self._name)
            )
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()

    def _state(self, step: int) -> dict[str, Array]:
        import numpy

        found: dict[str, Array] = {"step": numpy.array(step)}
        for path, gate in self._gates.items():
            found[f"v {path}"] = gate.detach().cpu().numpy()
            state = self._optimiser.state[gate]
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"{name} {path}"] = state[name].cpu().numpy()
        return found

    def _restore(self, kept: Mapping[str, Array]) -> int:
        """Return the steps that are done; gates and optimiser are as after them."""
        import torch

        if not kept:
            return 0
        step = int(kept["step"])
        with torch.no_grad():
            for path, gate in self._gates.items():
                gate.copy_(torch.from_numpy(kept[f"v {path}"]))
                state = {"step": torch.tensor(float(step))}
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.from_numpy(kept[f"{name} {path}"]).to(gate.device)
                self._optimiser.state[gate] = state
        return step
