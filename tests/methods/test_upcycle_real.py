"""SmolLM2-135M-Instruct, a real pretrained model in bfloat16, converted and proven equal."""

from __future__ import annotations

from pathlib import Path

import pytest

import adaconvert

pytestmark = pytest.mark.real


@pytest.mark.parametrize(
    ("options", "host"),
    [
        ({}, "mixtral"),
        ({"granularity": 2}, "mixtral"),
        ({"shared_experts": "split", "target": "qwen2_moe"}, "qwen2_moe"),
    ],
    ids=["8x-top-2", "granular", "shared-split"],
)
def test_the_real_model_is_reproduced(
    smollm2: Path, tmp_path: Path, options: dict[str, object], host: str
) -> None:
    result = adaconvert.convert(smollm2, destination=tmp_path / "moe", verify=False, **options)
    assert result.report.target == host
    report = adaconvert.verify(smollm2, tmp_path / "moe")
    found = report.equivalence
    assert found is not None
    assert found.logits.tokens == 512
    assert found.relative <= 1e-5
    assert found.logits.argmax_agreement == 1.0
    assert all(layer.split_groups in (None, 0.0) for layer in found.routing)
    assert all(layer.entropy > 0.2 for layer in found.routing)
    assert all(layer.top1 < 0.9 for layer in found.routing)
