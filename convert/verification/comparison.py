"""Running a dense and a converted model on the same tokens, whole or block by block.

Shapes: B sequences, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from adaconvert.errors import VerificationError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.build import (
    KeyReport,
    attention_of,
    causal_class,
    find_blocks,
    load,
    report_of,
)
from adaconvert.layerwise.configs import load_config
from adaconvert.layerwise.quiet import quiet
from adaconvert.layerwise.runner import LayerwiseModel
from adaconvert.layerwise.stored import ReadCount, stored_tensors
from adaconvert.progress import bar
from adaconvert.verification.logits import hidden_difference
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
    """

    def __init__(
        self,
        sources: tuple[Source, Source],
        probe: Probe,
        *,
        granularity: int,
        stored_dtype: str | None,
        progress: bool,
    ) -> None:
        self._dense, self._target = sources
        self._ids = probe.tensor()
        self._granularity = granularity
        self._stored_dtype = stored_dtype
        self._progress = progress
        self.differences: list[float] = []
        self.routing: list[LayerRouting] = []
        self.keys = KeyReport()

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [B, S, V] of both models, each loaded whole."""
        hidden: list[torch.Tensor] = []
        with bar(2, "comparing", "model", enabled=self._progress) as shown:
            model = _load_dense(self._dense)
            with _each_state(model, hidden.append):
                dense = _run(model, self._ids)
            # the target needs the room
            del model
            shown.update(1)
            target, self.keys = load_target(self._target)
            logits = self._run_target(target, hidden)
            shown.update(1)
        return dense, logits

    def _run_target(self, model: PreTrainedModel, hidden: list[torch.Tensor]) -> torch.Tensor:
        blocks, expected = find_blocks(model), iter(hidden)
        same_depth = len(blocks) + 1 == len(hidden)

        def compare(state: torch.Tensor) -> None:
            if same_depth or not self.differences:
                self.differences.append(hidden_difference(next(expected), state))

        with ExitStack() as stack:
            watches = [stack.enter_context(self._watch(block)) for block in blocks]
            stack.enter_context(_each_state(model, compare))
            logits = _run(model, self._ids)
        for index, watch in enumerate(watches):
            self._note(watch, index)
        return logits

    def layerwise(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [B, S, V] of both models, run one block at a time."""
        dense, target = LayerwiseModel(self._dense), LayerwiseModel(self._target)
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


def _load_dense(source: Source) -> PreTrainedModel:
    """Return the source in float32, built from its validated files and its sanitised config."""
    config = load_config(source)
    model, keys = load(causal_class(config), config, stored_tensors(source, ReadCount()))
    if keys.missing or keys.mismatched:
        names = ", ".join([*keys.missing, *keys.mismatched][:5])
        raise VerificationError(
            f"weights are missing or of another shape: {escape(names)}",
            where=escape(source.label),
        )
    return model


def load_target(target: Source, *, dtype: str = "float32") -> tuple[PreTrainedModel, KeyReport]:
    """Return the target as stock transformers loads it from its folder, and what it said of names.

    Raises:
        VerificationError: transformers refuses it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    attention = attention_of(causal_class(load_config(target)))
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(target.root),
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                attn_implementation=attention,
                output_loading_info=True,
            )
    except MemoryError:
        raise
    except Exception as error:
        # whatever it raises, the verdict is the same: a user could not load it either
        raise VerificationError(
            f"transformers cannot load it: {escape(str(error), 400)}"
        ) from error
    return model.eval().requires_grad_(False), report_of(info)


@contextmanager
def _each_state(model: PreTrainedModel, visit: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `visit` with what the first block receives, then what each returns, all [B, S, H]."""

    def on_input(module: nn.Module, args: tuple[Any, ...]) -> None:
        visit(args[0])

    def on_output(module: nn.Module, args: Any, output: Any) -> None:
        visit(output[0] if isinstance(output, tuple) else output)

    blocks = find_blocks(model)
    hooks = [blocks[0].register_forward_pre_hook(on_input)]
    hooks += [block.register_forward_hook(on_output) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    import torch

    runner: Any = model
    with torch.no_grad():
        logits: torch.Tensor = runner(input_ids=ids, use_cache=False).logits
    return logits.float()
