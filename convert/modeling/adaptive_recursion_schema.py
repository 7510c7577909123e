"""The schema of `config.adaptive.model.recursion`.

    recursion = {
        blocks:  path of the list of blocks,
        base:    for each of the L depths the depth whose matrices it uses: the first of its group,
        rank:    of the residuals; 0 for none, "full" for all a matrix can have,
        linears: paths of the shared linears inside a block,
        sharing: how depths were put into groups, one of `SHARINGS`,
        start:   what the shared matrices were made of, one of `STARTS`,
    }

Depths of a group share their matrices W'. Each of them has a residual of its own beside each:
`<linear>.residual.down` [r, in] and `.residual.up` [out, r], for W' x + up (down x). r is never
more than a matrix can have, min(in, out). A depth that is alone in its group has none. Norms,
biases and all else stay each depth's own. This file needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adaptive_checks import AdaptiveConfigError, check_keys, check_whole

SHARINGS = ("cycle", "sequence", "middle-cycle", "middle-sequence")
STARTS = ("average", "stepwise", "lower", "upper")
FULL = "full"
_RECURSION = {"blocks", "base", "rank", "linears", "sharing", "start"}


def check_recursion(where: str, recursion: Any) -> None:
    """Refuse a recursion that means nothing.

    Args:
        where: named in the message.
        recursion: `config.adaptive.model.recursion`.

    Raises:
        AdaptiveConfigError: a key is missing or unknown, or a value is out of range.
    """
    check_keys(where, recursion, _RECURSION)
    missing = sorted(_RECURSION - set(recursion))
    if missing:
        raise AdaptiveConfigError(f"{where} lacks {', '.join(missing)}")
    if not isinstance(recursion["blocks"], str) or not recursion["blocks"]:
        raise AdaptiveConfigError(f"{where}.blocks names a module, found {recursion['blocks']!r}")
    _check_base(f"{where}.base", recursion["base"])
    if recursion["rank"] != FULL:
        check_whole(f"{where}.rank", recursion["rank"], None, least=0)
    _check_linears(f"{where}.linears", recursion["linears"])
    for name, known in (("sharing", SHARINGS), ("start", STARTS)):
        if recursion[name] not in known:
            raise AdaptiveConfigError(
                f"{where}.{name} is {recursion[name]!r}, known: {', '.join(known)}"
            )


def _check_base(where: str, base: Any) -> None:
    """Hold every depth to the first depth of a group."""
    if not isinstance(base, list) or not base:
        raise AdaptiveConfigError(f"{where} is {base!r}, expected one number for each depth")
    for depth, first in enumerate(base):
        check_whole(f"{where}[{depth}]", first, depth, least=0)
        if base[first] != first:
            raise AdaptiveConfigError(
                f"{where}[{depth}] is {first}, a depth that itself uses the matrices of "
                f"{base[first]}"
            )


def _check_linears(where: str, linears: Any) -> None:
    is_list = isinstance(linears, list) and bool(linears)
    if not is_list or not all(isinstance(name, str) and name for name in linears):
        raise AdaptiveConfigError(f"{where} is {linears!r}, expected paths of linears in a block")
    if len(set(linears)) != len(linears):
        raise AdaptiveConfigError(f"{where} names a linear twice: {', '.join(linears)}")


def shared_depths(recursion: Mapping[str, Any]) -> dict[int, list[int]]:
    """Return the groups of two depths or more: the first depth -> all of them, ascending."""
    groups: dict[int, list[int]] = {}
    for depth, first in enumerate(recursion["base"]):
        groups.setdefault(first, []).append(depth)
    return {first: depths for first, depths in groups.items() if len(depths) > 1}


def rank_of(recursion: Mapping[str, Any], inputs: int, outputs: int) -> int:
    """Return r of a linear's residuals.

    Args:
        recursion: a checked description.
        inputs, outputs: of the linear.
    """
    most = min(inputs, outputs)
    return most if recursion["rank"] == FULL else min(int(recursion["rank"]), most)
