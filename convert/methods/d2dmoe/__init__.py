"""D2DMoE: a dense model's FFNs split into experts, each token running as many as contribute.

Stages: 2 split, 3 fit a router that predicts how much each expert contributes, 4 run the experts
whose prediction is at least tau times the best, 5 replace attention projections by networks that
are split, routed and selected from likewise. Each can be had alone.

Source: Szatkowski, Wojcik, Piorczynski, Scardapane 2024, arXiv 2310.04361, and its official code
bartwojcik/D2DMoE. They differ in the meaning of tau: an expert runs iff its score >= tau * max in
the paper, and here; iff score >= (1 - tau) * max in the code.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.adaptive import Partition
from adaconvert.arch.runtimes import verdicts
from adaconvert.arch.sites import ffn_site
from adaconvert.data.images import Images, read_images
from adaconvert.data.text import Documents, read_documents
from adaconvert.errors import OptionError
from adaconvert.layerwise.configs import load_config
from adaconvert.methods.d2dmoe.config import D2dmoeConfig
from adaconvert.methods.d2dmoe.fit import Fits, fit, kept_layers
from adaconvert.methods.d2dmoe.projection_fit import fit_networks, network_lines
from adaconvert.methods.d2dmoe.projections import Edit, edited, edits, networks_in
from adaconvert.methods.d2dmoe.reroute import (
    Site,
    changed_sites,
    kept_files,
    rerouted_plan,
    runs_all,
    words,
)
from adaconvert.methods.moefy import dense_config_file
from adaconvert.methods.moefy.config import Sizes
from adaconvert.methods.moefy.plan import SplitLayer, adaptive_plan
from adaconvert.methods.options import parse_layers
from adaconvert.methods.planned import Fitted, PlainPlan, Prepared
from adaconvert.methods.sources import Described, refuse_exits
from adaconvert.planning.ops import Exactness, Plan

#: activations that are exactly zero for many inputs.
SPARSE = frozenset({"relu", "relu2", "relu6", "relu_squared"})
#: the way arrays are computed; a change makes others of the same options.
ALGORITHM = 1


def prepare(config: D2dmoeConfig, described: Sequence[Described]) -> Prepared:
    """Return the planned run over opened sources; reads no weights.

    Raises:
        OptionError: the options do not fit the model.
        DataError: the text, or the images, cannot be read.
    """
    item = described[0]
    changes = edits(config, item)
    documents = _documents(config, item)
    plan = _plan(config, item, None if documents is None else documents.digest)
    is_split = item.spec.adaptive is not None
    planned = PlainPlan(
        plan=plan,
        described=tuple(described),
        target=f"{adaptive.PREFIX}{item.spec.model_type}",
        runtimes=verdicts(plan.config),
        files=kept_files(item.source) if is_split else dense_config_file(item.source),
    )
    done: list[Fits] = []

    def run(progress: bool) -> Fitted:
        found = Fits()
        sizes = sizes_by_layer(config, item)
        if sizes and (config.fits or not is_split):
            text = documents if config.fits else None
            found = fit(item, config, sizes, text, progress=progress)
        if isinstance(documents, Documents) and any(change.fitted() for change in changes):
            arrays, found.networks = fit_networks(
                item, config, changes, documents, progress=progress
            )
            found.arrays |= arrays
        done.append(found)
        return found

    def notes(written: Mapping[str, str]) -> list[str]:
        return [
            line
            for fits in done
            for line in (*quality_lines(fits), *network_lines(fits.networks, changes))
        ]

    return Prepared(
        planned=planned,
        fit=run,
        config_of=_finished(plan, item, done),
        notes_of=notes,
        kept=lambda: kept_layers(config),
    )


def replan(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest."""
    known = {field.name for field in fields(D2dmoeConfig)}
    given: dict[str, Any] = {key: value for key, value in options.items() if key in known}
    if "2" not in str(given.get("stages")):
        # what the options say of a split that was there already
        given |= {"num_experts": None, "expert_width": None}
    return _plan(D2dmoeConfig(**given), described[0], given.get("data"))


def _documents(config: D2dmoeConfig, item: Described) -> Documents | Images | None:
    if config.data is None:
        return None
    if item.spec.kind == "vision":
        return read_images(
            config.data,
            item.source.root,
            load_config(item.source),
            field=config.data_field,
            split=config.data_split,
        )
    return read_documents(config.data, field=config.data_field, split=config.data_split)


def _plan(config: D2dmoeConfig, item: Described, data_digest: str | None) -> Plan:
    changes = edits(config, item)
    if item.spec.adaptive is not None:
        if not list(adaptive.sites_of(item.spec, item.spec.adaptive)):
            refuse_exits(item, "and nothing of it is split")
        after = _changed_sites(config, item)
        options = _options(config, after[0][1] if after else None, data_digest, changes)
        plan = rerouted_plan(config, item, after, options, _digest(options))
        return edited(plan, item, changes, _digest(options))
    _check_dense(config)
    partition = _partition(config, item) if "2" in config.stage_set else None
    options = _options(config, partition, data_digest, changes)
    plan = _split_plan(config, item, partition, options)
    return edited(plan, item, changes, _digest(options))


def _split_plan(
    config: D2dmoeConfig,
    item: Described,
    partition: Partition | None,
    options: dict[str, object],
) -> Plan:
    """Return the plan that splits the feed-forward networks of a dense model, or none of them."""
    layers: list[SplitLayer] = []
    exactness = Exactness(kind="exact", why="no feed-forward network changes")
    if partition is not None:
        digest = _digest(options)
        asked = sorted(parse_layers(config.layers, item.spec.layers))
        layers = [SplitLayer(layer=i, partition=partition, digest=digest) for i in asked]
        exactness = _exactness(partition)
    return adaptive_plan(
        "d2dmoe", options, item, layers, exactness=exactness, notes=_notes(config, item)
    )


