"""Gates of routed adapters at their limits: half precision, and rules that are one another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.modeling.adaptive_adapters import gates_of
from adaconvert.modeling.loading import load_model

Adapt = Callable[..., Path]
ALL = {"rule": "top-p", "p": 1.0}
#: of bfloat16, through two blocks, as a share of the norm of the logits.
CLOSE = 8 * torch.finfo(torch.bfloat16).eps


def ids_of() -> Tensor:
    return torch.randint(3, 300, (2, 13), generator=torch.Generator().manual_seed(0))


def logits_of(model: Any, *, mixed: bool) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found: Tensor = model(ids_of()).logits
    return found.float()


def drawn(size: float) -> Tensor:
    return size * torch.randn(500, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("reads", ["module", "layer"])
def test_selected_adapters_under_autocast_are_near_those_of_float32(
    adapt: Adapt, reads: str, k: int
) -> None:
    select = {"rule": "top-k", "k": k, "renormalize": k > 1}
    folder = adapt(reads=reads, select=select, scaling=0.2)
    model: Any = load_model(folder, dtype="float32")
    dense: Any = load_model(folder.parent / "dense", dtype="float32")
    wide, mixed = logits_of(model, mixed=False), logits_of(model, mixed=True)
    assert bool(mixed.isfinite().all())
    assert (mixed - wide).norm() <= CLOSE * wide.norm()
    assert (mixed - logits_of(dense, mixed=True)).norm() > 2 * CLOSE * wide.norm()


@pytest.mark.parametrize("on", ["input", "output"])
def test_vectors_that_scale_act_under_autocast(adapt: Adapt, on: str) -> None:
    folder = adapt(kind="ia3", on=on)
    model: Any = load_model(folder, dtype="float32")
    dense: Any = load_model(folder.parent / "dense", dtype="float32")
    wide, mixed = logits_of(model, mixed=False), logits_of(model, mixed=True)
    plain = logits_of(dense, mixed=True)
    assert bool(mixed.isfinite().all())
    away = (mixed - plain).norm()
    # what half precision takes off is little of what the vectors do
    assert away > 4 * (mixed - wide).norm()
    assert away > CLOSE * plain.norm()


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_a_share_of_one_is_soft_routing(size: float) -> None:
    logits = drawn(size)
    assert torch.equal(gates_of(logits, ALL).dense(8), gates_of(logits, {"rule": "soft"}).weights)


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_a_model_with_a_share_of_one_computes_what_soft_routing_does(
    adapt: Adapt, reads: str
) -> None:
    model: Any = load_model(adapt(reads=reads), dtype="float64")
    with torch.no_grad():
        soft = model(ids_of()).logits
        with model.set_adapters("top-p", p=1.0):
            found = model(ids_of()).logits
    assert torch.equal(found, soft)
