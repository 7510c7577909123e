"""The target checkpoint a host wants: its config.json, and for every tensor where it comes from.

Names and shapes of the target are those `registry.describe` derives from the config written here,
so each is stated once, in `families`. What a source tensor goes through stands in the tables below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from adaconvert.arch import expressions, fit, registry, rope, values
from adaconvert.arch.base import (
    Carry,
    HostLayout,
    HostRequest,
    HostTensor,
    ModelSpec,
    Rows,
    TensorSpec,
)
from adaconvert.dtypes import BY_NAME

if TYPE_CHECKING:
    from adaconvert.arch.hosts.base import Host

#: roles a conversion method fills; every other tensor is carried over from the source.
METHOD_ROLES = frozenset(
    {
        "router",
        "expert_gate",
        "expert_up",
        "expert_down",
        "expert_gate_up",
        "expert_downs",
        "shared_gate",
        "shared_up",
        "shared_down",
        "shared_gate_up",
        "shared_router",
    }
)

#: norm of the source -> role -> what the tensor goes through to serve a host with RMSNorm.
#: A LayerNorm without weights is RMSNorm on a residual stream whose mean is zero, which it is when
#: every tensor that writes to the stream has been centred.
ADAPTERS: Mapping[str, Mapping[str, str]] = {
    "rms": {},
    "rms_plus_one": {"attn_norm": "plus_one", "ffn_norm": "plus_one", "norm_final": "plus_one"},
    "layernorm_no_params": {
        "embed": "center_rows",
        "o": "center_out",
        "o_bias": "center_out",
        "down": "center_out",
    },
}

#: role -> value of a tensor the host needs and the source lacks, whatever its norms are.
FILLERS: Mapping[str, float] = {
    "q_bias": 0.0,
    "k_bias": 0.0,
    "v_bias": 0.0,
    "o_bias": 0.0,
    "score_bias": 0.0,
}

#: norm of the source -> further fillers: weights of norms that have none.
NORM_FILLERS: Mapping[str, Mapping[str, float]] = {
    "layernorm_no_params": {"attn_norm": 1.0, "ffn_norm": 1.0, "norm_final": 1.0},
}

Params = tuple[tuple[str, str | int | float | bool], ...]

#: functions that only move values; everything else rounds in a 16-bit dtype.
_EXACT = frozenset({None, "constant", "interleave_rope"})

#: (pad, bos, eos) transformers assumes for a family when config.json does not state them.
_SPECIAL_IDS: Mapping[str, tuple[int | None, int | None, int | None]] = {
    "llama": (None, 1, 2),
    "mistral": (None, 1, 2),
    "granite": (None, 1, 2),
    "qwen2": (None, None, None),
    "qwen3": (None, None, None),
    "gemma": (0, 2, 1),
    "phi3": (32000, 1, 32000),
    "olmo": (1, None, 50279),
    "olmo2": (1, None, 50279),
    "olmo3": (1, None, 50279),
}


def build(host: Host, spec: ModelSpec, request: HostRequest, dtype_name: str) -> HostLayout:
    """Return the target checkpoint of `spec` on `host`; `fit.reasons` must be empty for them."""
    config = config_of(host, spec, request, dtype_name)
    tensors = tuple(_tensors(host, spec, request, config))
    down_fn = ADAPTERS[spec.traits.norm].get("down")
    carried = (tensor.carry for tensor in tensors if tensor.carry is not None)
    return HostLayout(
        config=config,
        tensors=tensors,
        combine=host.combine,
        shared_gated=host.shared is not None and host.shared.gated,
        down_fn=down_fn,
        rounds=down_fn is not None or any(_rounds(carry) for carry in carried),
        notes=tuple(_notes(host, spec, request)),
    )


def config_of(
    host: Host, spec: ModelSpec, request: HostRequest, dtype_name: str
) -> dict[str, object]:
    """Return the complete config.json of the target, in old and new spellings.

    Nothing else of the source's config is carried: an unknown key could mean anything elsewhere.
    """
    found = _values(host, spec, request)
    dtype = BY_NAME[dtype_name].config_name if dtype_name in BY_NAME else dtype_name
    rotary = rope.read(spec)
    own = {key: _resolve(value, found) for key, value in host.config.items()}
    return {
        "architectures": [host.architecture],
        "model_type": host.model_type,
        **{key: _resolve(value, found) for key, value in _COMMON.items()},
        **_special_ids(spec),
        **own,
        **(rope.write(rotary, partial_key=host.partial_rotary) if rotary else {}),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


_COMMON: Mapping[str, object] = {
    "vocab_size": "$vocab",
    "hidden_size": "$hidden",
    "intermediate_size": "$width",
    "num_hidden_layers": "$layers",
    "num_attention_heads": "$heads",
    "num_key_value_heads": "$kv_heads",
    "head_dim": "$head_dim",
    "hidden_act": "$activation",
    "max_position_embeddings": "$max_positions",
    "rms_norm_eps": "$norm_eps",
    "tie_word_embeddings": "$tied",
    "attention_dropout": "$attention_dropout",
    "initializer_range": "$initializer_range",
    "use_cache": True,
    "num_experts": "$experts",
    "num_local_experts": "$experts",
    "num_experts_per_tok": "$top_k",
    "norm_topk_prob": True,
    "router_aux_loss_coef": "$aux_loss_coef",
    "output_router_logits": False,
}


def _values(host: Host, spec: ModelSpec, request: HostRequest) -> dict[str, object]:
    """Return what "$" values of host configs stand for."""
    shared = fit.shared_width(host, spec, request)
    return {
        "vocab": spec.vocab,
        "hidden": spec.hidden,
        "width": request.expert_width if host.fixed_width else spec.intermediate,
        "layers": spec.layers,
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_positions": spec.max_positions,
        "experts": request.num_experts,
        "top_k": request.top_k,
        "expert_width": request.expert_width,
        "shared_width": shared,
        "shared_units": shared // request.expert_width,
        "aux_loss_coef": request.aux_loss_coef,
        **_layer_values(spec, request),
        **_trait_values(host, spec),
        **_window_values(spec),
    }


def _layer_values(spec: ModelSpec, request: HostRequest) -> dict[str, object]:
    chosen = fit.chosen_layers(spec, request)
    return {
        "dense_layers": [layer for layer in range(spec.layers) if layer not in chosen],
        "first_moe": chosen[0],
        "last_moe": chosen[-1],
    }


def _trait_values(host: Host, spec: ModelSpec) -> dict[str, object]:
    traits = spec.traits
    return {
        "activation": traits.activation,
        "norm_eps": traits.norm_eps,
        "tied": traits.tied and not fit.unties(host, spec),
        "biased": traits.qkv_bias or traits.o_bias,
        "qk_norm": traits.qk_norm != "none",
        "embed_scale": traits.embed_scale,
        "residual_scale": traits.residual_scale,
        "logits_scale": traits.logits_scale,
        "attention_scale": fit.attention_scale(spec),
        "attention_dropout": _number(spec.config.get("attention_dropout"), 0.0),
        "initializer_range": _number(spec.config.get("initializer_range"), 0.02),
    }


def _window_values(spec: ModelSpec) -> dict[str, object]:
    sliding = _slides(spec)
    first = sliding.index(True) if any(sliding) else spec.layers
    return {
        "slides": any(sliding),
        "window": spec.traits.sliding_window if any(sliding) else None,
        # blocks below this one attend to everything, as older readers of these configs have it
        "full_layers": first,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
    }


def _slides(spec: ModelSpec) -> list[bool]:
    """Return, block by block, whether attention is windowed."""
    if spec.traits.sliding != "per_layer":
        return [spec.traits.sliding == "uniform"] * spec.layers
    family = registry.FAMILIES[spec.model_type]
    mask = family.masks["sliding"]
    listed = spec.config.get(mask.key)
    if isinstance(listed, list):
        return [item == mask.value for item in listed[: spec.layers]]
    found = values.read(family, spec.config, family.architectures[spec.architecture])
    places = ({"layer": layer, "ordinal": layer + 1} for layer in range(spec.layers))
    return [expressions.holds(mask.default, {**found, **place}) for place in places]


def _special_ids(spec: ModelSpec) -> dict[str, object]:
    keys = ("pad_token_id", "bos_token_id", "eos_token_id")
    assumed = _SPECIAL_IDS.get(spec.model_type, (None, None, None))
    return {key: spec.config.get(key, value) for key, value in zip(keys, assumed, strict=True)}


def _resolve(value: object, found: Mapping[str, object]) -> object:
    return found[value[1:]] if isinstance(value, str) and value.startswith("$") else value


def _number(value: object, assumed: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else assumed


def _tensors(
    host: Host, spec: ModelSpec, request: HostRequest, config: Mapping[str, object]
) -> Iterator[HostTensor]:
    target = registry.describe(config)
    source = _Source(spec)
    spare = request.shared_kind == "none"
    for tensor in target.tensors:
        if tensor.role == "head" and target.traits.tied:
            continue
        carry = None
        if tensor.role not in METHOD_ROLES:
            carry = _carry(host, source, tensor)
        elif spare and tensor.role.startswith("shared_"):
            carry = _spare(source, tensor)
        yield HostTensor(
            name=tensor.name,
            role=tensor.role,
            shape=tensor.shape,
            layer=tensor.layer,
            expert=tensor.expert,
            carry=carry,
        )


class _Source:
    """The tensors of the source by role."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._index = {(tensor.role, tensor.layer): tensor for tensor in spec.tensors}
        self._counts = {tensor.name: tensor.shape[0] for tensor in spec.tensors}
        queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self._fused_rows = {"q": (0, queries), "k": (queries, keys), "v": (queries + keys, keys)}

    def find(self, role: str, layer: int | None) -> Rows | None:
        """Return where the source holds what `role` is for, None when it does not."""
        if role in {"gate", "up", "down"} and layer is not None:
            return self.spec.ffn_rows(layer).get(role)
        if role == "head" and self.spec.traits.tied:
            role = "embed"
        whole = self._index.get((role, layer))
        if whole is not None:
            return Rows(tensor=whole.name, start=0, count=whole.shape[0])
        part, _, bias = role.partition("_")
        fused = self._index.get((f"qkv_{bias}" if bias else "qkv", layer))
        if fused is None or part not in self._fused_rows or bias not in {"", "bias"}:
            return None
        start, count = self._fused_rows[part]
        return Rows(tensor=fused.name, start=start, count=count)

    def cut(self, rows: Rows) -> tuple[int, int] | None:
        """Return (start, count) of `rows`, None when they are the whole tensor."""
        whole = rows.start == 0 and rows.count == self._counts[rows.tensor]
        return None if whole else (rows.start, rows.count)


