"""The schema of `config.adaptive.sites[path].layer`: a block that some tokens skip.

    layer = {
        kind:      "mod" (tokens that run a block attend to one another alone; 2404.02258) or
                   "skip" (2410.13184, 2503.23798),
        index:     of the block,
        hidden:    d,
        router:    {width}: None for a linear one, else of its inner layer,
        predictor: None, or {width} of a causal predictor beside the router of "mod",
        gate:      s; what a block changes is weighted with 1 + s tanh(r), r the router's logit
                   without its bias,
        adapter:   None, or {width}: what skipped tokens run instead,
        kv:        "keep": skipped tokens write keys and values; "skip": nobody attends to them,
        keys:      paths inside the block of the matrices they run for that,
        capacity:  share of a sequence's tokens that training chooses; None where it does not,
        select:    {rule: "threshold", threshold}: a token runs the block where the logit that
                   decides is above; {rule: "all"}; {rule: "none"}; {rule: "capacity", capacity}:
                   the best of the whole sequence, which no generation can know,
    }

This file needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adaptive_checks import AdaptiveConfigError, check_keys, check_whole, is_number

KINDS = ("mod", "skip")
KV = ("keep", "skip")
#: rule -> the name of its value.
DEPTH_RULES: Mapping[str, str | None] = {
    "all": None,
    "none": None,
    "threshold": "threshold",
    "capacity": "capacity",
}
_LAYER = {
    *("kind", "index", "hidden", "router", "predictor", "gate", "adapter", "kv", "keys"),
    *("capacity", "select"),
}


def check_layer(where: str, spec: Any) -> None:
    """Refuse a description of a routed block that means nothing.

    Args:
        where: named in the message.
        spec: the "layer" slot of a site.

    Raises:
        AdaptiveConfigError: a key is missing or unknown, or a value is out of range.
    """
    check_keys(where, spec, _LAYER)
    missing = sorted(_LAYER - set(spec))
    if missing:
        raise AdaptiveConfigError(f"{where} lacks {', '.join(missing)}")
    for name, known in (("kind", KINDS), ("kv", KV)):
        if spec[name] not in known:
            listed = ", ".join(known)
            raise AdaptiveConfigError(f"{where}.{name} is {spec[name]!r}, known: {listed}")
    check_whole(f"{where}.index", spec["index"], None, least=0)
    check_whole(f"{where}.hidden", spec["hidden"], None)
    check_keys(f"{where}.router", spec["router"], {"width"})
    if spec["router"].get("width") is not None:
        check_whole(f"{where}.router.width", spec["router"]["width"], None)
    for part in ("predictor", "adapter"):
        if spec[part] is not None:
            check_keys(f"{where}.{part}", spec[part], {"width"})
            check_whole(f"{where}.{part}.width", spec[part].get("width"), None)
    if not is_number(spec["gate"]) or not 0 <= spec["gate"] < 1:
        raise AdaptiveConfigError(f"{where}.gate is {spec['gate']!r}, expected 0 or more, below 1")
    if spec["capacity"] is not None:
        _check_capacity(f"{where}.capacity", spec["capacity"])
    _check_parts(where, spec)
    check_rule(f"{where}.select", spec["select"])


def _check_parts(where: str, spec: Mapping[str, Any]) -> None:
    """Refuse parts that the kind of a block leaves without meaning."""
    keys = spec["keys"]
    named = isinstance(keys, list | tuple) and all(isinstance(key, str) for key in keys)
    if not named or bool(keys) != (spec["kv"] == "keep"):
        raise AdaptiveConfigError(
            f"{where}.keys is {keys!r}, expected the matrices behind kept keys and values, and "
            "none where they are not kept"
        )
    if spec["kind"] == "mod" and spec["kv"] != "skip":
        raise AdaptiveConfigError(f"{where}.kv is {spec['kv']!r}, expected 'skip' for kind mod")
    if spec["kind"] == "skip":
        for name in ("predictor", "capacity"):
            if spec[name] is not None:
                raise AdaptiveConfigError(f"{where}.{name} is of kind mod alone")
        if spec["gate"]:
            raise AdaptiveConfigError(f"{where}.gate is {spec['gate']!r}, expected 0 for kind skip")


def _check_capacity(where: str, value: Any) -> None:
    if not is_number(value) or not 0 < value <= 1:
        raise AdaptiveConfigError(
            f"{where} is {value!r}, expected a share above 0 and up to 1: with 0 no token runs"
        )


def check_rule(where: str, select: Any, paths: set[str] | None = None) -> None:
    """Refuse a rule of skipping that means nothing.

    Args:
        where: named in the message.
        select: {"rule", and its value}; where `paths` are given the value may be a mapping from
            these to numbers.
        paths: of the routed blocks.

    Raises:
        AdaptiveConfigError: unknown rule, or its value is missing or out of range.
    """
    if not isinstance(select, Mapping) or select.get("rule") not in DEPTH_RULES:
        rule = select.get("rule") if isinstance(select, Mapping) else select
        raise AdaptiveConfigError(f"{where}.rule is {rule!r}, known: {', '.join(DEPTH_RULES)}")
    name = DEPTH_RULES[select["rule"]]
    check_keys(where, select, {"rule", name or "rule"})
    if name is None:
        return
    given = select.get(name)
    each: Mapping[str, Any] = {"": given}
    if paths is not None and isinstance(given, Mapping):
        unknown = sorted(set(map(str, given)) - paths)
        if unknown:
            raise AdaptiveConfigError(f"{where}: no such block: {', '.join(unknown)}")
        each = given
    for path, value in each.items():
        place = f"{where}.{name}" + (f"[{path!r}]" if path else "")
        if name == "capacity":
            _check_capacity(place, value)
        elif not is_number(value):
            raise AdaptiveConfigError(f"{place} is {value!r}, expected a number")
