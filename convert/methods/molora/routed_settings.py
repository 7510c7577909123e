"""What the adapter_config.json of routed adapters says, held to what it may say.

The same rules as of `adapters.config.MoloraConfig`, which needs peft; here a damaged file is what a
user gave, and is told where it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from adaconvert.arch.adapters import IA3, LORA, READS, is_named
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError, check_gates

_NEEDED = ("target_modules", "num_experts", "r", "lora_alpha", "router", "select")
#: of numbers; no dtype holds what is further from zero.
_LARGEST = 1e38
_CHOICES: Mapping[str, tuple[object, ...]] = {
    "experts_kind": (LORA, IA3),
    "share": (None, "a"),
    "router.kind": ("linear", "none"),
    "router.reads": READS,
    "router.score": ("dot", "abs"),
    "router.norm": ("none", "layernorm"),
}
_ALL = "all-linear"


def check_settings(config: Mapping[str, Any], where: str) -> None:
    """Return only when an adapter_config.json describes routed adapters.

    Args:
        config: the file, of peft_type "MOLORA".
        where: name of the file in messages.

    Raises:
        SourceError: a key is missing, or its value means nothing.
    """
    for key in _NEEDED:
        if key not in config:
            raise SourceError(
                f"does not describe routed adapters: it has no {key}",
                where=where,
                hint="Write the adapter again: save_pretrained, or adaconvert molora.",
            )
    for key in ("num_experts", "r"):
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            _refuse(where, key, "a whole number above 0", value)
    if not _is_number(config["lora_alpha"]) or config["lora_alpha"] < 0:
        _refuse(where, "lora_alpha", "a number, 0 or more", config["lora_alpha"])
    _check_scaling(config, where)
    _check_choices(config, where)
    _check_modules(config, where)
    dropout = config.get("dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        _refuse(where, "dropout", "a number, 0 or more and below 1", dropout)
    if not isinstance(config["select"], dict):
        _refuse(where, "select", "an object", config["select"])
    try:
        check_gates("select", config["select"], config["num_experts"])
    except AdaptiveConfigError as error:
        raise SourceError(
            f"does not describe routed adapters: {escape(error)}", where=where
        ) from None


def check_named(config: Mapping[str, Any], paths: Iterable[str], where: str) -> None:
    """Return only when PEFT finds all linears that there are tensors for.

    It leaves out the tensors of others without a word, and computes something else.

    Args:
        config: checked.
        paths: of the linears.
        where: name of the file in messages.

    Raises:
        SourceError: `target_modules` does not name one.
    """
    wanted = config["target_modules"]
    if isinstance(wanted, str) and wanted.lower() == _ALL:
        return
    for path in paths:
        if not _names(wanted, path):
            raise SourceError(
                f"does not name {escape(path, 120)!r}, for which there are tensors",
                where=f"{where}: target_modules",
                found=escape(wanted, 80),
                hint="Write the adapter again: save_pretrained, or adaconvert molora.",
            )


def _names(wanted: str | list[str], path: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(is_named(path, name) for name in wanted)


def _check_scaling(config: Mapping[str, Any], where: str) -> None:
    scaling, count = config.get("scaling"), config["num_experts"]
    if scaling is None or _is_number(scaling):
        return
    if not isinstance(scaling, list) or len(scaling) != count or not all(map(_is_number, scaling)):
        _refuse(where, "scaling", f"null, a number or {count} numbers", scaling)


def _check_choices(config: Mapping[str, Any], where: str) -> None:
    router = config["router"]
    if not isinstance(router, dict) or "kind" not in router:
        _refuse(where, "router", "an object with a kind", router)
    found = {"experts_kind": config.get("experts_kind", LORA), "share": config.get("share")}
    found |= {f"router.{key}": value for key, value in router.items() if key != "scale"}
    for key, value in found.items():
        known = _CHOICES.get(key)
        if known is None:
            _refuse(where, "router", "kind, reads, score, norm and scale", key)
        if value not in known:
            _refuse(where, key, " or ".join(map(_shown, known)), value)
    if not _is_number(router.get("scale", 1.0)):
        _refuse(where, "router.scale", "a number", router["scale"])


def _check_modules(config: Mapping[str, Any], where: str) -> None:
    """Hold names of modules to a list of them, or a regular expression."""
    scaled = config.get("feedforward_modules")
    if config.get("experts_kind", LORA) == LORA and scaled is not None:
        _refuse(where, "feedforward_modules", "null with lora", scaled)
    for key, value in (
        ("target_modules", config["target_modules"]),
        ("feedforward_modules", scaled),
    ):
        if value is None and key == "feedforward_modules":
            continue
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                _refuse(where, key, "a regular expression", f"{value}: {error}")
        elif not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            _refuse(where, key, "a list of names, or a regular expression", value)


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < _LARGEST


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _refuse(where: str, key: str, expected: str, found: object) -> NoReturn:
    shown = repr(found) if isinstance(found, str) else _shown(found)
    raise SourceError(
        "does not describe routed adapters",
        where=f"{where}: {key}",
        expected=expected,
        found=escape(found if isinstance(found, dict | list) else shown, 60),
    )
