"""Settings made for shares of the experts, and what a model does with them, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert.data.text import documents_of
from adaconvert.data.tokens import TokenBlocks, token_blocks
from adaconvert.errors import OptionError, SourceError
from adaconvert.evaluate.allocation import LEVELS, allocate, sensitivities
from adaconvert.evaluate.candidates import COARSE, between, coarse, default_rules, uniform
from adaconvert.evaluate.sweep import ALL, REFERENCE, Grid, Measurer, Setting, applied, given
from adaconvert.modeling.adaptive_select import select_experts
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

RNG = np.random.default_rng(0)
SCORES = {"a": RNG.gamma(0.5, 1, (800, 16)), "b": 5 * RNG.gamma(2.0, 1, (800, 16))}
GRID = Grid({"a": 16, "b": 16}, SCORES)


def selected(setting: Setting, path: str) -> float:
    select = setting.select.get(path) or setting.select["*"]
    chosen = select_experts(torch.from_numpy(SCORES[path]).float(), select)
    return float(chosen.float().mean())


@pytest.mark.parametrize("share", COARSE)
def test_a_threshold_reaches_its_share_at_every_site(share: float) -> None:
    setting = GRID.uniform("threshold", share)
    for path in SCORES:
        # one more score of 12800, and the best expert of tokens that would run none
        assert selected(setting, path) == pytest.approx(share, abs=0.03)
        assert selected(setting, path) >= share - 1e-4


@pytest.mark.parametrize("rule", ["dynamic-k", "top-p"])
@pytest.mark.parametrize("share", COARSE)
def test_one_value_reaches_the_share_over_all_sites(rule: str, share: float) -> None:
    setting = GRID.uniform(rule, share)
    assert set(setting.select) == {"*"}
    found = np.mean([selected(setting, path) for path in SCORES])
    assert found == pytest.approx(max(share, 1 / 16), abs=2e-3)


@pytest.mark.parametrize("share", COARSE)
def test_top_k_rounds_and_never_reaches_zero(share: float) -> None:
    assert GRID.uniform("top-k", share).select == {"*": {"rule": "top-k", "k": round(share * 16)}}
    few = Grid({"a": 2, "b": 16}, {}).uniform("top-k", 0.1)
    assert few.select == {"a": {"rule": "top-k", "k": 1}, "b": {"rule": "top-k", "k": 2}}


def test_shares_per_site_and_a_site_in_full() -> None:
    setting = GRID.per_site("dynamic-k", {"a": 0.3, "b": 1.0}, name="x")
    assert setting.select["b"] == {"rule": "all"}
    assert selected(setting, "a") == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        ("dynamic-k", 1.5, "tau above 1 would select nothing"),
        ("dynamic-k", -0.1, "expected tau from 0 to 1"),
        ("top-p", 1.2, "p above 1 would select more than all"),
        ("top-k", 0, "at least one expert runs"),
        ("top-k", 1.5, "at least one expert runs"),
        ("threshold", float("nan"), "is no number"),
        ("all", 1, "is no rule with a value"),
    ],
)
def test_values_that_mean_nothing_are_refused(rule: str, value: float, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        given(rule, value)


@pytest.mark.parametrize(
    ("kinds", "rules"),
    [
        (["contribution"], ("dynamic-k", "threshold")),
        (["gate", "gate"], ("threshold", "top-k")),
        (["contribution", "gate"], ("threshold", "top-k")),
    ],
)
def test_rules_suit_the_routers(kinds: list[str], rules: tuple[str, ...]) -> None:
    assert default_rules({str(n): {"router": {"kind": k}} for n, k in enumerate(kinds)}) == rules


@pytest.mark.parametrize("specs", [{}, {"a": {"router": {"kind": "none"}}}])
def test_a_model_without_router_is_refused(specs: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="no router that could choose"):
        default_rules(specs)


def test_finer_settings_lie_where_the_limit_is_crossed() -> None:
    family = uniform(GRID, "top-k")
    settings = coarse(family)
    fits = {setting.name for setting in settings if (setting.share or 0) >= 0.6}
    shares = [s.share for s in between(family, lambda s: s.name in fits, first=True)]
    # a limit: what can be certified lies above what just keeps it
    assert shares == pytest.approx([0.675, 0.65, 0.625, 0.575, 0.55, 0.525])
    shares = [s.share for s in between(family, lambda s: s.name not in fits, first=False)]
    assert shares == pytest.approx([0.575, 0.55, 0.525])
    shares = [s.share for s in between(family, lambda s: False, first=True)]
    assert shares == pytest.approx([0.975, 0.95, 0.925])
    assert between(family, lambda s: True, first=True) == []


def test_allocation_takes_from_the_site_that_suffers_least() -> None:
    weak = {"a": 0.0, "b": 0.01, "c": 1.0}

    def increase(shares: Any) -> float:
        return sum(weak[site] * (1 - share) ** 2 for site, share in shares.items())

    curves = sensitivities(list(weak), increase)
    assert [share for share, _ in curves["b"]] == list(LEVELS)
    cost = {"a": 1.0, "b": 2.0, "c": 1.0}
    found = allocate(curves, cost, [0.9, 0.5, 0.2, 0.05])
    assert 0.05 not in found
    for target, shares in found.items():
        assert sum(cost[s] * shares[s] for s in cost) == pytest.approx(4 * target, rel=1e-12)
        assert shares["a"] <= shares["b"] <= shares["c"]
    assert found[0.9] == pytest.approx({"a": 0.6, "b": 1.0, "c": 1.0})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    dense = tiny_models.make("llama", folder / "dense")
    return make_adaptive(dense, folder / "adaptive", router="gate", experts=16)


@pytest.fixture(scope="module")
def blocks(tiny: Path) -> TokenBlocks:
    texts = tuple("few experts run and little is lost " * n for n in (1, 3, 2, 5))
    return token_blocks(documents_of(texts), tiny, length=24)


def test_blocks_are_measured_alike_alone_and_in_padded_batches(
    tiny: Path, blocks: TokenBlocks
) -> None:
    model = load_model(tiny)
    setting = given("top-k", 5)
    everything = np.arange(len(blocks))
    assert not blocks.weights.all()
    alone = Measurer(model, blocks, batch=1).measure(setting, everything)
    together = Measurer(model, blocks, batch=4).measure(setting, everything)
    # float32 sums of 320 logits in another order
    assert alone.loss == pytest.approx(together.loss, rel=2e-6)
    assert (alone.changed == together.changed).all()
    assert alone.compute == together.compute
    assert 0 < alone.compute < 1
    for at in (0, len(blocks) - 1):
        ids = torch.from_numpy(blocks.ids[at][blocks.weights[at]])[None]
        with torch.no_grad(), model.set_select("top-k", k=5):
            loss = model(input_ids=ids, labels=ids).loss
        assert alone.loss[at] == pytest.approx(float(loss), rel=2e-6)


def test_the_reference_is_itself_and_knobs_are_put_back(tiny: Path, blocks: TokenBlocks) -> None:
    model = load_model(tiny)
    measurer = Measurer(model, blocks)
    found = measurer.measure(REFERENCE, np.arange(len(blocks)))
    assert found.compute == 1
    assert not found.changed.any()
    same = measurer.measure(given("top-k", 16), np.arange(len(blocks)))
    assert (same.loss == found.loss).all()
    assert not same.changed.any()
    with applied(model, {"*": {"rule": "top-k", "k": 2}, "model.layers.1.mlp": {"rule": "all"}}):
        assert model._adaptive_knobs["*"] == {"rule": "top-k", "k": 2}
        assert model._adaptive_knobs["model.layers.1.mlp"] == {"rule": "all"}
    assert model._adaptive_knobs == {}
    with (
        pytest.raises(OptionError, match=r"k is 17, expected 1 to 16"),
        applied(model, {"*": {"rule": "top-k", "k": 17}}),
    ):
        pass


def test_scores_are_those_of_real_tokens(tiny: Path, blocks: TokenBlocks) -> None:
    model = load_model(tiny)
    found = Measurer(model, blocks).scores(np.arange(len(blocks)))
    assert set(found) == set(model.adaptive_sites())
    assert {scores.shape for scores in found.values()} == {(blocks.tokens, 16)}
    assert ALL == {"*": {"rule": "all"}}


def test_a_loss_that_is_not_finite_is_named(tiny: Path, blocks: TokenBlocks) -> None:
    model = load_model(tiny)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        SourceError, match=r"loss is nan with all experts; found first in document \d"
    ):
        Measurer(model, blocks).reference(np.arange(len(blocks)))
    names = [f"text.jsonl:{n + 1}" for n in range(4)]
    with pytest.raises(SourceError, match=r"found first in text\.jsonl:[1-4]\. Nothing was"):
        Measurer(model, blocks, names=names).reference(np.arange(len(blocks)))
