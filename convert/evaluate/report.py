"""What `evaluate` found, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adaconvert.evaluate.compute import Compute
from adaconvert.evaluate.exit_table import exit_lines
from adaconvert.evaluate.real_experts import RealExperts
from adaconvert.evaluate.settings import Setting
from adaconvert.evaluate.speed import Rate, Speed
from adaconvert.evaluate.statistics import Mean, finite, perplexity
from adaconvert.evaluate.tasks import TaskResult
from adaconvert.evaluate.usage import RealShare, SiteUsage
from adaconvert.units import human_bytes, human_count

NOISE = "Tokens per second on a machine that does other work as well are noisy: compare ratios."


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentResult:
    """One document, or one labelled text.

    Attributes:
        name: where it comes from.
        tokens: predicted tokens; 1 for a labelled text.
        loss: negative log-likelihood summed over them, nats.
        agreeing: of them, those where the reference's first choice is the model's; None without.
        divergence: KL(reference || model) summed over them, nats; None without.
        right: the classifier chose the label; None for a causal model.
    """

    name: str
    tokens: int
    loss: float
    agreeing: int | None = None
    divergence: float | None = None
    right: bool | None = None

    def to_json(self) -> dict[str, object]:
        """Return what there is by name."""
        values = {
            "name": self.name,
            "tokens": self.tokens,
            "loss": finite(self.loss),
            "agreeing": self.agreeing,
            "kl_divergence": finite(self.divergence),
            "right": self.right,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A model at one setting; what was not measured is None or empty.

    Attributes:
        label: of the setting, or "reference".
        setting: position of the knobs.
        loss: mean negative log-likelihood in nats: per token, or per labelled text.
        accuracy: share of labelled texts the classifier got right.
        increase: loss minus the reference's, paired by document.
        agreement: share of tokens, or texts, where the first choice is the reference's.
        divergence: KL(reference || model) in nats per token.
        compute: costs per token.
        usage: of the experts, site by site.
        classes: real experts by class of token, where null experts take slots.
        speed: tokens per second.
        tasks: metrics of lm-evaluation-harness.
        documents: each document.
    """

    label: str
    setting: Setting
    loss: Mean | None = None
    accuracy: Mean | None = None
    increase: Mean | None = None
    agreement: Mean | None = None
    divergence: Mean | None = None
    compute: Compute | None = None
    usage: tuple[SiteUsage, ...] = ()
    classes: RealExperts | None = None
    speed: Speed | None = None
    tasks: tuple[TaskResult, ...] = ()
    documents: tuple[DocumentResult, ...] = ()

    @property
    def perplexity(self) -> float | None:
        """Return exp of the loss per token, None for a classifier."""
        if self.loss is None or self.accuracy is not None:
            return None
        return perplexity(self.loss.value)

    @property
    def realised(self) -> RealShare | None:
        """Return what null experts leave of the source's experts, None where there are none."""
        return RealShare.of_sites(self.usage)

    def to_json(self) -> dict[str, object]:
        """Return the result by name."""
        realised = self.realised
        means = ("loss", "accuracy", "increase", "agreement", "divergence")
        return {
            "label": self.label,
            "set_compute": self.setting.compute,
            "set_select": dict(self.setting.select) or None,
            **{name: mean.to_json() if (mean := getattr(self, name)) else None for name in means},
            "perplexity": finite(self.perplexity),
            "tokens": sum(document.tokens for document in self.documents),
            "compute": self.compute.to_json() if self.compute else None,
            "experts": [usage.to_json() for usage in self.usage],
            **({} if realised is None else {"real_experts": realised.to_json()}),
            **({} if self.classes is None else {"token_classes": self.classes.to_json()}),
            "speed": self.speed.to_json() if self.speed else None,
            "tasks": [task.to_json() for task in self.tasks],
            "documents": [document.to_json() for document in self.documents],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything `evaluate` measured.

    Attributes:
        checkpoint: hub id or folder name.
        architecture: name of the class.
        kind: "causal", "classifier" or "image classifier".
        runtime: dtype, device and threads it ran with.
        data: what it was measured on, by name; empty without data.
        reference: the reference's own result, None without one.
        results: one for each setting.
        exits: a row for each exit, of a language model that has some; see `exit_table`.
        notes: what the reader should know.
    """

    checkpoint: str
    architecture: str
    kind: str
    runtime: dict[str, object]
    data: dict[str, object]
    reference: Result | None
    results: tuple[Result, ...]
    exits: tuple[dict[str, object], ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the evaluation as JSON data."""
        return {
            "checkpoint": self.checkpoint,
            "architecture": self.architecture,
            "kind": self.kind,
            "runtime": self.runtime,
            "data": self.data or None,
            "reference": self.reference.to_json() if self.reference else None,
            "settings": [result.to_json() for result in self.results],
            **({"exits": list(self.exits)} if self.exits else {}),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Return the evaluation as text."""
        found = [f"{self.checkpoint}: {self.architecture}, {_named(self.runtime)}"]
        if self.data:
            found.append(f"data: {_named(self.data)}")
        rows = ([self.reference] if self.reference else []) + list(self.results)
        found += _quality(rows)
        found += exit_lines(self.exits)
        found += _cost(rows)
        found += _tasks(rows)
        for result in rows:
            found += _usage(result)
        if any(result.speed for result in rows):
            found.append(f"note: {NOISE}")
        return found + [f"note: {note}" for note in self.notes]


def _named(values: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def _quality(rows: Sequence[Result]) -> Iterator[str]:
    if all(result.loss is None for result in rows):
        return
    columns = ("setting", "loss", "perplexity", "accuracy", "over reference", "agreement", "KL")
    cells = [
        (
            result.label,
            _mean(result.loss),
            _number(result.perplexity),
            _mean(result.accuracy),
            _mean(result.increase),
            _percent(result.agreement),
            _mean(result.divergence),
        )
        for result in rows
    ]
    yield from _table(columns, cells)


def _cost(rows: Sequence[Result]) -> Iterator[str]:
    if all(result.compute is None and result.speed is None for result in rows):
        return
    replaced = any(result.compute and result.compute.projection_flops for result in rows)
    nulled = any(result.realised for result in rows)
    columns = (
        *("setting", "compute", "FLOPs/token", "in FFN"),
        *(("in projections",) if replaced else ()),
        *(("real experts",) if nulled else ()),
        *("router/gate", "executed", "bytes/token", "prefill tok/s", "decode tok/s"),
    )
    cells = [_cost_cells(result, replaced=replaced, nulled=nulled) for result in rows]
    yield from _table(columns, cells)


def _cost_cells(result: Result, *, replaced: bool, nulled: bool) -> tuple[str, ...]:
    cost, speed, real = result.compute, result.speed, result.realised
    return (
        result.label,
        "" if cost is None or cost.fraction is None else f"{cost.fraction:.4f}",
        _count(cost.flops if cost else None),
        _count(cost.ffn_flops if cost else None),
        *((_count(cost.projection_flops if cost else None),) if replaced else ()),
        *(("" if real is None else f"{100 * real.share:.1f} % of {real.of:g}",) if nulled else ()),
        _count(cost.router_flops if cost else None),
        _count(cost.executed_flops if cost else None),
        "" if cost is None else human_bytes(round(cost.weight_bytes)),
        _rate(speed.prefill if speed else None),
        _rate(speed.decode if speed else None),
    )


def _tasks(rows: Sequence[Result]) -> Iterator[str]:
    cells = [
        (
            *(result.label, task.task, task.metric),
            Mean(value=task.value, error=task.error).text(),
            str(task.samples),
        )
        for result in rows
        for task in result.tasks
    ]
    if cells:
        yield from _table(("setting", "task", "metric", "value", "samples"), cells)


def _usage(result: Result) -> Iterator[str]:
    some = [usage for usage in result.usage if usage.active < usage.experts]
    if not result.usage:
        return
    real = result.realised
    if real is not None:
        yield f"real experts, {result.label}: {real.line()}"
    if result.classes is not None:
        yield from _classes(result.classes)
    yield f"experts, {result.label}:"
    yield from (f"  {usage.line()}" for usage in some)
    if len(some) < len(result.usage):
        yield f"  {len(result.usage) - len(some)} sites ran every expert for every token"


def _classes(found: RealExperts) -> Iterator[str]:
    """Yield real experts by class of token, over all layers."""
    total = sum(found.tokens)
    cells = []
    for kind, name in enumerate(found.classes):
        mean, idle = found.overall(kind)
        share = f"{100 * found.tokens[kind] / total:.1f} %"
        cells.append((f"  {name}", share, f"{mean:.4f}", f"{100 * idle:.2f} %"))
    yield from _table(("  class of token", "of tokens", "real experts", "none for"), cells)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table without the columns that are empty in every row."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[columns[i] for i in kept], *([row[i] for i in kept] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(kept))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _mean(mean: Mean | None) -> str:
    return "" if mean is None else mean.text()


def _percent(mean: Mean | None) -> str:
    return "" if mean is None else f"{100 * mean.value:.2f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "" if value is None else human_count(round(value))


def _rate(rate: Rate | None) -> str:
    return "" if rate is None else f"{rate.median:.4g} ({rate.low:.4g} to {rate.high:.4g})"
