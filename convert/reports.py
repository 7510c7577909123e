"""What the API returns: plain data for programs, lines for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adaconvert.arch.base import ModelSpec, RuntimeVerdict
from adaconvert.arch.registry import FAMILIES, describe
from adaconvert.io import aux_files
from adaconvert.io.layout import PAGE
from adaconvert.io.names import escape
from adaconvert.io.writer import layout_shards, parse_size
from adaconvert.methods.planned import Planned
from adaconvert.methods.sources import Described, differing_files, left_behind
from adaconvert.planning.digest import run_digest
from adaconvert.planning.estimate import Costs, costs, counted, working_memory
from adaconvert.planning.ops import Exactness
from adaconvert.units import human_bytes, human_count

#: memory a run takes besides the largest computed tensor: interpreter, numpy, copy and hash
#: buffers.
BASE_MEMORY = 64 << 20
CARD = "README.md"
#: keys that describe the file or its writer, not the model.
_ABOUT_THE_FILE = frozenset({"transformers_version", "torch_dtype", "dtype", "architectures"})


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What a conversion would write, need and promise.

    Attributes:
        target: architecture of the result.
        shards: weight files.
        disk: bytes the destination takes; the run needs as much free space.
        memory: bound on the memory of the conversion itself, verification not counted.
        before, after: costs of the dense source and of the result.
        counted: at how many real experts those of blocks with null experts are counted, in words.
        runtimes: what each runtime will do with the result.
        digest: identity of the run, as in adaconvert.json.
    """

    method: str
    target: str
    options: dict[str, object]
    exactness: Exactness
    tensors: int
    shards: int
    disk: int
    memory: int
    before: Costs
    after: Costs
    runtimes: tuple[RuntimeVerdict, ...]
    notes: tuple[str, ...]
    digest: str
    counted: str = ""

    @classmethod
    def of(cls, planned: Planned, max_shard_size: str | int) -> PlanReport:
        """Return the report of a planned run."""
        plan = planned.plan
        spec, source = planned.described[0].spec, planned.described[0].source
        layouts = layout_shards(plan.targets, parse_size(max_shard_size))
        return cls(
            method=plan.method,
            target=planned.target,
            options=plan.options,
            exactness=plan.exactness,
            tensors=len(plan.targets),
            shards=len(layouts),
            disk=sum(layout.nbytes + PAGE for layout in layouts),
            memory=BASE_MEMORY + working_memory(plan),
            before=costs(spec, {n: r.dtype for n, r in source.tensors.items()}),
            after=target_costs(planned),
            runtimes=_verdicts(planned),
            notes=(*plan.notes, *_source_notes(planned)),
            digest=run_digest(plan, parse_size(max_shard_size)),
            counted=counted(_target(planned)),
        )

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON data."""
        return {
            "method": self.method,
            "target": self.target,
            "options": self.options,
            "exactness": {"kind": self.exactness.kind, "why": self.exactness.why},
            "tensors": self.tensors,
            "shards": self.shards,
            "disk_bytes": self.disk,
            "memory_bytes": self.memory,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "runtimes": [
                {"runtime": v.runtime, "verdict": v.verdict, "why": v.why} for v in self.runtimes
            ],
            "notes": list(self.notes),
            "plan_digest": self.digest,
        }

    def lines(self) -> list[str]:
        """Return the report as text."""
        more = self.after.flops / self.before.flops
        source = "source" if self.method == "adamoe" else "dense"
        rows = [
            f"{self.method} to {self.target}: {self.exactness.kind} ({self.exactness.why})",
            f"writes      {self.tensors} tensors in {self.shards} files, {human_bytes(self.disk)}",
            f"needs       {human_bytes(self.disk)} of disk, {human_bytes(self.memory)} of memory "
            "(without verification)",
            *cost_lines(self.before, self.after, source),
            _flops_line(self.method, more),
            *([f"counted: {self.counted}"] if self.counted else []),
        ]
        rows += [f"{v.runtime:<18}{v.verdict}: {v.why}" for v in self.runtimes]
        rows += [f"note: {note}" for note in self.notes]
        return rows


def _target(planned: Planned) -> ModelSpec:
    """Return what the result is: of a PEFT folder, its base with the adapters."""
    folder = planned.folder
    if folder is not None:
        return describe(folder.target, folder.dtypes)
    return describe(planned.plan.config, {tensor.name for tensor in planned.plan.targets})


def target_costs(planned: Planned) -> Costs:
    """Return the costs of the result; of a PEFT folder, with its base."""
    folder = planned.folder
    if folder is not None:
        return costs(_target(planned), folder.dtypes)
    return costs(_target(planned), {t.name: t.dtype for t in planned.plan.targets})


def _verdicts(planned: Planned) -> tuple[RuntimeVerdict, ...]:
    """Return the verdicts; a result that is not the dense model is compared with itself."""
    found = planned.runtimes
    if planned.plan.method == "adamoe":
        return tuple(
            replace(v, why=v.why.replace("as the dense model", "as the source")) for v in found
        )
    if planned.plan.exactness.kind in {"exact", "exact-fp32"}:
        return found
    return tuple(
        replace(v, why=v.why.replace("as the dense model", "as this checkpoint defines"))
        for v in found
    )


def _source_notes(planned: Planned) -> list[str]:
    """Return what opening the sources found, and what of them the target will not hold."""
    notes = []
    for item in planned.described:
        label = item.source.label
        found = [*item.source.notes, *item.audit.notes]
        if item.spec.adaptive is not None:
            # what makes it adaptive is undone or made anew, which goes without saying
            found = [note for note in found if "dropped auto_map" not in note]
        left = {} if planned.folder is not None else left_behind(item)
        found += [f"{name} is not copied: {why}" for name, why in left.items() if name != CARD]
        keys = _keys_left(item, planned.plan.config) if planned.folder is None else []
        if keys:
            found.append(f"config keys not carried over (see --keep-config): {', '.join(keys)}")
        notes += [f"{label}: {note}" for note in found]
    if planned.folder is not None:
        return notes
    copied = aux_files.classify(planned.described[0].source).copied
    return notes + differing_files(planned.described, copied)


def _keys_left(item: Described, config: Mapping[str, object]) -> list[str]:
    """Return the source's config keys that neither its family reads nor the target has."""
    family = FAMILIES[item.spec.model_type]
    read = {name for key in family.keys.values() for name in (key.name, *key.aliases)}
    known = read | set(config) | _ABOUT_THE_FILE
    if item.spec.adaptive is not None:
        known = known | {"adaptive"}
    return sorted(escape(key, 60) for key in item.source.config if key not in known)


