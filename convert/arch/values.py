"""Reading config.json through a family's keys: every value is checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping

from adaconvert.arch import expressions
from adaconvert.arch.family import Family, Key
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

WHERE = "config.json"
Values = dict[str, object]

#: beyond what any published model has by a wide margin; keeps a typo from filling the memory.
_LIMITS = {"layers": 4096, "experts": 65536, "positions": 2**31}
_LIMIT = 2**24
_KINDS = {
    "size": "a whole number of at least 1",
    "count": "a whole number of at least 0",
    "flag": "true or false",
    "number": "a finite number",
    "text": "a text",
    "list": "a list of whole numbers",
    "labels": "a mapping of labels, or how many there are",
    "side": "a whole number of at least 1, or the same one twice",
}


def read(family: Family, config: Mapping[str, object], flags: tuple[str, ...] = ()) -> Values:
    """Return every key of `family` by our own name, defaults filled in, all checked.

    Raises:
        SourceError: a value has the wrong type, is out of range, contradicts another or does not
            divide.
    """
    values: Values = {"never": False, "always": True, **_flags(family, flags)}
    for name, key in family.keys.items():
        values[name] = _value(family, name, key, config, values)
    in_force = bool(family.window) and expressions.holds(family.window, values)
    values["windowed"] = in_force and values["window"] is not None
    for check in ("heads/kv_heads", *family.checks):
        if all(name in values for name in expressions.names_in(check)):
            compute(family, check, values)
    _check_top_k(family, values)
    _refuse(family, values)
    return values


def compute(family: Family, expression: str, values: Mapping[str, object]) -> int:
    """Return the whole number an expression stands for.

    Raises:
        SourceError: a division does not come out even.
    """
    try:
        result = expressions.evaluate(expression, values)
    except expressions.UnevenDivisionError as error:
        keys = explain(family, expressions.names_in(expression), values)
        raise SourceError(f"{error} ({keys})", where=WHERE) from None
    if not isinstance(result, int):
        raise ValueError(f"{family.model_type}: {expression!r} is no size")
    return result


def explain(family: Family, names: tuple[str, ...], values: Mapping[str, object]) -> str:
    """Return "key=value, key=value" for our names, in the words of config.json."""
    said: dict[str, object] = {}
    for name in names:
        key = family.keys.get(name)
        if key is not None and key.name:
            said[key.name] = values.get(name)
        elif key is not None:
            inner = expressions.names_in(key.fallback)
            said |= {family.keys[part].name: values.get(part) for part in inner}
    return ", ".join(f"{key}={str(value).lower()}" for key, value in said.items())


def _flags(family: Family, flags: tuple[str, ...]) -> Values:
    every = {flag for known in family.architectures.values() for flag in known}
    return {flag: flag in flags for flag in every}


def _check_top_k(family: Family, values: Values) -> None:
    if "top_k" in values and expressions.holds("experts > 0 and top_k > experts", values):
        stated = explain(family, ("experts", "top_k"), values)
        raise SourceError(f"more experts per token than there are ({stated})", where=WHERE)


def _refuse(family: Family, values: Values) -> None:
    for condition, why in family.refusals.items():
        if expressions.holds(condition, values):
            stated = explain(family, expressions.names_in(condition), values)
            raise SourceError(f"{stated}: {why}", where=WHERE)


def _value(
    family: Family, name: str, key: Key, config: Mapping[str, object], values: Values
) -> object:
    stated, found = _stated(key, config)
    if found is not None and not (type(found) is int and found == key.dead):
        return _checked(name, stated, key, found)
    if key.fallback:
        return _derived(family, key, values)
    if key.nullable:
        return None
    return key.default if key.kind == "list" else _checked(name, stated, key, None)


def _derived(family: Family, key: Key, values: Values) -> int:
    size = compute(family, key.fallback, values)
    if key.kind == "size" and size < 1:
        stated = explain(family, expressions.names_in(key.fallback), values)
        raise SourceError(f"{stated} leaves nothing of {key.fallback}", where=WHERE)
    return size


def _stated(key: Key, config: Mapping[str, object]) -> tuple[str, object]:
    present = [(name, config[name]) for name in (key.name, *key.aliases) if name in config]
    if not present:
        return key.name, key.default
    given = [(name, value) for name, value in present if value is not None]
    if not given:
        return present[0]
    for other, twin in given[1:]:
        if twin != given[0][1] and key.kind != "labels":
            raise SourceError(
                f"{given[0][0]} and {other} mean the same and disagree",
                where=WHERE,
                expected=f"{given[0][0]}={_show(given[0][1])}",
                found=f"{other}={_show(twin)}",
            )
    return given[0]


def _checked(name: str, stated: str, key: Key, found: object) -> object:
    if not _fits(key, found):
        raise SourceError(
            f"{stated} is not usable", where=WHERE, expected=_KINDS[key.kind], found=_show(found)
        )
    if key.kind == "number" and isinstance(found, int):
        return float(found)
    if key.kind == "side" and isinstance(found, list):
        return found[0]
    if isinstance(found, str):
        return key.renamed.get(found, found)
    size = len(found) if key.kind == "labels" and isinstance(found, Mapping) else found
    if key.kind in {"size", "count", "labels"} and isinstance(size, int):
        _check_limit(stated, size, _LIMITS.get(name, _LIMIT))
    return size


def _check_limit(stated: str, size: int, limit: int) -> None:
    if size > limit:
        raise SourceError(
            f"{stated} is larger than any model's",
            where=WHERE,
            expected=f"at most {limit}",
            found=size,
        )


def _show(value: object) -> str:
    return "null or no value" if value is None else escape(repr(value), 60)


def _fits(key: Key, found: object) -> bool:
    match key.kind:
        case "size":
            return _is_whole(found, 1)
        case "count":
            return _is_whole(found, 0)
        case "flag":
            return isinstance(found, bool)
        case "number":
            return _is_number(found)
        case "text":
            return isinstance(found, str)
        case "labels":
            return isinstance(found, Mapping) or _is_whole(found, 1)
        case "side":
            sides = found if isinstance(found, list) and len(found) == 2 else [found]
            return all(_is_whole(side, 1) and side == sides[0] for side in sides)
        case "list":
            return isinstance(found, list) and all(type(item) is int for item in found)
    raise ValueError(f"{key.name}: unknown kind {key.kind!r}")


def _is_whole(found: object, least: int) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found >= least


def _is_number(found: object) -> bool:
    if isinstance(found, bool) or not isinstance(found, int | float):
        return False
    # a whole number too large for a float is none a model could use
    return math.isfinite(found) if isinstance(found, float) else abs(found) < 2**63
