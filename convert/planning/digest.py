"""The identity of a plan: two runs with equal digests write equal bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from adaconvert import __version__
from adaconvert.planning.ops import Plan


def _plain(value: object) -> object:
    """Return `value` as JSON data; every dataclass carries its class name."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def run_digest(plan: Plan, max_shard_size: int) -> str:
    """Return the identity of a run: its plan, how it is cut into files, and the program."""
    return plan_digest(plan, max_shard_size=max_shard_size, version=__version__)


def plan_digest(plan: Plan, **extra: object) -> str:
    """Return the sha256 of the whole plan in canonical JSON.

    Args:
        plan: any plan.
        extra: what else decides the bytes written, such as the shard size.
    """
    data = {"plan": _plain(plan), "extra": _plain(extra)}
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
