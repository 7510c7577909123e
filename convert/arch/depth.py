"""Models with fewer blocks: config.json and names of a checkpoint that lost some of its blocks.

A block must go on computing what it computed at its old place: its window, its rotary positions and
whether it is sparse. What a config states per block is cut; what it states by a rule over block
numbers ("every other block slides") is written out as a list, where the family has one.

Letters: L blocks, K of them kept.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from adaconvert.arch import expressions, values
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.family import Family
from adaconvert.arch.interpret import Masks, masks
from adaconvert.arch.registry import FAMILIES

#: keys that hold one entry per block.
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
#: rules over block numbers that older readers take where they do not know the list.
_RULES = {
    "sliding": ("sliding_window_pattern", "_sliding_window_pattern"),
    "roped": ("no_rope_layer_interval",),
}
#: keys by which a block computes something else at another place -> value that is harmless.
_BY_PLACE = {"scale_attn_by_inverse_layer_idx": False}


def refusal(spec: ModelSpec, kept: Sequence[int]) -> str | None:
    """Return why a model cannot be left with these blocks, None when it can.

    Args:
        spec: the model.
        kept: numbers of the blocks that stay, ascending.
    """
    for key, harmless in _BY_PLACE.items():
        if spec.config.get(key, harmless) != harmless:
            return f"{key} makes what a block computes depend on its number"
    family, _ = _read(spec, spec.config)
    wanted = _cut(block_masks(spec), kept)
    found = block_masks(spec, config_without(spec, kept))
    for name, mask in wanted.items():
        if found[name] != mask:
            keys = expressions.names_in(family.masks[name].default)
            named = ", ".join(family.keys[key].name for key in keys if key in family.keys)
            return (
                f"config.json of {spec.model_type} says by {named} which blocks are {name}, and "
                f"no values of these say it of the blocks that stay"
            )
    return None


def block_masks(spec: ModelSpec, config: Mapping[str, object] | None = None) -> Masks:
    """Return whether each block is "sliding", "roped" or "moe", as far as the family has these.

    Args:
        spec: the model.
        config: another config.json of the same family; the model's own when None.
    """
    family, found = _read(spec, spec.config if config is None else config)
    return masks(family, spec.config if config is None else config, found)


def config_without(spec: ModelSpec, kept: Sequence[int]) -> dict[str, object]:
    """Return config.json of the model with these blocks alone; see `refusal`.

    Args:
        spec: the model.
        kept: numbers of the blocks that stay, ascending.
    """
    family, found = _read(spec, spec.config)
    wanted = _cut(block_masks(spec), kept)
    config = copy.deepcopy(dict(spec.config))
    key = family.keys["layers"]
    for name in [name for name in (key.name, *key.aliases) if name in config] or [key.name]:
        config[name] = len(kept)
    for name in PER_BLOCK:
        listed = config.get(name)
        if isinstance(listed, list) and len(listed) >= spec.layers:
            config[name] = [listed[number] for number in kept]
    config |= _sparsity(family, wanted.get("moe"))
    if "full_layers" in family.keys and family.keys["full_layers"].name in config:
        full = found["full_layers"]
        assert isinstance(full, int)
        config[family.keys["full_layers"].name] = sum(number < full for number in kept)
    return _listed(family, spec, config, wanted)


def names_without(spec: ModelSpec, kept: Sequence[int]) -> dict[str, str]:
    """Return the name each tensor that stays will have, in the order of the checkpoint."""
    return {tensor.name: _renamed(tensor, kept) for tensor in tensors_of(spec, kept)}


def tensors_of(spec: ModelSpec, kept: Sequence[int]) -> list[TensorSpec]:
    """Return the tensors that stay, in the order of the checkpoint."""
    return [t for t in spec.tensors if t.layer is None or t.layer in kept]


def _renamed(tensor: TensorSpec, kept: Sequence[int]) -> str:
    if tensor.layer is None:
        return tensor.name
    # the number of the block is the first in every family's names; that of an expert comes later
    return tensor.name.replace(f".{tensor.layer}.", f".{list(kept).index(tensor.layer)}.", 1)


def _read(spec: ModelSpec, config: Mapping[str, object]) -> tuple[Family, values.Values]:
    family = FAMILIES[spec.model_type]
    return family, values.read(family, config, family.architectures[spec.architecture])


def _cut(whole: Masks, kept: Sequence[int]) -> Masks:
    return {name: tuple(mask[n] for n in kept) for name, mask in whole.items() if mask}


def _listed(
    family: Family, spec: ModelSpec, config: dict[str, object], wanted: Masks
) -> dict[str, object]:
    """Return a config that lists what a rule over block numbers no longer says."""
    for name, mask in family.masks.items():
        rule = {key: value for key, value in config.items() if key != mask.key}
        if not mask.key or block_masks(spec, rule)[name] == wanted[name]:
            continue
        if config.get(mask.key) is None:
            no = mask.others[0]
            config[mask.key] = [mask.value if yes else no for yes in wanted[name]]
        for stale in _RULES.get(name, ()):
            config.pop(stale, None)
    return config


def _sparsity(family: Family, sparse: Sequence[bool] | None) -> dict[str, object]:
    """Return the keys that say which of the blocks that stay are sparse."""
    keys = family.keys
    if sparse is None:
        return {}
    if "dense_layers" in keys:
        dense = [place for place, yes in enumerate(sparse) if not yes]
        return {keys["dense_layers"].name: dense, keys["sparse_step"].name: 1}
    if "first_sparse" in keys:
        return {keys["first_sparse"].name: sum(not yes for yes in sparse)}
    return _interval(family, sparse) if "moe_start" in keys else {}


def _interval(family: Family, sparse: Sequence[bool]) -> dict[str, object]:
    """Return the first, last and distance that give these sparse blocks (ERNIE 4.5); {} where none
    do, which `refusal` then finds."""
    places = [place for place, yes in enumerate(sparse) if yes]
    first, last = (places[0], places[-1]) if places else (len(sparse), 0)
    for step in range(1, len(sparse) + 1):
        made = [first <= at <= last and (at + 1) % step == 0 for at in range(len(sparse))]
        if made == list(sparse):
            names = (family.keys[name].name for name in ("moe_start", "moe_end", "moe_step"))
            return dict(zip(names, (first, last, step), strict=True))
    return {}
