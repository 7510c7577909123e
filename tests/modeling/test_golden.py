"""A checkpoint of every version of the contract stays loadable and computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adaconvert.modeling.loading import load_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@pytest.mark.smoke
@pytest.mark.parametrize("version", [1])
def test_golden_checkpoint_computes_what_it_did(version: int) -> None:
    folder = GOLDEN / f"adaptive_v{version}"
    expected = load_file(folder / "expected.safetensors")
    model: Any = load_model(folder, dtype="float32")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        got = {"all": model(ids).logits}
        with model.set_compute(0.75):
            got["calibrated"] = model(ids).logits
        with model.set_select("top-p", p=0.5):
            got["top_p"] = model(ids).logits
    for name, want in expected.items():
        # another version of torch may sum in another order
        assert (got[name] - want).abs().max() <= 1e-5 * want.abs().max(), name
