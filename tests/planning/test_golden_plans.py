"""Plans of small models by digest: a change here changes the bytes of users' outputs, and must be
meant.

Refresh with `pytest --update-golden` and say so under "Changes" in README.
"""

from __future__ import annotations

import json
from pathlib import Path

import adaconvert
from adaconvert.methods.registry import make_config, prepare
from adaconvert.methods.sources import open_source
from adaconvert.planning.digest import plan_digest
from adaconvert.testing.tiny_models import make

GOLDEN = Path(__file__).parents[1] / "golden" / "plans.json"
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-granular": ("llama", {"granularity": 2, "experts": 4, "top_k": 2}),
    "llama-shared": ("llama", {"shared_experts": "split"}),
    "llama-noise": ("llama", {"noise": 0.1, "seed": 3}),
    "llama-drop": ("llama", {"drop": 0.5}),
    "qwen2": ("qwen2", {"experts": 4}),
    "phi3": ("phi3", {}),
    "granite": ("granite", {}),
    "gemma": ("gemma", {}),
    "olmo": ("olmo", {}),
}


def test_plans_are_what_they_were(tmp_path: Path, update_golden: bool) -> None:
    found = {}
    for name, (family, options) in CASES.items():
        described = open_source(str(make(family, tmp_path / family)))
        planned = prepare(make_config("upcycle", options), [described]).planned
        found[name] = plan_digest(planned.plan)
    if update_golden:
        GOLDEN.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    assert found == json.loads(GOLDEN.read_text())


def test_the_digest_does_not_depend_on_where_the_source_lies(tmp_path: Path) -> None:
    a = adaconvert.plan(make("llama", tmp_path / "a" / "model"))
    b = adaconvert.plan(make("llama", tmp_path / "b" / "model"))
    assert a.digest == b.digest
