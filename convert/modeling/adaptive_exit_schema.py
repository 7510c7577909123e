"""The schema of `config.adaptive.model.exits`.

    exits = {
        kind:    "causal" | "classifier",
        blocks:  path of the list of blocks,
        tail:    {role: path of a module that follows them}, roles: "norm", "pooler", "head",
        network: name of the feed-forward network in a block, None where it is no module,
        scale:   factor on what blocks add to the residual stream,
        heads:   [{at, own, map, network, block, confidence}, ...] by `at`, ascending,
        decide:  {measure, thresholds, decay, patience},
        kv:      "recompute" | "propagate",
        draft:   None | {at, tokens, threshold, vocab},
        trunk:   None | digests of the blocks the heads were made for; may be left out,
    }

An exit lies after block `at` - 1: `at` blocks have run, 1 to L - 1; after the last of the L blocks
lies the model's own end. `own` names the parts of the tail it has
itself. `map` is an affine map in front of them (tuned lens), `network` a branch of the host block's
feed-forward network (EE-Tuning's MLP head), `block` a block of its own (EE-Tuning's Layer head),
`confidence` a trained classifier that says whether the exit can be trusted (CALM).

decide: `measure` of confidence, `thresholds` by exit, or None where an exit is never taken (taken
is strictly above the threshold); `decay` {"rate", "length"} lets thresholds fall with the position
(CALM), None for not. Of measure "patience" as many exits in a row as `patience` must agree with the
one before: in their choice (PABEE), or, where a threshold is given, by a similarity above it
(F-PABEE); with as many as there are exits none is taken.

kv: what later tokens see of blocks a token skipped. "recompute": exact keys and values, computed
later, for several tokens at once; "propagate": those of the state it left with (CALM).

draft: speculative decoding: exit `at` drafts up to `tokens`, or until its likeliest token is no
likelier than `threshold`; `vocab`, the number of tokens it chooses among, None for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .adaptive_checks import AdaptiveConfigError, check_keys, check_whole, is_number

#: measure of confidence -> range its thresholds lie in. "entropy" is 1 - entropy / log(classes),
#: so that of every measure more is surer.
MEASURES: Mapping[str, tuple[float, float]] = {
    "difference": (0.0, 1.0),
    "max": (0.0, 1.0),
    "entropy": (0.0, 1.0),
    "state": (-1.0, 1.0),
    "classifier": (0.0, 1.0),
    "patience": (0.0, 1.0),
}
TAIL = ("norm", "pooler", "head")
KV = ("recompute", "propagate")
_EXITS = {
    *("kind", "blocks", "tail", "network", "scale", "heads", "decide", "kv", "draft"),
}
_HEAD = {"at", "own", "map", "network", "block", "confidence"}
_DECIDE = {"measure", "thresholds", "decay", "patience"}


def check_exits(where: str, exits: Any) -> None:
    """Refuse exits that mean nothing.

    Args:
        where: named in the message.
        exits: `config.adaptive.model.exits`.

    Raises:
        AdaptiveConfigError: a key is missing or unknown, or a value is out of range.
    """
    _complete(where, exits, _EXITS, {"trunk"})
    if exits["kind"] not in ("causal", "classifier"):
        raise AdaptiveConfigError(f"{where}.kind is {exits['kind']!r}, known: causal, classifier")
    check_keys(f"{where}.tail", exits["tail"], set(TAIL))
    paths = [exits["blocks"], *exits["tail"].values()]
    if not all(isinstance(path, str) and path for path in paths):
        raise AdaptiveConfigError(f"{where}: blocks and tail name modules, found {paths}")
    if not is_number(exits["scale"]):
        raise AdaptiveConfigError(f"{where}.scale is {exits['scale']!r}, expected a number")
    heads = exits["heads"]
    if not isinstance(heads, list) or not heads:
        raise AdaptiveConfigError(f"{where}.heads is {heads!r}, expected at least one exit")
    for number, head in enumerate(heads):
        _check_head(f"{where}.heads[{number}]", head, exits)
    places = [head["at"] for head in heads]
    if places != sorted(set(places)):
        raise AdaptiveConfigError(f"{where}.heads are at {places}, expected ascending, each once")
    check_decide(f"{where}.decide", exits["decide"], len(heads))
    check_trust(f"{where}.decide", exits["decide"], heads)
    if exits["kv"] not in KV:
        raise AdaptiveConfigError(f"{where}.kv is {exits['kv']!r}, known: {', '.join(KV)}")
    trunk = exits.get("trunk")
    listed = isinstance(trunk, list) and all(isinstance(digest, str) for digest in trunk)
    if trunk is not None and not listed:
        raise AdaptiveConfigError(f"{where}.trunk is {trunk!r}, expected digests or null")
    if exits["draft"] is not None:
        check_draft(f"{where}.draft", exits["draft"], places)


def _complete(where: str, found: Any, keys: set[str], more: Iterable[str] = ()) -> None:
    check_keys(where, found, keys.union(more))
    missing = sorted(keys - set(found))
    if missing:
        raise AdaptiveConfigError(f"{where} lacks {', '.join(missing)}")


def _check_head(where: str, head: Any, exits: Mapping[str, Any]) -> None:
    _complete(where, head, _HEAD)
    check_whole(f"{where}.at", head["at"], None)
    for name in ("map", "network", "block", "confidence"):
        if not isinstance(head[name], bool):
            raise AdaptiveConfigError(f"{where}.{name} is {head[name]!r}, expected a boolean")
    own = head["own"]
    if not isinstance(own, list) or set(own) - set(exits["tail"]):
        known = ", ".join(exits["tail"])
        raise AdaptiveConfigError(f"{where}.own is {own!r}, known: {known}")
    if head["network"] and not exits["network"]:
        raise AdaptiveConfigError(f"{where}.network: the blocks have no such module")


def check_decide(where: str, decide: Any, count: int) -> None:
    """Refuse a rule of leaving that means nothing.

    Args:
        where: named in the message.
        decide: {"measure", "thresholds", "decay", "patience"}.
        count: exits.

    Raises:
        AdaptiveConfigError: a key is missing or unknown, or a value is out of range.
    """
    _complete(where, decide, _DECIDE)
    measure = decide["measure"]
    if not isinstance(measure, str) or measure not in MEASURES:
        raise AdaptiveConfigError(f"{where}.measure is {measure!r}, known: {', '.join(MEASURES)}")
    low, high = MEASURES[measure]
    found = decide["thresholds"]
    right = isinstance(found, list) and len(found) == count
    if not right or not all(t is None or (is_number(t) and low <= t <= high) for t in found):
        raise AdaptiveConfigError(
            f"{where}.thresholds is {found!r}, expected {count}, each null or {low:g} to {high:g}"
        )
    if decide["decay"] is not None:
        _complete(f"{where}.decay", decide["decay"], {"rate", "length"})
        check_whole(f"{where}.decay.length", decide["decay"]["length"], None)
        if not is_number(decide["decay"]["rate"]) or decide["decay"]["rate"] < 0:
            raise AdaptiveConfigError(f"{where}.decay.rate is {decide['decay']['rate']!r}")
    if measure == "patience":
        check_whole(f"{where}.patience", decide["patience"], count)


def check_trust(where: str, decide: Mapping[str, Any], heads: list[Any]) -> None:
    """Refuse a rule that asks classifiers of confidence which exits do not have.

    Args:
        where: named in the message.
        decide: a checked rule.
        heads: the exits' descriptions.

    Raises:
        AdaptiveConfigError: an exit with a threshold has no classifier.
    """
    if decide["measure"] != "classifier":
        return
    for head, level in zip(heads, decide["thresholds"], strict=True):
        if level is not None and not head["confidence"]:
            raise AdaptiveConfigError(
                f"{where}: the exit after {head['at']} blocks has no classifier of confidence"
            )


def check_draft(where: str, draft: Any, places: list[int]) -> None:
    """Refuse a way of drafting that means nothing.

    Args:
        where: named in the message.
        draft: {"at", "tokens", "threshold", "vocab"}.
        places: where the exits are.

    Raises:
        AdaptiveConfigError: a key is missing or unknown, or a value is out of range.
    """
    _complete(where, draft, {"at", "tokens", "threshold", "vocab"})
    if draft["at"] not in places:
        raise AdaptiveConfigError(f"{where}.at is {draft['at']!r}, exits are at {places}")
    check_whole(f"{where}.tokens", draft["tokens"], 512)
    threshold = draft["threshold"]
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise AdaptiveConfigError(f"{where}.threshold is {threshold!r}, expected 0 to 1")
    if draft["vocab"] is not None:
        check_whole(f"{where}.vocab", draft["vocab"], None)
