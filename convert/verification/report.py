"""The verification of a converted checkpoint, as a whole and for people and programs to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaconvert.errors import OptionError, ResourceError, VerificationError
from adaconvert.io import manifest as manifests
from adaconvert.io.source import Source
from adaconvert.planning.ops import Exactness, Plan
from adaconvert.verification import render
from adaconvert.verification.equivalence import Equivalence, compare
from adaconvert.verification.integrity import Integrity, check
from adaconvert.verification.models import (
    has_exits,
    is_adapted,
    is_adaptive,
    is_nulled,
    is_split,
    is_text,
)
from adaconvert.verification.tokens import Probe, compare_tokenizers, load_tokenizer
from adaconvert.verification.verdict import EXACT, Verdict, bound_of, judge, promised, run_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What verification found.

    Attributes:
        integrity: whether the files are the ones that were written.
        tokenizer: where the tokenizers first differ, None when they agree.
        has_tokenizer: the source has one.
        equivalence: how far the logits are apart, None when the target could not be run.
        verdict: whether that keeps the promise, None when the target could not be run.
        failures: what kept the target from being run.
        notes: what the user should know.
    """

    integrity: Integrity
    tokenizer: str | None
    has_tokenizer: bool
    equivalence: Equivalence | None
    verdict: Verdict | None
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Tell whether the checkpoint is what it was declared to be."""
        return not self.problems()

    def problems(self) -> tuple[str, ...]:
        """Return everything that is wrong, one line each."""
        found = [problem.line() for problem in self.integrity.problems]
        found += self.failures
        if self.tokenizer is not None:
            found.append(f"tokenizer: {self.tokenizer}")
        if self.verdict is not None and self.verdict.fault is not None:
            found.append(self.verdict.fault)
        return tuple(found)

    def problem(self) -> str:
        """Return what is wrong on one line; of the problems of files only the first three."""
        files = [problem.line() for problem in self.integrity.problems]
        other = list(self.problems()[len(files) :])
        if len(files) > 3:
            files = [*files[:3], f"and {len(files) - 3} more problems of files or tensors"]
        return "; ".join([*files, *other])

    def lines(self) -> list[str]:
        """Return the report as text."""
        rows = [render.integrity_line(self.integrity)]
        same = "the same tokens" if self.has_tokenizer else "none in the source"
        rows.append(f"tokenizer    {self.tokenizer or same}")
        if self.equivalence is not None and self.verdict is not None:
            rows += render.equivalence_lines(self.equivalence, self.verdict)
            rows += render.routing_lines(self.equivalence.routing)
        rows += [f"problem      {problem}" for problem in self.problems()]
        rows += [f"note         {note}" for note in self.notes]
        rows.append(f"verdict      {'ok' if self.ok else 'FAILED'}")
        return rows

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON data: no times, no paths, numbers to three digits."""
        return {
            "ok": self.ok,
            "problems": list(self.problems()),
            "notes": list(self.notes),
            "integrity": {
                "ok": self.integrity.ok,
                "shards": self.integrity.shards,
                "tensors": self.integrity.tensors,
                "bytes": self.integrity.nbytes,
            },
            "tokenizer": self.tokenizer,
            "promise": None if self.verdict is None else self.verdict.kind,
            "bound": None if self.verdict is None else self.verdict.bound,
            "equivalence": None
            if self.equivalence is None
            else render.equivalence_json(self.equivalence),
        }

    def record(self) -> dict[str, object]:
        """Return what a manifest keeps of a report: the same for every run of the same conversion.

        The last digits of float32 sums depend on thread count and processor, and the mode on the
        memory that happened to be free; so differences are given as the power of ten they lie
        below.
        """
        found, verdict = self.equivalence, self.verdict
        measured: dict[str, object] = {}
        if found is not None and verdict is not None:
            measured = {
                "promise": verdict.kind,
                "bound": verdict.bound,
                "probe": found.probe,
                "tokens": found.logits.tokens,
                **({"logits_left_out": found.logits.left_out} if found.logits.left_out else {}),
                "relative_difference_below": render.power_above(found.relative),
                "argmax_agreement": render.rounded(found.logits.argmax_agreement, 2),
                "kl_nats_below": render.power_above(found.logits.kl),
            }
            if found.quality is not None:
                measured["configured"] = render.setting_json(found.quality.configured, 2)
        return {"ok": self.ok, "notes": list(self.notes), **measured}


