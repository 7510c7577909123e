"""Splitting dense feed-forward networks into experts of which each token runs some.

The split permutes neurons and loses nothing: with every expert on, the model is the dense one, and
`unmoefy` undoes it bit for bit.

Sources: MoEfication 2110.01786; CMoE 2502.04416; D2DMoE 2310.04361; LLaMA-MoE 2406.16554.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.adaptive import BARE_ROUTERS, Partition
from adaconvert.arch.runtimes import verdicts
from adaconvert.arch.sites import ffn_site
from adaconvert.data.text import Documents, read_documents
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.regular import read_whole
from adaconvert.io.source import Source
from adaconvert.io.source_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adaconvert.methods.moefy.config import MoefyConfig, Sizes, sizes_of
from adaconvert.methods.moefy.fit import Fits, check_matrices, fit, permutes
from adaconvert.methods.moefy.inverse import DENSE_CONFIG
from adaconvert.methods.moefy.inverse import prepare_inverse as prepare_inverse
from adaconvert.methods.moefy.inverse import replan_inverse as replan_inverse
from adaconvert.methods.moefy.native import native_plan
from adaconvert.methods.moefy.plan import SplitLayer, adaptive_plan
from adaconvert.methods.options import parse_layers
from adaconvert.methods.planned import Fitted, PlainPlan, Prepared
from adaconvert.methods.sources import Described
from adaconvert.planning.ops import Exactness, Plan

#: the way splits are computed; a change makes other orders of the same options.
ALGORITHM = 1


def prepare(config: MoefyConfig, described: Sequence[Described]) -> Prepared:
    """Return the planned run over opened sources; reads no weights.

    Raises:
        OptionError: the options do not fit the model.
        DataError: the text cannot be read.
    """
    item = described[0]
    _check_runs_on_text(config, item)
    documents = _documents(config)
    digest = None if documents is None else documents.digest
    sizes = sizes_of(config, item.spec)
    layers = sorted(parse_layers(config.layers, item.spec.layers))
    plan, target = _plan(config, item, digest)
    planned = PlainPlan(
        plan=plan,
        described=tuple(described),
        target=target,
        runtimes=verdicts(plan.config),
        files={} if config.native else dense_config_file(item.source),
    )

    def run(progress: bool) -> Fits:
        return fit(item, config, sizes, layers, documents, progress=progress)

    def finished(fitted: Fitted) -> dict[str, object]:
        assert isinstance(fitted, Fits)
        paths = {ffn_site(item.spec, layer).path: layer for layer in layers}
        return _with_thresholds(plan.config, {p: fitted.thresholds[n] for p, n in paths.items()})

    return Prepared(
        planned=planned, fit=run, config_of=finished if config.finds_thresholds else None
    )


def replan(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest."""
    given: dict[str, Any] = dict(options)
    return _plan(MoefyConfig(**given), described[0], given.get("data"))[0]


def _check_runs_on_text(config: MoefyConfig, item: Described) -> None:
    """Hold options that run the model on text to models that can be run layer by layer on it.

    Raises:
        OptionError: it is no decoder.
    """
    if config.data is not None and item.spec.kind != "decoder":
        raise OptionError(
            f"a {item.spec.model_type} cannot be run layer by layer on text",
            where="--data",
            expected="a decoder",
            hint="Use --split balanced-kmeans, which looks at the weights alone.",
        )


def _documents(config: MoefyConfig) -> Documents | None:
    if config.data is None:
        return None
    return read_documents(config.data, field=config.data_field, split=config.data_split)


def _plan(config: MoefyConfig, item: Described, data_digest: str | None) -> tuple[Plan, str]:
    """Return the plan, and the model_type of the result."""
    check_matrices(item, config)
    sizes = sizes_of(config, item.spec)
    options = _options(config, sizes, data_digest)
    digest = _digest(options)
    layers = sorted(parse_layers(config.layers, item.spec.layers))
    if config.native:
        return native_plan(
            item,
            sizes,
            layers,
            target=config.target,
            permuted=permutes(config, sizes),
            options=options,
            digest=digest,
        )
    partition = _partition(config, sizes)
    plan = adaptive_plan(
        "moefy",
        options,
        item,
        [SplitLayer(layer=layer, partition=partition, digest=digest) for layer in layers],
        exactness=exactness_of(config, sizes),
        notes=_notes(config, item),
    )
    return plan, f"{adaptive.PREFIX}{item.spec.model_type}"


def _partition(config: MoefyConfig, sizes: Sizes) -> Partition:
    return Partition(
        split=config.split,
        permuted=permutes(config, sizes),
        experts=sizes.experts,
        width=sizes.width,
        shared=sizes.shared,
        router={"kind": config.router},
        select=config.select(sizes.experts),
    )


def exactness_of(config: MoefyConfig, sizes: Sizes) -> Exactness:
    """Return what step 0 promises: the dense model where every expert runs."""
    if config.runs_all(sizes.experts):
        why = "the neurons are only put in another order, and every expert runs"
        return Exactness(kind="exact", why=why)
    select = config.select(sizes.experts)
    number = next((f" {key}={value:g}" for key, value in select.items() if _is_number(value)), "")
    untrained = "" if config.router in BARE_ROUTERS else "untrained "
    return Exactness(
        kind="approximate",
        why=f"{select['rule']}{number} of {sizes.experts} experts of {sizes.width} neurons, by the "
        f"{untrained}router {config.router}; with every expert on it is the dense model",
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _notes(config: MoefyConfig, item: Described) -> list[str]:
    notes = []
    if config.router == "oracle":
        notes.append(
            "the oracle router runs the whole feed-forward network to choose: it measures what the "
            "split allows, and saves nothing"
        )
    elif config.router != "gate":
        notes.append("the routers are not trained")
    if item.audit.compare_ties:
        notes.append("the stored copy of the tied head is kept")
    return notes


def _options(config: MoefyConfig, sizes: Sizes, data_digest: str | None) -> dict[str, object]:
    """Return the resolved options for the manifest: no paths, every default spelled out."""
    options: dict[str, object] = asdict(config)
    options["num_experts"], options["expert_width"] = sizes.experts, sizes.width
    options["shared_neurons"] = sizes.shared or None
    options["data"] = data_digest
    return options


def _digest(options: Mapping[str, object]) -> str:
    text = json.dumps([ALGORITHM, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _with_thresholds(
    config: Mapping[str, object], thresholds: Mapping[str, float]
) -> dict[str, object]:
    """Return a config.json whose sites hold the thresholds that were found."""
    found: dict[str, Any] = copy.deepcopy(dict(config))
    for path, value in thresholds.items():
        found["adaptive"]["sites"][path]["ffn"]["select"]["threshold"] = value
    return found


def dense_config_file(source: Source) -> dict[str, bytes]:
    """Return the source's config.json as it is, to be given back by `unmoefy`; nothing when it
    holds what no output may carry.

    Raises:
        SourceError: the source has another file of that name, which would be lost.
    """
    if DENSE_CONFIG in source.side_files:
        raise SourceError(
            "is the name under which the dense config.json is kept, and the source has a file of "
            "its own there",
            where=DENSE_CONFIG,
            hint="Rename that file, or move it out of the source.",
        )
    if source.raw_config != source.config:
        return {}
    return {DENSE_CONFIG: read_whole(source.path(CONFIG_FILE), CONFIG_FILE, MAX_CONFIG_BYTES)}
