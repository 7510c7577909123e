"""From a trained model in memory to a checkpoint folder with the source's names and dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.arch.adaptive import NEURON_ORDER, auto_map
from adaconvert.arch.check import audit
from adaconvert.arch.projections import stock_spec
from adaconvert.arch.registry import describe
from adaconvert.dtypes import BY_CONFIG_NAME, BY_NAME, torch_dtype
from adaconvert.errors import VerificationError
from adaconvert.export.adaptive import code_files
from adaconvert.export.card_facts import costs_of, facts_of
from adaconvert.io import aux_files, manifest
from adaconvert.io.commit import Staging
from adaconvert.io.digest import DigestPool
from adaconvert.io.layout import ShardRecord
from adaconvert.io.names import escape
from adaconvert.io.reader import read_torch
from adaconvert.io.source import Source
from adaconvert.io.writer import ShardLayout, index_json, layout_shards
from adaconvert.methods.sources import Described
from adaconvert.progress import bar
from adaconvert.train.routing_config import CORRECTION, OWN_DTYPE

if TYPE_CHECKING:
    import torch

_AUTO_MAP_NOTE = "auto_map"
_VERSIONS = ("accelerate", "numpy", "safetensors", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One tensor of the result, as `io.layout` and `arch.check` want it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str = ""


def config_of(
    item: Described,
    changed: Mapping[str, Any],
    dtype: str,
    *,
    goals: Mapping[str, float] | None = None,
    depth: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return config.json of the result: the source's, what changed, and no calibration.

    Args:
        item: the source.
        changed: keys that changed.
        dtype: config name of the stored dtype, or "keep".
        goals: path -> budget of the blocks with null experts that were given one.
        depth: "thresholds", and "capacities", of blocks that tokens may skip, each by path.
    """
    config = {**item.source.config, **changed}
    if dtype != "keep":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if item.spec.adaptive is not None:
        adaptive: dict[str, Any] = dict(config["adaptive"])
        sites = {**adaptive["sites"]}
        for path, slots in adaptive["sites"].items():
            ffn = slots.get("ffn")
            if ffn is None or "mixture" not in ffn:
                continue
            # trained, it no longer runs what it ran as made
            budget = {**ffn["null"], "target": (goals or {}).get(path, ffn["null"].get("target"))}
            budget.pop("start", None)
            # where a budget was held the stored bias is what was moved, so it decides
            rule = {"select": {"rule": "null"}} if path in (goals or {}) else {}
            sites[path] = {**slots, "ffn": {**ffn, "null": budget, **rule}}
        for path, threshold in (depth or {}).get("thresholds", {}).items():
            made = {"select": {"rule": "threshold", "threshold": threshold}}
            if path in (depth or {}).get("capacities", {}):
                made["capacity"] = (depth or {})["capacities"][path]
            sites[path] = {**sites[path], "layer": {**sites[path]["layer"], **made}}
        config["adaptive"] = {**adaptive, "sites": sites, "calibration": None}
        config["auto_map"] = auto_map(item.spec)
    return config


def targets_of(
    item: Described, trained: Source, config: Mapping[str, Any], dtype: str
) -> list[Target]:
    """Return the tensors of the result, in the source's order and dtypes.

    Args:
        item: the source.
        trained: what transformers saved, in any dtype.
        config: of the result.
        dtype: config name for floating-point tensors, "keep" for the source's.

    Raises:
        VerificationError: the trained model is not what the config describes.
    """
    stored = item.source.tensors
    usual = max(BY_NAME, key=lambda d: sum(r.nbytes for r in stored.values() if r.dtype == d))
    wanted = None if dtype == "keep" else BY_CONFIG_NAME[dtype].name
    is_adaptive = item.spec.adaptive is not None
    stock = {tensor.name for tensor in stock_spec(item.spec).tensors} if is_adaptive else set()
    place = {name: at for at, name in enumerate(item.audit.used)}
    names = sorted(trained.tensors, key=lambda name: (place.get(name, len(place)), name))
    targets = []
    for name in names:
        kept = stored[name].dtype if name in stored else usual
        routes = is_adaptive and ".router." in name and name not in stock
        is_own = (routes and not name.startswith("exits.")) or name.endswith(f".{NEURON_ORDER}")
        if wanted is not None and name.endswith(CORRECTION):
            # rounded, it would choose other experts
            is_own = BY_NAME[wanted].nbytes < BY_NAME[kept].nbytes
        is_own |= is_adaptive and name.endswith(OWN_DTYPE)
        final = kept if wanted is None or is_own or not BY_NAME[kept].is_float else wanted
        targets.append(Target(name=name, dtype=final, shape=trained.tensors[name].shape))
    try:
        audit(describe(config, trained.tensors), {t.name: t for t in targets})
    except Exception as error:
        raise VerificationError(f"the trained model cannot be written: {error}") from error
    return targets


