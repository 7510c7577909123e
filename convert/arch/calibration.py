"""Whether the calibration table in a config.json still belongs to the checkpoint it lies in."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

#: what transformers changes when it saves a config that means the same.
_VOLATILE: Final = ("transformers_version", "_name_or_path", "auto_map")


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the sha256 of what a config.json says besides its calibration and default selections.

    Keys that transformers rewrites without a change of meaning are left out.
    """
    bare = {key: value for key, value in config.items() if key not in _VOLATILE}
    adaptive = copy.deepcopy(bare.get("adaptive")) or {}
    adaptive.pop("calibration", None)
    for slots in adaptive.get("sites", {}).values():
        slots.get("ffn", {}).pop("select", None)
        (slots.get("linear", {}).get("mlp") or {}).pop("select", None)
    # rows of a table say all of how tokens leave; these are what holds without one
    exits = (adaptive.get("model") or {}).get("exits") or {}
    for name in ("decide", "kv"):
        exits.pop(name, None)
    bare["adaptive"] = adaptive
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def table_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the calibration table of a config.json, None when there is none."""
    adaptive = config.get("adaptive")
    table = adaptive.get("calibration") if isinstance(adaptive, dict) else None
    return table if isinstance(table, dict) and isinstance(table.get("digests"), dict) else None


def stale_reasons(config: Mapping[str, Any], weights: str | None) -> list[str]:
    """Return why the table of a config.json no longer holds; empty when it does.

    Args:
        config: with a calibration table.
        weights: sha256 over the tensors, see `io.digest.digest_of_digests`; None to leave them.
    """
    table = table_of(config)
    digests = {} if table is None else table["digests"]
    reasons = []
    if weights is not None and digests.get("weights") != weights:
        reasons.append("the weights have changed since")
    try:
        same = digests.get("config") == config_digest(config)
    except (AttributeError, TypeError):
        # sites that are no such thing
        same = False
    return reasons if same else [*reasons, "config.json has changed since"]
