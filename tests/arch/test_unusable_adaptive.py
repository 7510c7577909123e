"""Parts of `config.adaptive` that are not what they must be are refused, asserts removed or not."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from adaconvert.arch.adapters import adapted
from adaconvert.arch.exits import exits_of
from adaconvert.arch.projections import Network, networks_of
from adaconvert.arch.recursion import recursion_of
from adaconvert.arch.registry import describe
from adaconvert.errors import SourceError
from adaconvert.testing.exits_by_hand import exits_of as exits_by_hand
from adaconvert.testing.tiny_models import config_values

PATH = "model.layers.0.self_attn.q_proj"
RECURSION: dict[str, Any] = {
    **{"blocks": "model.layers", "base": [0, 0], "rank": 4, "linears": ["self_attn.q_proj"]},
    **{"sharing": "cycle", "start": "average"},
}
ADAPTERS: dict[str, Any] = {
    "adapters": {
        **{"kind": "lora", "count": 2, "rank": 2, "share": None, "scaling": 1.0},
        **{"input": 32, "output": 32},
    },
    "router": {
        **{"kind": "linear", "reads": "module", "of": None, "score": "dot"},
        **{"norm": "none", "scale": 1.0, "input": 32},
    },
    "select": {"rule": "soft"},
}
NETWORK = Network(
    **{"role": "q", "hidden": 32, "output": 32, "experts": 2, "width": 4},
    up_bias=False,
    down_bias=False,
).content()


def _linear(slot: Mapping[str, Any]) -> dict[str, Any]:
    return {"sites": {PATH: {"linear": slot}}}


def _llama() -> Any:
    return describe({"model_type": "llama", **config_values("llama")})


#: part -> what it is when usable, and what reads it.
PARTS: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "recursion": (RECURSION, lambda found: recursion_of({"model": {"recursion": found}})),
    "exits": (exits_by_hand("llama", [1]), lambda found: exits_of({"model": {"exits": found}})),
    "linear": (ADAPTERS, lambda found: list(adapted(_llama(), _linear(found)))),
    "linear.mlp": (NETWORK, lambda found: list(networks_of(_llama(), _linear({"mlp": found})))),
}
#: part, path of a value in it, and what is there instead.
DAMAGED = [
    ("recursion", "base", [0, 0, 1]),
    ("recursion", "base", [1, 1]),
    ("recursion", "base", [0, True]),
    ("recursion", "base", None),
    ("recursion", "rank", -1),
    ("recursion", "rank", True),
    ("recursion", "rank", "half"),
    ("recursion", "blocks", 3),
    ("recursion", "linears", []),
    ("recursion", "linears", ["a", "a"]),
    ("recursion", "linears", [["a"]]),
    ("recursion", "sharing", "all"),
    ("recursion", "start", "random"),
    ("exits", "heads", None),
    ("exits", "heads", [{"at": 0, "own": []}]),
    ("exits", "heads", [{"at": 2, "own": []}, {"at": 1, "own": []}]),
    ("exits", "heads", [{"at": 1, "own": ["nose"]}]),
    ("exits", "draft", {"at": 5, "vocab": None}),
    ("exits", "draft", {"at": 1, "vocab": "all"}),
    ("exits", "decide.thresholds", []),
    ("linear", "adapters.input", 31),
    ("linear", "adapters.kind", "dora"),
    ("linear", "adapters.count", 0),
    ("linear", "router.kind", "oracle"),
    ("linear", "router.of", "model.layers.7"),
    ("linear", "select.rule", None),
    ("linear", "select", None),
    ("linear.mlp", "router.kind", "magic"),
    ("linear.mlp", "output", 31),
    ("linear.mlp", "intermediate", 9),
    ("linear.mlp", "experts", None),
]
NO_OBJECTS = [None, [], 3]


@pytest.mark.parametrize("part", PARTS)
def test_they_are_read_as_they_are(part: str) -> None:
    usable, read = PARTS[part]
    assert read(copy.deepcopy(usable))


@pytest.mark.parametrize(("part", "path", "value"), DAMAGED)
def test_damage_is_refused(part: str, path: str, value: Any) -> None:
    usable, read = PARTS[part]
    damaged = copy.deepcopy(usable)
    *above, last = path.split(".")
    inside = damaged
    for key in above:
        inside = inside[key]
    inside[last] = value
    with pytest.raises(SourceError, match=rf"{part} is not usable; expected ") as refused:
        read(damaged)
    assert refused.value.where == "config.json"


@pytest.mark.parametrize("slot", NO_OBJECTS)
def test_no_object_is_refused(slot: Any) -> None:
    with pytest.raises(SourceError, match="mlp is not usable"):
        list(networks_of(_llama(), _linear({"mlp": slot})))


def test_damage_is_refused_without_asserts(tmp_path: Path) -> None:
    # pytest keeps the asserts of test modules alive
    done = subprocess.run(
        [
            *(sys.executable, "-O", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"),
            *("--basetemp", str(tmp_path / "pytest"), "-k", "refused and not without"),
            str(Path(__file__)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(DAMAGED) + len(NO_OBJECTS)} passed" in done.stdout
