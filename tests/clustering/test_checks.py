"""The hint tells which numbers of experts would work."""

from __future__ import annotations

import pytest

from adaconvert.clustering.checks import check_experts, divisors_hint


def test_all_divisors_are_named_when_they_are_few() -> None:
    assert divisors_hint(12, 5) == "12 neurons divide into 1, 2, 3, 4, 6, 12 experts."
    assert divisors_hint(13, 4) == "13 neurons divide into 1, 13 experts."


def test_of_many_divisors_the_nearest_are_named() -> None:
    assert divisors_hint(1536, 100) == (
        "1536 neurons divide into 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256 "
        "experts (others are further off)."
    )


@pytest.mark.parametrize(("count", "width"), [(1, 12), (3, 4), (12, 1)])
def test_the_width_of_an_expert_is_returned(count: int, width: int) -> None:
    assert check_experts(12, count) == width
