"""The sections of a card that do not tell of stages or of a calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from adaconvert.arch.runtimes import verdicts
from adaconvert.errors import AdaconvertError
from adaconvert.export.card_adapters import adapted_words, knobs
from adaconvert.export.card_calibration import default_line, is_note
from adaconvert.export.card_depth import beside
from adaconvert.export.card_exits import exit_words
from adaconvert.export.card_facts import LICENSE_KEYS, known_costs, license_of
from adaconvert.export.card_stages import roots, routers
from adaconvert.export.card_text import (
    code,
    fenced,
    is_number,
    listed,
    percent,
    plain,
    sentence,
    table,
)
from adaconvert.export.card_told import Told
from adaconvert.export.card_training import was_validated
from adaconvert.io.card_file import RECIPE
from adaconvert.modeling.adaptive_knobs import knobs_for
from adaconvert.units import human_bytes, human_count

_EXACT: Final = frozenset({"exact", "exact-fp32"})
#: begins a note that holds until something else is the default.
_UNTIL: Final = "every expert runs until "
_COUNTED: Final = (
    "As configured; where the number of experts depends on the token, all are counted. "
)
_COUNTED_NULLED: Final = (
    "Real experts are counted as every token runs them while the start is as made; once biases "
    "were fitted or trained, at the target, if there is one, else as in the source. "
)
_UNCALIBRATED: Final = (
    "It is not calibrated: `set_compute` gives every layer the same share of its experts, by a "
    "rule that knows nothing of this model."
)
_UNCALIBRATED_NULLED: Final = (
    "It is not calibrated: `set_compute` gives every token of a layer the same number of real "
    "experts; after `adaconvert calibrate` it moves the null biases."
)
_PATH: Final = '"path/or/hub-id"'


def intro(told: Told) -> str:
    """Return one sentence on what the checkpoint is."""
    kind = code(told.config.get("model_type"))
    if told.nulled is not None:
        what = (
            f"An adaptive {kind}: null experts, which cost nothing, compete for a token's slots, "
            "so that it runs as many real ones as it needs"
        )
    elif told.is_adaptive and not told.is_split:
        what = f"A {kind} with {_beside(told)}"
    elif told.is_adaptive:
        what = f"An adaptive {kind}: each token runs as many experts as it is given"
    elif told.is_mixture:
        what = f"A {kind} mixture of experts, a stock architecture of `transformers`"
    else:
        what = f"A dense {kind}, a stock architecture of `transformers`"
    names = told.stages[0].names if len(told.stages) == 1 else "the stages below"
    return f"{what}. Made by adaconvert {plain(told.record['adaconvert'])} from {names}."


def _beside(told: Told) -> str:
    """Return what an adaptive checkpoint in which nothing is split has besides its model."""
    adapters = adapted_words(told.config)
    found = [f"routed adapters: {adapters}"] if adapters else []
    return "; and ".join([*found, *filter(None, [exit_words(told.config)]), *beside(told.config)])


def class_line(told: Told) -> str:
    """Return the promise, and what a calibration has made of it."""
    why = told.record["exactness"].get("why")
    default = "" if told.calibration is None else default_line(told.calibration)
    if not default:
        return f"**Class: {plain(told.kind)}.** {sentence(why)}"
    return f"**Class: {plain(told.kind)}.** As converted: {plain(why)}. {default}"


def size(told: Told) -> Iterator[str]:
    """Yield the table of parameters and costs."""
    after = known_costs(told.facts.get("after"))
    before = known_costs(told.facts.get("before"))
    yield from ("## What it is", "")
    rows = [["architecture", code(told.architecture)]]
    if told.is_adapter:
        rows = [["adapter type", code(told.config["peft_type"])]]
    if before and after:
        rows[0].append("")
    if after is not None:
        for name, key, shown in (
            ("parameters, total", "total_params", human_count),
            ("parameters, active per token", "active_params", human_count),
            ("FLOPs per token", "flops", human_count),
            ("of these in feed-forward networks", "ffn_flops", human_count),
            ("bytes of weights read per token", "weight_bytes", human_bytes),
        ):
            rows.append([name, *(shown(cost[key]) for cost in (after, before) if cost)])
    columns = ["", "this checkpoint", *([code(before.get("of"))] if before and after else [])]
    yield from table(columns, rows)
    if after is not None:
        context = after["context"]
        yield ""
        counted = _COUNTED_NULLED if told.nulled is not None else _COUNTED
        if told.is_adapter:
            counted = "With its base, which the folder does not hold. "
        elif not told.is_adaptive:
            counted = ""
        yield (
            f"{counted}FLOPs are at {context} tokens of context, bytes at batch 1.{_chosen(told)}"
        )
    yield ""


def _chosen(told: Told) -> str:
    """Return what a calibrated default of null experts spends, which costs do not tell; "" where
    there is none."""
    found = told.calibration
    if told.nulled is None or found is None or found.chosen is None:
        return ""
    compute = found.rows[found.chosen].compute
    flops = told.config["adaptive"]["reference"].get("flops_per_token")
    about = ""
    if is_number(flops):
        at = "" if found.length is None else f" at {found.length} tokens of context"
        about = f", about {human_count(round(compute * flops))}{at}"
    return (
        " The default that `adaconvert calibrate` chose is not in these numbers: it runs "
        f"{percent(compute)} of the reference's FLOPs per token{about}."
    )


def loading(told: Told) -> Iterator[str]:
    """Yield how to load it, both ways where there are two."""
    auto = told.auto_class
    yield from ("## Loading it", "")
    if not told.is_adaptive:
        yield from ("With stock `transformers`; no custom code:", "")
        yield from _python(
            f"from transformers import {auto or 'AutoModel'}",
            "",
            f"model = {auto or 'AutoModel'}.from_pretrained({_PATH})",
        )
        return
    call = auto or "AutoModel"
    yield "The folder carries the code it needs, for `torch` and `transformers` alone:"
    yield ""
    yield from _python(
        f"from transformers import {call}",
        "",
        f"model = {call}.from_pretrained({_PATH}, trust_remote_code=True)",
    )
    yield "With adaconvert installed, no code of the folder runs:"
    yield ""
    yield from _python(
        "import adaconvert.auto",
        f"from transformers import {call}",
        "",
        f"model = {call}.from_pretrained({_PATH})",
    )


def _python(*lines: str) -> Iterator[str]:
    yield from ("```python", *lines, "```", "")


def using(told: Told) -> Iterator[str]:
    """Yield how to run fewer experts, or how to train routers that are not trained."""
    if told.is_adaptive and adapted_words(told.config):
        yield from ("## Weighing the adapters", "")
        yield from _python(*knobs())
    if told.is_split:
        yield from ("## Running fewer experts", "")
        yield from _python(*_knobs(told))
        if told.calibration is None:
            biases = ", which gives the null biases of other budgets" if told.nulled else ""
            yield (
                "How much quality that costs depends on the model and must be measured: "
                f"`adaconvert evaluate`, then `adaconvert calibrate`{biases}."
            )
            yield ""
    elif told.is_mixture and not told.is_adaptive and routers(told.stages) == "untrained":
        yield from _balance(told)


def _knobs(told: Told) -> Iterator[str]:
    """Yield a line of code for each knob."""
    fraction = _fraction(told)
    if fraction is not None:
        yield f"model.set_compute({fraction:g})   # of the reference's FLOPs per token"
    if told.nulled is not None:
        yield 'model.set_select("all")   # what the source decides, no null experts'
        yield "model.set_select(None)   # as configured again"
    if told.nulled == 1:
        yield 'with model.set_select("all"):   # no null experts, until the block ends'
    else:
        yield f'with model.set_select("top-k", k={_half(told)}):   # experts, until the block ends'
    yield "    model.generate(...)"


def _fraction(told: Told) -> float | None:
    """Return a fraction to show that a checkpoint reaches; None where whole experts are too much
    and null biases are not calibrated."""
    if told.calibration is None and told.nulled is not None:
        adaptive = told.config["adaptive"]
        return next((n / 100 for n in range(90, 100) if _reaches(adaptive, n / 100)), None)
    least = 0.9 if told.calibration is None else min(r.compute for r in told.calibration.rows)
    return min(1.0, math.ceil(100 * least) / 100)


def _reaches(adaptive: Mapping[str, Any], fraction: float) -> bool:
    try:
        knobs_for({**adaptive, "calibration": None}, fraction)
    # out of reach, or not described as the runtime would have it
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return False
    return True


def _half(told: Told) -> int:
    """Return half of the experts of the first split network, or of those a token of the source
    runs."""
    if told.nulled is not None:
        return max(1, told.nulled // 2)
    sites = told.config["adaptive"].get("sites")
    for slots in sites.values() if isinstance(sites, dict) else ():
        split = slots.get("ffn") or (slots.get("linear") or {}).get("mlp") or {}
        count = split.get("experts", {}).get("count")
        if isinstance(count, int) and count > 1:
            return count // 2
    return 1


def _balance(told: Told) -> Iterator[str]:
    yield from ("## Training it", "")
    yield (
        "The load-balancing loss is switched off for serving (`output_router_logits: false`). "
        "When you train with `transformers`, TRL or another trainer, switch it on, or experts "
        "will starve; `adaconvert finetune` does."
    )
    yield ""
    coefficient = told.config.get("router_aux_loss_coef")
    known = is_number(coefficient)
    yield from _python(
        f"model = {told.auto_class}.from_pretrained({_PATH}, output_router_logits=True)",
        *([f"# config.router_aux_loss_coef is {coefficient}"] if known else []),
    )


def runtimes(told: Told) -> Iterator[str]:
    """Yield what each runtime does with a mixture or an adaptive checkpoint."""
    if not told.is_mixture:
        return
    try:
        found = verdicts(told.config)
    except AdaconvertError:
        return
    same = told.kind in _EXACT
    yield from ("## Where it runs", "")
    yield from table(
        ("runtime", "result", "why"),
        [
            (v.runtime, v.verdict, plain(v.why if same else _of_itself(v.why)).replace("|", "\\|"))
            for v in found
        ],
    )
    yield ""


def _of_itself(why: str) -> str:
    """Return a verdict on a result that is not the dense model."""
    return why.replace("as the dense model", "as this checkpoint defines")


def limits(told: Told) -> Iterator[str]:
    """Yield what does not hold, was not measured, or has to be known."""
    found = [*_state(told), *_notes(told)]
    yield from ("## Limits and notes", "")
    yield from (f"- {line}" for line in dict.fromkeys(found))
    yield f"- Whatever limits and biases {roots(told.stages)} has, this checkpoint has as well."
    yield ""


def _state(told: Told) -> Iterator[str]:
    state = routers(told.stages)
    if told.is_mixture and state == "untrained":
        yield "The routers are not trained."
    if told.stages[-1].method == "upcycle" and len(told.stages[-1].sources) == 1:
        yield "Copies of one expert only become different experts by training."
    if told.stages[-1].options.get("native") and told.kind in _EXACT:
        yield (
            "Every expert runs until `num_experts_per_tok` is lowered: a start for training, which "
            "saves nothing by itself."
        )
    if told.kind == "needs-training":
        yield "It needs training before it is of use."
    for reason in told.stale:
        yield (
            f"Its calibration table is left out: {plain(reason)}. Run `adaconvert calibrate` again."
        )
    if told.is_split and told.calibration is None and not told.stale:
        yield _UNCALIBRATED if told.nulled is None else _UNCALIBRATED_NULLED
    last = told.stages[-1]
    if last.method == "finetune" and not was_validated(last) and not told.record.get("quality"):
        yield "Only its training loss is known: no text that was held out has been measured."


def _notes(told: Told) -> Iterator[str]:
    calibrated = told.calibration is not None and told.calibration.chosen is not None
    for note in map(str, told.record["notes"]):
        # which files of the source were left out is nothing to a reader of this card
        foreign = is_note(note) or " not copied (" in note
        overtaken = calibrated and note.startswith(_UNTIL)
        if not foreign and not overtaken:
            yield sentence(note)


def recipe(told: Told) -> Iterator[str]:
    """Yield the recipe in full."""
    if told.recipe is not None:
        yield from ("## Recipe", "")
        yield f"Run it again with `adaconvert run {RECIPE} SOURCE DESTINATION`."
        yield ""
        yield from fenced(told.recipe.splitlines(), "yaml")
        yield ""


def license_section(told: Told) -> Iterator[str]:
    """Yield the licences of sources that do not have the same one."""
    entries = told.facts.get("licenses")
    if not isinstance(entries, list) or not entries:
        return
    yield from ("## License", "")
    yield "It was made of checkpoints that do not state the same licence:"
    yield ""
    for entry in entries:
        if isinstance(entry, dict):
            stated = license_of(entry)
            said = [plain(_joined(stated[key])) for key in LICENSE_KEYS if key in stated]
            yield f"- {code(entry.get('source'))}: {', '.join(said) or 'not stated'}"
    yield ""


def _joined(value: object) -> str:
    return listed(value) if isinstance(value, list) else str(value)
