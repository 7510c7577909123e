"""What a card tells of adapters: those of a PEFT folder, and those inside a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from adaconvert.export.card_text import code, fenced, plain

if TYPE_CHECKING:
    from adaconvert.export.card_told import Told

#: PEFT's task -> auto class of transformers.
_CLASSES: Final = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_READS: Final = {
    "module": "a router of each linear's own, on its input",
    "layer": "one router a block, on the input of the block",
    "shared": "one router for the model, on the input of every block",
}
#: kinds of adapters, or ways to weigh them, that are all named.
_MOST_KINDS: Final = 2
_PATH: Final = '"path/or/hub-id"'


def auto_class(config: Mapping[str, Any]) -> str:
    """Return the class that loads the base of an adapter folder with its head."""
    mapped = config.get("auto_mapping")
    named = mapped.get("base_model_class") if isinstance(mapped, dict) else None
    if isinstance(named, str) and named.isidentifier():
        return named
    return _CLASSES.get(str(config.get("task_type")), "AutoModel")


def words(config: Mapping[str, Any]) -> str:
    """Return what an adapter_config.json describes, in words."""
    rank = _rank_words([config.get("r"), *_pattern(config)])
    if config.get("peft_type") != "MOLORA":
        return f"one LoRA of {rank}"
    count = plain(config.get("num_experts"))
    if config.get("experts_kind") == "ia3":
        return f"{count} vectors that scale, per linear"
    tied = " that share A" if config.get("share") else ""
    return f"{count} LoRA of {rank} per linear{tied}"


def _pattern(config: Mapping[str, Any]) -> list[Any]:
    """Return the ranks an adapter_config.json has for some linears alone."""
    found = config.get("rank_pattern")
    return list(found.values()) if isinstance(found, dict) else []


def _rank_words(ranks: Iterable[Any]) -> str:
    """Return "rank 8", or "rank 3 to 5" where adapters differ."""
    found = list(ranks)
    if not all(type(rank) is int for rank in found) or min(found) == max(found):
        return f"rank {plain(found[0])}"
    return f"rank {min(found)} to {max(found)}"


def routing(config: Mapping[str, Any]) -> str:
    """Return how adapters are weighed, in words; "" where there is one."""
    router, select = config.get("router"), config.get("select")
    if not isinstance(router, dict) or not isinstance(select, dict):
        return ""
    number = next((f" {name}={select[name]:g}" for name in ("k", "p") if name in select), "")
    how = f"{plain(select.get('rule'))}{number}"
    if router.get("kind") == "none":
        return f"weighed alike ({how})"
    return f"weighed token by token ({how}) by {_READS.get(str(router.get('reads')), 'routers')}"


def intro(told: Told) -> str:
    """Return one sentence on what a PEFT folder is."""
    how = routing(told.config)
    return (
        f"Adapters for {code(_base(told))}: {words(told.config)}{', ' if how else ''}{how}. Made "
        f"by adaconvert {plain(told.record['adaconvert'])}."
    )


def _base(told: Told) -> object:
    """Return what the base is called; a path of another machine is none of a reader's business."""
    named = told.facts.get("base")
    if isinstance(named, str):
        return plain(named)
    sources = told.stages[0].sources
    return sources[0].get("label") if sources else "its base"


def loading(told: Told) -> Iterator[str]:
    """Yield how to load a PEFT folder."""
    call = auto_class(told.config)
    yield from ("## Loading it", "")
    if told.config.get("peft_type") != "MOLORA":
        yield "A stock LoRA: with `peft`, or any runtime that takes LoRA adapters:"
        yield ""
        yield from _python(
            "from peft import PeftModel",
            f"from transformers import {call}",
            "",
            f'base = {call}.from_pretrained("path/or/hub-id/of/the/base")',
            f"model = PeftModel.from_pretrained(base, {_PATH})",
        )
        return
    yield "With `peft` and `adaconvert`, which adds the adapter type MOLORA to it:"
    yield ""
    yield from _python(
        "import adaconvert.auto  # without this, peft fails with KeyError: 'MOLORA'",
        "from peft import PeftModel",
        f"from transformers import {call}",
        "",
        f'base = {call}.from_pretrained("path/or/hub-id/of/the/base")',
        f"model = PeftModel.from_pretrained(base, {_PATH})",
    )
    yield (
        "After that import `load_adapter`, several adapters side by side and "
        "`AutoPeftModelForCausalLM` work as with any adapter. `adaconvert molora THIS DST "
        "--standalone` writes a checkpoint that needs neither package, `--as-plain-lora` a stock "
        "LoRA with uniform weights."
    )
    yield ""


def knobs() -> Iterator[str]:
    """Yield a line of code for each way of weighing the adapters of a checkpoint."""
    yield 'model.set_adapters("uniform")   # every adapter alike'
    yield "model.set_adapters(None)   # as configured again"
    yield 'with model.set_adapters("top-k", k=1):   # one adapter a token, until the block ends'
    yield "    model.generate(...)"


def adapted_words(config: Mapping[str, Any]) -> str:
    """Return what adapters a checkpoint's config.json describes, in words; "" for none."""
    adaptive = config.get("adaptive")
    sites = adaptive.get("sites") if isinstance(adaptive, dict) else None
    slots = [
        slots["linear"]
        for slots in (sites.values() if isinstance(sites, dict) else ())
        if isinstance(slots, dict) and "adapters" in (slots.get("linear") or {})
    ]
    if not slots:
        return ""
    said = [_said(slot) for slot in slots]
    ranks = [one["r"] for one in said if one["experts_kind"] != "ia3"]
    # ranks that differ make no kinds
    what = _either(words({**one, "rank_pattern": dict(enumerate(ranks))}) for one in said)
    return f"{what} on {len(slots)} linears, {_either(map(routing, said))}"


def _said(slot: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapters of one linear as an adapter_config.json has them."""
    adapters = slot["adapters"]
    return {
        "peft_type": "MOLORA",
        "num_experts": adapters.get("count"),
        "r": adapters.get("rank"),
        "experts_kind": adapters.get("kind"),
        "share": adapters.get("share"),
        "router": slot.get("router"),
        "select": slot.get("select"),
    }


def _either(texts: Iterable[str]) -> str:
    """Return the text that holds for all, both of two, or the first of several."""
    found = list(dict.fromkeys(texts))
    if len(found) > _MOST_KINDS:
        return f"{found[0]} or one of {len(found) - 1} other kinds"
    return " or ".join(found)


def _python(*lines: str) -> Iterator[str]:
    yield from fenced(list(lines), "python")
    yield ""
