"""Does a checkpoint hold what its config.json implies? Names, shapes, dtypes; no tensor is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from adaconvert.arch import expressions, registry, values
from adaconvert.arch.adapters import ADAPTER_ROLES
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.exits import DRAFT_TOKENS
from adaconvert.arch.family import Family, Template
from adaconvert.arch.routed_layers import ROUTER as DEPTH_ROUTER
from adaconvert.dtypes import BY_CONFIG_NAME, BY_NAME, WEIGHT_DTYPES
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

#: tensors of adaptive checkpoints whose dtype is not that of the model.
_OWN_ROLES = frozenset(
    {
        *("router", "neuron_order", "projection_router", "null_bias", "null_scale", "null_value"),
        *ADAPTER_ROLES,
        DRAFT_TOKENS,
        DEPTH_ROUTER,
    }
)
#: role of whole numbers -> their dtype, and what they are.
_WHOLE = {
    "neuron_order": ("I32", "an order of neurons"),
    DRAFT_TOKENS: ("I64", "ids of tokens"),
}
#: names given in full before the rest is only counted.
_SHOWN = 5


class Stored(Protocol):
    """What the audit needs to know of a stored tensor; `io.TensorRef` is one."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What becomes of every stored tensor.

    Attributes:
        used: names the model reads, in the order of the ModelSpec.
        dropped: other stored names, with the reason.
        compare_ties: (head, embedding) pairs both stored although config.json ties them. The head
            is among the dropped: the caller compares bytes and refuses a head that differs.
        notes: what the user should know.
    """

    used: tuple[str, ...]
    dropped: dict[str, str]
    compare_ties: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


def audit(spec: ModelSpec, stored: Mapping[str, Stored]) -> Audit:
    """Return what becomes of every stored tensor of a complete checkpoint of the stated sizes.

    Args:
        spec: from `registry.describe(config, stored)`.
        stored: every tensor in the files, by name.

    Raises:
        SourceError: a tensor is missing, unknown, no float, or of another size than config.json
            implies.
    """
    expected = {tensor.name: tensor for tensor in spec.tensors}
    extra = [name for name in stored if name not in expected]
    dropped = dict(_legacy(spec, extra))
    unknown = [name for name in extra if name not in dropped]
    missing = [name for name in expected if name not in stored and not expected[name].optional]
    _refuse_missing(spec, missing, unknown)
    _refuse_unknown(spec, unknown, stored)
    present = [tensor for tensor in spec.tensors if tensor.name in stored]
    for tensor in present:
        _check_dtype(tensor, stored[tensor.name])
    _check_shapes(spec, present, stored)
    ties = tuple(_ties(spec, present))
    dropped |= {head: f"tied: same bytes as {embed}" for head, embed in ties}
    used = tuple(tensor.name for tensor in present if tensor.name not in dropped)
    own = {t.name for t in present if spec.adaptive is not None and t.role in _OWN_ROLES}
    return Audit(
        used=used,
        dropped=dropped,
        compare_ties=ties,
        notes=tuple(_notes(spec, [stored[name] for name in used if name not in own])),
    )


def _legacy(spec: ModelSpec, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    reasons = registry.FAMILIES[spec.model_type].legacy
    patterns = [(re.compile(pattern), why) for pattern, why in reasons.items()]
    for name in names:
        why = next((why for pattern, why in patterns if pattern.fullmatch(name)), None)
        if why is not None:
            yield name, why


def _refuse_missing(spec: ModelSpec, missing: list[str], unknown: list[str]) -> None:
    if not missing:
        return
    heads = {tensor.name for tensor in spec.tensors if tensor.role == "head"}
    if set(missing) <= heads and not unknown:
        raise SourceError(
            f"tie_word_embeddings is false, but no {missing[0]} is stored",
            where=values.WHERE,
            hint="Set tie_word_embeddings to true if the head is the embedding.",
        )
    raise SourceError(
        f"{_some(missing)} that config.json implies {_are(missing)} not stored",
        where=values.WHERE,
        hint=_missing_hint(spec, missing, unknown),
    )


def _missing_hint(spec: ModelSpec, missing: list[str], unknown: list[str]) -> str | None:
    lost = set(missing)
    blocks = [tensor for tensor in spec.tensors if tensor.layer is not None]
    held = {tensor.layer for tensor in blocks if tensor.name not in lost}
    whole = all(tensor.name not in lost or tensor.layer not in held for tensor in blocks)
    if whole and held == set(range(len(held))) and 0 < len(held) < spec.layers:
        family = registry.FAMILIES[spec.model_type]
        stated = f"{family.keys['layers'].name}={spec.layers}"
        return f"config.json says {stated}; the files hold {len(held)} layers."
    if unknown:
        return f"Stored instead: {_some(unknown)}, unknown to {spec.model_type}."
    return None


def _refuse_unknown(spec: ModelSpec, unknown: list[str], stored: Mapping[str, Stored]) -> None:
    if not unknown:
        return
    family = registry.FAMILIES[spec.model_type]
    reasons = {name: _why_unknown(spec, family, name) for name in unknown}
    first = next((why for why in reasons.values() if why), "")
    names = [name for name, why in reasons.items() if why == first]
    contradicted = f", but {first}" if first else f" that a {spec.architecture} does not have"
    raise SourceError(
        f"{_some(names)} {_are(names)} stored{contradicted}",
        where=escape(getattr(stored[names[0]], "file", spec.model_type)),
    )


def _why_unknown(spec: ModelSpec, family: Family, name: str) -> str:
    """Return what in config.json rules out a tensor the family could have, else ""."""
    for template in family.tensors:
        place = _place(template, name)
        if place is None:
            continue
        if place["layer"] >= spec.layers:
            return f"config.json says {family.keys['layers'].name}={spec.layers}"
        if "experts" in family.keys and place["expert"] >= spec.num_experts:
            return f"config.json says {family.keys['experts'].name}={spec.num_experts}"
        roots = _roots(family, template.when)
        if roots and "never" not in roots:
            found = values.read(family, spec.config, family.architectures[spec.architecture])
            return f"config.json says {values.explain(family, roots, found)}"
    return ""


def _roots(family: Family, condition: str) -> tuple[str, ...]:
    """Return the config keys a condition rests on, those of its masks included."""
    found: list[str] = []
    for name in expressions.names_in(condition):
        mask = family.masks.get(name)
        found.extend(expressions.names_in(mask.default) if mask else (name,))
    return tuple(dict.fromkeys(found))


def _place(template: Template, name: str) -> dict[str, int] | None:
    """Return layer and expert of a name made from `template`, -1 for none; None for other names."""
    pattern = re.escape(template.name)
    for word in ("layer", "expert"):
        pattern = pattern.replace(rf"\{{{word}\}}", rf"(?P<{word}>\d{{1,9}})", 1)
    match = re.fullmatch(pattern.replace(r"\{p\}", r"(?:\w+\.)?"), name)
    if match is None:
        return None
    return {word: int(match.groupdict().get(word) or -1) for word in ("layer", "expert")}


def dtypes_of(tensor: TensorSpec) -> tuple[str, ...]:
    """Return the dtypes a stored tensor may have."""
    return (_WHOLE[tensor.role][0],) if tensor.role in _WHOLE else WEIGHT_DTYPES


def _check_dtype(tensor: TensorSpec, found: Stored) -> None:
    if found.dtype in dtypes_of(tensor):
        return
    if tensor.role in _WHOLE:
        wanted, what = _WHOLE[tensor.role]
        raise SourceError(
            f"dtype {escape(found.dtype, 20)} is not that of {what}",
            where=_where(tensor.name, found),
            expected=wanted,
        )
    kind = "8-bit float" if found.dtype in BY_NAME and BY_NAME[found.dtype].is_float else "no float"
    raise SourceError(
        f"dtype {escape(found.dtype, 20)} is {kind}, so the weights are quantised or damaged",
        where=_where(tensor.name, found),
        expected=" or ".join(WEIGHT_DTYPES),
        hint="Start from the checkpoint in full precision.",
    )


def _check_shapes(spec: ModelSpec, present: list[TensorSpec], stored: Mapping[str, Stored]) -> None:
    wrong = [t for t in present if tuple(stored[t.name].shape) != t.shape]
    if not wrong:
        return
    tensor = wrong[0]
    found = stored[tensor.name]
    others = f", as of {len(wrong) - 1} more," if len(wrong) > 1 else ""
    keys = _implied_by(spec, tensor, tuple(found.shape))
    raise SourceError(
        f"shape{others} does not fit config.json",
        where=_where(tensor.name, found),
        expected=f"{list(tensor.shape)}" + (f" ({keys})" if keys else ""),
        found=f"{list(found.shape)}",
        hint=_shape_hint(spec, tensor, tuple(found.shape)),
    )


def _implied_by(spec: ModelSpec, tensor: TensorSpec, found: tuple[int, ...]) -> str:
    family = registry.FAMILIES[spec.model_type]
    sizes = values.read(family, spec.config, family.architectures[spec.architecture])
    templates = (t for t in family.tensors if t.role == tensor.role and _place(t, tensor.name))
    template = next(templates, None)
    if template is None:
        return "config.adaptive"
    axes = template.shape.split(",")
    if len(axes) == len(found):
        axes = [axis for axis, a, b in zip(axes, tensor.shape, found, strict=True) if a != b]
    names = [name for axis in axes for name in expressions.names_in(axis)]
    return values.explain(family, tuple(names), sizes)


def _shape_hint(spec: ModelSpec, tensor: TensorSpec, found: tuple[int, ...]) -> str | None:
    if tensor.role not in {"embed", "head"} or found[1:] != tensor.shape[1:]:
        return None
    key = registry.FAMILIES[spec.model_type].keys["vocab"].name
    side = "the files" if found[0] > tensor.shape[0] else "config.json"
    return (
        f"The vocabulary seems padded in {side} only; "
        f"if the files are right, set {key} to {found[0]} in config.json."
    )


def _ties(spec: ModelSpec, present: list[TensorSpec]) -> Iterator[tuple[str, str]]:
    embeds = [tensor.name for tensor in present if tensor.role == "embed"]
    heads = [tensor.name for tensor in present if tensor.role == "head"]
    if spec.traits.tied:
        yield from ((head, embed) for head in heads for embed in embeds)


def _notes(spec: ModelSpec, used: list[Stored]) -> Iterator[str]:
    counts = Counter(tensor.dtype for tensor in used)
    if len(counts) > 1:
        parts = ", ".join(f"{count} in {dtype}" for dtype, count in counts.most_common())
        yield f"tensors have mixed dtypes ({parts}); each keeps its own"
    stated = spec.config.get("dtype", spec.config.get("torch_dtype"))
    known = BY_CONFIG_NAME.get(stated) if isinstance(stated, str) else None
    if known is not None and counts and known.name not in counts:
        held = ", ".join(sorted(counts))
        yield f"config.json says {known.config_name}, the files hold {held}; the files decide"


def _where(name: str, found: Stored) -> str:
    file = getattr(found, "file", None)
    return f"{escape(file)}: tensor '{escape(name)}'" if file else f"tensor '{escape(name)}'"


def _some(names: list[str]) -> str:
    shown = ", ".join(escape(name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def _are(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is"
