"""Which model families are known, and what a checkpoint of one holds; `model_type` decides."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from adaconvert.arch import values
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.families import (
    bert,
    deepseek_v2,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    gemma,
    gemma2,
    gemma3_text,
    glm4_moe,
    gpt2,
    gpt_neox,
    granite,
    granitemoe,
    granitemoeshared,
    llama,
    mistral,
    mixtral,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    vit,
)
from adaconvert.arch.family import Family
from adaconvert.arch.interpret import interpret, masks
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

_MODULES = (
    llama,
    mistral,
    qwen2,
    qwen3,
    gemma,
    gemma2,
    gemma3_text,
    phi3,
    olmo,
    olmo2,
    olmo3,
    granite,
    smollm3,
    gpt2,
    gpt_neox,
    bert,
    vit,
    mixtral,
    qwen2_moe,
    qwen3_moe,
    olmoe,
    deepseek_v2,
    granitemoe,
    granitemoeshared,
    flex_olmo,
    glm4_moe,
    ernie4_5_moe,
    dots1,
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def supported() -> list[str]:
    """Return every known model_type, sorted."""
    return sorted(FAMILIES)


def describe(config: Mapping[str, object], stored: Collection[str] = ()) -> ModelSpec:
    """Return what a checkpoint with this config.json holds, from the config alone.

    Args:
        config: config.json, in the spelling of transformers 4 or 5.
        stored: tensor names in the files, when there are files. They only decide between two
            spellings of the same tensor: GPT-2 with and without "transformer.", BERT's
            LayerNorm.gamma and LayerNorm.weight.

    Raises:
        SourceError: the model_type or architecture is not supported, or a value is unusable.
    """
    if str(config.get("model_type")).startswith("adaptive_"):
        from adaconvert.arch import adaptive

        return adaptive.describe(config, stored)
    family = _family(config)
    return interpret(family, config, _architecture(family, config), stored)


def layer_mask(spec: ModelSpec, name: str) -> tuple[bool, ...]:
    """Return whether each layer is "sliding", "roped" or "moe"; empty for families without it.

    Raises:
        SourceError: a config value is unusable.
    """
    family = FAMILIES[spec.model_type]
    found = values.read(family, spec.config, family.architectures[spec.architecture])
    return masks(family, spec.config, found).get(name, ())


def _family(config: Mapping[str, object]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        found = "none" if model_type is None else escape(repr(model_type), 60)
        raise SourceError(
            "model_type is not usable", where=values.WHERE, expected="a text", found=found
        )
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(config.get("text_config"), Mapping):
        raise SourceError(
            f"'{escape(model_type, 60)}' is multimodal; its language model is in text_config",
            where=values.WHERE,
            hint="Save the language model as a checkpoint of its own first.",
        )
    raise SourceError(
        f"model_type '{escape(model_type, 60)}' is not supported",
        where=values.WHERE,
        hint=_nearest(model_type) + f"Supported: {', '.join(supported())}.",
    )


def _nearest(model_type: str) -> str:
    near = difflib.get_close_matches(model_type[:60].lower(), supported(), n=3, cutoff=0.6)
    return f"Nearest: {', '.join(near)}. " if near else ""


def _architecture(family: Family, config: Mapping[str, object]) -> str:
    stated = config.get("architectures")
    if stated is None or stated == []:
        return next(iter(family.architectures))
    if not isinstance(stated, list) or not all(isinstance(item, str) for item in stated):
        raise SourceError(
            "architectures is not usable", where=values.WHERE, expected="a list of class names"
        )
    known = [str(item) for item in stated if item in family.architectures]
    if known:
        return known[0]
    raise SourceError(
        f"architecture {escape(stated[0], 80)} is not supported: {_reason(family, stated[0])}",
        where=values.WHERE,
        hint=f"Supported for {family.model_type}: {', '.join(family.architectures)}.",
    )


def _reason(family: Family, architecture: str) -> str:
    if family.kind != "decoder":
        return "its tensors are not known"
    if architecture.endswith("Model") and not architecture.endswith("LMHeadModel"):
        return "it has no language-model head"
    return "its head is not that of a causal language model"
