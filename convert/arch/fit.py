"""Whether a host holds a model exactly: one check per feature, each with the words a user reads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from adaconvert.arch.base import HostRequest, ModelSpec
from adaconvert.arch.rope import KNOWN_TYPES

if TYPE_CHECKING:
    from adaconvert.arch.hosts.base import Host

_KINDS = {"encoder": "an encoder", "vision": "a vision model"}
_NORMS = {
    "rms": "RMSNorm",
    "rms_plus_one": "RMSNorm with weights stored minus one",
    "layernorm": "LayerNorm with weights",
    "layernorm_no_params": "LayerNorm without weights",
}
_PLACEMENTS = {
    "pre": "norms before each branch",
    "post": "norms on the branch outputs",
    "sandwich": "norms before and after each branch",
    "parallel": "attention and FFN in parallel",
}
_ROPES = {
    "none": "no rotary positions",
    "two": "two rotary bases, local and global",
    "nope": "layers without rotary positions (NoPE)",
}
_QK_NORMS = {
    "none": "no norms on queries and keys",
    "head": "a norm on each query and key head",
    "full": "norms over all query and key heads at once",
}
_WINDOWS = {
    "none": "full attention",
    "uniform": "a sliding window in every layer",
    "per_layer": "sliding windows in some layers only",
}
_BIASES = {
    "": "has none",
    "qkv": "has them on q, k and v only",
    "qkvo": "has them on q, k, v and o",
}


def reasons(host: Host, spec: ModelSpec, request: HostRequest) -> list[str]:
    """Return why `host` cannot hold `spec` exactly, one clause each; empty when it can."""
    if spec.kind != "decoder":
        return [f"{_KINDS[spec.kind]} (no stock MoE architecture is one)"]
    if spec.num_experts:
        return ["it is a mixture of experts already"]
    found = (check(host, spec, request) for check in _CHECKS)
    return [text for text in found if text]


def chosen_layers(spec: ModelSpec, request: HostRequest) -> tuple[int, ...]:
    """Return the blocks that become MoE, ascending; a request that names none means all."""
    return tuple(sorted(request.moe_layers)) if request.moe_layers else tuple(range(spec.layers))


def default_attention_scale(spec: ModelSpec) -> float:
    """Return head_dim ** -0.5, what attention multiplies q.k by unless a family says otherwise."""
    return float(spec.head_dim**-0.5)


def attention_scale(spec: ModelSpec) -> float:
    """Return the factor on q.k of the source."""
    return spec.traits.attention_scale or default_attention_scale(spec)


def unties(host: Host, spec: ModelSpec) -> bool:
    """Return whether the target stores a head of its own though the source's is tied."""
    return spec.traits.tied and spec.traits.embed_scale != 1 and not host.multipliers


def shared_width(host: Host, spec: ModelSpec, request: HostRequest) -> int:
    """Return the width of the shared expert in the target, asked for or not; 0 for none."""
    if request.shared_kind != "none":
        return request.shared_width
    if host.shared is None or not host.shared.required:
        return 0
    return min(host.shared.spare_width or request.expert_width, spec.intermediate)


def _ffn(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.ffn != "glu":
        return "an FFN without a gate (its experts are gated)"
    return "biases in the FFN (its experts have none)" if spec.traits.mlp_bias else ""


def _norms(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.norm in host.norms:
        return ""
    return f"{_NORMS[spec.traits.norm]} (it has RMSNorm)"


def _placement(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.norm_placement == host.norm_placement:
        return ""
    return f"{_PLACEMENTS[spec.traits.norm_placement]} (it has {_PLACEMENTS[host.norm_placement]})"


def _caps(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.softcap:
        return "soft-capped attention or logits (it has no caps)"
    if spec.traits.clip_qkv is not None:
        return f"queries, keys and values clipped at {spec.traits.clip_qkv:g} (it does not clip)"
    return ""


def _rope(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.rope != "one":
        return f"{_ROPES[spec.traits.rope]} (it rotates every layer with one base)"
    if spec.traits.rope_type not in KNOWN_TYPES:
        return f"rotary scaling of type {spec.traits.rope_type} (it does not know that type)"
    return ""


def _partial(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.partial_rotary == 1 or host.partial_rotary:
        return ""
    return (
        f"rotary positions on {spec.traits.partial_rotary:g} of each head (it rotates whole heads)"
    )


def _attention_biases(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    has = {"qkv": spec.traits.qkv_bias, "o": spec.traits.o_bias}
    lacking = [
        part
        for part, there in has.items()
        if there and part not in host.biases.replace("qkvo", "qkv o")
    ]
    if not lacking:
        return ""
    names = {"qkv": "q, k and v", "o": "o"}
    where = " and ".join(names[part] for part, there in has.items() if there)
    return f"attention biases on {where} (it {_BIASES[host.biases]})"


def _qk_norm(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.qk_norm in host.qk_norm:
        return ""
    has = " or ".join(_QK_NORMS[kind] for kind in sorted(host.qk_norm))
    return f"{_QK_NORMS[spec.traits.qk_norm]} (it has {has})"


def _sliding(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if spec.traits.sliding in host.sliding:
        return ""
    has = "one window for all layers" if "uniform" in host.sliding else "full attention only"
    return f"{_WINDOWS[spec.traits.sliding]} (it has {has})"


def _multipliers(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if host.multipliers:
        return ""
    traits = spec.traits
    odd = {
        "residual multiplier": (traits.residual_scale, 1.0),
        "logits scaling": (traits.logits_scale, 1.0),
        "attention multiplier": (attention_scale(spec), default_attention_scale(spec)),
    }
    # 1e-7: half a unit of float32, in which attention is computed
    lacking = [
        name for name, (is_, usual) in odd.items() if not math.isclose(is_, usual, rel_tol=1e-7)
    ]
    return f"{', '.join(lacking)} other than the usual (it has no multipliers)" if lacking else ""


def _layers(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    chosen = chosen_layers(spec, request)
    outside = [layer for layer in chosen if not 0 <= layer < spec.layers]
    if outside:
        return f"block {outside[0]} (the source has blocks 0-{spec.layers - 1})"
    run = chosen == tuple(range(chosen[0], chosen[-1] + 1))
    last = chosen[-1] == spec.layers - 1
    possible = {
        "all": len(chosen) == spec.layers,
        "any": True,
        "suffix": run and last,
        "range": run,
    }
    limits = {
        "all": "every block is MoE",
        "suffix": "dense blocks can only come first",
        "range": "its MoE blocks are one run",
    }
    if possible[host.moe_layers]:
        return ""
    dense = f"{spec.layers - len(chosen)} of {spec.layers} blocks left dense"
    return f"{dense} (in it {limits[host.moe_layers]})"


def _shared(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if request.shared_kind == "none":
        return ""
    if host.shared is None:
        return "a shared expert (it has none)"
    if host.shared.in_units and request.shared_width % request.expert_width:
        unit = f"a multiple of the {request.expert_width} of a routed one"
        return f"a shared expert of {request.shared_width} neurons (in it {unit})"
    return ""


def _experts(host: Host, spec: ModelSpec, request: HostRequest) -> str:
    if request.num_experts >= host.min_experts:
        return ""
    return f"{request.num_experts} experts (its router needs at least {host.min_experts})"


_CHECKS: tuple[Callable[[Host, ModelSpec, HostRequest], str], ...] = (
    _ffn,
    _norms,
    _placement,
    _caps,
    _rope,
    _partial,
    _attention_biases,
    _qk_norm,
    _sliding,
    _multipliers,
    _layers,
    _shared,
    _experts,
)
