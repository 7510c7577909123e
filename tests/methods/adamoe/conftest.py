"""Tiny mixtures with routers that decide clearly, what they compute, and their exact starts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch import Tensor

from adaconvert.testing.mixtures_by_case import Gates, gates_of, make_mixture, null, stock

Sources = Callable[..., Path]
Computed = Callable[..., tuple[Gates, Tensor]]
Started = Callable[[str, int, int], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Return what makes a tiny mixture by name, seed and dtype, its routers scaled."""
    root = tmp_path_factory.mktemp("mixtures")

    def source(name: str, seed: int = 1, dtype: str = "float32") -> Path:
        folder = root / f"{name}-{seed}-{dtype}"
        return folder if folder.exists() else make_mixture(name, folder, seed=seed, dtype=dtype)

    return source


@pytest.fixture(scope="module")
def computed(sources: Sources) -> Computed:
    """Return what gives the gates and logits of a tiny mixture in transformers itself, by name,
    seed and dtype; read only."""

    @cache
    def found(name: str, seed: int, dtype: str) -> tuple[Gates, Tensor]:
        source = sources(name, seed, dtype)
        return gates_of(stock(source, dtype), source)

    return lambda name, seed=1, dtype="float32": found(name, seed, dtype)


@pytest.fixture(scope="module")
def started(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Return what gives a tiny mixture with `copies` null experts for each of its six real ones,
    verified for one copy, by name, seed and copies; read only."""
    root = tmp_path_factory.mktemp("started")

    @cache
    def start(name: str, seed: int, copies: int) -> Path:
        out = root / f"{name}-{seed}-{copies}"
        return null(sources(name, seed), out, null_experts=6 * copies, verify=copies == 1)

    return start
