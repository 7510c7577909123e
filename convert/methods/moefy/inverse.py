"""`unmoefy`: neurons back in the order of the dense model, and nothing else of the split left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence

from adaconvert.arch import adaptive, registry
from adaconvert.arch.adaptive import NEURON_ORDER
from adaconvert.arch.projections import networks_of, stock_spec
from adaconvert.arch.sites import FfnSite, Part
from adaconvert.errors import AdaconvertError, OptionError
from adaconvert.io import manifest
from adaconvert.io.digest import digest_of_digests
from adaconvert.io.names import escape
from adaconvert.io.regular import read_whole
from adaconvert.io.source import Source
from adaconvert.methods.moefy.config import UnmoefyConfig
from adaconvert.methods.moefy.plan import dropped, permuted, target, whole
from adaconvert.methods.planned import PlainPlan, Prepared
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Drop, Exactness, Expr, Plan, TargetTensor

#: config.json of the dense source, byte for byte, as `moefy` keeps it.
DENSE_CONFIG = "dense_config.json"
#: keys the adaptive config.json states for itself, whatever the dense one says.
_OURS = frozenset({"auto_map", "tokenizer_class"})
_MAX_CONFIG = 16_000_000
#: keys transformers writes anew whenever it saves a model.
_ABOUT_THE_FILE = frozenset({"architectures", "transformers_version"})


def prepare_inverse(config: UnmoefyConfig, described: Sequence[Described]) -> Prepared:
    """Return the planned run that makes a dense model of an adaptive one; reads no weights.

    Raises:
        OptionError: the checkpoint holds more than split networks.
    """
    item = described[0]
    plan = _plan(item)
    planned = PlainPlan(
        plan=plan,
        described=tuple(described),
        target=item.spec.model_type,
        runtimes=(),
        files=_config_file(item.source, plan.config),
    )

    def notes(written: Mapping[str, str]) -> list[str]:
        return _identity(item.source, written)

    return Prepared(planned=planned, notes_of=notes)


def replan_inverse(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest."""
    return _plan(described[0])


def _plan(item: Described) -> Plan:
    spec = item.spec
    assert spec.adaptive is not None
    _check_only_split(item)
    sites = list(adaptive.sites_of(spec, spec.adaptive))
    orders = {site.layer: f"{site.stored}.{NEURON_ORDER}" for site, p in sites if p.permuted}
    parts = {p.tensor: p for site, _ in sites if site.layer in orders for p in site.parts}
    config = adaptive.dense_config(item.source.config)
    plan = Plan(
        method="unmoefy",
        options={},
        sources=(item.source.fingerprint,),
        targets=tuple(_targets(item, config, orders, parts)),
        drops=(*dropped(item), *_routers(item, [site for site, _ in sites])),
        config=config,
        exactness=Exactness(
            kind="exact", why="the neurons are back in the order of the dense model"
        ),
    )
    check_plan(plan, [item.source.tensors])
    return plan


def _targets(
    item: Described,
    config: Mapping[str, object],
    orders: Mapping[int, str],
    parts: Mapping[str, Part],
) -> Iterator[TargetTensor]:
    stored = item.source.tensors
    for tensor in registry.describe(config, stored).tensors:
        if tensor.name not in stored:
            continue
        ref = stored[tensor.name]
        expr: Expr = whole(ref)
        if tensor.name in parts and tensor.layer is not None:
            order = whole(stored[orders[tensor.layer]])
            expr = permuted(ref, parts[tensor.name], order, inverse=True)
        yield target(tensor.name, ref.dtype, ref.shape, expr, tensor.layer)


def _routers(item: Described, sites: Sequence[FfnSite]) -> Iterator[Drop]:
    for site in sites:
        for name in item.source.tensors:
            if name.startswith(f"{site.stored}.router."):
                yield Drop(source=0, tensor=name, reason="router; the dense model has none")


def _check_only_split(item: Described) -> None:
    """Hold the checkpoint to nothing but split networks; anything else cannot be taken back.

    Raises:
        OptionError: naming what else it holds.
    """
    adaptive_part = item.spec.adaptive or {}
    model = adaptive_part.get("model")
    held = [name for name, value in (model if isinstance(model, dict) else {}).items() if value]
    sites = adaptive_part.get("sites")
    _check_projections(item)
    for slots in (sites if isinstance(sites, dict) else {}).values():
        held += [slot for slot in slots if slot != "ffn"]
        ffn = slots.get("ffn", {})
        held += ["null experts"] if ffn.get("null") else []
        own = ffn.get("activation", item.spec.traits.activation)
        held += [f"activation {own}"] if own != item.spec.traits.activation else []
    if held:
        names = ", ".join(escape(name, 40) for name in dict.fromkeys(held))
        raise OptionError(
            f"holds more than split networks: {names}",
            where=item.source.label,
            hint="Only a split can be undone; start from the dense checkpoint instead.",
        )


def _check_projections(item: Described) -> None:
    """Hold the checkpoint to projections that are still there.

    Raises:
        OptionError: naming those that networks have taken the place of.
    """
    assert item.spec.adaptive is not None
    found = [site.path for site, _ in networks_of(stock_spec(item.spec), item.spec.adaptive)]
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise OptionError(
            f"networks have taken the place of projections, whose weights are gone: "
            f"{', '.join(found[:3])}{more}",
            where=item.source.label,
            hint="Start from the dense checkpoint instead.",
        )


def _config_file(source: Source, config: Mapping[str, object]) -> dict[str, bytes]:
    """Return the dense source's config.json as it was, when it still says the same."""
    if DENSE_CONFIG not in source.side_files:
        return {}
    try:
        raw = read_whole(source.path(DENSE_CONFIG), DENSE_CONFIG, _MAX_CONFIG)
        kept = json.loads(raw)
    except (AdaconvertError, ValueError, RecursionError):
        return {}
    if not isinstance(kept, dict):
        return {}
    apart = _ABOUT_THE_FILE | _OURS
    mine = {key: value for key, value in config.items() if key not in apart}
    theirs = {key: value for key, value in kept.items() if key not in apart}
    stated = kept.get("architectures") or config["architectures"]
    return {"config.json": raw} if (mine, stated) == (theirs, config["architectures"]) else {}


def _identity(source: Source, written: Mapping[str, str]) -> list[str]:
    """Return whether the tensors are those of the dense model the checkpoint was made of.

    Args:
        source: the adaptive checkpoint.
        written: sha256 of every tensor of the dense one.
    """
    try:
        record = manifest.read(source.root)
    except AdaconvertError:
        return []
    sources, drops = record["sources"], record["dropped"]
    entry = sources[0] if isinstance(sources, list) and sources else None
    if not isinstance(entry, dict) or drops or not _was_dense(record):
        return []
    label = escape(entry.get("label"), 80)
    if entry.get("digest") == digest_of_digests(dict(written)):
        return [f"every tensor is, bit for bit, that of {label}"]
    return [f"the weights are not those of {label}: they were changed since"]


def _was_dense(record: Mapping[str, object]) -> bool:
    """Return whether the source of a checkpoint was dense: `d2dmoe` also takes split ones."""
    options = record["options"]
    stages = options.get("stages") if isinstance(options, dict) else None
    return stages is None or "2" in str(stages)
