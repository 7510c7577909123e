"""What a card tells of early exits: those an adaptive checkpoint has, and a stock one's drafts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from adaconvert.arch.exits import CAUSAL, exits_of, is_taken
from adaconvert.errors import AdaconvertError
from adaconvert.export.card_text import fenced, is_number, listed, plain

if TYPE_CHECKING:
    from adaconvert.export.card_stages import Stage
    from adaconvert.export.card_told import Told

#: method whose stages make exits.
METHOD: Final = "early-exit"
_PARTS: Final = {
    "map": "an affine map",
    "network": "a branch of its block's feed-forward network",
    "block": "a block",
    "confidence": "a classifier of its own confidence",
}
_TAIL: Final = {"norm": "a norm", "pooler": "a pooler", "head": "an output matrix"}
#: stages that leave a stock checkpoint's settings for drafting as they are.
_KEEP: Final = ("finetune", "calibrate")


def found_exits(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the exits of a config.json; None where there are none that can be read."""
    adaptive = config.get("adaptive")
    try:
        return exits_of(adaptive if isinstance(adaptive, dict) else None)
    except AdaconvertError:
        return None


def exit_words(config: Mapping[str, Any]) -> str:
    """Return what exits a checkpoint's config.json describes, in words; "" for none."""
    exits = found_exits(config)
    if exits is None:
        return ""
    kinds = list(dict.fromkeys(_parts(head) for head in exits["heads"]))
    each = kinds[0] if len(kinds) == 1 else "parts of their own that differ"
    return f"early exits after {_after([head['at'] for head in exits['heads']])}, with {each}"


def _after(places: Sequence[object]) -> str:
    """Return where exits lie, in words."""
    count = "block" if [str(place) for place in places] == ["1"] else "blocks"
    return f"{listed([plain(place) for place in places])} {count}"


def _parts(head: Mapping[str, Any]) -> str:
    """Return what an exit has of its own, in words."""
    found = [_TAIL[role] for role in head["own"] if role in _TAIL]
    found += [words for part, words in _PARTS.items() if head.get(part) is True]
    return listed(found) if found else "nothing of their own"


def section(told: Told) -> Iterator[str]:
    """Yield how exits are used; nothing where there are none."""
    exits = found_exits(told.config)
    if exits is not None:
        yield from ("## Leaving early", "")
        yield from fenced(list(_knobs(exits)), "python")
        yield from ("", _state(exits), "")
    drafted = stock_draft(told.stages) if not told.is_adaptive else None
    if drafted is not None:
        yield from ("## Drafting", "")
        call = f"model.generate(**inputs, assistant_early_exit={drafted})"
        yield from fenced([f"{call}   # stock transformers, one sequence at a time"], "python")
        yield ""
        yield (
            "It drafts with the blocks in front of that exit, and the whole model checks: the text "
            "is the one it would give without. How many tokens to draft is in "
            "generation_config.json."
        )
        yield ""


def stock_draft(stages: Sequence[Stage]) -> int | None:
    """Return the exit a stock checkpoint drafts with; None where nothing says it does."""
    for stage in reversed(stages):
        if stage.method == METHOD:
            options = stage.options
            first = str(options.get("exits") or "").partition(",")[0]
            at = options.get("draft_exit") or (int(first) if first.isdecimal() else None)
            return at if type(at) is int else None
        if stage.method not in _KEEP:
            return None
    return None


def _knobs(exits: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line of code for each way of using exits."""
    yield "model.set_exits(thresholds=0.9)   # leave where an exit is surer than this"
    yield "model.set_exits(thresholds=None)   # never leave"
    yield "model.reset_exits()   # as configured again"
    if exits["kind"] == CAUSAL:
        draft = exits["draft"] or {}
        at = plain(draft.get("at") or exits["heads"][0]["at"])
        yield f"model.generate(**inputs, draft_exit={at})   # draft there, check with the whole"


def _state(exits: Mapping[str, Any]) -> str:
    """Return whether tokens leave as configured."""
    decide = exits["decide"]
    measure = plain(decide["measure"])
    if not is_taken(exits):
        return (
            f"As configured no exit is taken, and the model computes what it did without them. "
            f"What says how sure an exit is: `{measure}`. `adaconvert calibrate` sets thresholds "
            "for a stated risk."
        )
    if measure == "patience":
        return f"As configured a text leaves once {plain(decide['patience'])} exits in a row agree."
    limits = [f"{t:g}" if is_number(t) else "never" for t in decide["thresholds"]]
    return f"As configured it leaves where `{measure}` is above {', '.join(limits)}, by exit."


def became(options: Mapping[str, Any]) -> str:
    """Return what `early-exit` made of a model."""
    return f"with exits after {_after(str(options.get('exits') or '').split(','))}"


def stage_sentence(stage: Stage) -> str:
    """Return what `early-exit` did."""
    head = plain(stage.options.get("head"))
    return f"{stage.names} {became(stage.options)}, head {head}"
