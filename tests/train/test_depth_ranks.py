"""Routers fitted before the first step: what they rank, and what a run makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from adaconvert.modeling.adaptive_depth_parts import OPEN, DepthRouter, unit_scale
from adaconvert.modeling.loading import load_model
from adaconvert.train.depth_ranks import Ranked, Ranks, fit_router
from adaconvert.train.result import FinetuneResult

from .conftest import reach

Tune = Callable[..., FinetuneResult]
Make = Callable[..., Path]
HIDDEN, TOKENS = 24, 4000


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def router_of(width: int | None = None) -> DepthRouter:
    made = DepthRouter({"hidden": HIDDEN, "router": {"width": width}, "predictor": None})
    torch.nn.init.zeros_(made.weight)
    torch.nn.init.constant_(made.bias, OPEN)
    if made.inner is not None:
        made.inner.weight.data.copy_(0.5 * drawn(*made.inner.weight.shape, seed=5))
    return made


def changed(x: torch.Tensor, logarithm: torch.Tensor) -> torch.Tensor:
    """Return x moved so that the square of the change is exp(logarithm) of the square of x."""
    way = torch.nn.functional.normalize(drawn(*x.shape, seed=9), dim=-1)
    return x + way * x.norm(dim=-1, keepdim=True) * (logarithm[:, None] / 2).exp()


@torch.no_grad()
@pytest.mark.parametrize("width", [None, 64])
def test_logits_rise_with_what_skipping_changes(width: int | None) -> None:
    x = drawn(TOKENS, HIDDEN)
    true = unit_scale(x) @ drawn(HIDDEN, seed=1) - 3
    router = router_of(width)
    found = fit_router(router, x, changed(x, true), x)
    assert found is not None
    logits = router(x.float()[None])[0].double()
    order = torch.corrcoef(torch.stack([logits, true]))[0, 1]
    assert float(order) > (0.999 if width is None else 0.9)
    assert found.right == pytest.approx(float(order), abs=0.05)
    assert float(logits.mean()) == pytest.approx(OPEN, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1.0, abs=1e-3)
    # both distributions are of the same tokens
    for kept, own in ((found.logits, logits), (found.need, true)):
        middle = float(own.median())
        assert float(kept.median()) == pytest.approx(middle, abs=0.05 if width is None else 0.3)


def test_what_nothing_predicts_leaves_a_router_alone() -> None:
    x = drawn(TOKENS, HIDDEN)
    router = router_of()
    assert fit_router(router, x, x, x) is None
    assert fit_router(router, x[:15], changed(x, drawn(TOKENS))[:15], x[:15]) is None
    alike = fit_router(router, x, changed(x, drawn(TOKENS, seed=4) - 5), x)
    assert alike is not None
    assert alike.need.unique().tolist() == pytest.approx([-5.0], abs=0.1)
    assert alike.logits.unique().tolist() == [OPEN]
    assert alike.right == 0.0
    assert not router.weight.any()
    assert router.bias.tolist() == [OPEN]


def test_a_block_whose_tokens_are_alike_runs_or_not() -> None:
    alike = Ranked(need=torch.full((512,), -2.5), logits=torch.full((512,), OPEN), right=0.0)
    ranks = Ranks({"alike": alike, "other": ranked(-3, -2)})
    for target, whole in ((0.8, 1.0), (0.2, 0.0)):
        shares = ranks.shares(target)
        assert shares["alike"] == whole
        threshold = ranks.thresholds(shares)["alike"]
        assert (threshold < OPEN) == bool(whole)


def ranked(low: float, high: float) -> Ranked:
    need = torch.linspace(low, high, 512, dtype=torch.float64)
    return Ranked(need=need, logits=need, right=1.0)


@pytest.mark.parametrize("target", [0.0, 0.25, 0.5, 0.8, 1.0])
def test_one_cut_through_all_blocks(target: float) -> None:
    blocks = {"little": ranked(-6, -4), "some": ranked(-5, -3), "much": ranked(-2, -1)}
    shares = Ranks(blocks).shares(target)
    assert sum(shares.values()) / 3 == pytest.approx(target, abs=1e-2)
    assert shares["little"] <= shares["some"] <= shares["much"]


def test_shares_follow_the_fit_and_keep_what_moved_them_otherwise() -> None:
    blocks = {"little": ranked(-4, -2), "much": ranked(-3, -1)}
    ranks = Ranks(blocks)
    first = ranks.followed({"little": 0.9, "much": 0.1}, 0.8)
    assert first == ranks.shares(0.8)
    moved = {"little": first["little"] + 0.05, "much": first["much"] - 0.05}
    ranks = Ranks.restored(ranks.state())
    second, said = ranks.followed(moved, 0.6), ranks.shares(0.6)
    assert second["little"] == pytest.approx(said["little"] + 0.05)
    assert second["much"] == pytest.approx(said["much"] - 0.05)
    assert ranks.followed({"little": 0.0, "much": 1.0}, 0.0) == {
        "little": 0.0,
        "much": pytest.approx(1.0 - said["much"]),
    }


def test_what_is_kept_comes_back() -> None:
    before = ranked(-3, 1)
    after = Ranked.restored(before.state())
    assert torch.equal(before.need, after.need)
    assert torch.equal(before.logits, after.logits)
    assert before.right == after.right


def budgeted(source: Path, text: Path, **more: Any) -> dict[str, Any]:
    low, high = reach(load_model(source))
    return {
        **{"train": ("depth",), "depth_compute": low + (high - low) / 2, "steps": 6, "lr": 1e-9},
        **{"router_lr": 1e-9, "valid": [str(text)], "valid_tokens": 600, "data": [str(text)]},
        **more,
    }


def test_a_run_begins_where_the_fit_says(
    routed: Make, tune: Tune, text: Path, tmp_path: Path
) -> None:
    source = routed()
    lines: list[str] = []
    options = budgeted(source, text)
    result = tune(source, **options, report=lines.append)
    first = result.summary["validation"][0]
    assert first["compute"] == pytest.approx(options["depth_compute"], abs=0.05)
    assert any(line.startswith("routers of ") for line in lines)
    # what tells tokens apart is left alone
    lines.clear()
    tune(tmp_path / "out", "again", **budgeted(source, text), report=lines.append)
    assert not any(line.startswith("routers of ") for line in lines)


def test_a_ramp_that_is_asked_for_is_kept(routed: Make, tune: Tune, text: Path) -> None:
    source = routed()
    result = tune(source, **budgeted(source, text, depth_ramp=0.5, log_every=1))
    runs = [entry["run"] for entry in result.curve]
    assert result.summary["validation"][0]["run"] == 1.0
    assert runs[0] == 1.0
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] < 0.8


def test_a_fit_of_some_blocks_alone_lets_every_token_run(
    routed: Make, tune: Tune, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[Any] = []

    def once(router: Any, *args: Any) -> Any:
        found = None if fitted else fit_router(router, *args)
        fitted.append(found)
        return found

    monkeypatch.setattr("adaconvert.train.depth_fit.fit_router", once)
    result = tune(routed(), **budgeted(routed("skip", "b"), text, log_every=1))
    runs = [entry["run"] for entry in result.curve]
    assert len(fitted) > 1
    assert [one is None for one in fitted[:2]] == [False, True]
    # the fit's text ran whole; other text may hold a token or two below all of it
    assert result.summary["validation"][0]["run"] > 0.99
    assert runs[0] > 0.99
    assert runs[-1] < 0.8


@pytest.mark.parametrize("kind", ["mod", "skip-kv"])
def test_where_keys_go_too_nobody_is_fitted_to_skip(
    kind: str, routed: Make, tune: Tune, text: Path
) -> None:
    lines: list[str] = []
    source = routed(kind)
    result = tune(source, **budgeted(source, text), report=lines.append)
    assert not any(line.startswith("routers of ") for line in lines)
    assert result.summary["validation"][0]["run"] == 1.0


def test_without_a_budget_nobody_is_fitted_to_skip(routed: Make, tune: Tune, text: Path) -> None:
    lines: list[str] = []
    result = tune(
        routed(), **budgeted(routed("skip", "b"), text, depth_compute=None), report=lines.append
    )
    assert not any(line.startswith("routers of ") for line in lines)
    assert result.summary["validation"][0]["run"] == 1.0


def test_fitted_routers_skip_what_changes_little(
    routed: Make, tune: Tune, text: Path, tmp_path: Path
) -> None:
    source = routed()
    tune(source, **budgeted(source, text))
    model: Any = load_model(tmp_path / "out", dtype="float64")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = torch.tensor([n for one in texts for n in tokenizer(one)["input_ids"]][:512])[None]
    changes: dict[bool, list[float]] = {True: [], False: []}

    def hook(block: Any, args: Any, kwargs: Any, found: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        ran = found if isinstance(found, torch.Tensor) else found[0]
        need = (ran - block.depth.skipped(x)).square().sum(-1) / x.square().sum(-1)
        runs = block.depth.router(x) > block.adaptive_layer["select"]["threshold"]
        for which in (True, False):
            changes[which] += need[runs == which].log().tolist()

    for block in model.adaptive_depth().values():
        block.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad(), model.set_depth("all"):
        model(input_ids=ids, use_cache=False)
    means = {which: sum(found) / len(found) for which, found in changes.items()}
    assert means[True] > means[False]