def _carry(host: Host, source: _Source, tensor: TensorSpec) -> Carry:
    """Return how one tensor outside the experts is made from the source."""
    rows = source.find(tensor.role, tensor.layer)
    if rows is None:
        fillers = {**FILLERS, **NORM_FILLERS.get(source.spec.traits.norm, {})}
        return Carry(tensor=None, fn="constant", params=(("value", fillers[tensor.role]),))
    fn, params = _function(host, source.spec, tensor.role)
    return Carry(tensor=rows.tensor, rows=source.cut(rows), fn=fn, params=params)


def _function(host: Host, spec: ModelSpec, role: str) -> tuple[str | None, Params]:
    """Return what a source tensor goes through to serve as `role`, and the parameters of that."""
    if role == "embed" and spec.traits.embed_scale != 1 and not host.multipliers:
        return "scale", (("factor", spec.traits.embed_scale),)
    if host.interleaved and role in {"q", "k"}:
        heads = spec.heads if role == "q" else spec.kv_heads
        return "interleave_rope", (("heads", heads), ("head_dim", spec.head_dim))
    return ADAPTERS[spec.traits.norm].get(role), ()


def _spare(source: _Source, tensor: TensorSpec) -> Carry:
    """Return a tensor of a shared expert nobody asked for: neurons with nothing coming out."""
    if tensor.role in {"shared_gate", "shared_up"} and tensor.layer is not None:
        rows = source.spec.ffn_rows(tensor.layer)[tensor.role.removeprefix("shared_")]
        first = Rows(tensor=rows.tensor, start=rows.start, count=tensor.shape[0])
        return Carry(tensor=first.tensor, rows=source.cut(first))
    return Carry(tensor=None, fn="constant", params=(("value", 0.0),))


def _rounds(carry: Carry) -> bool:
    if carry.fn == "scale":
        factor = float(dict(carry.params)["factor"])
        return math.frexp(factor)[0] != 0.5
    return carry.fn not in _EXACT


def _notes(host: Host, spec: ModelSpec, request: HostRequest) -> Iterator[str]:
    shared = fit.shared_width(host, spec, request)
    if shared and request.shared_kind == "none":
        yield (
            f"{host.model_type} cannot do without a shared expert: one of {shared} neurons that "
            "contributes nothing is added to each MoE block."
        )
    if fit.unties(host, spec):
        yield "The head is stored apart from the embedding, which is scaled; the source ties them."
    if spec.traits.rope_type == "longrope":
        yield (
            "The source drops its cache when a text grows past the original context length; the "
            "target does not, so generated text may differ from there on."
        )
    if host.model_type == "qwen2_moe" and spec.traits.sliding != "none":
        yield "Under flash attention transformers ignores the window of qwen2_moe; sdpa keeps it."
