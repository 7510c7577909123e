"""What a fine-tune is asked to do, checked before anything is read.

Defaults of optimiser and schedule are those D2DMoE tunes Gemma-2B with (Szatkowski et al. 2024,
2310.04361, published scripts: AdamW, learning rate 1e-4, weight decay 0.01, 5 % warm-up, cosine,
clip at 1); the others say where they come from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.evaluate.settings import parse_select
from adaconvert.io.names import escape

SCHEDULES: Final = ("cosine", "linear", "constant")
PRECISIONS: Final = ("fp32", "bf16")
ACTIVATIONS: Final = ("keep", "relu", "relu2")
PENALTIES: Final = ("hoyer", "l1")
NORMS: Final = ("raw", "width")
RAMPS: Final = ("constant", "linear", "warm-up")
DTYPES: Final = ("keep", "bfloat16", "float16", "float32")
#: option -> field of `Sparsity`.
SPARSITY_OPTIONS: Final = {
    "activation": "activation",
    "sparsity": "coefficient",
    "sparsity_loss": "penalty",
    "sparsity_norm": "norm",
    "sparsity_ramp": "ramp",
}
_COUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmbt]?)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """Where text comes from, and its share of the tokens.

    Attributes:
        where: file, folder or hub id, as `adaconvert.data.text.read_documents` takes it.
        weight: share of the tokens is this over the sum of all weights.
    """

    where: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> DataSource:
        """Return the source `FILE` or `FILE,WEIGHT` names.

        Raises:
            OptionError: the weight is not a number above 0.
        """
        where, comma, tail = text.rpartition(",")
        if not comma:
            return cls(where=text)
        try:
            weight = float(tail)
        except ValueError:
            # a comma in the name of a file
            return cls(where=text)
        if not (weight > 0 and math.isfinite(weight)):
            raise OptionError(
                "is no weight", where=f"--data {escape(text)}", expected="a number above 0"
            )
        return cls(where=where, weight=weight)

    @property
    def label(self) -> str:
        """Return the name outputs may carry: a hub id, or the last part of a path."""
        return self.where if not Path(self.where).exists() else Path(self.where).resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Activation sparsity enforcement, stage 1 of D2DMoE.

    Attributes:
        activation: what replaces the activation of every feed-forward network; "keep" leaves it.
            The published code replaces by ReLU; squared ReLU is Primer's (So et al. 2021,
            2109.08668).
        penalty: "hoyer": (sum |a|)^2 / sum a^2, between 1 (one neuron) and the width (flat; square
            Hoyer, 2310.04361 eq. 2); "l1": sum |a| (what its BERT and GPT-2 scripts use).
        coefficient: factor of the penalty, averaged over tokens and blocks. 0 only measures. The
            scripts use 0.2 (ViT-B) and 1e-4 to 1e-3 (Gemma-2B) on the raw square Hoyer, which
            grows with the width.
        norm: "raw" as published, "width" divided by the number of neurons, so that a coefficient
            carries over between models.
        ramp: how the coefficient grows: "constant", "linear" over the whole run, "warm-up" over
            its first half (the ViT scripts).
    """

    activation: str = "keep"
    penalty: str = "hoyer"
    coefficient: float = 0.0
    norm: str = "raw"
    ramp: str = "warm-up"

    def __post_init__(self) -> None:
        _among("--activation", self.activation, ACTIVATIONS)
        _among("--sparsity-loss", self.penalty, PENALTIES)
        _among("--sparsity-norm", self.norm, NORMS)
        _among("--sparsity-ramp", self.ramp, RAMPS)
        _number("--sparsity", self.coefficient, 0.0)

    @property
    def watches(self) -> bool:
        """Return whether activations must be looked at."""
        return self.coefficient > 0 or self.activation != "keep"

    def at(self, step: int, steps: int) -> float:
        """Return the coefficient of a step, counted from 0, of `steps`."""
        share = (step + 1) / steps
        if self.ramp == "constant":
            return self.coefficient
        return self.coefficient * min(1.0, share if self.ramp == "linear" else 2 * share)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """One fine-tune.

    Attributes:
        data: where the text comes from.
        tokens, steps: budget; exactly one is given.
        text_field: field of a row that holds the text.
        seq_len: tokens of a sequence.
        batch_size: sequences that pass through the model at a time.
        accumulate: such batches per optimiser step; the result equals one large batch.
        train: what is trained: "all", "router", "experts", "adapters", "exits", or a regular
            expression that matches somewhere in a parameter's name; several add up.
        lr, router_lr: peak learning rates; routers take `lr` when theirs is None.
        weight_decay: of matrices; norms and biases get none.
        warmup: share of the steps over which learning rates rise.
        schedule: how they fall after that.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        precision: "fp32", or "bf16": trained parameters stay float32, matrices are multiplied in
            bfloat16, frozen parameters keep their stored dtype.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        seed: of the order of documents and of dropout.
        lm, distill: factors of the language-model loss and of the divergence from the teacher.
        teacher: dense checkpoint; None is the one that is trained, as it was.
        temperature: of the distillation (Hinton et al. 2015, 1503.02531), whose loss is multiplied
            by its square.
        sparsity: see `Sparsity`.
        select: {"rule": ..., its value} every adaptive site runs while training; None as stored.
        compute: fraction of the reference's FLOPs every token may use while training, None for all.
        dtype: of the floating-point tensors written, "keep" for the stored one.
        log_every: steps between log lines.
        save_every: steps between checkpoints to resume from; None is five a run, 0 none.
        report_to: experiment trackers, as transformers names them.
    """

    data: tuple[DataSource, ...]
    tokens: int | None = None
    steps: int | None = None
    text_field: str = "text"
    seq_len: int = 512
    batch_size: int = 8
    accumulate: int = 1
    train: tuple[str, ...] = ("all",)
    lr: float = 1e-4
    router_lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.05
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    precision: str = "fp32"
    checkpointing: bool = False
    seed: int = 0
    lm: float = 1.0
    distill: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0
    sparsity: Sparsity = field(default_factory=Sparsity)
    select: Mapping[str, Any] | None = None
    compute: float | None = None
    dtype: str = "keep"
    log_every: int = 10
    save_every: int | None = None
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_budget()
        for name in ("seq_len", "batch_size", "accumulate", "log_every"):
            _whole(name, getattr(self, name), 2 if name == "seq_len" else 1)
        _whole("seed", self.seed, 0)
        if self.save_every is not None:
            _whole("save_every", self.save_every, 0)
        _among("--schedule", self.schedule, SCHEDULES)
        _among("--precision", self.precision, PRECISIONS)
        _among("--dtype", self.dtype, DTYPES)
        for name in ("lr", "router_lr", "temperature"):
            if getattr(self, name) is not None:
                _number(_flag(name), getattr(self, name), 0.0, open_low=True)
        for name in ("weight_decay", "max_grad_norm", "lm", "distill"):
            _number(_flag(name), getattr(self, name), 0.0)
        _number("--warmup", self.warmup, 0.0, 1.0)
        self._check_losses()
        self._check_parts()

    def _check_budget(self) -> None:
        if not self.data:
            raise OptionError("no data given", where="--data")
        if (self.tokens is None) == (self.steps is None):
            raise OptionError("give either tokens or steps", where="--tokens")
        for name in ("tokens", "steps"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)

    def _check_losses(self) -> None:
        if not self.lm and not self.distill:
            raise OptionError("with --lm 0 there must be --distill", where="--lm")
        if self.teacher is not None and not self.distill:
            raise OptionError("a teacher does nothing without --distill", where="--teacher")
        if self.select is not None and self.compute is not None:
            raise OptionError("cannot be combined with --select", where="--compute")

    def _check_parts(self) -> None:
        if not self.train:
            raise OptionError("nothing to train", where="--train")
        for part in self.train:
            try:
                re.compile(part)
            except re.error as error:
                raise OptionError(
                    f"is no regular expression: {error}", where=f"--train {escape(part)}"
                ) from None

    @classmethod
    def of(cls, data: Sequence[str], options: Mapping[str, Any]) -> FinetuneConfig:
        """Return the fine-tune that options with the names of this class and of `Sparsity` ask for.

        Args:
            data: `FILE` or `FILE,WEIGHT` each.
            options: values; counts and selections may be text, None stands for the default.

        Raises:
            OptionError: unknown name, or a value is wrong.
        """
        given = {name: value for name, value in options.items() if value is not None}
        for name in ("tokens", "steps"):
            if name in given:
                given[name] = parse_count(given[name], _flag(name))
        if isinstance(given.get("select"), str):
            given["select"] = parse_select(given["select"])
        own = {name: given.pop(name) for name in SPARSITY_OPTIONS if name in given}
        known = {item.name for item in fields(cls)} - {"data", "sparsity"}
        unknown = sorted(set(given) - known)
        if unknown:
            raise OptionError(
                "is no option of a fine-tune",
                where=escape(unknown[0]),
                expected=", ".join(sorted({*known, *SPARSITY_OPTIONS})),
            )
        sources = tuple(DataSource.parse(str(text)) for text in data)
        sparsity = Sparsity(**{SPARSITY_OPTIONS[name]: value for name, value in own.items()})
        return cls(data=sources, sparsity=sparsity, **given)

    @property
    def step_tokens(self) -> int:
        """Return the tokens of one optimiser step."""
        return self.seq_len * self.batch_size * self.accumulate

    @property
    def total_steps(self) -> int:
        """Return the number of optimiser steps: the budget rounded up to whole ones."""
        return self.steps or math.ceil((self.tokens or 0) / self.step_tokens)

    @property
    def warmup_steps(self) -> int:
        """Return the steps over which learning rates rise; the first of them has rate 0, so a share
        of less than a step is none."""
        return math.floor(self.warmup * self.total_steps)

    @property
    def save_steps(self) -> int:
        """Return the steps between checkpoints, 0 for none; by default they fall on log steps, so
        that a resumed run logs the same means."""
        if self.save_every is not None:
            return self.save_every
        return math.ceil(self.total_steps / 5 / self.log_every) * self.log_every

    def to_json(self) -> dict[str, Any]:
        """Return every option that decides the result, without paths of this machine."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("log_every", "save_every", "report_to"):
            del found[name]
        found["data"] = [{"name": s.label, "weight": s.weight} for s in self.data]
        found["sparsity"] = {f.name: getattr(self.sparsity, f.name) for f in fields(self.sparsity)}
        found["teacher"] = None if self.teacher is None else DataSource(where=self.teacher).label
        found["select"] = None if self.select is None else dict(self.select)
        found["train"] = list(self.train)
        return found


def parse_count(text: str | int, where: str = "--tokens") -> int:
    """Return the number in `2M`, `1.5B`, `500k` or a plain number (powers of a thousand).

    Raises:
        OptionError: it is none, or less than 1.
    """
    match = _COUNT.fullmatch(str(text))
    value = 0.0
    if match:
        value = float(match[1]) * 1000.0 ** " kmbt".index(match[2].lower() or " ")
    if value < 1:
        raise OptionError(
            "is no count", where=where, expected="a number such as 20M", found=escape(str(text))
        )
    return round(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _among(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(
            "is unknown", where=where, expected=" or ".join(known), found=escape(str(value))
        )


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(
            "is out of range", where=_flag(name), expected=f"{least} or more", found=value
        )


def _number(
    where: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False
) -> None:
    fits = low < value <= high if open_low else low <= value <= high
    if not fits or not math.isfinite(value):
        above = f"above {low:g}" if open_low else f"{low:g} or more"
        expected = above if high == math.inf else f"{low:g} to {high:g}"
        raise OptionError("is out of range", where=where, expected=expected, found=value)
