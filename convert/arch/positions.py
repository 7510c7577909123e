"""What a config.json says about rotary positions, in the spelling of transformers 4 or 5."""

from __future__ import annotations

from collections.abc import Mapping

from adaconvert.arch.family import Rope
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

FULL = "full_attention"
SLIDING = "sliding_attention"

Parameters = dict[str, object]


def read(
    rope: Rope, config: Mapping[str, object], layer_types: tuple[str, ...] = (FULL,)
) -> dict[str, Parameters]:
    """Return the rotary parameters of each of `layer_types`, rope_type and rope_theta filled in.

    Raises:
        SourceError: rope_parameters, rope_scaling or a value in them has the wrong type.

    Source: transformers 5.23, `RotaryEmbeddingConfigMixin.convert_rope_params_to_dict`.
    """
    return {layer_type: _read(rope, config, layer_type) for layer_type in layer_types}


def rotated_fraction(rope: Rope, parameters: Mapping[str, object]) -> float:
    """Return the fraction of head_dim that is rotated.

    Families whose attention rotates whole heads ignore the key, unless a scaled rope type reads it.
    """
    stated = parameters.get("partial_rotary_factor")
    ignored = rope.partial is None and parameters["rope_type"] == "default"
    return float(stated) if isinstance(stated, int | float) and not ignored else 1.0


def _read(rope: Rope, config: Mapping[str, object], layer_type: str) -> Parameters:
    named = _mapping(config, "rope_parameters")
    scaling = _mapping(config, "rope_scaling")
    theta = config.get(rope.theta_key, rope.theta)
    if not rope.layered:
        return _complete(rope, config, _of_layer_type(scaling or named, layer_type), theta)
    own = dict(_as_mapping(named.get(layer_type)))
    if layer_type == FULL:
        return _complete(rope, config, {**own, **scaling}, theta)
    local = config.get(rope.local_key, rope.local_theta) if rope.local_key else rope.local_theta
    return _complete(rope, config, own, local)


def _of_layer_type(stated: Mapping[str, object], layer_type: str) -> Parameters:
    nested = [stated[key] for key in (layer_type, FULL, SLIDING) if key in stated]
    return dict(_as_mapping(nested[0]) if nested else stated)


def _complete(
    rope: Rope, config: Mapping[str, object], parameters: Parameters, theta: object
) -> Parameters:
    older = parameters.pop("type", "default")
    kind = parameters.setdefault("rope_type", older)
    if not isinstance(kind, str):
        raise _unusable("rope_type", "a text", kind)
    parameters["rope_type"] = rope.renamed.get(kind, kind)
    parameters.setdefault("rope_theta", theta)
    fraction = config.get(rope.partial_key, rope.partial)
    if fraction is not None:
        parameters.setdefault("partial_rotary_factor", fraction)
    for key in ("rope_theta", "partial_rotary_factor"):
        value = parameters.get(key, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise _unusable(key, "a number above 0", value)
    return parameters


def _mapping(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _unusable(key, "an object", value)
    return _as_mapping(value)


def _as_mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _unusable(key: str, expected: str, found: object) -> SourceError:
    shown = escape(repr(found), 60)
    return SourceError(f"{key} is not usable", where=WHERE, expected=expected, found=shown)
