"""Settings of null experts read off margins: what a model that decides by them then runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert.errors import OptionError
from adaconvert.evaluate.allocation import LEVELS, sensitivities
from adaconvert.evaluate.candidates import COARSE, default_rules, rules_for
from adaconvert.evaluate.null_grid import STORED, NullGrid, NullSite
from adaconvert.evaluate.settings import parse_select, settings_of
from adaconvert.evaluate.sweep import Setting, given
from adaconvert.modeling.adaptive_null import decide

TOKENS = 900
#: path -> real and null experts, K', k, experts that run in any case, bias the model holds.
SITES: Mapping[str, tuple[int, int, int, int, int, float]] = {
    "a": (8, 16, 6, 2, 0, 0.0),
    "b": (8, 8, 4, 2, 0, 0.5),
}


def decided(path: str, seed: int, bias: float, sites: Mapping[str, Any] = SITES) -> Any:
    """Return what a block decides for random logits."""
    real, null, slots, _, forced, _ = sites[path]
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(TOKENS, real, generator=rng) * (1 + len(path) + seed)
    others = torch.randn(TOKENS, null, generator=rng)
    return decide(logits, others, slots=slots, combine="renorm", beta=bias, min_real=forced)


def grid_of(sites: Mapping[str, Any] = SITES) -> NullGrid:
    known = {p: NullSite(source_k=s[3], forced=s[4], bias=s[5]) for p, s in sites.items()}
    margins = {p: decided(p, n, 0.0, sites).margins.numpy() for n, p in enumerate(sites)}
    return NullGrid(known, margins)


def realised(setting: Setting | None, sites: Mapping[str, Any] = SITES) -> dict[str, float]:
    """Return the share of its k experts each block runs at a setting."""
    assert setting is not None
    found = {}
    for n, path in enumerate(sites):
        select = setting.select.get(path) or setting.select["*"]
        assert select["rule"] == "null"
        kept = decided(path, n, select["bias"], sites).kept
        found[path] = float(kept.sum()) / TOKENS / sites[path][3]
    return found


@pytest.mark.parametrize("share", COARSE)
def test_every_block_runs_its_share(share: float) -> None:
    setting = grid_of().uniform("null", share)
    for found in realised(setting).values():
        # half an expert of all tokens together
        assert abs(found - share) <= 0.5 / TOKENS


@pytest.mark.parametrize("share", COARSE)
def test_all_blocks_together_run_the_share_and_biases_move_alike(share: float) -> None:
    setting = grid_of().pooled(share)
    found = realised(setting)
    assert abs(np.mean(list(found.values())) - share) <= 0.5 / TOKENS
    assert setting is not None
    steps = [setting.select[path]["bias"] - SITES[path][5] for path in SITES]
    # biases are float32
    assert abs(steps[0] - steps[1]) <= 4 * np.finfo(np.float32).eps * (1 + abs(steps[0]))
    assert all(np.float32(one["bias"]) == one["bias"] for one in setting.select.values())


@pytest.mark.parametrize("share", COARSE)
def test_a_step_from_a_large_bias_is_rounded_once(share: float) -> None:
    # a start by bias holds -10000, near which float32 has a grid of 0.001
    held = {path: (*site[:5], -1e4) for path, site in SITES.items()}
    margins = {p: decided(p, n, 0.0).margins.numpy() / 1000 for n, p in enumerate(SITES)}
    known = {p: NullSite(source_k=s[3], forced=s[4], bias=s[5]) for p, s in held.items()}
    setting = NullGrid(known, margins).pooled(share)
    assert setting is not None
    bias = setting.select["*"]["bias"]
    run = sum(float((margins[p] >= bias).sum()) / TOKENS / held[p][3] for p in held)
    assert abs(run / len(held) - share) <= 0.5 / TOKENS


def test_one_bias_for_all_is_told_once() -> None:
    same = {"a": SITES["a"], "b": (*SITES["b"][:5], 0.0)}
    setting = grid_of(same).pooled(0.6)
    assert setting is not None
    assert set(setting.select) == {"*"}


def test_shares_per_site_and_a_site_without_null_experts() -> None:
    grid = grid_of()
    setting = grid.per_site("null", {"a": 0.3, "b": 1.0}, name="x")
    assert setting is not None
    assert setting.select["b"] == {"rule": "all"}
    found = decided("a", 0, setting.select["a"]["bias"]).kept.sum()
    assert abs(float(found) / TOKENS - 0.6) <= 0.5 / TOKENS


@pytest.mark.parametrize("forced", [0, 1])
def test_shares_below_what_always_runs_are_not_made(forced: int) -> None:
    # one slot more than there are null experts, or one expert that runs in any case
    site = (8, 8, 4, 2, 1, 0.0) if forced else (8, 3, 4, 2, 0, 0.0)
    grid = grid_of({"a": site})
    assert grid.uniform("null", 0.4) is None
    assert grid.pooled(0.4) is None
    least = grid.uniform("null", 0.5)
    assert realised(least, {"a": site}) == {"a": 0.5}
    assert grid.levels("a", LEVELS) == pytest.approx([0.5 + 0.5 * level for level in LEVELS])


def test_a_block_that_can_do_nothing_else_has_no_levels() -> None:
    site = (8, 3, 4, 1, 1, 0.0)
    grid = grid_of({"a": site})
    assert grid.levels("a", LEVELS) == ()
    curves = sensitivities(["a"], lambda shares: 0.0, {"a": grid.levels("a", LEVELS)})
    assert curves == {"a": []}


def test_equal_margins_stay_together_and_rounding_moves_none() -> None:
    margins = np.repeat(np.array([[3.0, 1.0], [2.0, 1.0], [2.0, 0.0]], np.float32), 4, axis=0)
    grid = NullGrid({"a": NullSite(source_k=2, forced=0, bias=0.0)}, {"a": margins})
    setting = grid.uniform("null", 0.5)
    assert setting is not None
    # the twelve best: four of 3 and eight of 2
    assert setting.select == {"*": {"rule": "null", "bias": 1.5}} or setting.select == {
        "a": {"rule": "null", "bias": 1.5}
    }
    cut = grid.uniform("null", 0.6)
    assert cut is not None
    assert cut.select["a"]["bias"] == 1.0


def test_the_static_baseline_runs_whole_numbers_of_real_experts() -> None:
    grid = grid_of()
    found = grid.uniform("top-k", 0.5)
    assert found is not None
    assert (found.name, found.select) == ("top-k, k 1", {"*": {"rule": "top-k", "k": 1}})
    # rounds to all of them: what the reference runs
    assert grid.uniform("top-k", 0.9) is None
    apart = grid.per_site("top-k", {"a": 0.5, "b": 1.0}, name="x")
    assert apart is not None
    assert apart.select == {"a": {"rule": "top-k", "k": 1}, "b": {"rule": "top-k", "k": 2}}


def test_what_the_model_holds_is_a_setting_as_well() -> None:
    assert STORED.select == {"*": {"rule": "null"}}
    assert given("null", -0.25).select == {"*": {"rule": "null", "bias": -0.25}}


MIXTURE = {"router": {"kind": "mixture"}}


@pytest.mark.parametrize("asked", [(), ("null",), ("top-k", "null")])
def test_rules_of_null_experts(asked: tuple[str, ...]) -> None:
    assert default_rules({"a": MIXTURE}) == ("null", "top-k")
    assert rules_for({"a": MIXTURE}, asked) == (asked or ("null", "top-k"))


def test_a_rule_that_is_not_for_the_model_is_named() -> None:
    with pytest.raises(OptionError, match=r"--rule threshold: is not for a model with null exp"):
        rules_for({"a": MIXTURE}, ["null", "threshold"])
    gate = {"a": {"router": {"kind": "gate"}}}
    with pytest.raises(OptionError, match=r"--rule null: is for models with null experts alone"):
        rules_for(gate, ["null"])
    assert rules_for(gate, ["top-p"]) == ("top-p",)


def test_the_rule_null_may_be_asked_for_with_a_bias_or_without() -> None:
    assert parse_select("rule=null") == {"rule": "null"}
    assert parse_select("rule=null,bias=-0.5") == {"rule": "null", "bias": -0.5}
    assert [one.label for one in settings_of((), ("rule=null", "rule=all"))] == ["null", "all"]
    with pytest.raises(OptionError, match="expected rule=null,bias=NUMBER or alone"):
        parse_select("rule=null,tau=0.5")