def targets_in(stored: str, wanted: str) -> str:
    """Return the dtype of a tensor that is written.

    Args:
        stored: its dtype in the source.
        wanted: config name for floating-point tensors, "keep" for the source's.
    """
    if wanted == "keep" or not BY_NAME[stored].is_float:
        return stored
    return BY_CONFIG_NAME[wanted].name


def write_weights(
    staging: Staging,
    trained: Source,
    targets: Sequence[Target],
    cap: int | None,
    *,
    progress: bool = False,
) -> tuple[ShardLayout, ...]:
    """Return the shards that are written to `staging` afterwards.

    Raises:
        VerificationError: a tensor holds NaN or infinity.
        ResourceError: the disk is full or broken.
    """
    layouts = layout_shards(targets, cap)
    write_values(
        staging,
        layouts,
        lambda name: read_torch(trained, trained.tensors[name]),
        progress=progress,
    )
    return layouts


def write_values(
    staging: Staging,
    layouts: Sequence[ShardLayout],
    value_of: Callable[[str], torch.Tensor],
    *,
    progress: bool = False,
) -> None:
    """Write shards to `staging`.

    Args:
        staging: takes them.
        layouts: what they hold.
        value_of: a tensor by its name, in any dtype.
        progress: show a progress bar.

    Raises:
        VerificationError: a tensor holds NaN or infinity.
        ResourceError: the disk is full or broken.
    """
    with bar(sum(layout.nbytes for layout in layouts), "write", enabled=progress) as shown:
        for layout in layouts:
            with staging.shard(layout) as writer:
                for tensor in layout.tensors:
                    value = value_of(tensor.name).to(torch_dtype(tensor.dtype))
                    writer.write(tensor.name, _bytes(value, tensor.name))
                    shown.update(tensor.nbytes)
                writer.finish()


def _bytes(value: torch.Tensor, name: str) -> Any:
    import torch

    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise VerificationError(
            "a trained tensor is not finite",
            where=f"tensor '{escape(name)}'",
            hint="Lower --lr or --sparsity; float16 also overflows above 65504.",
        )
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def write_files(
    staging: Staging,
    item: Described,
    config: Mapping[str, Any],
    layouts: Sequence[ShardLayout],
) -> None:
    """Write everything beside the weights but card and manifest: the source's side files byte for
    byte, then our own."""
    for name in aux_files.classify(item.source).copied:
        staging.copy_file(name, item.source.path(name))
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
    own = {"config.json": text.encode()}
    if item.spec.adaptive is not None:
        own |= code_files()
    for name, content in own.items():
        staging.write_file(name, content)
    index = index_json(layouts)
    if index is not None:
        staging.write_file("model.safetensors.index.json", index)


def manifest_of(
    item: Described,
    summary: Mapping[str, Any],
    records: Mapping[str, ShardRecord],
    staged: Staging,
    digest: str,
) -> dict[str, Any]:
    """Return the content of adaconvert.json, without the card and not yet sealed."""
    with DigestPool([item.source, own_source(item)]) as pool:
        weights, own = pool.source_digest(0), pool.source_digest(1)
    dropped = {**item.audit.dropped}
    made = manifest.build(
        method="finetune",
        options=summary["options"],
        sources=[
            {
                "label": own_source(item).label,
                "revision": own_source(item).revision,
                "fingerprint": item.source.fingerprint,
                "digest": weights,
            }
        ],
        plan_digest=digest,
        exactness={"kind": "approximate", "why": f"trained for {summary['tokens']} tokens"},
        shards=records,
        files=staged.files,
        dropped=[
            {"source": 0, "tensor": name, "reason": why} for name, why in sorted(dropped.items())
        ],
        notes=[*summary["notes"], *_source_notes(item)],
        versions={name: metadata.version(name) for name in _VERSIONS},
    )
    return {
        **made,
        "training": {k: v for k, v in summary.items() if k != "options"},
        "history": _history(item, own),
        "card": _card(item, staged.path),
    }


def own_source(item: Described) -> Source:
    """Return the files that a fine-tune makes another version of: those of the adapters, or all."""
    return item.source if item.view is None else item.view.adapters.source


def _history(item: Described, weights: str) -> list[dict[str, object]]:
    source = own_source(item)
    return manifest.history_of(source.root, label=source.label, weights=weights)


def _card(item: Described, folder: Path) -> dict[str, Any]:
    """Return what only the writer of the card knows; a folder of adapters costs what its view
    does."""
    if item.view is None:
        return facts_of([item.source], folder, inherit_costs=True)
    after = costs_of(item.source.root)
    facts = facts_of([own_source(item)], folder, inherit_costs=True, after=after)
    return {**facts, "base": item.view.base.source.label}


def _source_notes(item: Described) -> list[str]:
    notes = [*item.source.notes, *item.audit.notes]
    if item.spec.adaptive is not None:
        # made anew, which goes without saying
        notes = [note for note in notes if _AUTO_MAP_NOTE not in note]
    return [f"{item.source.label}: {note}" for note in notes]
