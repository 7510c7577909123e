"""A checkpoint loads where adaconvert is not installed, and there computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.modeling.loading import CODE_FILES, code_folder, load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_fresh_process_reproduces_logits_exactly(
    tmp_path: Path, family: str, elsewhere: Callable[..., dict[str, torch.Tensor]]
) -> None:
    dense = tiny_models.make(family, tmp_path / "dense.with dots")
    folder = make_adaptive(dense, tmp_path / "adaptive.with dots")
    got = elsewhere(folder, "set_compute(0.7)", "compute=0.7")
    model: Any = load_model(folder, dtype="float32")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(got["full"], model(ids).logits)
        with model.set_compute(0.7):
            assert torch.equal(got["less"], model(ids).logits)
        grown = model.generate(ids, max_new_tokens=3, do_sample=False, compute=0.7, pad_token_id=0)
    assert torch.equal(got["grown"], grown)


def test_code_files_are_all_there_and_flat() -> None:
    here = {path.name for path in code_folder().glob("*.py")}
    assert set(CODE_FILES) == here - {"__init__.py", "loading.py", "stock_experts.py"}
    for name in CODE_FILES:
        text = (code_folder() / name).read_text()
        assert "from . import" not in text, "transformers' scanner does not see it"
