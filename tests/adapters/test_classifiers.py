"""Adapter folders of models that are no decoders, as PEFT loads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.modeling.loading import load_model

Bases = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"


def disturbed(folder: Path) -> Path:
    """Return `folder` with random numbers in all its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.3
        for name, tensor in load_file(folder / WEIGHTS).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "architecture",
    [
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "BertForMaskedLM",
    ],
)
def test_peft_and_the_standalone_form_agree(
    architecture: str, base_of: Bases, tmp_path: Path
) -> None:
    import peft

    import adaconvert.auto  # noqa: F401

    base, out = base_of("bert", architecture=architecture), tmp_path / "out"
    api.convert(base, destination=out, method="molora", experts=2, rank=2, routing="uniform")
    disturbed(out)
    for form in ("standalone", "as_plain_lora"):
        api.convert(out, destination=tmp_path / form, method="molora", **{form: True})
    for folder in (out, tmp_path / "as_plain_lora"):
        mapping = json.loads((folder / "adapter_config.json").read_text())["auto_mapping"]
        assert mapping == {"base_model_class": architecture, "parent_library": "transformers"}
    batch = {"input_ids": torch.arange(5, 45).reshape(2, 20)}
    models: list[Any] = [
        load_model(tmp_path / "standalone"),
        peft.PeftModel.from_pretrained(load_model(base), str(out)),
        peft.AutoPeftModel.from_pretrained(str(out)),
        peft.PeftModel.from_pretrained(load_model(base), str(tmp_path / "as_plain_lora")),
    ]
    with torch.no_grad():
        first, *others = [model.eval().double()(**batch)[0] for model in models]
        plain = load_model(base).double()(**batch)[0]
    assert first.dtype == torch.float64
    assert (first - plain).abs().max() > 1e-3
    for found in others:
        torch.testing.assert_close(found, first, rtol=0, atol=1e-12)
