"""`calibrate` where networks have taken the place of projections: their knobs move with those of
the feed-forward networks, or they run whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert import api
from adaconvert.errors import OptionError
from adaconvert.evaluate.candidates import ffn_alone, of_these_alone
from adaconvert.evaluate.sweep import Grid, given
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.networks_by_hand import add_networks

ALL = {"rule": "all"}
OPTIONS: dict[str, Any] = {"length": 32, "max_tokens": None}
Q = "model.layers.0.self_attn.q_proj"
FFN = "model.layers.0.mlp"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"document {n}: few of {n * n} experts run"} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return what makes a tiny Llama with networks for its projections."""
    dense = tiny_models.make("llama", tmp_path / "dense", max_shard_size="1GB")

    def made(router: str = "contribution", **networks: Any) -> Path:
        folder = make_adaptive(dense, tmp_path / "source", router=router, experts=16)
        add_networks(folder, **networks)
        return folder

    return made


def sites(folder: Path) -> dict[str, dict[str, Any]]:
    found = json.loads((folder / "config.json").read_text())["adaptive"]["sites"]
    return {path: slots.get("ffn") or slots["linear"]["mlp"] for path, slots in found.items()}


def cost(folder: Path, compute: float) -> tuple[float, dict[str, int]]:
    """Return the compute of a loaded model and how many neurons each site ran for one text."""
    model: Any = load_model(folder, dtype="float32")
    with torch.no_grad(), model.set_compute(compute), model.account() as account:
        model(torch.arange(40)[None] * 7 % 300)
    return account.compute(), {path: site.neurons for path, site in account.sites.items()}


@pytest.mark.parametrize("width", [2, 5])
def test_one_knob_moves_both_kinds_and_one_the_feed_forward_networks_alone(
    make: Make, text: Path, tmp_path: Path, width: int
) -> None:
    source = make(width=width)
    out = tmp_path / "out"
    said = api.calibrate(source, text, destination=out, budget=0.9, **OPTIONS)
    both = [row for row in said.rows if set(row.select) == {"*"} and row.name != "all experts"]
    alone = [row for row in said.rows if row.name.endswith(", projections in full")]
    assert both or any(Q in row.select for row in said.rows)
    for row in alone:
        assert row.select["*"] == ALL
        assert Q not in row.select
        assert row.select[FFN]["rule"] in {"dynamic-k", "threshold"}
    (whole,) = (row for row in said.rows if row.name == "all experts")
    found, every = cost(out, 1.0)
    # networks of 8 neurons cost less than the matrices did, of 20 more
    assert whole.compute == pytest.approx(found, rel=1e-9)
    assert (whole.compute > 1) == (width == 5)
    assert said.chosen is not None
    chosen = said.rows[said.chosen]
    for path, spec in sites(out).items():
        assert spec["select"] == (chosen.select.get(path) or chosen.select["*"])
    found, some = cost(out, 0.9)
    assert found < whole.compute
    assert any(some[path] < every[path] for path in some)


def test_settings_of_some_sites_leave_the_others_whole() -> None:
    rng = np.random.default_rng(0)
    grid = Grid({FFN: 16, Q: 4}, {FFN: rng.gamma(1, 1, (50, 16)), Q: rng.gamma(1, 1, (50, 4))})
    for rule in ("dynamic-k", "threshold", "top-k"):
        setting = ffn_alone(grid, rule, [FFN])(0.5)
        assert setting is not None
        assert setting.select["*"] == ALL
        assert set(setting.select) == {"*", FFN}
        assert setting.select[FFN]["rule"] == rule
        assert setting.share == 0.5
    assert ffn_alone(grid, "top-k", [FFN])(0.5).select[FFN] == {"rule": "top-k", "k": 8}  # type: ignore[union-attr]
    values = of_these_alone(given("dynamic-k", 0.2), [Q])
    assert values.select == {"*": ALL, Q: {"rule": "dynamic-k", "tau": 0.2}}


@pytest.mark.parametrize(
    "more",
    [
        {"rules": ("top-k",), "values": (5,)},
        {"rules": ("threshold",), "per_layer": True},
    ],
)
def test_networks_that_are_not_split_run_whole(
    make: Make, text: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    api.calibrate(make(experts=1, width=12), text, destination=out, budget=0.97, **more, **OPTIONS)
    found = sites(out)
    assert all(spec["select"] == ALL for path, spec in found.items() if "self_attn" in path)
    assert found[FFN]["select"]["rule"] == more["rules"][0]
    _, some = cost(out, 0.97)
    assert some[Q] == 40 * 12
    assert some[FFN] < 40 * found[FFN]["intermediate"]


def test_a_k_above_the_experts_of_a_network_is_stored_as_all_of_them(
    make: Make, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    values = {"rules": ("top-k",), "values": (8,)}
    api.calibrate(make(), text, destination=out, budget=0.9, **values, **OPTIONS)
    found = sites(out)
    assert found[FFN]["select"] == {"rule": "top-k", "k": 8}
    assert found[Q]["select"] == {"rule": "top-k", "k": 4}
    assert cost(out, 0.9)[1][FFN] == 40 * found[FFN]["intermediate"] // 2


def test_sites_without_a_router_run_whole(make: Make, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = api.calibrate(make(router="none"), text, destination=out, **OPTIONS)
    rows = [row for row in said.rows if row.name != "all experts"]
    assert rows
    assert all(row.select["*"] == ALL for row in rows)
    assert {path for row in rows for path in row.select if path != "*"} == {
        path for path in sites(out) if "self_attn" in path
    }


@pytest.mark.parametrize("values", [(), (0.5,)])
def test_a_model_in_which_nothing_chooses_is_refused(
    make: Make, text: Path, tmp_path: Path, values: tuple[float, ...]
) -> None:
    source = make(router="none", experts=1, width=12)
    given = {**OPTIONS, "rules": ("dynamic-k",) if values else (), "values": values}
    with pytest.raises(OptionError, match="no router that could choose experts"):
        api.calibrate(source, text, destination=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()
