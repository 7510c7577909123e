"""Which linears get adapters: what names choose, as PEFT reads `target_modules`; near misses."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from adaconvert.arch.adapters import (
    DOWN,
    LORA,
    ROLES,
    block_of,
    is_named,
    linears,
    outer_linears,
)
from adaconvert.arch.base import ModelSpec
from adaconvert.errors import OptionError
from adaconvert.io.names import escape

ALL_LINEAR = "all-linear"
#: what MoV scales: keys, values and hidden units (2309.05444, section 3.1).
_IA3_ROLES = ("k", "v", "qkv", "qkv_by_head", "kv_up", *DOWN)


def default_targets(spec: ModelSpec, kind: str = LORA) -> tuple[str, ...]:
    """Return the linears that get adapters unless others are named.

    Args:
        spec: the model.
        kind: "lora": all of the blocks (2309.05444, section 4); "ia3": what gives keys and values,
            and what reads the hidden units.
    """
    roles = ROLES if kind == LORA else _IA3_ROLES
    return tuple(path for path, linear in linears(spec).items() if linear.role in roles)


def targets(spec: ModelSpec, wanted: str | Sequence[str] | None, kind: str = LORA) -> list[str]:
    """Return the paths of the linears a choice names, in the order of the modules.

    Args:
        spec: the model.
        wanted: as PEFT reads `target_modules`: a regular expression over whole paths, "all-linear",
            or names (comma-separated in a text), each a path or what one ends with; None for
            `default_targets`.
        kind: "lora" or "ia3".

    Raises:
        OptionError: nothing is found, a name finds nothing, or a head or an expert is named.
    """
    known = linears(spec)
    if wanted is None:
        return list(default_targets(spec, kind))
    if wanted == ALL_LINEAR:
        return list(known)
    names = _names(wanted)
    if names is None:
        found = [path for path in known if _fullmatch(str(wanted), path)]
        if not found:
            raise _unknown(spec, str(wanted), "matches the path of no linear")
        return found
    for name in names:
        if not any(is_named(path, name) for path in known):
            raise _unknown(spec, name, _why_unknown(spec, name))
    return [path for path in known if any(is_named(path, name) for name in names)]


def _names(wanted: str | Sequence[str]) -> list[str] | None:
    """Return the names a choice lists, None for a regular expression."""
    if not isinstance(wanted, str):
        return list(wanted)
    names = [part.strip() for part in wanted.split(",")]
    plain = all(re.fullmatch(r"\w+(\.\w+)*", name) for name in names)
    return names if plain else None


def _fullmatch(pattern: str, path: str) -> bool:
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise OptionError(
            f"is no regular expression: {error}", where="--target-modules", found=escape(pattern)
        ) from None


def _why_unknown(spec: ModelSpec, name: str) -> str:
    if any(is_named(path, name) for path in outer_linears(spec)):
        return "is a head, outside the blocks, which gets no adapters"
    experts = {t.name.rpartition(".weight")[0] for t in spec.tensors if t.expert is not None}
    fused = {t.name.rpartition(".weight")[0] for t in spec.tensors if t.role.startswith("expert_")}
    if any(is_named(path, name) or f".{name}." in path for path in experts | fused):
        return "is in the experts of a mixture, which are rows of one parameter and no linears"
    if any(is_named(t.name.removesuffix(".weight"), name) for t in spec.tensors):
        return "is no linear"
    return "is the end of no linear's path"


def _unknown(spec: ModelSpec, name: str, why: str) -> OptionError:
    near = near_names(spec, name)
    return OptionError(
        f"{escape(name, 80)!r} {why}",
        where="--target-modules",
        expected=", ".join(tails(spec)),
        hint=f"Did you mean {', '.join(near)}?" if near else None,
    )


def tails(spec: ModelSpec) -> list[str]:
    """Return what the paths of linears have behind their block, each once."""
    found = [path.removeprefix(block_of(path) + ".") for path in linears(spec)]
    return list(dict.fromkeys(found))


def near_names(spec: ModelSpec, name: str) -> list[str]:
    """Return the names of linears that look like one there is not: endings first, then parts."""
    ends = list(dict.fromkeys(tail.rpartition(".")[2] for tail in tails(spec)))
    asked = name.rpartition(".")[2].lower()
    near = difflib.get_close_matches(asked, [end.lower() for end in ends], n=4, cutoff=0.5)
    parts = [end for end in ends if len(asked) > 1 and asked in end.lower()]
    found = [*near, *parts]
    return list(dict.fromkeys(end for low in found for end in ends if end.lower() == low.lower()))


def named_by(spec: ModelSpec, paths: Sequence[str]) -> list[str]:
    """Return the shortest entries of PEFT's `target_modules` that name just these linears.

    Last names where they do, then what follows the block, then whole paths.
    """
    others = {*linears(spec), *outer_linears(spec)} - set(paths)
    last = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    inner = list(dict.fromkeys(path.removeprefix(block_of(path) + ".") for path in paths))
    for names in (last, inner):
        if not any(is_named(other, name) for other in others for name in names):
            return names
    return list(paths)
