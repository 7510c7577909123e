"""The plan of a PEFT folder: adapter tensors alone, routed (MOLORA) or as one stock LoRA.

What PEFT reads: adapter_config.json, and adapter_model.safetensors with names that begin with
"base_model.model.".
Letters: n inputs and m outputs of a linear, E adapters of rank r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from adaconvert.arch.adapters import LORA, PEFT_TYPE, is_named
from adaconvert.arch.base import RuntimeVerdict
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.methods.moefy.plan import target
from adaconvert.methods.molora.parts import Adapters, Placed, Value, check_alike
from adaconvert.methods.molora.plan import config_with, dtypes_with, uniform_rank
from adaconvert.methods.planned import AdapterFolder
from adaconvert.methods.sources import Described
from adaconvert.planning.ops import Apply, Drop, Exactness, Expr, Plan, TargetTensor

PREFIX = "base_model.model."
#: tensor of a standalone checkpoint -> what it is called in a folder.
NAMES = {
    "adapters.a": "molora_A",
    "adapters.b": "molora_B",
    "adapters.vectors": "molora_vectors",
    "router.weight": "molora_router",
}
STAYS = "stays in the base model"
#: ends of architectures whose PEFT class adds nothing of its own. Those of classifiers and of
#: question answering want the head in the folder too, and do not load one without it.
_DECODERS = ("ForCausalLM", "LMHeadModel")


def folder_plan(
    adapters: Adapters,
    options: dict[str, object],
    item: Described,
    sources: Sequence[str],
    base: str,
) -> Plan:
    """Return the plan of a folder of routed adapters; not checked.

    Args:
        adapters: what it holds.
        options: resolved options, JSON values only.
        item: the base, or the base with its adapters.
        sources: fingerprints.
        base: what the folder names as its base.

    Raises:
        SourceError: adapters differ in what adapter_config.json says once.
    """
    said = check_alike(adapters, item)
    targets = tuple(_routed(adapters))
    return Plan(
        method="molora",
        options=options,
        sources=tuple(sources),
        targets=targets,
        drops=_drops(adapters, item),
        config={**_common(item, base, PEFT_TYPE), **said, "base_fingerprint": None},
        exactness=adapters.exactness,
        notes=adapters.notes,
    )


def _drops(adapters: Adapters, item: Described) -> tuple[Drop, ...]:
    used = {f"{one.linear.stored}.{name}" for one in adapters.placed for name in one.values}
    return tuple(
        Drop(source=0, tensor=name, reason=item.audit.dropped.get(name, STAYS))
        for name in item.source.tensors
        if name not in used
    )


def _common(item: Described, base: str, peft_type: str) -> dict[str, object]:
    """Return what every adapter_config.json says; PEFT itself fills in the rest."""
    decoder = item.spec.architecture.endswith(_DECODERS)
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM" if decoder else None,
        **({} if decoder else _auto_mapping(item)),
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
    }


def _auto_mapping(item: Described) -> dict[str, object]:
    """Return what tells `AutoPeftModel` the class of the base; nothing of an adaptive base, whose
    class is in its own folder."""
    sites: Any = (item.spec.adaptive or {}).get("sites", {})
    if any(
        set(slots) != {"linear"} or "adapters" not in slots["linear"] for slots in sites.values()
    ):
        return {}
    named = {"base_model_class": item.spec.architecture, "parent_library": "transformers"}
    return {"auto_mapping": named}


def _routed(adapters: Adapters) -> Iterator[TargetTensor]:
    for one in adapters.placed:
        for name, value in one.values.items():
            full = f"{PREFIX}{one.linear.path}.{NAMES[name]}"
            yield target(full, value.dtype, value.expr.shape, value.expr, one.linear.layer)


def plain_plan(
    adapters: Adapters,
    options: dict[str, object],
    item: Described,
    sources: Sequence[str],
    base: str,
) -> Plan:
    """Return the plan of the stock LoRA that equals uniform gates; not checked.

    A of all adapters one below the other and B side by side are one LoRA of rank E r; 1 / E goes
    into its scaling: lora_alpha stays, and r is E times as large.

    Args and errors as for `folder_plan`.

    Raises:
        SourceError: the adapters are vectors, or of several ranks.
    """
    _check_low_rank(adapters, item)
    rank = uniform_rank(adapters.placed[0].slot)
    scaling = adapters.first["scaling"]
    same = all(one.slot["adapters"]["scaling"] == scaling for one in adapters.placed)
    single = same and isinstance(scaling, int | float)
    alpha = scaling * adapters.first["rank"] if single else rank
    # one number a linear, where the scaling cannot say it
    single = single and alpha / rank == scaling / adapters.first["count"]
    said = adapters.config or {}
    return Plan(
        method="molora",
        options=options,
        sources=tuple(sources),
        targets=tuple(_plain(adapters, fold=not single)),
        drops=_plain_drops(adapters, item),
        config={
            **_common(item, base, "LORA"),
            "target_modules": said.get("target_modules") or _paths(adapters),
            "r": rank,
            "lora_alpha": alpha if single else rank,
            "lora_dropout": said.get("dropout", 0.0),
            "bias": "none",
            "fan_in_fan_out": adapters.placed[0].linear.transposed,
            "modules_to_save": None,
        },
        exactness=_plain_exactness(adapters),
        notes=(*adapters.notes, *_plain_notes(adapters)),
    )


def _paths(adapters: Adapters) -> list[str]:
    return [one.linear.path for one in adapters.placed]


def _check_low_rank(adapters: Adapters, item: Described) -> None:
    each = [one.slot["adapters"] for one in adapters.placed]
    if any(one["kind"] != LORA for one in each):
        raise SourceError(
            "its adapters are vectors that scale (ia3), which no LoRA equals",
            where=escape(item.source.label),
        )
    if len({(one["count"], one["rank"]) for one in each}) > 1:
        raise SourceError(
            "its linears have adapters of several ranks or numbers",
            where=escape(item.source.label),
            expected="the same for all",
        )


def _plain_drops(adapters: Adapters, item: Described) -> tuple[Drop, ...]:
    routers = {
        f"{one.linear.stored}.{name}"
        for one in adapters.placed
        for name in one.values
        if name == "router.weight"
    }
    reasons = dict.fromkeys(routers, "uniform gates need no router")
    kept = _drops(adapters, item)
    stored = [name for name in routers if name in item.source.tensors]
    return (*kept, *(Drop(source=0, tensor=name, reason=reasons[name]) for name in sorted(stored)))


def _plain(adapters: Adapters, *, fold: bool) -> Iterator[TargetTensor]:
    for one in adapters.placed:
        a, b = one.values["adapters.a"], one.values["adapters.b"]
        sizes = one.slot["adapters"]
        rank = sizes["count"] * sizes["rank"]
        stem, layer = f"{PREFIX}{one.linear.path}", one.linear.layer
        first = _stacked(a, sizes["count"] if sizes.get("share") == "a" else 1)
        shape = (rank, sizes["input"])
        expr = _shaped(first, shape)
        yield target(f"{stem}.lora_A.weight", a.dtype, shape, expr, layer)
        wide = _side_by_side(b.expr, one, fold=fold)
        dtype = "F32" if fold else b.dtype
        yield target(f"{stem}.lora_B.weight", dtype, wide.shape, wide, layer)


def _stacked(value: Value, times: int) -> Expr:
    """Return a tensor `times` times, one below the other."""
    if times == 1:
        return value.expr
    shape = (times * value.expr.shape[0], *value.expr.shape[1:])
    return Apply(fn="concat", shape=shape, args=(value.expr,) * times)


def _shaped(expr: Expr, shape: tuple[int, ...]) -> Expr:
    """Return the same elements as a tensor of another shape; copies stay copies."""
    return replace(expr, shape=shape)


def _side_by_side(b: Expr, one: Placed, *, fold: bool) -> Expr:
    """Return B [m, E r]: adapter after adapter; with `fold`, each times its scaling over E."""
    sizes = one.slot["adapters"]
    count, rank, outputs = sizes["count"], sizes["rank"], sizes["output"]
    scaling = sizes["scaling"]
    each = list(scaling) if isinstance(scaling, list | tuple) else [scaling] * count
    factors = ",".join(repr(float(value) / count) for value in each) if fold else ""
    return Apply(
        fn="side_by_side",
        shape=(outputs, count * rank),
        args=(b,),
        params=(("factors", factors),),
    )


def _plain_exactness(adapters: Adapters) -> Exactness:
    found = adapters.exactness
    rules = {str(one.slot["select"]["rule"]) for one in adapters.placed}
    routers = {one.slot["router"]["kind"] for one in adapters.placed}
    if _adds_nothing(adapters) or rules == {"uniform"} or routers == {"none"}:
        return found
    return Exactness(
        kind="approximate",
        why=f"uniform gates stand in for {', '.join(sorted(rules))}",
    )


def _adds_nothing(adapters: Adapters) -> bool:
    return bool(adapters.options) and adapters.exactness.kind == "exact"


def _plain_notes(adapters: Adapters) -> Iterator[str]:
    sizes = adapters.first
    yield (
        f"one LoRA of rank {sizes['count']} x {sizes['rank']}: what all adapters add with the "
        "same weight for every token"
    )


def folder_of(
    adapters: Adapters, item: Described, fingerprint: bool, names: Mapping[str, str]
) -> AdapterFolder:
    """Return what is said of a folder besides its plan.

    Args:
        adapters: what it holds.
        item: the base, or the base with its adapters.
        fingerprint: adapter_config.json has the base's.
        names: path -> name of the weight of each linear.
    """
    return AdapterFolder(
        target=config_with(adapters, item),
        dtypes=dtypes_with(adapters, item),
        complete=partial(_with_fingerprint, item, names) if fingerprint else dict,
    )


def _with_fingerprint(
    item: Described, names: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, object]:
    from adaconvert.io.fingerprint import of_source

    return {**config, "base_fingerprint": of_source(item.source, names)}


def verdicts(peft_type: str) -> tuple[RuntimeVerdict, ...]:
    """Return what each runtime does with a folder of adapters."""
    if peft_type == "LORA":
        return (
            RuntimeVerdict(runtime="peft", verdict="right", why="a stock LoRA"),
            RuntimeVerdict(runtime="vllm", verdict="untested", why="a stock LoRA"),
        )
    return (
        RuntimeVerdict(
            runtime="peft", verdict="right", why="after `import adaconvert.auto`, which adds MOLORA"
        ),
        RuntimeVerdict(
            runtime="peft alone", verdict="refused", why="it does not know the peft_type MOLORA"
        ),
        RuntimeVerdict(runtime="vllm", verdict="refused", why="it knows LoRA alone"),
    )


def names_of(adapters: Adapters, targets: Sequence[str] | None = None) -> dict[str, str]:
    """Return the name of the weight of each adapted linear by path."""
    return {
        one.linear.path: one.linear.weight
        for one in adapters.placed
        if targets is None or any(is_named(one.linear.path, name) for name in targets)
    }
