"""The parts of a verification report as text and as JSON data.

Numbers are cut to three digits: they are measured to more than mean anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from adaconvert.units import human_bytes
from adaconvert.verification.equivalence import Equivalence
from adaconvert.verification.integrity import Integrity
from adaconvert.verification.quality import Quality, Setting
from adaconvert.verification.routing import LayerRouting, even_entropy
from adaconvert.verification.verdict import Verdict

_DIGITS = 3


def rounded(value: float | None, digits: int = _DIGITS) -> float | None:
    """Return a number with so many significant digits, None for one that JSON cannot hold."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def power_above(value: float) -> float | None:
    """Return the smallest power of ten above a number, from 1e-12 on; None when there is none."""
    if not math.isfinite(value):
        return None
    # parsing the text gives the same float on every system, which 10.0 ** n need not
    return float(f"1e{max(math.floor(math.log10(value)) + 1, -12) if value > 0 else -12}")


def integrity_line(found: Integrity) -> str:
    """Return how much was checked and whether it is as written."""
    size = f"{found.shards} shards, {found.tensors} tensors, {human_bytes(found.nbytes)}"
    verdict = "every byte as written" if found.ok else f"{len(found.problems)} problems"
    return f"integrity    {verdict} ({size})"


def equivalence_lines(found: Equivalence, verdict: Verdict) -> list[str]:
    """Return the comparison of the logits."""
    logits = found.logits
    held = "measured" if verdict.bound is None else f"at most {verdict.bound:g}"
    if found.quality is not None and verdict.bound is not None:
        nulled = found.quality.configured.real is not None
        held = f"with {'null experts off' if nulled else 'every expert on'} {held}"
    return [
        f"promise      {verdict.kind} ({held})",
        f"logits       max|d| {logits.max_abs_diff:.3g} of max|logit| {logits.max_abs_logit:.3g}: "
        f"relative {found.relative:.3g}",
        f"next token   same for {100 * logits.argmax_agreement:.4g} % of {logits.tokens} tokens "
        f"({logits.disputed} clear choices changed), KL {logits.kl:.3g} nats",
        *([f"left out     {_left_out(logits.left_out)}"] if logits.left_out else []),
        f"compared     {found.mode} models in float32 on {found.probe}",
        *quality_lines(found.quality),
    ]


def _left_out(count: int) -> str:
    return f"{count} logits that are no numbers in the source and in the result"


def quality_lines(quality: Quality | None) -> list[str]:
    """Return what a split model costs and gives as it is configured."""
    if quality is None:
        return []
    nulled = quality.configured.real is not None
    lines = [f"as configured, experts of {quality.width}: {_setting_text(quality.configured)}"]
    if quality.single is not None:
        lines.append(f"neuron by neuron, by the gate: {_setting_text(quality.single)}")
    above = "null experts off" if nulled else "every expert on"
    return [*lines, f"(logits above are with {above})"]


def _setting_text(setting: Setting) -> str:
    loss = "" if setting.loss is None else f"loss {setting.loss:+.3g} nats per token, "
    real = "" if setting.real is None else f"{setting.real:.3g} real ones per token, "
    return (
        f"{real}{setting.neurons:.1%} of the neurons, {setting.ffn:.1%} of the FLOPs; {loss}"
        f"same choice for {100 * setting.logits.argmax_agreement:.4g} % of tokens, "
        f"KL {setting.logits.kl:.3g} nats"
    )


def setting_json(setting: Setting | None, digits: int = _DIGITS) -> dict[str, object] | None:
    """Return one way of running a split model as JSON data."""
    if setting is None:
        return None
    return {
        "neurons": rounded(setting.neurons, digits),
        **({} if setting.real is None else {"real_experts": rounded(setting.real, digits)}),
        "ffn_flops": rounded(setting.ffn, digits),
        "loss_increase_nats": rounded(setting.loss, digits),
        "argmax_agreement": rounded(setting.logits.argmax_agreement, digits),
        "kl_nats": rounded(setting.logits.kl, digits),
    }


def routing_lines(layers: Sequence[LayerRouting]) -> list[str]:
    """Return the ranges of the routing statistics over all layers, and the most split groups."""
    if not layers:
        return []
    most = max(layer.experts for layer in layers)
    entropy = _range(layers, lambda layer: layer.entropy)
    load = _range(layers, lambda layer: layer.load)
    top1 = _range(layers, lambda layer: layer.top1)
    unused = sum(layer.dead for layer in layers)
    lines = [
        f"routing      {len(layers)} layers of {most} experts, {unused} experts unused",
        f"             entropy {entropy} of {even_entropy(most):.3g} nats, "
        f"top-1 probability {top1}, busiest expert {load} times the mean",
    ]
    if any(layer.real is not None for layer in layers):
        real = _range(layers, lambda layer: layer.real or 0.0)
        lines.append(f"             real experts per token {real}")
    split = [layer for layer in layers if layer.split_groups is not None]
    if split:
        worst = max(split, key=lambda layer: layer.split_groups_stored or 0.0)
        plain = max(layer.split_groups or 0.0 for layer in split)
        lines.append(
            f"groups       tokens that get a part of an FFN: at most {100 * plain:.3g} % "
            f"in float32, {100 * (worst.split_groups_stored or 0.0):.3g} % in the stored dtype "
            f"(layer {worst.layer})"
        )
    return lines


def _range(layers: Sequence[LayerRouting], value: Callable[[LayerRouting], float]) -> str:
    low, high = min(map(value, layers)), max(map(value, layers))
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g}-{high:.3g}"


def equivalence_json(found: Equivalence) -> dict[str, object]:
    """Return the comparison as JSON data."""
    logits = found.logits
    return {
        "mode": found.mode,
        "probe": found.probe,
        "tokens": logits.tokens,
        "finite": logits.finite,
        "logits_left_out": logits.left_out,
        "max_abs_diff": rounded(logits.max_abs_diff),
        "max_abs_logit": rounded(logits.max_abs_logit),
        "relative": rounded(found.relative),
        "argmax_agreement": rounded(logits.argmax_agreement, 4),
        "clear_choices_changed": logits.disputed,
        "kl_nats": rounded(logits.kl),
        "first_bad_layer": found.first_bad_layer,
        "embedding_relative": rounded(found.embedding),
        "layers_relative": [rounded(difference) for difference in found.layers],
        "missing_keys": list(found.keys.missing),
        "unexpected_keys": list(found.keys.unexpected),
        "mismatched_keys": list(found.keys.mismatched),
        "routing": [_layer_json(layer) for layer in found.routing],
        "configured": setting_json(found.quality.configured if found.quality else None),
        "single_neurons": setting_json(found.quality.single if found.quality else None),
    }


def _layer_json(layer: LayerRouting) -> dict[str, object]:
    return {
        "layer": layer.layer,
        "experts": layer.experts,
        "entropy_nats": rounded(layer.entropy),
        "max_load_over_mean": rounded(layer.load),
        "mean_top1_probability": rounded(layer.top1),
        "dead_experts": layer.dead,
        **({} if layer.real is None else {"real_experts_per_token": rounded(layer.real)}),
        "split_groups": rounded(layer.split_groups),
        "split_groups_stored_dtype": rounded(layer.split_groups_stored),
    }
