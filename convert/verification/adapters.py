"""Whether a PEFT folder is the one that was written, and what it computes on its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from adaconvert.io.source import Source
from adaconvert.planning.ops import Plan
from adaconvert.verification.integrity import check
from adaconvert.verification.report import VerificationReport, compared, probe_for
from adaconvert.verification.tokens import Probe
from adaconvert.verification.verdict import promised


def verify_adapters(
    sources: Sequence[Source],
    adapters: Source,
    view: Path | None,
    *,
    manifest: Mapping[str, object],
    memory: int | None = None,
    probe: Probe | None = None,
    progress: bool = False,
    plan: Plan | None = None,
) -> VerificationReport:
    """Return whether a PEFT folder is whole, and computes on its base what it promised.

    Args:
        sources: the checkpoints it was made from; it is compared with the first.
        adapters: the folder, opened; its tensors are those it holds.
        view: its base with it as a checkpoint; None where its base is not at hand.
        manifest: content of its adaconvert.json.
        memory: bytes the comparison may take; 60 % of what is available when None.
        probe: tokens to compare on; the shipped text when None.
        progress: show a progress bar on a terminal.
        plan: the plan it was made by, see `integrity.check`.

    Raises:
        ResourceError: memory or permissions do not suffice.
    """
    integrity = check(
        adapters.root, manifest, sources=sources, plan=plan, progress=progress, adapters=adapters
    )
    report = VerificationReport(
        integrity=integrity,
        tokenizer=None,
        has_tokenizer=False,
        equivalence=None,
        verdict=None,
        notes=integrity.notes,
    )
    if not integrity.loadable:
        return report
    if view is None:
        note = "not run: the model it is for is not at hand; --base names it"
        return replace(report, notes=(*report.notes, note))
    given = probe_for(probe, sources[0])
    promise = promised(manifest)
    return compared(report, sources[0], view, promise, manifest, memory, given, progress)
