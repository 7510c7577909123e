"""Blocks that tokens may skip, as data: where they lie and the tensors they have besides.

`modeling.adaptive_depth_schema` says what the "layer" slot of a site holds. Letters: d hidden size,
w width of an inner layer, r width of an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaconvert.arch.adapters import block_of, linears
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.projections import stock_spec
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

ROUTER, ADAPTER = "depth_router", "depth_adapter"
#: roles of the tensors routed blocks add.
DEPTH_ROLES = frozenset({ROUTER, ADAPTER})
#: roles of what makes queries, keys and values.
_KEYS = ("q", "k", "v", "qkv", "qkv_by_head", "q_down", "q_up", "kv_down", "kv_up")
#: kinds of routed blocks, as `modeling.adaptive_depth_schema` has them.
_ROUTED = ("mod", "skip")
#: kinds of layers whose masks can be narrowed block by block.
_KINDS = frozenset({"full_attention", "sliding_attention"})


def refusal(spec: ModelSpec) -> str | None:
    """Return why no block of a model can be skipped by some tokens, None where one can."""
    if spec.kind != "decoder":
        return f"{spec.architecture} is no causal language model, and tokens skip blocks of these"
    kinds = spec.config.get("layer_types")
    strange = sorted(set(map(str, kinds)) - _KINDS) if isinstance(kinds, list) else []
    if strange:
        return f"blocks of kind {escape(', '.join(strange), 80)} cannot be masked one by one"
    if spec.config.get("attention_chunk_size"):
        return "its attention is cut into chunks, and cannot be masked block by block"
    return None


def blocks_of(spec: ModelSpec) -> list[str]:
    """Return the paths of a model's blocks, in order."""
    found: dict[int, str] = {}
    for path, linear in linears(stock_spec(spec)).items():
        found.setdefault(linear.layer, block_of(path))
    return [found[index] for index in sorted(found)]


def keys_of(spec: ModelSpec, index: int) -> list[str]:
    """Return the paths inside a block of what makes queries, keys and values."""
    every = linears(stock_spec(spec)).items()
    inside = [(path, one) for path, one in every if one.layer == index and one.role in _KEYS]
    return [path.removeprefix(f"{block_of(path)}.") for path, _ in inside]


def routed_of(adaptive: Mapping[str, object] | None) -> dict[str, dict[str, Any]]:
    """Return the "layer" slots of an adaptive checkpoint by path; empty where it has none.

    Raises:
        SourceError: one is malformed.
    """
    sites = None if adaptive is None else adaptive.get("sites")
    if not isinstance(sites, dict):
        return {}
    found = {
        path: slots["layer"]
        for path, slots in sites.items()
        if isinstance(slots, dict) and "layer" in slots
    }
    for path, slot in found.items():
        try:
            widths = [part["width"] for part in (slot["predictor"], slot["adapter"]) if part]
            widths += [slot["router"]["width"]] if slot["router"]["width"] is not None else []
            sizes = [*widths, slot["hidden"], slot["index"] + 1]
            if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
                raise ValueError(sizes)
            if not isinstance(slot["select"]["rule"], str) or slot["kind"] not in _ROUTED:
                raise ValueError(slot["select"])
        except (KeyError, TypeError, ValueError):
            raise SourceError(
                f"adaptive.sites[{escape(path, 80)}].layer is not usable",
                where=WHERE,
                expected="kind, index, router, predictor, adapter, kv and select",
            ) from None
    return found


def shapes_of(slot: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a routed block, name behind "<block>.depth." -> shape."""
    hidden = int(slot["hidden"])
    found = _scores("router", hidden, slot["router"]["width"])
    if slot["predictor"] is not None:
        found |= _scores("router.predictor", hidden, int(slot["predictor"]["width"]))
    if slot["adapter"] is not None:
        width = int(slot["adapter"]["width"])
        found |= {"adapter.down.weight": (width, hidden), "adapter.up.weight": (hidden, width)}
    return found


def _scores(name: str, hidden: int, width: int | None) -> dict[str, tuple[int, ...]]:
    inner = {} if width is None else {f"{name}.inner.weight": (width, hidden)}
    return {
        f"{name}.weight": (1, hidden if width is None else width),
        f"{name}.bias": (1,),
        **inner,
    }


def role_of(name: str) -> str:
    """Return the role of a tensor of a routed block."""
    return ADAPTER if name.startswith("adapter.") else ROUTER


def stored_block(spec: ModelSpec, index: int) -> str:
    """Return the path of a block as files have it."""
    stock = stock_spec(spec)
    for linear in linears(stock).values():
        if linear.layer == index:
            return block_of(linear.stored)
    raise SourceError(f"has no block {index}", where=WHERE)


def layer_tensors(spec: ModelSpec, adaptive: Mapping[str, object]) -> list[TensorSpec]:
    """Return the tensors routed blocks have besides the stock ones.

    Raises:
        SourceError: a block does not exist, or is malformed.
    """
    found = []
    paths = blocks_of(spec)
    for path, slot in routed_of(adaptive).items():
        if path not in paths or paths.index(path) != slot["index"]:
            raise SourceError(
                f"adaptive.sites names {escape(path, 80)!r}, which is no block of a "
                f"{spec.architecture}, or of another number",
                where=WHERE,
            )
        found += list(_tensors(stored_block(spec, slot["index"]), slot))
    return found


def _tensors(stored: str, slot: Mapping[str, Any]) -> Iterator[TensorSpec]:
    for name, shape in shapes_of(slot).items():
        yield TensorSpec(
            name=f"{stored}.depth.{name}", role=role_of(name), shape=shape, layer=slot["index"]
        )


def words(adaptive: Mapping[str, object] | None, layers: int) -> str:
    """Return which blocks of a model tokens may skip, and how; "" for none."""
    slots = list(routed_of(adaptive).values())
    if not slots:
        return ""
    ways = dict.fromkeys(
        "mixture-of-depths"
        if slot["kind"] == "mod"
        else f"keys and values {'kept' if slot['kv'] == 'keep' else 'skipped'}"
        for slot in slots
    )
    indices = sorted(slot["index"] for slot in slots)
    return f"blocks {listed(indices)} of {layers} may be skipped by tokens, {' or '.join(ways)}"


def listed(numbers: Sequence[int]) -> str:
    """Return numbers of blocks as text."""
    return ", ".join(map(str, numbers))
