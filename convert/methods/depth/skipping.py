"""A whole model in memory whose blocks can be skipped, and what skipping costs it on text.

Skipping leaves every other block at its place, so what is measured is what a checkpoint without the
skipped ones computes, whatever its config.json says by block numbers.

Shapes: N sequences, L positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from adaconvert.errors import SourceError, VerificationError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.build import causal_class, find_blocks, load
from adaconvert.layerwise.configs import load_config
from adaconvert.layerwise.stored import ReadCount, stored_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from adaconvert.data.tokens import TokenBlocks

#: tokens that are computed at a time; their logits, twice, are the largest thing in memory.
_BATCH_TOKENS = 1024


class Skipping:
    """A language model and the text it is measured on.

    Args:
        source: a stock decoder.
        blocks: token ids [N, L]; padding stands at the ends of rows.
        fitness: "kl" or "loss", see `measure`.
        device: torch device.

    Attributes:
        rows: N.

    Raises:
        SourceError: the model gives numbers on this text that are not finite.
        VerificationError: weights are missing or of another shape.
    """

    def __init__(self, source: Source, blocks: TokenBlocks, *, fitness: str, device: str) -> None:
        import torch

        config = load_config(source)
        model, keys = load(causal_class(config), config, stored_tensors(source, ReadCount()))
        if keys.missing or keys.mismatched:
            names = ", ".join([*keys.missing, *keys.mismatched][:5])
            raise VerificationError(
                f"weights are missing or of another shape: {escape(names)}",
                where=escape(source.label),
            )
        self._model: Any = model.to(device)
        self._modules = find_blocks(model)
        self._ids = torch.from_numpy(blocks.ids)
        self._seen = torch.from_numpy(blocks.weights)
        self._fitness = fitness
        self._device = device
        self.rows = len(blocks)
        self._states: list[torch.Tensor] = []
        if fitness == "kl":
            self._states = [self._final(batch) for batch in self._batches(self.rows)]
        if not torch.isfinite(torch.tensor(self.measure((), 1))):
            raise SourceError("computes no finite loss on this text", where=escape(source.label))

    def measure(self, dropped: Collection[int], rows: int) -> float:
        """Return what skipping blocks costs per token on the first `rows` sequences.

        "kl": the mean Kullback-Leibler divergence, in nats, of its next-token distribution from
        that of the whole model, at every token; "loss": the mean loss of the tokens that follow.
        NaN counts as infinitely bad.

        Args:
            dropped: blocks that are skipped.
            rows: at most N.
        """
        import torch

        total = torch.zeros((), dtype=torch.float64)
        count = 0
        with self.skipped(dropped), torch.no_grad():
            for number, batch in enumerate(self._batches(rows)):
                own = self._logits(batch)
                values = self._divergence(own, number) if self._states else None
                values = self._losses(own, batch) if values is None else values
                kept = self._seen[batch] if self._states else self._seen[batch][:, 1:]
                total += values.cpu()[kept].double().sum()
                count += int(kept.sum())
        found = float(total) / max(count, 1)
        return found if found == found else float("inf")

    @contextmanager
    def skipped(self, dropped: Collection[int]) -> Iterator[None]:
        """Let some blocks give back what they receive, for as long as the context lasts."""
        with ExitStack() as stack:
            for number in dropped:
                stack.enter_context(_identity(self._modules[number]))
            yield

    def _batches(self, rows: int) -> list[slice]:
        step = max(_BATCH_TOKENS // self._ids.shape[1], 1)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _logits(self, batch: slice) -> torch.Tensor:
        ids = self._ids[batch].to(self._device)
        logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits.float()

    def _divergence(self, own: torch.Tensor, number: int) -> torch.Tensor:
        """Return the divergence from the whole model at each position, [b, L]."""
        import torch

        state = self._states[number][: len(own)].to(self._device)
        with self.skipped(range(len(self._modules))), _fed(self._model, state):
            # what follows the output matrix (a scale, a cap) stays with the model
            batch = slice(0, len(own))
            whole = self._logits(batch).log_softmax(-1)
        parted = whole - own.log_softmax(-1)
        return torch.sum(whole.exp() * parted, dim=-1)

    def _losses(self, own: torch.Tensor, batch: slice) -> torch.Tensor:
        """Return the loss of each token but the first, [b, L - 1]."""
        targets = self._ids[batch][:, 1:].to(self._device)
        return -own[:, :-1].log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    def _final(self, batch: slice) -> torch.Tensor:
        """Return what the output matrix receives of the whole model, [b, L, H]."""
        import torch

        seen: list[torch.Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].cpu())

        hook = self._model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            with torch.no_grad():
                self._logits(batch)
        finally:
            hook.remove()
        return seen[0]


@contextmanager
def _identity(block: nn.Module) -> Iterator[None]:
    """Let a block give back its hidden states; nothing of it runs."""

    def give_back(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states

    module: Any = block
    before = module.forward
    module.forward = give_back
    try:
        yield
    finally:
        module.forward = before


@contextmanager
def _fed(model: Any, state: torch.Tensor) -> Iterator[None]:
    """Let the output matrix of a model receive `state`, whatever comes before it gives."""

    def swap(_: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        return (state,)

    hook = model.get_output_embeddings().register_forward_pre_hook(swap)
    try:
        yield
    finally:
        hook.remove()


#: a function from blocks and sequences to what skipping costs.
Measure = Callable[[Collection[int], int], float]