def _changed_sites(config: D2dmoeConfig, item: Described) -> list[Site]:
    """Return the split networks with their new routers and rules; none where stage 5 alone runs, or
    where the checkpoint has networks in place of projections only."""
    if not config.stage_set & {"2", "3", "4"}:
        return []
    assert item.spec.adaptive is not None
    ffn = any(True for _ in adaptive.sites_of(item.spec, item.spec.adaptive))
    if not ffn and networks_in(item.spec) and "2" not in config.stage_set:
        return []
    return changed_sites(config, item)


def _partition(config: D2dmoeConfig, item: Described) -> Partition:
    sizes = config.sizes(item.spec)
    router: dict[str, object] = {"kind": "none"}
    if config.fits:
        router = {"kind": "contribution", "width": config.width(item.spec)}
    return Partition(
        split="balanced-kmeans",
        permuted=sizes.width > 1,
        experts=sizes.experts,
        width=sizes.width,
        router=router,
        select=config.select(),
    )


def sizes_by_layer(config: D2dmoeConfig, item: Described) -> dict[int, Sizes]:
    """Return how each converted block is split: as asked, or as a split source is already."""
    if item.spec.adaptive is None and "2" not in config.stage_set:
        return {}
    if item.spec.adaptive is None:
        sizes = config.sizes(item.spec)
        return dict.fromkeys(sorted(parse_layers(config.layers, item.spec.layers)), sizes)
    return {
        site.layer: Sizes(experts=p.experts, width=p.width, shared=p.shared)
        for site, p in _changed_sites(config, item)
    }


def _check_dense(config: D2dmoeConfig) -> None:
    if "2" not in config.stage_set and config.stage_set != {"5"}:
        raise OptionError(
            "the source is not split",
            where="--stages",
            expected="stage 2 among them, or 5 alone",
            found=config.stages,
        )


def _exactness(partition: Partition) -> Exactness:
    if runs_all(partition):
        why = "the neurons are only put in another order, and every expert runs"
        return Exactness(kind="exact", why=why)
    return Exactness(
        kind="approximate",
        why=f"{words(partition.select)} of {partition.experts} experts of {partition.width} "
        "neurons, by fitted contribution routers; with every expert on it is the dense model",
    )


def _notes(config: D2dmoeConfig, item: Described) -> list[str]:
    notes = []
    if "2" in config.stage_set and item.spec.traits.activation not in SPARSE:
        notes.append(
            f"{item.spec.traits.activation} has no exact zeros: unless stage 1 of D2DMoE has made "
            "the model sparse, expect the loss to rise soon as experts are left out; "
            "`adaconvert inspect --activations` says how soon"
        )
    if config.fits and config.tau is None:
        notes.append("every expert runs until --tau, `calibrate` or set_select turns it down")
    if item.audit.compare_ties:
        notes.append("the stored copy of the tied head is kept")
    return notes


def _options(
    config: D2dmoeConfig,
    partition: Partition | None,
    data_digest: str | None,
    changes: Sequence[Edit],
) -> dict[str, object]:
    """Return the resolved options for the manifest: no paths, every default spelled out."""
    options = {**asdict(config), "data": data_digest, "work": None}
    if not changes:
        options = {key: v for key, v in options.items() if not key.startswith("projection")}
    if config.replaces:
        options["projections"] = ",".join(config.roles)
    if partition is None:
        return options
    return {
        **options,
        "num_experts": partition.experts,
        "expert_width": partition.width,
        "shared_neurons": partition.shared or None,
        "split": partition.split,
        "router": partition.router["kind"],
        "router_width": partition.router.get("width"),
        "rule": partition.select["rule"],
    }


def _digest(options: Mapping[str, object]) -> str:
    text = json.dumps([ALGORITHM, options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(
    plan: Plan, item: Described, done: Sequence[Fits]
) -> Callable[[Fitted], dict[str, object]]:
    """Return what adds to config.json how good each router and each network is."""

    def config_of(fitted: Fitted) -> dict[str, object]:
        config: dict[str, Any] = copy.deepcopy(plan.config)
        for fits in done:
            for layer, quality in fits.quality.items():
                site = config["adaptive"]["sites"][ffn_site(item.spec, layer).path]
                site["ffn"]["router"]["quality"] = quality.to_json()
            for path, network in fits.networks.items():
                mlp = config["adaptive"]["sites"][path]["linear"]["mlp"]
                if network.distilled is not None:
                    mlp["quality"] = network.distilled.to_json()
                if network.router is not None:
                    mlp["router"]["quality"] = network.router.to_json()
        return config

    return config_of


def quality_lines(fits: Fits) -> list[str]:
    """Return how good the routers are, in a sentence or two."""
    if not fits.quality:
        return []
    ranked = sorted(fits.quality.items(), key=lambda pair: pair[1].spearman)
    worst, best = ranked[0], ranked[-1]
    mean = sum(quality.spearman for _, quality in ranked) / len(ranked)
    captured = sum(quality.captured["E/2"] for _, quality in ranked) / len(ranked)
    fixed = sum(quality.constant["E/2"] for _, quality in ranked) / len(ranked)
    return [
        f"contribution routers on {worst[1].tokens} held-out tokens: rank correlation with the "
        f"true contributions {mean:.2f} on average, {worst[1].spearman:.2f} in block {worst[0]} "
        f"to {best[1].spearman:.2f} in block {best[0]}",
        f"choosing half of the experts by them keeps {captured:.1%} of the contribution that the "
        f"best half has; the same half for every token would keep {fixed:.1%}",
    ]
