"""Running a dense and a converted model on the same tokens, whole or block by block.

Shapes: B sequences, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from adaconvert.io.source import Source
from adaconvert.layerwise.build import KeyReport
from adaconvert.layerwise.dense_view import dense_view
from adaconvert.layerwise.runner import LayerwiseModel
from adaconvert.progress import bar
from adaconvert.verification.logits import hidden_difference
from adaconvert.verification.models import (
    blocks_of,
    inputs_of,
    is_split,
    load_reference,
    load_target,
    never_leave,
    run,
    takes_exits,
)
from adaconvert.verification.quality import Quality, measure
from adaconvert.verification.routing import LayerRouting, RouterWatch
from adaconvert.verification.tokens import Probe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Comparison:
    """One run of both models; collects what is compared on the way.

    Attributes:
        differences: of what the first blocks receive, then of what each block returns.
        routing: statistics of each converted layer.
        keys: what transformers said about the target's tensor names.
        quality: of an adaptive target as it is configured, None when it runs every expert, or when
            that is what is compared.
    """

    def __init__(
        self,
        sources: tuple[Source, Source],
        probe: Probe,
        *,
        granularity: int,
        stored_dtype: str | None,
        progress: bool,
        tolerance: float = 1e-5,
        configured: bool = False,
    ) -> None:
        self._dense, self._target = sources
        self._probe = probe
        self._ids = probe.tensor()
        self._tolerance = tolerance
        self._configured = configured
        self._granularity = granularity
        self._stored_dtype = stored_dtype
        self._progress = progress
        self.differences: list[float] = []
        self.routing: list[LayerRouting] = []
        self.keys = KeyReport()
        self.quality: Quality | None = None

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [B, S, V] of both models, each loaded whole."""
        hidden: list[torch.Tensor] = []
        with bar(2, "comparing", "model", enabled=self._progress) as shown:
            model = load_reference(self._dense)
            with _each_state(model, hidden.append):
                dense = run(model, inputs_of(model, self._probe))
            # the target needs the room
            del model
            shown.update(1)
            target, self.keys = load_target(self._target)
            if takes_exits(self._target):
                never_leave(target)
            inputs = inputs_of(target, self._probe)
            with ExitStack() as stack:
                if is_split(self._target) and not self._configured:
                    stack.enter_context(_every_expert(target))
                logits = self._run_target(target, inputs, hidden)
            if is_split(self._target) and not self._configured:
                self.quality = measure(target, inputs, dense, tolerance=self._tolerance)
            shown.update(1)
        return dense, logits

    def _run_target(
        self,
        model: PreTrainedModel,
        inputs: dict[str, torch.Tensor],
        hidden: list[torch.Tensor],
    ) -> torch.Tensor:
        blocks, expected = blocks_of(model), iter(hidden)
        same_depth = len(blocks) + 1 == len(hidden)

        def compare(state: torch.Tensor) -> None:
            if same_depth or not self.differences:
                self.differences.append(hidden_difference(next(expected), state))

        with ExitStack() as stack:
            watches = [stack.enter_context(self._watch(block)) for block in blocks]
            stack.enter_context(_each_state(model, compare))
            logits = run(model, inputs)
        for index, watch in enumerate(watches):
            self._note(watch, index)
        return logits

    def layerwise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [B, S, V] of both models, run one block at a time.

        An adaptive one runs as the dense model that all its experts together are.
        """
        views = (dense_view(self._dense), dense_view(self._target))
        dense, target = LayerwiseModel(views[0]), LayerwiseModel(views[1])
        left, right = dense.embed(self._ids), target.embed(self._ids)
        self.differences.append(hidden_difference(left, right))
        same_depth = dense.num_blocks == target.num_blocks
        with bar(target.num_blocks, "comparing", "block", enabled=self._progress) as shown:
            for index in range(target.num_blocks):
                right = self._one(target, index, right)
                if same_depth:
                    left = dense.block(index)(left)
                    self.differences.append(hidden_difference(left, right))
                shown.update(1)
        if not same_depth:
            left = self._through(dense, left)
        logits = dense.head(left), target.head(right)
        self.keys = target.keys
        return logits

    def _through(self, model: LayerwiseModel, hidden: torch.Tensor) -> torch.Tensor:
        for block in model.blocks():
            hidden = block(hidden)
        return hidden

    def _one(self, model: LayerwiseModel, index: int, hidden: torch.Tensor) -> torch.Tensor:
        block = model.block(index)
        with self._watch(block.module) as watch:
            output = block(hidden)
        self._note(watch, index)
        return output

    def _watch(self, block: nn.Module) -> RouterWatch:
        return RouterWatch(block, granularity=self._granularity, stored_dtype=self._stored_dtype)

    def _note(self, watch: RouterWatch, index: int) -> None:
        found = watch.summary(index)
        if found is not None:
            self.routing.append(found)


@contextmanager
def _every_expert(model: PreTrainedModel) -> Iterator[None]:
    """Run every expert of an adaptive model, through its router and not past it; of a mixture those
    the source runs."""
    runner: Any = model
    # scores are only computed for selections that need them, or for whoever collects them
    with runner.set_select("all"), runner.collect("router_scores"):
        yield


@contextmanager
def _each_state(model: PreTrainedModel, visit: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `visit` with what the first block receives, then what each returns, all [B, S, H]."""

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        visit(args[0])

    def on_output(module: nn.Module, args: Any, output: Any) -> None:
        visit(output[0] if isinstance(output, tuple) else output)

    blocks = blocks_of(model)
    hooks = [blocks[0].register_forward_pre_hook(on_input)]
    hooks += [block.register_forward_hook(on_output) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
