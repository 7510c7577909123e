"""What skipped tokens run instead, fitted before the first step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_depth_parts import DepthAdapter, unit_scale
from adaconvert.modeling.loading import load_model
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.depth_fit import Ridge, fit, fit_depth, undecided
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]
Make = Callable[..., Path]
HIDDEN = 24


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def adapter_of(width: int) -> DepthAdapter:
    made = DepthAdapter(HIDDEN, width).double()
    torch.nn.init.normal_(made.down.weight, std=0.02)
    return made


def test_a_change_of_low_rank_is_found() -> None:
    x = drawn(4, 500, HIDDEN)
    change = unit_scale(x) @ drawn(HIDDEN, 4, seed=1) @ drawn(4, HIDDEN, seed=2)
    adapter = adapter_of(8)
    with torch.no_grad():
        left = fit(adapter, x, x + change)
        found = adapter(x)
    missed = float((found - change).square().sum() / change.square().sum())
    assert left == pytest.approx(missed, rel=0.5)
    assert missed < 0.15


def test_the_directions_are_the_best_of_their_number() -> None:
    x, noise = drawn(2000, HIDDEN), drawn(2000, HIDDEN, seed=3)
    change = x @ drawn(HIDDEN, HIDDEN, seed=1) + noise
    down, up = Ridge(x, change).matrices(1e-9, 5)
    assert (down.shape, up.shape) == ((HIDDEN, 5), (5, HIDDEN))
    # Eckart-Young in the metric of what least squares predict
    predicted = x @ torch.linalg.lstsq(x, change).solution
    _, _, turned = torch.linalg.svd(predicted, full_matrices=False)
    inside = x @ down
    best = predicted @ turned[:5].T
    both = torch.linalg.lstsq(inside, best).solution
    assert float((inside @ both - best).norm() / best.norm()) < 1e-6


def test_where_nothing_helps_nothing_changes() -> None:
    adapter = adapter_of(8)
    before = [p.clone() for p in adapter.parameters()]
    assert fit(adapter, drawn(64, HIDDEN), drawn(64, HIDDEN, seed=1) * 1e3) == 1.0
    assert all(map(torch.equal, before, adapter.parameters()))
    assert fit(adapter, drawn(4, HIDDEN), drawn(4, HIDDEN, seed=1)) == 1.0


def test_more_inner_neurons_than_directions() -> None:
    x = drawn(600, HIDDEN)
    adapter = adapter_of(2 * HIDDEN)
    # every direction has its opposite, so nothing of a linear change is out of reach
    assert fit(adapter, x, x + unit_scale(x) @ drawn(HIDDEN, HIDDEN, seed=1)) < 1e-5


def first_losses(tune: Tune, source: Path, text: Path, name: str, **more: Any) -> tuple[float, str]:
    lines: list[str] = []
    result = tune(
        source,
        name,
        **{"train": ("all",), "steps": 1, "lr": 1e-9, "valid": [str(text)], "valid_tokens": 600},
        report=lines.append,
        **more,
    )
    said = next((line for line in lines if line.startswith("adapters")), "")
    return result.summary["validation"][0]["loss"], said


@pytest.fixture
def dropping(deep: Path, tmp_path: Path) -> Path:
    """A model of which no token runs two blocks, and adapters that add nothing."""
    options: dict[str, Any] = {"kind": "skip", "drop": "2,3", "layers": "1", "adapter_width": 16}
    api.convert(deep, destination=tmp_path / "dropping", method="depth", **options)
    return tmp_path / "dropping"


def test_dropped_blocks_begin_with_a_lower_loss(
    dropping: Path, tune: Tune, text: Path, tmp_path: Path
) -> None:
    left, said = first_losses(tune, dropping, text, "fitted")
    without, nothing = first_losses(tune, dropping, text, "plain", depth_fit=0)
    assert left < without
    assert said.startswith("adapters of 3 blocks fitted on ")
    assert not nothing
    # what adds something is left alone
    _, again = first_losses(tune, tmp_path / "fitted", text, "again")
    assert not again


def test_padding_is_no_token(dropping: Path, text: Path) -> None:
    config = FinetuneConfig.of([str(text)], {"steps": 5, "train": ("all",), "seq_len": 21})
    ids = torch.arange(40 * 16).reshape(40, 16) % 90
    found = []
    for more in (0, 5):
        padded = torch.nn.functional.pad(ids, (0, more))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (0, more))
        rows = [{"input_ids": i, "attention_mask": m} for i, m in zip(padded, mask, strict=True)]
        model: Any = load_model(dropping, dtype="float64")
        fitted = fit_depth(model, rows, config, routers=False)
        assert fitted is not None
        assert fitted.tokens == ids.numel()
        found.append(
            torch.cat([p.flatten() for n, p in model.named_parameters() if ".depth." in n])
        )
    assert torch.allclose(found[0], found[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("skip", {"depth_fit": -1}, "0 or more"),
        ("mod", {"depth_fit": 64}, "is for blocks of --kind skip"),
    ],
)
def test_options_that_do_not_fit(
    routed: Make, tune: Tune, kind: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        tune(routed(kind), train=("all",), **more)


def test_routers_are_fitted_whatever_ran_before(deep: Path, text: Path, tmp_path: Path) -> None:
    api.convert(deep, destination=tmp_path / "made", method="depth", kind="skip", layers="1-3")
    config = FinetuneConfig.of(
        [str(text)], {"steps": 60, "train": ("depth",), "seq_len": 16, "depth_compute": 0.8}
    )
    ids = torch.arange(80 * 16).reshape(80, 16) * 7 % 90
    found = []
    for threshold in (0.0, 2.0):
        model: Any = load_model(tmp_path / "made", dtype="float64")
        # above what an untrained router says nobody runs
        with model.set_depth("threshold", threshold=threshold):
            fitted = fit_depth(model, [{"input_ids": row} for row in ids], config, routers=True)
        assert fitted is not None
        assert len(fitted.ranked) == 3
        found.append(torch.cat([b.depth.router.weight for b in model.adaptive_depth().values()]))
    assert torch.equal(*found)


def test_a_router_with_a_frozen_part_is_left_alone(deep: Path, tmp_path: Path) -> None:
    api.convert(deep, destination=tmp_path / "made", method="depth", kind="skip", layers="1-3")
    model: Any = load_model(tmp_path / "made")
    assert len(undecided(model)) == 3
    next(iter(model.adaptive_depth().values())).depth.router.bias.requires_grad_(False)
    assert len(undecided(model)) == 2
