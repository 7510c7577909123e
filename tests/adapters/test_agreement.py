"""What the command line writes, which knows models as data, is what PEFT's method reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert.adapters.checks import targets_of
from adaconvert.adapters.config import MoloraConfig
from adaconvert.arch.adapters import linears
from adaconvert.arch.registry import FAMILIES
from adaconvert.methods.sources import open_source
from adaconvert.modeling.adaptive_linear import sizes_of
from adaconvert.modeling.loading import load_model

Bases = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_the_same_in_the_same_order(base_of: Bases, family: str) -> None:
    base = base_of(family)
    model: Any = load_model(base)
    found = targets_of(MoloraConfig(target_modules="all-linear"), model)
    known = linears(open_source(str(base)).spec)
    # the order says which linear of a block holds its router
    assert list(known) == list(found)
    for path, linear in known.items():
        assert (linear.inputs, linear.outputs) == sizes_of(found[path])
