"""Null experts: tokens that choose them run fewer real ones.

Sources: AdaMoE 2406.13233; MoE++ 2410.07348 (kinds); LongCat-Flash 2509.01322 (bias control).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.null_experts import holds_nulls
from adaconvert.arch.runtimes import verdicts
from adaconvert.data.text import Documents, read_documents
from adaconvert.errors import OptionError, SourceError
from adaconvert.methods.adamoe import promise
from adaconvert.methods.adamoe.base import Base, again, from_dense, stock
from adaconvert.methods.adamoe.config import AdamoeConfig
from adaconvert.methods.adamoe.fit import Budget
from adaconvert.methods.adamoe.materialize import (
    Zeros,
    check_biases,
    check_rows,
    config_of,
    copied_rows,
    stock_plan,
    zeros_of,
)
from adaconvert.methods.adamoe.plan import Nulling, nulled_plan
from adaconvert.methods.adamoe.start import Start, check_target, start_of
from adaconvert.methods.budget import parse_layers
from adaconvert.methods.options import option
from adaconvert.methods.planned import Fitted, PlainPlan, Prepared
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Plan

#: the way biases are fitted; a change makes others of the same options.
ALGORITHM = 1


def prepare(config: AdamoeConfig, described: Sequence[Described]) -> Prepared:
    """Return the planned run over opened sources; reads no weights.

    Raises:
        SourceError: the source's routing is not covered, or it has null experts already.
        OptionError: the options do not fit the model.
        DataError: the text cannot be read.
    """
    item = described[0]
    if holds_nulls(item.spec.adaptive):
        return _prepare_nulled(config, described)
    _check_source(item)
    base = _base(config, described)
    documents = _documents(config, base)
    nulling = _nulling(config, base, None if documents is None else documents.digest)
    plan = _plan(config, nulling, described)
    return _prepared(config, nulling, plan, described, documents)


def replan(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest."""
    given: dict[str, Any] = dict(options)
    config = AdamoeConfig(**given)
    if holds_nulls(described[0].spec.adaptive):
        return _plan_nulled(config, described)
    is_mixture = bool(described[0].spec.num_experts)
    base = stock(config, described[0]) if is_mixture else again(config, described)
    data = None if base.options.get("via") == "moefy" else given.get("data")
    return _plan(config, _nulling(config, base, data), described)


def _check_source(item: Described) -> None:
    if item.spec.adaptive is not None:
        raise SourceError(
            "is adaptive: its feed-forward networks are split, and experts of a split network run "
            "with weight one, which null experts would not leave as it is",
            where=f"{item.source.label}/config.json",
            hint="Start from the dense model with --via moefy, or from a mixture.",
        )


def _base(config: AdamoeConfig, described: Sequence[Described]) -> Base:
    if not described[0].spec.num_experts:
        return from_dense(config, described)
    _check_one(described, "takes one mixture; several sources are for dense models")
    return stock(config, described[0])


def _check_one(described: Sequence[Described], message: str) -> None:
    """Refuse several sources."""
    if len(described) > 1:
        raise OptionError(message, where="SRC", expected=1, found=len(described))


def _documents(config: AdamoeConfig, base: Base) -> Documents | None:
    """Return the text biases are set on, None where none are."""
    if config.data is None or base.options.get("via") == "moefy":
        return None
    return read_documents(config.data, field=config.data_field, split=config.data_split)


def _nulling(config: AdamoeConfig, base: Base, data: str | None) -> Nulling:
    """Return what is done to a mixture; `data` is the digest of the text biases are set on."""
    targets = _targets(config, base)
    shares = {layer: share for layer, (_, share) in targets.items()}
    fresh = base.options.get("via") == "upcycle"
    start = start_of(config, base.blocks[0], fresh=fresh, shares=tuple(shares.values()))
    digest = None
    if data is not None:
        text = json.dumps([ALGORITHM, data, config.data_tokens, _own(config, start)])
        digest = hashlib.sha256(text.encode()).hexdigest()
    for where, share in targets.values():
        check_target(where, share, start.nulls, base.blocks[0])
    return Nulling(base=base, start=start, targets=shares, data=data, digest=digest)


def _targets(config: AdamoeConfig, base: Base) -> dict[int, tuple[str, float]]:
    """Return the share of each block that has one, and the option that asks for it.

    Raises:
        OptionError: `layer_budget` cannot be read.
    """
    layers = [block.layer for block in base.blocks]
    found = {}
    if config.target_compute is not None:
        found = dict.fromkeys(layers, ("--target-compute", config.target_compute))
    if config.layer_budget is not None:
        named = parse_layers(config.layer_budget, layers)
        found |= {layer: ("--layer-budget", share) for layer, share in named.items()}
    return found


