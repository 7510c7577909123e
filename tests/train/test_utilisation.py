"""FLOPs of a trained token by hand, and peaks by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaconvert.methods.sources import open_source
from adaconvert.testing import tiny_models
from adaconvert.train import utilisation

# hidden 32, 4 heads of 8, 2 of them for keys and values, 2 layers, 320 tokens
ATTENTION = 2 * (32 * 32 * 2 + 32 * 16 * 2)
HEAD = 320 * 32
#: 2 layers, scores and weighted sums over 16 tokens, the mean of a text of 32
SCORES = 2 * 4 * 32 * 16


@pytest.mark.parametrize(
    ("family", "ffn"),
    [
        ("llama-tied", 2 * 3 * 32 * 64),
        # two of four experts, and the router
        ("mixtral", 2 * (2 * 3 * 32 * 64 + 4 * 32)),
    ],
)
def test_flops_are_those_of_the_matrices_a_token_passes(
    family: str, ffn: int, tmp_path: Path
) -> None:
    item = open_source(str(tiny_models.make(family, tmp_path / "src")))
    matrices = 2 * (ATTENTION + HEAD + ffn)
    every = utilisation.flops_per_token(item, 32, 1.0)
    assert every == 3 * (matrices + SCORES)
    # frozen weights need no gradient of their own, attention scores always do
    frozen = utilisation.flops_per_token(item, 32, 0.0)
    assert frozen == 2 * matrices + 3 * SCORES


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("AbacusOne", "bf16", None),
    ],
)
def test_peaks_are_known_by_name(name: str, precision: str, expected: float | None) -> None:
    assert utilisation.peak(name, precision) == expected
