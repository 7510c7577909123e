"""The one interpreter of family files: family and config.json in, ModelSpec out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from itertools import groupby
from typing import Any

from adaconvert.arch import expressions, positions, values
from adaconvert.arch.base import ModelSpec, TensorSpec, Traits
from adaconvert.arch.family import Choice, Family, Mask, Power, Ref, Template
from adaconvert.errors import SourceError

#: far above the largest published model (61 layers of 256 experts hold 48,000 tensors).
_MAX_TENSORS = 2**20

Masks = dict[str, tuple[bool, ...]]
Shape = Callable[[], tuple[int, ...]]


def interpret(
    family: Family,
    config: Mapping[str, object],
    architecture: str,
    stored: Collection[str] = (),
) -> ModelSpec:
    """Return what a checkpoint with this config holds.

    Args:
        family: the family `model_type` names.
        config: config.json.
        architecture: one of the family's architectures.
        stored: names in the files; they decide between old and new spellings of the same tensor.

    Raises:
        SourceError: a config value is unusable.
    """
    found = values.read(family, config, family.architectures[architecture])
    layer_masks = masks(family, config, found)
    tensors = _tensors(family, found, layer_masks, _prefix(family, architecture, stored))
    return ModelSpec(
        model_type=family.model_type,
        kind=family.kind,
        architecture=architecture,
        hidden=_size(found, "hidden"),
        intermediate=_size(found, "intermediate"),
        layers=_size(found, "layers"),
        heads=_size(found, "heads"),
        kv_heads=_size(found, "kv_heads", "heads"),
        head_dim=_size(found, "head_dim"),
        vocab=_size(found, "vocab"),
        max_positions=_size(found, "positions"),
        traits=_traits(family, config, found, layer_masks),
        tensors=tuple(_respelled(family, tensors, stored)),
        legacy=tuple(family.legacy),
        num_experts=_size(found, "experts"),
        top_k=_size(found, "top_k"),
        value_dim=_size(found, "value_dim"),
        config=dict(config),
    )


def masks(family: Family, config: Mapping[str, object], found: values.Values) -> Masks:
    """Return each of the family's masks, one entry per layer.

    Raises:
        SourceError: a list in the config has the wrong length or entries, or names a window that is
            not set.
    """
    result: Masks = {}
    for name, mask in family.masks.items():
        listed = config.get(mask.key) if mask.key else None
        if listed is not None:
            result[name] = _listed(mask, listed, _size(found, "layers"))
            continue
        layers = range(_size(found, "layers"))
        result[name] = tuple(
            expressions.holds(mask.default, _at(found, result, layer)) for layer in layers
        )
    if any(result.get("sliding", ())) and not found["windowed"]:
        key = family.masks["sliding"].key
        raise SourceError(
            f"{key} names sliding attention, but no sliding window is set", where=values.WHERE
        )
    return result


def _size(found: Mapping[str, object], *names: str) -> int:
    value = next((found[name] for name in names if name in found), 0)
    return value if isinstance(value, int) else 0


def _listed(mask: Mask, listed: object, layers: int) -> tuple[bool, ...]:
    allowed = (mask.value, *mask.others)
    if not isinstance(listed, list) or any(item not in allowed for item in listed):
        raise SourceError(
            f"{mask.key} is not usable",
            where=values.WHERE,
            expected=f"a list of {' or '.join(map(repr, allowed[:2]))}",
        )
    if len(listed) < layers or (mask.exact and len(listed) > layers):
        raise SourceError(
            f"{mask.key} does not have one entry per layer",
            where=values.WHERE,
            expected=layers,
            found=len(listed),
        )
    return tuple(item == mask.value for item in listed[:layers])


def _at(found: Mapping[str, object], layer_masks: Masks, layer: int) -> dict[str, object]:
    here = {name: mask[layer] for name, mask in layer_masks.items()}
    return {**found, **here, "layer": layer, "ordinal": layer + 1}


def _prefix(family: Family, architecture: str, stored: Collection[str]) -> str:
    if "prefixed" not in family.architectures[architecture]:
        return ""
    first = family.tensors[0].name
    is_bare = family.bare and first.format(p="") in stored
    return "" if is_bare else family.prefix


def _tensors(
    family: Family, found: values.Values, layer_masks: Masks, prefix: str
) -> Iterator[TensorSpec]:
    _check_count(family, found)
    for in_block, group in groupby(family.tensors, key=lambda template: "{layer}" in template.name):
        templates = [(template, _shapes(family, template, found)) for template in group]
        for layer in range(_size(found, "layers")) if in_block else (None,):
            names = found if layer is None else _at(found, layer_masks, layer)
            yield from _block(templates, layer, prefix, names)


def _block(
    templates: list[tuple[Template, Shape]],
    layer: int | None,
    prefix: str,
    names: Mapping[str, object],
) -> Iterator[TensorSpec]:
    for per_expert, group in groupby(templates, key=lambda pair: "{expert}" in pair[0].name):
        present = [pair for pair in group if expressions.holds(pair[0].when, names)]
        # all of one expert, then all of the next: what belongs together is stored together
        for expert in range(_size(names, "experts")) if per_expert else (None,):
            for template, shape in present:
                yield TensorSpec(
                    name=template.name.format(p=prefix, layer=layer, expert=expert),
                    role=template.role,
                    shape=shape(),
                    layer=layer,
                    expert=expert,
                    optional=expressions.holds(template.optional, names),
                    transposed=template.transposed,
                )


def _shapes(family: Family, template: Template, found: values.Values) -> Shape:
    # sizes of tensors that do not exist may make no sense, so they are computed when first needed
    @cache
    def shape() -> tuple[int, ...]:
        return tuple(values.compute(family, part, found) for part in template.shape.split(","))

    return shape


def _check_count(family: Family, found: values.Values) -> None:
    per_expert = any("{expert}" in template.name for template in family.tensors)
    copies = _size(found, "layers") * (_size(found, "experts") if per_expert else 1)
    if copies * len(family.tensors) > _MAX_TENSORS:
        stated = values.explain(family, ("layers", "experts"), found)
        raise SourceError(f"{stated}: more tensors than any model holds", where=values.WHERE)


def _respelled(
    family: Family, tensors: Iterator[TensorSpec], stored: Collection[str]
) -> Iterator[TensorSpec]:
    for tensor in tensors:
        old = next(_old_names(family, tensor.name), None)
        if old in stored and tensor.name not in stored:
            yield TensorSpec(
                name=str(old), role=tensor.role, shape=tensor.shape, layer=tensor.layer
            )
        else:
            yield tensor


def _old_names(family: Family, name: str) -> Iterator[str]:
    for old, new in family.renamed.items():
        if name.endswith(new):
            yield name.removesuffix(new) + old


def _traits(
    family: Family, config: Mapping[str, object], found: values.Values, layer_masks: Masks
) -> Traits:
    fields: dict[str, Any] = {name: _trait(value, found) for name, value in family.traits.items()}
    fields["tied"] = bool(found.get("tied", False))
    fields |= _sliding(found, layer_masks) | _rope(family, config, layer_masks)
    return Traits(**fields)


def _trait(value: object, found: values.Values) -> object:
    if isinstance(value, Ref):
        return expressions.evaluate(value.expression, found)
    if isinstance(value, Choice):
        return value.then if expressions.holds(value.when, found) else value.otherwise
    if isinstance(value, Power):
        base = expressions.evaluate(value.base, found)
        if not expressions.holds(value.when, found) or not isinstance(base, int | float):
            return 1.0
        return float(base**value.exponent)
    return value


def _sliding(found: values.Values, layer_masks: Masks) -> dict[str, object]:
    layers = layer_masks.get("sliding", (bool(found["windowed"]),))
    if not any(layers):
        return {"sliding": "none", "sliding_window": None}
    kind = "uniform" if all(layers) else "per_layer"
    return {"sliding": kind, "sliding_window": found["window"]}


def _rope(family: Family, config: Mapping[str, object], layer_masks: Masks) -> dict[str, object]:
    roped = layer_masks.get("roped", (True,))
    if family.rope is None or not any(roped):
        return {"rope": "none"}
    sliding = set(layer_masks.get("sliding", ())) or {False}
    types = tuple(positions.SLIDING if slides else positions.FULL for slides in sorted(sliding))
    parameters = list(positions.read(family.rope, config, types).values())
    one = all(other == parameters[0] for other in parameters)
    return {
        "rope": "nope" if not all(roped) else "one" if one else "two",
        "rope_type": parameters[0]["rope_type"],
        "partial_rotary": positions.rotated_fraction(family.rope, parameters[0]),
    }
