"""What a calibration table of exits is still right for."""

from __future__ import annotations

import copy
from typing import Any

from adaconvert.arch.calibration import config_digest
from adaconvert.testing.exits_by_hand import exits_of


def config(**exits: Any) -> dict[str, Any]:
    content = exits_of("llama", [1, 3], **exits)
    return {"hidden_size": 32, "adaptive": {"sites": {}, "model": {"exits": content}}}


def test_rules_of_leaving_are_defaults_that_a_table_does_not_depend_on() -> None:
    plain = config()
    digest = config_digest(plain)
    decide = {"measure": "state", "thresholds": [0.5, None], "decay": None, "patience": None}
    assert config_digest(config(decide=decide, kv="propagate")) == digest
    # nothing was taken from what was looked at
    assert plain == config()


def test_the_exits_themselves_are_not() -> None:
    digest = config_digest(config())
    assert config_digest(config(scale=0.5)) != digest
    other = copy.deepcopy(config())
    other["adaptive"]["model"]["exits"]["heads"][0]["at"] = 2
    assert config_digest(other) != digest
    assert config_digest({"adaptive": {"sites": {}, "model": None}}) != digest
