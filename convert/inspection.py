"""`inspect`: what a checkpoint is, from its headers and config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from adaconvert.arch import recursion, routed_layers
from adaconvert.arch.adapters import LORA, adapted
from adaconvert.arch.adaptive import sites_of
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.calibration import stale_reasons, table_of
from adaconvert.arch.check import audit
from adaconvert.arch.exits import KINDS, exits_of, is_taken
from adaconvert.arch.null_experts import nulled
from adaconvert.arch.projections import networks_of, stock_spec
from adaconvert.arch.registry import describe
from adaconvert.arch.trunk import foreign
from adaconvert.errors import AdaconvertError
from adaconvert.io import manifest
from adaconvert.io.source import Source
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError, read
from adaconvert.planning.estimate import Costs, costs, counted
from adaconvert.units import human_bytes, human_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        label: hub id or folder name.
        spec: description of the model; None when the family is unknown.
        costs: None when the family is unknown.
        dtypes: bytes by stored dtype.
        problems: what a conversion would refuse, in the words it would use.
    """

    label: str
    spec: ModelSpec | None
    costs: Costs | None
    dtypes: dict[str, int]
    files: tuple[str, ...]
    tensors: int
    fingerprint: str
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Return the inspection as JSON data."""
        spec = self.spec
        return {
            "label": self.label,
            "model_type": spec.model_type if spec else None,
            "architecture": spec.architecture if spec else None,
            "layers": spec.layers if spec else None,
            "hidden_size": spec.hidden if spec else None,
            "intermediate_size": spec.intermediate if spec else None,
            "num_experts": spec.num_experts if spec else None,
            "top_k": spec.top_k if spec else None,
            "adaptive": bool(spec and spec.adaptive is not None),
            "tied": spec.traits.tied if spec else None,
            "costs": self.costs.to_json() if self.costs else None,
            "dtype_bytes": self.dtypes,
            "files": list(self.files),
            "tensors": self.tensors,
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
            "problems": list(self.problems),
        }

    def lines(self) -> list[str]:
        """Return the inspection as text."""
        rows = [f"{self.label}: {_family_line(self.spec)}"]
        if self.spec is not None and self.costs is not None:
            rows += _size_lines(self.spec, self.costs)
        stored = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.dtypes.items())
        rows.append(f"stored        {stored} in {len(self.files)} files, {self.tensors} tensors")
        rows.append(f"fingerprint   {self.fingerprint}")
        rows += [f"note: {note}" for note in self.notes]
        rows += [f"problem: {problem}" for problem in self.problems]
        return rows


def _family_line(spec: ModelSpec | None) -> str:
    if spec is None:
        return "not a model adaconvert can describe"
    experts = f", {spec.num_experts} experts top-{spec.top_k}" if spec.num_experts else ", dense"
    if spec.adaptive is not None:
        found = [_nulled_text(spec) or _split_text(spec), _adapted_text(spec), _exits_text(spec)]
        found.append(routed_layers.words(spec.adaptive, spec.layers))
        found.append(recursion.words(spec.adaptive))
        experts = f", adaptive: {'; '.join(filter(None, found)) or 'nothing is split'}"
    tied = ", tied embeddings" if spec.traits.tied else ""
    return f"{spec.model_type} ({spec.architecture}){experts}{tied}"


def _nulled_text(spec: ModelSpec) -> str:
    """Return what null experts a mixture has, and what it can spend; "" when it has none."""
    assert spec.adaptive is not None
    found = list(nulled(spec, spec.adaptive))
    if not found:
        return ""
    block, nulls = found[0]
    low, high = nulls.reach(block)
    shares = sorted({n.target for _, n in found if n.target is not None})
    target = f", wanted share {' to '.join(f'{s:g}' for s in shares[:: max(len(shares) - 1, 1)])}"
    return (
        f"{len(found)} blocks of {block.count} experts top-{block.top_k} and {nulls.count} null "
        f"ones ({nulls.kind}), {nulls.slots} slots, weights of the {nulls.weights} ones, "
        f"{low * block.top_k:.3g} to {high * block.top_k:.3g} real experts per token by the null "
        f"bias{target if shares else ''}"
    )


def _adapted_text(spec: ModelSpec) -> str:
    """Return what routed adapters an adaptive checkpoint has; "" when it has none."""
    assert spec.adaptive is not None
    slots = [slot for _, slot in adapted(stock_spec(spec), spec.adaptive)]
    if not slots:
        return ""
    low = [slot["adapters"]["rank"] for slot in slots if slot["adapters"]["kind"] == LORA]
    ranks = " to ".join(str(rank) for rank in sorted({min(low), max(low)})) if low else ""
    kinds = list(dict.fromkeys(_kind_text(slot["adapters"], ranks) for slot in slots))
    ways = list(dict.fromkeys(map(_weighed_text, slots)))
    more = ", ".join(
        f"the first of {len(found)} {what}"
        for found, what in ((kinds, "kinds"), (ways, "ways to weigh them"))
        if len(found) > 1
    )
    return f"{kinds[0]} on {len(slots)} linears, {ways[0]}{f' ({more})' if more else ''}"


def _exits_text(spec: ModelSpec) -> str:
    """Return what early exits an adaptive checkpoint has; "" when it has none."""
    exits = exits_of(spec.adaptive)
    if exits is None:
        return ""
    places = ", ".join(str(head["at"]) for head in exits["heads"])
    decide = exits["decide"]
    when = f"taken by {decide['measure']}" if is_taken(exits) else "none taken as configured"
    drafts = "" if exits["draft"] is None else f", drafts from {exits['draft']['at']}"
    return (
        f"exits after {places} of {spec.layers} blocks, {_heads_text(exits['heads'])}, {when}"
        f"{drafts}"
    )


def _heads_text(heads: Sequence[Mapping[str, Any]]) -> str:
    """Return the kind of the heads, as `early-exit --head` names it."""
    kinds = {
        (bool(head["own"]), head["map"], head["network"], head["block"]): None for head in heads
    }
    named = [name for kind in kinds for name, parts in KINDS.items() if parts == kind]
    return f"head {' or '.join(named)}" if named else "heads of several parts"


def _kind_text(adapters: Mapping[str, Any], ranks: str) -> str:
    """Return what adapters a linear has; `ranks` are those of all linears."""
    is_low_rank = adapters["kind"] == LORA
    what = f"LoRA of rank {ranks}" if is_low_rank else "vectors that scale (ia3)"
    return f"{adapters['count']} {what}"


def _weighed_text(slot: Mapping[str, Any]) -> str:
    """Return how the adapters of a linear are weighed."""
    router, select = slot["router"], slot["select"]
    reads = {"module": "a router each", "layer": "a router a block", "shared": "one router"}
    routed = reads[router["reads"]] if router["kind"] != "none" else "no router"
    return f"weighed by {select['rule']}, {routed}"


def _split_text(spec: ModelSpec) -> str:
    """Return how many networks of an adaptive checkpoint are split, and how the first one is; ""
    when none is."""
    assert spec.adaptive is not None
    found = [partition for _, partition in sites_of(spec, spec.adaptive)]
    replaced = _replaced_text(spec)
    if not found:
        return replaced
    first = found[0]
    numbers = [f"{value:g}" for value in first.select.values() if isinstance(value, int | float)]
    rule = " ".join([str(first.select.get("rule")), *numbers])
    return (
        f"{len(found)} of {spec.layers} feed-forward networks split, {first.experts} experts of "
        f"{first.width} neurons, router {first.router['kind']}, {rule}"
        + (f"; {replaced}" if replaced else "")
    )


def _replaced_text(spec: ModelSpec) -> str:
    """Return which projections are networks, and how good the first ones are; "" when none is."""
    assert spec.adaptive is not None
    found = list(networks_of(stock_spec(spec), spec.adaptive))
    if not found:
        return ""
    roles = ", ".join(dict.fromkeys(site.role for site, _ in found))
    blocks = len({site.layer for site, _ in found})
    experts = sorted({network.experts for _, network in found})
    sizes = "whole" if experts == [1] else f"{' or '.join(map(str, experts))} experts each"
    errors = [network.quality["error"] for _, network in found if network.quality is not None]
    known = [float(error) for error in errors if isinstance(error, int | float)]
    mean = f", mean relative error {sum(known) / len(known):.3f}" if known else ""
    return f"networks in place of {roles} in {blocks} of {spec.layers} blocks, {sizes}{mean}"


def _size_lines(spec: ModelSpec, cost: Costs) -> list[str]:
    real = counted(spec)
    return [
        f"shape         {spec.layers} layers, hidden {spec.hidden}, FFN {spec.intermediate}, "
        f"{spec.heads} heads ({spec.kv_heads} KV) of {spec.head_dim}, vocabulary {spec.vocab}",
        f"parameters    {human_count(cost.total_params)} total, "
        f"{human_count(cost.active_params)} active per token",
        f"FLOPs/token   {human_count(cost.flops)} at {cost.context} tokens of context, "
        f"{human_count(cost.ffn_flops)} of them in FFNs",
        f"bytes/token   {human_bytes(cost.weight_bytes)} of weights read at batch 1",
        *([f"counted       {real}"] if real else []),
    ]


def _calibration_notes(source: Source) -> list[str]:
    """Return whether a calibration table still holds, as far as files say without weights."""
    table = table_of(source.raw_config)
    if table is None:
        return []
    weights = None
    with suppress(AdaconvertError, ValueError):
        weights = manifest.weights_of(manifest.read(source.root))
    reasons = stale_reasons(source.raw_config, weights)
    if reasons:
        return [f"the calibration table does not hold: {reason}" for reason in reasons]
    rows = table.get("rows")
    found = f"calibrated at {len(rows) if isinstance(rows, list) else 0} settings"
    unknown = "; whether these are the weights it was measured on is not known without reading them"
    return [found if weights is not None else found + unknown]


def _unusable(spec: ModelSpec) -> str | None:
    """Return why the runtime would refuse what config.json says of it; None where it would not."""
    if spec.adaptive is None:
        return None
    try:
        read(spec.adaptive)
    except AdaptiveConfigError as error:
        return f"cannot be loaded: {error}"
    return None


def inspect_source(where: str, *, revision: str | None = None) -> Inspection:
    """Return the inspection of a folder, hub-cache snapshot or hub id.

    Raises:
        SourceError: the files cannot be read as a checkpoint at all.
    """
    source = Source.open(where, revision=revision)
    sizes: Counter[str] = Counter()
    for ref in source.tensors.values():
        sizes[ref.dtype] += ref.nbytes
    spec, cost = None, None
    notes: list[str] = list(source.notes)
    problems: list[str] = []
    try:
        spec = describe(source.config, source.tensors)
        audited = audit(spec, source.tensors)
        notes += audited.notes
        problems += filter(None, [_unusable(spec), foreign(source, spec)])
    except AdaconvertError as error:
        problems.append(error.describe())
    notes += _calibration_notes(source)
    if spec is not None:
        cost = costs(spec, {name: ref.dtype for name, ref in source.tensors.items()})
    return Inspection(
        label=source.label,
        spec=spec,
        costs=cost,
        dtypes=dict(sorted(sizes.items())),
        files=source.files,
        tensors=len(source.tensors),
        fingerprint=source.fingerprint,
        notes=tuple(notes),
        problems=tuple(problems),
    )
