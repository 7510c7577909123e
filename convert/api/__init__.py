"""The documented Python API: `convert`, `d2dmoe`, `unmoefy`, `inspect`, `inspect_activations`,
`plan`, `verify`, `evaluate`, `finetune`, `calibrate`, `card`, `push`, `run`.

Each returns an object with `to_json()` (plain data) and `lines()` (text for people); each raises an
`AdaconvertError` whose message says what, where, expected, found and what to do.
"""

from __future__ import annotations

from adaconvert.api.converting import convert, inspect, inspect_activations, plan, unmoefy, verify
from adaconvert.api.measuring import calibrate, evaluate
from adaconvert.api.publishing import card, push, run
from adaconvert.api.training import d2dmoe, finetune

__all__ = [
    "calibrate",
    "card",
    "convert",
    "d2dmoe",
    "evaluate",
    "finetune",
    "inspect",
    "inspect_activations",
    "plan",
    "push",
    "run",
    "unmoefy",
    "verify",
]