def verify_checkpoint(
    sources: Sequence[Path],
    target: Path,
    *,
    exactness: Exactness | None = None,
    manifest: Mapping[str, object] | None = None,
    memory: int | None = None,
    probe: Probe | None = None,
    progress: bool = False,
    plan: Plan | None = None,
) -> VerificationReport:
    """Return whether the checkpoint in `target` is whole, loads, and computes what it promised.

    Args:
        sources: the checkpoints it was made from; it is compared with the first.
        target: the converted checkpoint.
        exactness: the promise; that of the manifest when None.
        manifest: content of adaconvert.json; read from `target` when None.
        memory: bytes the comparison may take; 60 % of what is available when None.
        probe: tokens to compare on; the shipped text when None.
        progress: show a progress bar on a terminal.
        plan: the plan the target was made by, see `integrity.check`.

    Raises:
        SourceError: a source cannot be read.
        OptionError: there is no source, or a newer adaconvert wrote the manifest.
        VerificationError: the manifest is missing, damaged or edited. Anything else that is wrong
            is in the report.
        ResourceError: memory or permissions do not suffice.
    """
    if not sources:
        raise OptionError("needs a source to compare with", where="verify")
    # what a conversion may leave out was decided when it opened its sources
    opened = [Source.open(source, ignore_unindexed=True) for source in sources]
    record = manifests.read(target) if manifest is None else manifest
    integrity = check(target, record, sources=opened, plan=plan, progress=progress)
    probe = probe_for(probe, opened[0])
    notes = list(integrity.notes)
    if len(opened) > 1:
        notes.append("compared with the first source only")
    report = VerificationReport(
        integrity=integrity,
        tokenizer=compare_tokenizers(opened[0].root, target, probe.text),
        has_tokenizer=load_tokenizer(opened[0].root) is not None,
        equivalence=None,
        verdict=None,
        notes=tuple(notes),
    )
    if not integrity.loadable:
        return report
    promise = exactness or promised(record)
    return compared(report, opened[0], target, promise, record, memory, probe, progress)


def probe_for(given: Probe | None, source: Source) -> Probe:
    """Return what to compare on; images are drawn when the model is run."""
    if not is_text(source):
        return Probe(ids=((0,),), origin="random images", text="")
    return given or Probe.shipped(source.root)


def compared(
    report: VerificationReport,
    source: Source,
    folder: Path,
    promise: Exactness | None,
    manifest: Mapping[str, object],
    memory: int | None,
    probe: Probe,
    progress: bool,
) -> VerificationReport:
    """Return a report with what running source and target found; `promise` and `manifest` are the
    target's."""
    target = Source.open(folder)
    bound = None if is_nulled(target) and _is_noisy(manifest) else bound_of(promise, target)
    bound = None if _is_trained(manifest) else bound
    try:
        found = compare(
            source.root,
            folder,
            probe=probe,
            memory=memory,
            tolerance=EXACT if bound is None else bound,
            granularity=_granularity(manifest),
            stored_dtype=run_dtype(target),
            configured=_as_configured(promise, target),
            progress=progress,
        )
    except VerificationError as error:
        return replace(report, failures=(error.describe(),))
    except MemoryError as error:
        raise ResourceError(
            "ran out of memory while comparing", hint="Lower --memory, or free some."
        ) from error
    notes = (*report.notes, *_split_note(found, run_dtype(target)), *_quality_notes(found, target))
    return replace(report, equivalence=found, verdict=judge(promise, bound, found), notes=notes)


def _is_trained(manifest: Mapping[str, object]) -> bool:
    """Return whether a fine-tune changed what the model computes with every expert and block."""
    training = manifest.get("training")
    parts = training.get("by_part") if isinstance(training, Mapping) else None
    return isinstance(parts, Mapping) and bool(set(parts) - {"router", "exits"})


def _as_configured(promise: Exactness | None, target: Source) -> bool:
    """Return whether the promise is about null experts as they are configured."""
    return promise is not None and promise.kind in {"exact", "exact-fp32"} and is_nulled(target)


def _quality_notes(found: Equivalence, target: Source) -> list[str]:
    """Return what the quality of a split model means, or why it was not measured."""
    if found.quality is not None:
        return found.quality.advice()
    if is_nulled(target) and found.mode == "layerwise":
        return [
            "too large to load whole, so it was compared block by block with null experts off; "
            "they were not run"
        ]
    if is_adapted(target) and found.mode == "layerwise":
        return [
            "too large to load whole, so it was compared block by block without its adapters; they "
            "were not run"
        ]
    if has_exits(target) and not is_split(target) and found.mode == "layerwise":
        return [
            "too large to load whole, so it was compared block by block without its exits; they "
            "were not run"
        ]
    if is_adaptive(target) and found.mode == "layerwise":
        return [
            "too large to load whole, so the experts were compared block by block as the dense "
            "networks they make together; the configured selection was not run"
        ]
    return []


def _split_note(found: Equivalence, dtype: str | None) -> list[str]:
    """Return a sentence on groups of experts the stored dtype breaks, if there are any."""
    splits = [s for layer in found.routing if (s := layer.split_groups_stored) is not None]
    mean = sum(splits) / len(splits) if splits else 0.0
    if not mean:
        return []
    return [
        f"with the router in {dtype}, about {100 * mean:.1g} % of tokens per layer get an "
        "incomplete group of experts, because two groups tie after rounding; run the model in "
        "float32, or choose a host that computes its router in float32"
    ]


def _is_noisy(manifest: Mapping[str, object]) -> bool:
    """Return whether experts carry noise, so that no way of running them gives the source."""
    options = manifest.get("options")
    value = options.get("noise") if isinstance(options, dict) else None
    return isinstance(value, int | float) and value > 0


def _granularity(manifest: Mapping[str, object]) -> int:
    options = manifest.get("options")
    value = options.get("granularity", 1) if isinstance(options, dict) else 1
    return value if isinstance(value, int) and value > 0 else 1
