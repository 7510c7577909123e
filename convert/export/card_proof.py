"""What a card says was proven of a checkpoint, and what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adaconvert.export.card_facts import entries_of
from adaconvert.export.card_text import code, fenced, is_number, percent, plain, table
from adaconvert.export.card_told import Told


def verification(told: Told) -> Iterator[str]:
    """Yield what was proven of it."""
    found = told.record["verification"]
    yield from ("## Verification", "")
    if isinstance(found, dict):
        if told.calibration is not None and told.calibration.chosen is not None:
            yield from ("Before it was calibrated:", "")
        yield from fenced(list(_proof(told, found)), "text")
    elif told.record["method"] == "finetune":
        yield (
            "A fine-tune computes another function than its source, so they are not compared. "
            "The checkpoint was loaded by itself, and its logits are finite."
        )
    elif told.record["method"] == "calibrate":
        yield "Only measured: the weights are those it had before."
    else:
        yield (
            "**Not verified**: the conversion ran with `--no-verify`. "
            "Run `adaconvert verify SOURCE THIS`."
        )
    yield ""


def _proof(told: Told, found: Mapping[str, Any]) -> Iterator[str]:
    configured = found.get("configured")
    whole = ", no null experts" if told.nulled is not None else ", every expert on"
    every = whole if isinstance(configured, dict) else ""
    if found.get("promise") is None:
        yield "not compared with its source"
        return
    bound = found.get("bound")
    limit = f" (at most {bound:g} of the largest logit{every})" if is_number(bound) else ""
    yield f"promise: {found['promise']}{limit}"
    yield (
        f"largest difference of a logit in float32{every}: below "
        f"{found.get('relative_difference_below')} of the largest logit, over "
        f"{found.get('tokens')} tokens ({found.get('probe')})"
    )
    if is_number(found.get("argmax_agreement")):
        share = percent(found["argmax_agreement"])
        yield f"same most likely next token{every}: {share} of tokens"
    if is_number(found.get("kl_nats_below")) and told.stages[-1].method == "molora" and not bound:
        yield f"KL divergence of its next tokens from the source's: below {found['kl_nats_below']}"
    if isinstance(configured, dict):
        yield f"as configured{_widths(told)}: {_configured(configured, told)}"
    notes = found.get("notes")
    yield from (f"note: {note}" for note in (notes if isinstance(notes, list) else []))


def _widths(told: Told) -> str:
    width = told.stages[-1].options.get("expert_width")
    return f", experts of {width} neurons" if isinstance(width, int) else ""


def _configured(found: Mapping[str, Any], told: Told) -> str:
    of, networks = "the neurons", "split networks"
    if told.nulled is not None:
        of, networks = "the source's real experts", "mixtures"
    said = []
    if is_number(found.get("neurons")) and is_number(found.get("ffn_flops")):
        said.append(
            f"{percent(found['neurons'])} of {of}, {percent(found['ffn_flops'])} of the "
            f"FLOPs of the {networks}"
        )
    if is_number(found.get("loss_increase_nats")):
        said.append(f"loss {found['loss_increase_nats']:+g} nats per token")
    if is_number(found.get("argmax_agreement")):
        share = percent(found["argmax_agreement"])
        said.append(f"same most likely token for {share} of tokens")
    return ", ".join(said)


def quality(told: Told) -> Iterator[str]:
    """Yield what `evaluate --record` measured, text by text."""
    measured = [
        entry for entry in entries_of(told.record) if isinstance(entry.get("settings"), list)
    ]
    if measured:
        yield from ("## Quality", "")
    for entry in measured:
        yield from _measured(entry)


def _measured(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was measured on one text."""
    yield (
        f"Measured by `adaconvert evaluate` in {plain(found.get('dtype'))} on "
        f"{plain(found.get('tokens'))} tokens of {plain(found.get('documents'))} documents of "
        f"{code(found.get('data'))}."
    )
    yield ""
    columns = (
        "setting",
        "compute",
        "real experts",
        "loss",
        "perplexity",
        "accuracy",
        "over reference",
        "same",
    )
    entries = [found.get("reference"), *found["settings"]]
    rows = [_quality_row(entry) for entry in entries if isinstance(entry, dict)]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    yield from table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    yield ""


def _quality_row(entry: Mapping[str, Any]) -> list[str]:
    agreement = entry.get("agreement")
    return [
        plain(entry.get("label")),
        _digits(entry.get("compute")),
        _real(entry.get("real_experts")),
        *(_digits(entry.get(key)) for key in ("loss", "perplexity", "accuracy")),
        _digits(entry.get("increase"), "+.4f"),
        percent(agreement) if is_number(agreement) else "",
    ]


def _real(found: object) -> str:
    """Return what null experts leave of the source's experts; empty where there are none."""
    if not isinstance(found, dict) or not all(is_number(found.get(k)) for k in ("share", "of")):
        return ""
    return f"{percent(found['share'])} of {found['of']:.3g}"


def _digits(value: object, form: str = ".4f") -> str:
    return format(value, form) if is_number(value) else ""