def _flops_line(method: str, ratio: float) -> str:
    if ratio > 1.005 and method == "upcycle":
        return (
            f"each token costs {ratio:.2f}x the FLOPs of the dense model: upcycling adds capacity, "
            "it does not save compute"
        )
    if ratio > 1.005 and method in ("moefy", "d2dmoe"):
        return (
            f"each token costs {ratio:.2f}x the FLOPs of the dense model while every expert runs; "
            "fewer experts cost less"
        )
    model = "source" if method == "adamoe" else "dense model"
    if not 0.995 <= ratio <= 1.005:
        return f"each token costs {ratio:.2f}x the FLOPs of the {model}"
    return f"each token costs the same FLOPs as the {model}"


def cost_lines(before: Costs, after: Costs, source: str = "dense") -> list[str]:
    """Return a small table of costs, of the source under the name given and converted."""
    table: Sequence[tuple[str, str, str]] = (
        ("", source, "converted"),
        ("parameters", human_count(before.total_params), human_count(after.total_params)),
        ("active/token", human_count(before.active_params), human_count(after.active_params)),
        ("FLOPs/token", human_count(before.flops), human_count(after.flops)),
        ("  in FFNs", human_count(before.ffn_flops), human_count(after.ffn_flops)),
        ("bytes/token", human_bytes(before.weight_bytes), human_bytes(after.weight_bytes)),
    )
    note = f"(FLOPs at {before.context} tokens of context; bytes of weights read at batch 1)"
    return [*(f"{name:<14}{a:>12}{b:>12}" for name, a, b in table), note]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionResult:
    """A finished conversion.

    Attributes:
        destination: the committed folder.
        report: the plan it followed.
        manifest: the content of its adaconvert.json.
        verification_lines: the verification for people; one line when it was skipped.
        found: what was found while writing, one sentence each.
    """

    destination: Path
    report: PlanReport
    manifest: dict[str, object]
    verification_lines: tuple[str, ...]
    found: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON data."""
        return {
            "destination": self.destination.name,
            "plan": self.report.to_json(),
            "verification": self.manifest.get("verification"),
        }

    def lines(self) -> list[str]:
        """Return the result as text."""
        found = [f"found: {sentence}" for sentence in self.found]
        return [
            *self.report.lines(),
            *found,
            "",
            *self.verification_lines,
            f"wrote {self.destination}",
        ]
