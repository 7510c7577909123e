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
from typing import Any, Final

from adaconvert.data.rows import existing
from adaconvert.errors import OptionError
from adaconvert.evaluate.settings import parse_select
from adaconvert.io.names import escape
from adaconvert.train.adapt_config import (
    ADAPT_OPTIONS,
    MACHINE_OPTIONS,
    Adapting,
    Machine,
    taken,
)
from adaconvert.train.bounds import among as _among
from adaconvert.train.bounds import flag as _flag
from adaconvert.train.bounds import number as _number
from adaconvert.train.bounds import parse_count
from adaconvert.train.bounds import whole as _whole
from adaconvert.train.depth_config import DEPTH_OPTIONS, Depthing
from adaconvert.train.exit_config import EXIT_OPTIONS, Exiting
from adaconvert.train.rates import Rate
from adaconvert.train.routing_config import ROUTING_OPTIONS, Routing
from adaconvert.train.sources import READING_OPTIONS, Reading, several
from adaconvert.train.validation import VALIDATION_OPTIONS, Validation

SCHEDULES: Final = ("cosine", "linear", "constant")
PRECISIONS: Final = ("auto", "fp32", "bf16", "fp64")
OPTIMIZERS: Final = ("adamw", "sgd")
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
    "activation_ramp": "blend",
}


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
        path = existing(self.where)
        return self.where if path is None else path.resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class Sparsity:
    """Activation sparsity enforcement, stage 1 of D2DMoE.

    Attributes:
        activation: what replaces the activation of every feed-forward network; "keep" leaves it.
            The published code replaces by ReLU; squared ReLU is Primer's (So et al. 2021,
            2109.08668).
        penalty: "hoyer": (sum |a|)^2 / sum a^2, between 1 (one neuron) and the width (flat; square
            Hoyer, 2310.04361 eq. 2); "l1": sum |a| (what its BERT and GPT-2 scripts use).
        coefficient: factor of the penalty, averaged over tokens and blocks; networks in place of
            projections add their own average. 0 only measures. The scripts use 0.2 (ViT-B) and 1e-4
            to 1e-3 (Gemma-2B) on the raw square Hoyer, which grows with the width.
        norm: "raw" as published, "width" divided by the number of neurons, so that a coefficient
            carries over between models.
        blend: share of the run over which the new activation takes the old one's place, the two
            mixed in between; 0 replaces it at once (the published code).
        ramp: how the coefficient grows: "constant", "linear" over the whole run, "warm-up" over
            its first half (the ViT scripts).
    """

    activation: str = "keep"
    penalty: str = "hoyer"
    coefficient: float = 0.0
    norm: str = "raw"
    ramp: str = "warm-up"
    blend: float = 0.0

    def __post_init__(self) -> None:
        _among("--activation", self.activation, ACTIVATIONS)
        _among("--sparsity-loss", self.penalty, PENALTIES)
        _among("--sparsity-norm", self.norm, NORMS)
        _among("--sparsity-ramp", self.ramp, RAMPS)
        _number("--sparsity", self.coefficient, 0.0)
        _number("--activation-ramp", self.blend, 0.0, 1.0)

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

    def newness(self, step: int, steps: int) -> float:
        """Return the share of the new activation at a step, counted from 0, of `steps`."""
        return 1.0 if self.blend == 0 else min(1.0, (step + 1) / (steps * self.blend))


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneConfig:
    """One fine-tune.

    Attributes:
        data: where the text comes from.
        tokens, steps: budget; exactly one is given.
        text_field: field of a row that holds the text.
        label_field: of a classifier, that which holds the class; None for "label".
        reading: see `Reading`.
        validation: see `Validation`.
        seq_len: tokens of a sequence.
        batch_size: sequences that pass through the model at a time.
        accumulate: such batches per optimiser step; the result equals one large batch.
        train: what is trained: "all", "router", "experts", "adapters", "exits", "depth", or a
            regular expression that matches somewhere in a parameter's name; several add up.
        lr, router_lr: peak learning rates; routers take `lr` when theirs is None.
        lr_of: `PART=RATE` each, parts as in `train`; the last that fits a parameter holds for it.
        weight_decay: of matrices; norms and biases get none.
        warmup: share of the steps over which learning rates rise.
        schedule: how they fall after that.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        precision: "fp32", or "bf16": trained parameters stay float32, matrices are multiplied in
            bfloat16, frozen parameters keep their stored dtype; "fp64" for comparisons; "auto"
            until the checkpoint is known, see `checks.settled`.
        optimizer: "adamw", or "sgd" without momentum, which keeps no state.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        seed: of the order of documents and of dropout.
        lm, distill: factors of the language-model loss and of the divergence from the teacher.
        distill_hidden: factor of the squared distance from the teacher's hidden states, relative
            to their squared length, averaged over tokens and layers.
        teacher: checkpoint; None is the one that is trained, as it was. Adaptive ones teach with
            every expert on, those with null experts as the mixture they were made of
            (self-distillation, as ZEDA does it).
        temperature: of the distillation (Hinton et al. 2015, 1503.02531), whose loss is multiplied
            by its square.
        sparsity: see `Sparsity`.
        routing: see `Routing`.
        exits: see `Exiting`.
        depth: see `Depthing`.
        select: {"rule": ..., its value} every adaptive site runs while training; None as stored.
        compute: fraction of the reference's FLOPs every token may use while training, None for all.
        dtype: of the floating-point tensors written, "keep" for the stored one.
        log_every: steps between log lines.
        save_every: steps between checkpoints to resume from; None is five a run, 0 none.
        report_to: experiment trackers, as transformers names them.
        adapting: see `Adapting`.
        machine: see `Machine`.
        processes: that train together, each on `batch_size` sequences at a time.
    """

    data: tuple[DataSource, ...]
    tokens: int | None = None
    steps: int | None = None
    text_field: str = "text"
    label_field: str | None = None
    reading: Reading = field(default_factory=Reading)
    validation: Validation = field(default_factory=Validation)
    seq_len: int = 512
    batch_size: int = 8
    accumulate: int = 1
    train: tuple[str, ...] = ("all",)
    lr: float = 1e-4
    router_lr: float | None = None
    lr_of: tuple[str, ...] = ()
    weight_decay: float = 0.01
    warmup: float = 0.05
    schedule: str = "cosine"
    max_grad_norm: float = 1.0
    precision: str = "auto"
    optimizer: str = "adamw"
    checkpointing: bool = False
    seed: int = 0
    lm: float = 1.0
    distill: float = 0.0
    distill_hidden: float = 0.0
    teacher: str | None = None
    temperature: float = 1.0
    sparsity: Sparsity = field(default_factory=Sparsity)
    routing: Routing = field(default_factory=Routing)
    exits: Exiting = field(default_factory=Exiting)
    depth: Depthing = field(default_factory=Depthing)
    select: Mapping[str, Any] | None = None
    compute: float | None = None
    dtype: str = "keep"
    log_every: int = 10
    save_every: int | None = None
    report_to: tuple[str, ...] = ()
    adapting: Adapting = field(default_factory=Adapting)
    machine: Machine = field(default_factory=Machine)
    processes: int = 1

    def __post_init__(self) -> None:
        self._check_budget()
        for name in ("seq_len", "batch_size", "accumulate", "log_every"):
            _whole(name, getattr(self, name), 2 if name == "seq_len" else 1)
        _whole("seed", self.seed, 0)
        if self.save_every is not None:
            _whole("save_every", self.save_every, 0)
        _among("--schedule", self.schedule, SCHEDULES)
        _among("--precision", self.precision, PRECISIONS)
        _among("--optimizer", self.optimizer, OPTIMIZERS)
        _among("--dtype", self.dtype, DTYPES)
        for name in ("lr", "router_lr", "temperature"):
            if getattr(self, name) is not None:
                _number(_flag(name), getattr(self, name), 0.0, open_low=True)
        for name in ("weight_decay", "max_grad_norm", "lm", "distill", "distill_hidden"):
            _number(_flag(name), getattr(self, name), 0.0)
        _number("--warmup", self.warmup, 0.0, 1.0)
        for text in self.lr_of:
            Rate.parse(text)
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
        taught = self.distill or self.distill_hidden
        if not self.lm and not taught and not self.routing.regression:
            raise OptionError("with --lm 0 there must be --distill or the like", where="--lm")
        if self.teacher is not None and not taught:
            raise OptionError("a teacher does nothing without --distill", where="--teacher")
        if self.select is not None and self.compute is not None:
            raise OptionError("cannot be combined with --select", where="--compute")
        if self.routing.budgets and (self.select is not None or self.compute is not None):
            other = "--select" if self.select is not None else "--compute"
            raise OptionError(f"cannot be combined with {other}", where=self.routing.budgets)

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
        for name in ("tokens", "steps", "valid_tokens"):
            if name in given:
                given[name] = parse_count(given[name], _flag(name))
        if isinstance(given.get("select"), str):
            given["select"] = parse_select(given["select"])
        for name in ("train", "lr_of", "report_to"):
            if name in given:
                given[name] = several(given[name])
        own = {name: given.pop(name) for name in SPARSITY_OPTIONS if name in given}
        routing = {ROUTING_OPTIONS[n]: given.pop(n) for n in ROUTING_OPTIONS if n in given}
        reading = {n: given.pop(n) for n in READING_OPTIONS if n in given}
        valid = {n: given.pop(n) for n in VALIDATION_OPTIONS if n in given}
        exits = {n: given.pop(n) for n in EXIT_OPTIONS if n in given}
        adapting, machine = taken(ADAPT_OPTIONS, given), taken(MACHINE_OPTIONS, given)
        depth = taken(DEPTH_OPTIONS, given)
        own_options = (
            *(*SPARSITY_OPTIONS, *ROUTING_OPTIONS, *READING_OPTIONS, *VALIDATION_OPTIONS),
            *(*ADAPT_OPTIONS, *MACHINE_OPTIONS, *EXIT_OPTIONS, *DEPTH_OPTIONS),
        )
        nested = {"reading", "validation", "sparsity", "routing", "exits", "depth"}
        nested |= {"adapting", "machine"}
        known = {item.name for item in fields(cls)} - {"data", "processes"} - nested
        unknown = sorted(set(given) - known)
        if unknown:
            raise OptionError(
                "is no option of a fine-tune",
                where=escape(unknown[0]),
                expected=", ".join(sorted({*known, *own_options})),
            )
        sources = tuple(DataSource.parse(str(text)) for text in data)
        sparsity = Sparsity(**{SPARSITY_OPTIONS[name]: value for name, value in own.items()})
        given |= {"reading": Reading.of(reading), "validation": Validation.of(valid)}
        given |= {"adapting": Adapting(**adapting), "machine": Machine(**machine)}
        given |= {"exits": Exiting.of(exits), "depth": Depthing(**depth)}
        return cls(data=sources, sparsity=sparsity, routing=Routing(**routing), **given)

    @property
    def step_tokens(self) -> int:
        """Return the tokens of one optimiser step."""
        return self.seq_len * self.step_sequences

    @property
    def step_sequences(self) -> int:
        """Return the sequences of one optimiser step, over all processes."""
        return self.batch_size * self.accumulate * self.processes

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
        found["routing"] = self.routing.to_json()
        nested = ("reading", "validation", "exits", "depth", "adapting", "machine")
        found |= {name: getattr(self, name).to_json() for name in nested}
        found["teacher"] = None if self.teacher is None else DataSource(where=self.teacher).label
        found["select"] = None if self.select is None else dict(self.select)
        found["train"], found["lr_of"] = list(self.train), list(self.lr_of)
        return found
