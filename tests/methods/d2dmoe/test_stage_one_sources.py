"""What stage 1 trained is not kept, and `verify` says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import adaconvert
from adaconvert.errors import VerificationError
from adaconvert.testing.tiny_models import make


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (".out.stage1", "stage 1 of `d2dmoe` trained, which is not kept"),
        ("one", "Name its sources in their order"),
    ],
)
def test_a_source_that_is_gone_is_named_as_such(tmp_path: Path, name: str, hint: str) -> None:
    trained, dense = make("llama", tmp_path / name), make("llama", tmp_path / "two", seed=1)
    adaconvert.convert(trained, destination=tmp_path / "out", verify=False, experts=2, noise=0.01)
    with pytest.raises(VerificationError, match=f"was not made from these sources.*{hint}"):
        adaconvert.verify(dense, tmp_path / "out")
