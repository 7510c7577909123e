"""Stored bits to float32 and back: the same as torch does, without torch in the product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaconvert.errors import SourceError
from adaconvert.planning.arrays import from_float32, to_float32


def test_bf16_rounds_like_torch() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 3e38)]
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(from_float32(values, "BF16", "x"), want)


def test_bf16_keeps_every_pattern() -> None:
    raw = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    finite = raw[(raw & 0x7F80) != 0x7F80]
    assert np.array_equal(from_float32(to_float32(finite, "BF16"), "BF16", "x"), finite)


def test_nan_and_infinity_survive_a_cast() -> None:
    values = np.array([np.nan, np.inf, -np.inf], dtype=np.float32)
    back = to_float32(from_float32(values, "BF16", "x"), "BF16")
    assert np.isnan(back[0])
    assert back[1:].tolist() == [np.inf, -np.inf]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_a_cast_that_overflows_is_refused(dtype: str) -> None:
    values = np.array([1.0, 3.4e38, -3.4e38], dtype=np.float32)
    with pytest.raises(SourceError, match=r"layer\.w: cast to .*float16 makes 2 values infinite"):
        from_float32(values, dtype, "layer.w")
