"""Rotary position parameters of a source, written so that every reader of the target rotates alike.

transformers 4 keeps `rope_theta` and `rope_scaling` apart; transformers 5 merges them into
`rope_parameters`, and takes `rope_scaling` first when a file holds both. `positions` reads either
spelling; this module writes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaconvert.arch import positions, registry
from adaconvert.arch.base import ModelSpec

#: rope types every stock host computes with the functions transformers shares between all models.
KNOWN_TYPES = frozenset({"default", "linear", "dynamic", "yarn", "longrope", "llama3"})

_OWN_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor"})
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeParameters:
    """How one model rotates queries and keys.

    Attributes:
        theta: base of the frequencies.
        rope_type: "default" or a scaling rule.
        partial: fraction of head_dim that is rotated.
        scaling: parameters of the rule (factor, short_factor, ...), as the source states them.
    """

    theta: float
    rope_type: str = "default"
    partial: float = 1.0
    scaling: Mapping[str, object] = field(default_factory=dict)


def read(spec: ModelSpec) -> RopeParameters | None:
    """Return the rotary parameters of the full-attention layers of a model, None when it has none.

    Source: transformers 5.23, `RotaryEmbeddingConfigMixin.standardize_rope_params`: a top-level
    `original_max_position_embeddings` (Phi-3) wins over the one beside the scaling rule.
    """
    family = registry.FAMILIES[spec.model_type]
    if family.rope is None:
        return None
    stated = positions.read(family.rope, spec.config)[positions.FULL]
    kind, theta = str(stated["rope_type"]), stated["rope_theta"]
    scaling = {
        key: value for key, value in stated.items() if key not in _OWN_KEYS and value is not None
    }
    original = spec.config.get(_ORIGINAL)
    if kind in {"llama3", "yarn", "longrope"} and isinstance(original, int):
        scaling[_ORIGINAL] = original
    return RopeParameters(
        theta=theta if isinstance(theta, int | float) else family.rope.theta,
        rope_type=kind,
        partial=spec.traits.partial_rotary,
        scaling=scaling if kind != "default" else {},
    )


def write(rope: RopeParameters, *, partial_key: bool) -> dict[str, object]:
    """Return the config keys from which transformers 4 and 5 and serving runtimes read `rope`.

    Args:
        rope: what to write.
        partial_key: the host reads `partial_rotary_factor`; else it is left out, and must be 1.
    """
    keys: dict[str, object] = {"rope_theta": rope.theta}
    if rope.rope_type == "longrope" and _ORIGINAL in rope.scaling:
        # transformers 4 looks for it at the top, and only there, when the rule is longrope
        keys[_ORIGINAL] = rope.scaling[_ORIGINAL]
    named = {"rope_type": rope.rope_type, **rope.scaling}
    part: dict[str, object] = {"partial_rotary_factor": rope.partial} if partial_key else {}
    keys["rope_scaling"] = None if rope.rope_type == "default" else named
    keys["rope_parameters"] = {**named, "rope_theta": rope.theta, **part}
    return {**keys, **part}