def _own(config: AdamoeConfig, start: Start) -> dict[str, object]:
    """Return the resolved options about null experts."""
    nulls = start.nulls
    return {
        "null_experts": nulls.count,
        "top_k": nulls.slots,
        "null_kind": nulls.kind,
        "null_init": start.init,
        "null_weights": nulls.weights,
        "min_real": nulls.min_real,
        "target_compute": config.target_compute,
        "layer_budget": config.layer_budget,
    }


def _options(config: AdamoeConfig, nulling: Nulling) -> dict[str, object]:
    """Return the resolved options for the manifest: no paths, every default spelled out."""
    own = _own(config, nulling.start)
    return {**asdict(config), **own, "data": nulling.data, **nulling.base.options}


def _plan(config: AdamoeConfig, nulling: Nulling, described: Sequence[Described]) -> Plan:
    """Return the checked plan of a mixture with null experts, in either form."""
    options = _options(config, nulling)
    sources = [item.source.fingerprint for item in described]
    if config.materialize:
        plan = _materialized(nulling, options, sources)
    else:
        plan = nulled_plan(
            nulling,
            options,
            sources,
            exactness=promise.exactness_of(nulling),
            notes=promise.notes_of(nulling, _elsewhere(nulling)),
        )
    check_plan(plan, [item.source.tensors for item in described])
    return plan


def _materialized(nulling: Nulling, options: dict[str, object], sources: list[str]) -> Plan:
    base, nulls = nulling.base, nulling.start.nulls
    return stock_plan(
        Zeros(base=base, nulls=nulls, rows=copied_rows(base, nulls)),
        options,
        sources,
        exactness=promise.stock_exactness(base, "gives the real ones their weights back"),
        notes=[*base.notes, promise.saves_nothing(nulls)],
    )


def _elsewhere(nulling: Nulling) -> str:
    """Return in words which runtimes run the stock form of a start; "" where there is none."""
    start = nulling.start
    if start.init != "exact" or not start.same or start.nulls.kind != "zero":
        return ""
    found = verdicts(config_of(nulling.base.spec, start.nulls))
    return ", ".join(f"{verdict.runtime} {verdict.verdict}" for verdict in found)


def _prepared(
    config: AdamoeConfig,
    nulling: Nulling,
    plan: Plan,
    described: Sequence[Described],
    documents: Documents | None,
) -> Prepared:
    prefix = "" if config.materialize else adaptive.PREFIX
    planned = PlainPlan(
        plan=plan,
        described=tuple(described),
        target=f"{prefix}{nulling.base.spec.model_type}",
        runtimes=verdicts(plan.config),
        files={},
    )
    if documents is None:
        return Prepared(planned=planned, fit=nulling.base.fit)
    budget = Budget(
        plan=plan,
        nulling=nulling,
        described=planned.described,
        documents=documents,
        device=config.device,
    )
    tokens = config.data_tokens
    return Prepared(
        planned=planned,
        fit=lambda progress: budget.fit(tokens, progress=progress),
        notes_of=lambda written: budget.notes(),
    )


def _prepare_nulled(config: AdamoeConfig, described: Sequence[Described]) -> Prepared:
    """Return the run that writes a checkpoint with null experts as a stock mixture."""
    item = described[0]
    _check_one(described, "takes one checkpoint with null experts")
    if not config.materialize:
        raise SourceError(
            "has null experts already",
            where=f"{item.source.label}/config.json",
            hint="`finetune --target-compute`, `calibrate` and set_compute change what it spends; "
            "--materialize writes it as a stock mixture.",
        )
    plan = _plan_nulled(config, described)

    def check(progress: bool) -> Fitted:
        check_biases(item)
        check_rows(item, zeros_of(item))
        return {}

    planned = PlainPlan(
        plan=plan,
        described=tuple(described),
        target=item.spec.model_type,
        runtimes=verdicts(plan.config),
        files={},
    )
    return Prepared(planned=planned, fit=check)


def _plan_nulled(config: AdamoeConfig, described: Sequence[Described]) -> Plan:
    item = described[0]
    _check_only_materialize(config)
    zeros = zeros_of(item)
    plan = stock_plan(
        zeros,
        asdict(config),
        [item.source.fingerprint],
        exactness=promise.stock_exactness(zeros.base, "does what their gain does"),
        notes=[promise.saves_nothing(zeros.nulls)],
    )
    check_plan(plan, [item.source.tensors])
    return plan


def _check_only_materialize(config: AdamoeConfig) -> None:
    """Hold the options to those that mean something for a checkpoint with null experts.

    Raises:
        OptionError: another one was given.
    """
    for name, default in asdict(AdamoeConfig()).items():
        if name != "materialize" and getattr(config, name) != default:
            raise OptionError(
                "changes nothing: the source has null experts already", where=option(name)
            )
