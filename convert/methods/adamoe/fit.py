"""Null biases set on text so that every block spends its share: nothing is trained.

The mixture is loaded with its null experts as the plan would write them, runs the text in batches,
and the bias of each block moves after every batch: the first ones set it by the quantiles of their
margins, the others by the budget controller, as blocks change what later blocks receive. What they
spend is then measured, where the text is long enough on tokens that set nothing. Source of the
proportional rule: LongCat-Flash 2509.01322; one bias for all null experts of a block is ours.

Shapes: T tokens, J choices of a token, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adaconvert.data.text import Documents
from adaconvert.errors import ResourceError, SourceError
from adaconvert.io.available import available_memory
from adaconvert.io.source import Source
from adaconvert.methods.adamoe.config import OFF
from adaconvert.methods.adamoe.plan import Nulling, bias_key
from adaconvert.methods.budget import BudgetController, Quantiles, bias_for, slope_at
from adaconvert.methods.d2dmoe.fit import device_of
from adaconvert.methods.planned import Fitted
from adaconvert.methods.sources import Described
from adaconvert.planning.evaluate import stored_parts
from adaconvert.planning.execute import copied_bytes
from adaconvert.planning.ops import Plan, TargetTensor
from adaconvert.progress import bar
from adaconvert.units import human_bytes

if TYPE_CHECKING:
    import torch

    from adaconvert.data.tokens import TokenBlocks

#: tokens of a sequence, and of what biases are moved after.
LENGTH = 512
BATCH = 2048
#: batches whose quantiles set the biases, before the controller moves them: a block's bias changes
#: what later blocks receive.
_WARM = 3
#: of the controller after that: about the mean of all batches, where nothing else changes.
_RATE, _DECAY = 0.5, 0.25
#: share of the tokens, at the end, that sets nothing: what is reported is measured on it. A text
#: shorter than so many batches sets the biases as a whole and is what they are measured on.
_KEPT_OUT = 1 / 8
_LEAST_BATCHES = 8
#: batches measured, at most.
_MEASURED = 8
#: fewer tokens say little about other text.
FEW = 4096
#: of the memory that is free, what the model may take.
_SHARE = 0.6


class PlannedTensor:
    """A tensor of a plan that is computed when indexed with `...`, as `StoredTensor` is read."""

    __slots__ = ("_fitted", "_sources", "_target")

    def __init__(self, target: TargetTensor, sources: list[Source], fitted: Fitted) -> None:
        self._target, self._sources, self._fitted = target, sources, fitted

    def __getitem__(self, key: object) -> torch.Tensor:
        import numpy
        import torch

        from adaconvert.dtypes import torch_dtype

        if key is not Ellipsis:
            raise TypeError("a planned tensor is read whole")
        parts = [part.reshape(-1) for part in self._bits()]
        raw = numpy.concatenate(parts) if len(parts) > 1 else parts[0]
        flat = torch.from_numpy(numpy.array(raw).view(numpy.uint8))
        return flat.view(torch_dtype(self._target.dtype)).reshape(self._target.shape)

    def _bits(self) -> list[Any]:
        return list(stored_parts(self._target, self._sources, self._fitted))

    def get_shape(self) -> list[int]:
        """Return the sizes, outermost first."""
        return list(self._target.shape)

    def get_dtype(self) -> str:
        """Return the safetensors dtype name."""
        return self._target.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The run that sets biases.

    Attributes:
        plan: of the checkpoint with null experts.
        nulling: what is done to which mixture.
        described: the sources.
        documents: the text.
        device: torch device the model runs on, or "auto".
        found: share each block spends with the biases that were set, by layer; filled by `fit`.
        seen: tokens that set the biases ("set"), that `found` was measured on ("measured"), and
            that set nothing ("apart"); filled by `fit`.
    """

    plan: Plan
    nulling: Nulling
    described: tuple[Described, ...]
    documents: Documents
    device: str = "auto"
    found: dict[int, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def fit(self, tokens: int, *, progress: bool) -> Fitted:
        """Return the arrays of every fitted leaf, the null biases among them.

        Args:
            tokens: of the text, at most.
            progress: show progress bars on a terminal.

        Raises:
            DataError: the source has no tokenizer, or the text no two tokens.
            OptionError: there is no such device.
            SourceError: a router computes NaN on the text.
            ResourceError: memory cannot hold the mixture.
        """
        import numpy

        fitted = dict(self.nulling.base.fit(progress))
        layers = {block.path: block.layer for block in self.nulling.base.blocks}
        biased = {path: layers[path] for path in layers if layers[path] in self.nulling.targets}
        # no null expert is chosen before the first batch has run
        off = numpy.full(1, OFF, numpy.float32)
        start = {bias_key(layer): off for layer in biased.values()}
        model = self._model({**fitted, **start}, device_of(self.device))
        biases = self._controlled(model, biased, tokens, progress)
        made = {bias_key(n): numpy.array([b], numpy.float32) for n, b in biases.items()}
        return {**fitted, **made}

    def _model(self, fitted: Fitted, device: str) -> Any:
        """Return the mixture with its null experts, in float32.

        Raises:
            ResourceError: memory cannot hold it.
        """
        from dataclasses import replace

        from adaconvert.layerwise.build import load
        from adaconvert.layerwise.configs import load_config
        from adaconvert.modeling.loading import model_class

        need = sum(math.prod(target.shape) for target in self.plan.targets) * 4
        free = int(available_memory() * _SHARE)
        if need > free:
            raise ResourceError(
                "the mixture has to be loaded to set its biases on text",
                where="--data",
                expected=f"{human_bytes(need)} of memory",
                found=human_bytes(free),
                hint="Leave --data out, and set the budget with `finetune --target-compute`.",
            )
        sources = [item.source for item in self.described]
        config = load_config(replace(sources[0], config=self.plan.config))
        tensors = {t.name: _tensor(t, sources, fitted) for t in self.plan.targets}
        model, _ = load(model_class(self.plan.config), config, tensors)
        return model.to(device)

    def _controlled(
        self, model: Any, layers: Mapping[str, int], tokens: int, progress: bool
    ) -> dict[int, float]:
        """Return the bias of each block, and keep the shares it realises."""
        from adaconvert.data.tokens import token_blocks

        root = self.described[0].source.root
        blocks = token_blocks(self.documents, root, length=LENGTH, max_tokens=tokens, spread=True)
        first, start = parts_of(blocks)
        targets = [self.nulling.targets[layer] for layer in layers.values()]
        control = Control(model, tuple(layers), targets, self.nulling)
        with bar(blocks.tokens, "biases", "tokens", enabled=progress) as shown:
            for inputs in batches(blocks, 0, first):
                control.step(inputs)
                shown.update(int(inputs["attention_mask"].sum()))
            shares = control.shares(batches(blocks, start, len(blocks)))
        self.found.update(zip(layers.values(), shares, strict=True))
        used, measured = int(blocks.weights[:first].sum()), int(blocks.weights[start:].sum())
        self.seen.update(set=used, measured=measured, apart=blocks.tokens - used)
        return {layers[path]: bias for path, bias in control.biases().items()}

    def notes(self) -> list[str]:
        """Return what was found, one sentence."""
        mean = sum(self.found.values()) / max(len(self.found), 1)
        goal = sum(self.nulling.targets.values()) / max(len(self.nulling.targets), 1)
        low, high = min(self.found.values()), max(self.found.values())
        where = "of it kept out of the setting" if self.seen["apart"] else "they were set on"
        note = (
            f"null biases set on the text give {mean:.3f} of the source's real experts per token "
            f"(blocks {low:.3f} to {high:.3f}) on {self.seen['measured']:,} tokens {where}, wanted "
            f"{goal:.3f}"
        )
        if self.seen["set"] < FEW:
            note += (
                f"; only {self.seen['set']:,} tokens set them, so other text may spend other "
                f"shares: give {FEW:,} or more"
            )
        return [note]


def parts_of(blocks: TokenBlocks) -> tuple[int, int]:
    """Return how many blocks set biases, and the first of those they are measured on, which go on
    to the end: those that set nothing; of a short text all."""
    import numpy

    if blocks.tokens < _LEAST_BATCHES * BATCH:
        return len(blocks), 0
    until = numpy.cumsum(blocks.weights.sum(axis=1))
    kept = min(int(blocks.tokens * _KEPT_OUT), _MEASURED * BATCH)
    first = int(numpy.searchsorted(until, blocks.tokens - kept)) + 1
    return first, first


def batches(blocks: TokenBlocks, first: int, end: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield what the model takes, of some of the blocks."""
    import torch

    each = max(BATCH // blocks.length, 1)
    for at in range(first, end, each):
        rows = slice(at, min(at + each, end))
        yield {
            "input_ids": torch.from_numpy(blocks.ids[rows]),
            "attention_mask": torch.from_numpy(blocks.weights[rows]).long(),
        }


class Control:
    """Null biases of a model while text runs through it.

    Args:
        model: with null experts; its biases are moved.
        paths: of the blocks.
        targets: their shares.
        nulling: what the blocks are.
    """

    def __init__(
        self, model: Any, paths: tuple[str, ...], targets: list[float], nulling: Nulling
    ) -> None:
        self._model, self._paths = model, paths
        self._unit = nulling.base.blocks[0].top_k
        self._min_real = nulling.start.nulls.min_real
        self._control = BudgetController(targets=targets, rate=_RATE, decay=_DECAY)
        self._steps = 0

    def step(self, inputs: Mapping[str, torch.Tensor]) -> None:
        """Run one batch, then move the bias of every block."""
        import torch

        with torch.no_grad(), self._model.collect("router_scores") as scores:
            self._run(inputs)
        margins = [torch.cat(scores[path]) for path in self._paths]
        for path, found in zip(self._paths, margins, strict=True):
            if bool(found.isnan().any()):
                raise SourceError("its router computes NaN on the text", where=path)
        spent = [
            self._share(found, bias) for found, bias in zip(margins, self._bias(), strict=True)
        ]
        self._set(self._moved(margins, spent))
        self._steps += 1

    def _run(self, inputs: Mapping[str, torch.Tensor]) -> None:
        given = {name: tensor.to(self._model.device) for name, tensor in inputs.items()}
        self._model(**given, use_cache=False)

    def _share(self, margins: torch.Tensor, bias: float) -> float:
        return Quantiles(margins, self._unit, min_real=self._min_real).share(bias)

    def _moved(self, margins: list[torch.Tensor], spent: list[float]) -> list[float]:
        """Return the next biases."""
        options = {"unit": self._unit, "min_real": self._min_real}
        pairs = list(zip(margins, self._control.targets, strict=True))
        if self._steps < _WARM:
            return [bias_for(found, share, **options) for found, share in pairs]
        slopes = [float(slope_at(found, share, **options)) for found, share in pairs]
        steps = self._control.update(spent, slopes)
        return [bias + step for bias, step in zip(self._bias(), steps, strict=True)]

    def _bias(self) -> list[float]:
        return list(self.biases().values())

    def _set(self, values: list[float]) -> None:
        import torch

        sites = self._model.adaptive_sites()
        with torch.no_grad():
            for path, value in zip(self._paths, values, strict=True):
                sites[path].null_experts.bias.fill_(value)

    def biases(self) -> dict[str, float]:
        """Return the bias of each block, by path."""
        sites = self._model.adaptive_sites()
        return {path: sites[path].null_experts.bias.item() for path in self._paths}

    def shares(self, given: Iterator[Mapping[str, torch.Tensor]]) -> list[float]:
        """Return the share each block spends on text with the biases as they are."""
        import torch

        run, tokens = [0] * len(self._paths), 0
        for inputs in given:
            with torch.no_grad(), self._model.collect("experts_run") as found:
                self._run(inputs)
            numbers = [torch.cat(found[path]) for path in self._paths]
            run = [old + int(new.sum()) for old, new in zip(run, numbers, strict=True)]
            tokens += len(numbers[0])
        return [number / (tokens * self._unit) for number in run]


def _tensor(target: TargetTensor, sources: list[Source], fitted: Fitted) -> Any:
    """Return what the loader reads a target from; whole copies are read from their files."""
    from adaconvert.layerwise.stored import ReadCount, StoredTensor

    copied = copied_bytes(target)
    if copied is not None and len(copied.pieces) == 1:
        piece = copied.pieces[0]
        source = sources[piece.source]
        ref = source.tensors[piece.tensor]
        if piece.total == ref.nbytes and ref.shape == target.shape:
            return StoredTensor(source, ref, ReadCount())
    return PlannedTensor(target, sources, fitted)
