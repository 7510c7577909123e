"""The plan of a checkpoint with exits: every tensor of the model, and copies of some beside them.

Two forms: one of the adaptive runtime, over a stock or an adaptive source, and, for heads that are
the model's own, the stock checkpoint itself with settings for drafting.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from adaconvert.arch import adaptive, exits
from adaconvert.arch.exits import ExitTensor
from adaconvert.arch.projections import stock_spec
from adaconvert.methods.moefy.plan import dropped, target, whole
from adaconvert.methods.sources import Described
from adaconvert.planning.estimate import reference
from adaconvert.planning.ops import Exactness, Expr, Fitted, Init, Plan, TargetTensor

#: key of the fitted ids a draft chooses among: int64 [n], ascending.
TOKENS_KEY = "draft_tokens"
METHOD = "early-exit"


def exits_plan(
    content: Mapping[str, Any],
    options: dict[str, object],
    item: Described,
    digest: str,
    *,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan of an adaptive checkpoint with exits; not checked.

    Args:
        content: `config.adaptive.model.exits`.
        options: resolved options, JSON values only.
        item: the model, stock or adaptive, without exits.
        digest: sha256 of what the tokens of a draft depend on.
        notes: what the user should know.
    """
    return Plan(
        method=METHOD,
        options=options,
        sources=(item.source.fingerprint,),
        targets=(*_stored(item), *_own(content, item, digest)),
        drops=dropped(item),
        config=_config(content, item),
        exactness=_exactness(content),
        notes=notes,
    )


def stock_plan(options: dict[str, object], item: Described, *, notes: tuple[str, ...]) -> Plan:
    """Return the plan of the stock checkpoint, tensor for tensor; not checked."""
    return Plan(
        method=METHOD,
        options=options,
        sources=(item.source.fingerprint,),
        targets=tuple(_stored(item)),
        drops=dropped(item),
        config=dict(item.source.config),
        exactness=Exactness(
            kind="exact", why="no tensor changes, and a draft never changes what is generated"
        ),
        notes=notes,
    )


def _stored(item: Described) -> Iterator[TargetTensor]:
    """Yield every tensor of the source as it is."""
    for tensor in item.spec.tensors:
        ref = item.source.tensors.get(tensor.name)
        if ref is not None:
            yield target(tensor.name, ref.dtype, ref.shape, whole(ref), tensor.layer)


def _own(content: Mapping[str, Any], item: Described, digest: str) -> Iterator[TargetTensor]:
    """Yield what exits have of their own; none of it belongs to a block, so they lie at the end."""
    stock = stock_spec(item.spec)
    for made in exits.exit_tensors(stock, content):
        tensor = made.tensor
        dtype = "I64" if made.value == "tokens" else _dtype(made, item)
        yield target(tensor.name, dtype, tensor.shape, _expr(made, item, digest), None)


def _dtype(made: ExitTensor, item: Described) -> str:
    """Return the dtype of what it is a copy of; of anything else, that of the model's head."""
    stored = item.source.tensors
    if made.origin is not None:
        return stored[made.origin].dtype
    heads = [t.name for t in item.spec.tensors if t.role in ("head", "classifier", "embed")]
    return next(stored[name].dtype for name in reversed(heads) if name in stored)


def _expr(made: ExitTensor, item: Described, digest: str) -> Expr:
    if made.origin is not None:
        return whole(item.source.tensors[made.origin])
    shape = made.tensor.shape
    if made.value == "tokens":
        return Fitted(key=TOKENS_KEY, shape=shape, digest=digest)
    if made.value == "eye":
        return Init(kind="identity", shape=shape)
    return Init(kind="constant", shape=shape, params=(("value", 0.0),))


def _config(content: Mapping[str, Any], item: Described) -> dict[str, object]:
    """Return config.json; an adaptive one keeps its sites, and loses a table that would be
    stale."""
    spec = item.spec
    if spec.adaptive is None:
        made = adaptive.config_with(spec, {}, reference(spec, frozenset()))
    else:
        made = {**copy.deepcopy(dict(item.source.config)), "auto_map": adaptive.auto_map(spec)}
    found: Any = made["adaptive"]
    found["calibration"] = None
    model = found.get("model") or {}
    found["model"] = {
        "exits": copy.deepcopy(dict(content)),
        "recursion": model.get("recursion"),
        "decode_policy": model.get("decode_policy"),
    }
    return made


def _exactness(content: Mapping[str, Any]) -> Exactness:
    if exits.is_taken(content):
        return Exactness(
            kind="approximate",
            why="tokens leave early as configured; with no exit taken it computes what the source "
            "does",
        )
    return Exactness(kind="exact", why="no exit is taken as written")
