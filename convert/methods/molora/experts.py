"""Existing LoRA adapters as what `molora` places in a model, and the fit of their routers.

Letters: E adapters, R the largest rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from adaconvert.arch.adapter_targets import named_by
from adaconvert.arch.adapters import LORA, Linear, linears, shapes_of, sites_of
from adaconvert.data.text import Documents, read_documents
from adaconvert.errors import OptionError
from adaconvert.io.names import listing
from adaconvert.layerwise.work import WorkFolder
from adaconvert.methods.molora import arrow, phatgoose
from adaconvert.methods.molora.base_at_hand import fingerprint_of
from adaconvert.methods.molora.compose import ROUTER, Composed, Rows, compose, key_of
from adaconvert.methods.molora.config import POST_HOC, MoloraOptions
from adaconvert.methods.molora.gate_training import GateSettings
from adaconvert.methods.molora.lora_folder import names_of, read_lora
from adaconvert.methods.molora.parts import (
    INIT_STD,
    Adapters,
    Placed,
    Value,
    drawn,
    resolved,
    router_of,
)
from adaconvert.methods.planned import Fitted
from adaconvert.methods.sources import Described
from adaconvert.planning import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Adapters that exist, placed in a model.

    Attributes:
        adapters: of the plan.
        composed: where they come from.
        fit: computes their tensors when it comes to executing the plan; the argument is whether to
            show progress.
    """

    adapters: Adapters
    composed: Composed
    fit: Callable[[bool], Fitted]


def experts(options: MoloraOptions, item: Described) -> Experts:
    """Return the adapters of `--from` as the experts of a model; their files are read and hashed.

    Raises:
        OptionError: an option does not fit them.
        SourceError: one is damaged, cannot become an expert, or is for another base.
        DataError: a text cannot be read.
        ResourceError: a file may not be read, or the hub cannot be reached.
    """
    if options.target_modules is not None:
        raise OptionError("does nothing with --from: the adapters say it", where="--target-modules")
    names = names_of([_whole_path(given) for given in options.adapters])
    found = [read_lora(path, name) for path, name in zip(options.adapters, names, strict=True)]
    composed = compose(
        found,
        item,
        fingerprint=partial(fingerprint_of, item),
        subtract_mean=options.subtract_mean,
    )
    texts = [read_documents(path, field=options.data_field) for path in options.data]
    config = _config(options, item, composed)
    return Experts(
        adapters=Adapters(
            placed=_placed(options, item, composed, config, _digest(options, composed, texts)),
            config=config,
            exactness=_exactness(options),
            notes=(f"experts in their order: {listing(names)}", *composed.notes),
            options=_options(options, config, names, composed, texts),
        ),
        composed=composed,
        fit=partial(_fit, options, item, composed, texts),
    )


def _whole_path(given: str) -> str:
    """Return a folder's whole path, so that "." has a name; a hub id as it is."""
    path = Path(given).expanduser()
    return str(path.resolve()) if path.is_dir() else given


def _options(
    options: MoloraOptions,
    config: Mapping[str, Any],
    names: Sequence[str],
    composed: Composed,
    texts: Sequence[Documents],
) -> dict[str, object]:
    """Return the resolved options for the manifest: digests and no paths."""
    same = config["scaling"] is None
    return {
        **resolved(options, config),
        "alpha": config["lora_alpha"] if same else None,
        "adapters": list(names),
        "adapters_digest": composed.digest(),
        "data": [text.digest for text in texts],
    }


def _config(options: MoloraOptions, item: Described, composed: Composed) -> dict[str, Any]:
    """Return what an adapter_config.json says of composed adapters."""
    count, rank, scaling = len(composed.adapters), composed.rank, list(composed.scaling)
    alpha = scaling[0] * rank
    # lora_alpha says it where division gives it back
    plain = len(set(scaling)) == 1 and alpha / rank == scaling[0]
    return {
        "target_modules": named_by(item.spec, composed.paths),
        "num_experts": count,
        "r": rank,
        "lora_alpha": alpha,
        "scaling": None if plain else scaling,
        "experts_kind": LORA,
        "share": None,
        "feedforward_modules": None,
        "dropout": options.dropout,
        "init_std": INIT_STD,
        "router": _router(options),
        "select": options.select(count),
    }


def _router(options: MoloraOptions) -> dict[str, object]:
    if options.routing == "arrow":
        return arrow.router()
    return phatgoose.router() if options.routing == "phatgoose" else router_of(options)


def _placed(
    options: MoloraOptions,
    item: Described,
    composed: Composed,
    config: Mapping[str, Any],
    digest: str,
) -> tuple[Placed, ...]:
    known = linears(item.spec)
    sites = sites_of(config, composed.sizes, hidden=item.spec.hidden)
    return tuple(
        Placed(
            linear=known[path],
            slot=sites[path]["linear"],
            values=_values(options, known[path], sites[path]["linear"], composed.dtype, digest),
        )
        for path in composed.paths
    )


def _values(
    options: MoloraOptions, linear: Linear, slot: Mapping[str, Any], dtype: str, digest: str
) -> dict[str, Value]:
    """Return the tensors of a linear: factors as they are stored, routers in float32."""
    found = {}
    for name, shape in shapes_of(linear.path, slot).items():
        fitted = ops.Fitted(key=key_of(linear.path, name), shape=shape, digest=digest)
        expr: ops.Expr = fitted
        if name == ROUTER and options.routing not in POST_HOC:
            expr = drawn(options.seed, f"{linear.path}.{name}", shape)
        found[name] = Value(dtype="F32" if name == ROUTER else dtype, expr=expr)
    return found


def _exactness(options: MoloraOptions) -> ops.Exactness:
    if options.routing in (*POST_HOC, "uniform"):
        why = "the adapters change what the model computes, as they were trained to"
        return ops.Exactness(kind="approximate", why=why)
    why = "its routers are random: train them with finetune"
    return ops.Exactness(kind="needs-training", why=why)


def _settings(options: MoloraOptions) -> GateSettings:
    return GateSettings(steps=options.gate_steps, seed=options.seed, device=options.device)


def _digest(options: MoloraOptions, composed: Composed, texts: Sequence[Documents]) -> str:
    """Return the sha256 of everything the fit depends on besides the weights of the source."""
    facts: list[object] = [composed.digest(), options.routing]
    if options.routing == "phatgoose":
        facts += [[text.digest for text in texts], _settings(options)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _fit(
    options: MoloraOptions,
    item: Described,
    composed: Composed,
    texts: Sequence[Documents],
    progress: bool,
) -> Fitted:
    """Return the tensors of the adapters and of routers that are fitted."""
    return composed.arrays(_rows(options, item, composed, texts, progress))


def _rows(
    options: MoloraOptions,
    item: Described,
    composed: Composed,
    texts: Sequence[Documents],
    progress: bool,
) -> Rows | None:
    if options.routing == "arrow":
        return lambda path, a, b: arrow.arrow_rows(a, b)
    if options.routing != "phatgoose":
        return None
    settings = _settings(options)
    work = None
    if options.work is not None:
        digest = phatgoose.run_digest(composed, item, texts, settings)
        work = WorkFolder(Path(options.work), digest)
    gates = phatgoose.phatgoose(composed, item, texts, settings, work=work, progress=progress)
    return lambda path, a, b: phatgoose.router_rows(gates[path])
