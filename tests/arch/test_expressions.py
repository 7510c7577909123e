"""The language of family files: what it computes, and that it runs nothing."""

from __future__ import annotations

import pytest

from adaconvert.arch.expressions import UnevenDivisionError, evaluate, holds, names_in

NAMES = {"heads": 4, "head_dim": 8, "hidden": 32, "moe": True, "tied": False, "dense": [0, 2]}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("heads*head_dim", 32),
        ("heads * head_dim + 2*heads*head_dim", 96),
        ("hidden/heads", 8),
        ("hidden/heads*heads", 32),
        ("30//heads", 7),
        ("30 % heads", 2),
        ("1 + 30 % heads", 3),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert evaluate(text, NAMES) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", True),
        ("moe", True),
        ("not moe", False),
        ("moe and not tied", True),
        ("tied or moe and tied", False),
        ("moe or tied and tied", True),
        ("heads >= 4 and heads <= 4", True),
        ("heads > 4", False),
        ("heads < 5", True),
        ("heads == 4", True),
        ("heads != 4", False),
        ("2 in dense", True),
        ("heads not in dense", True),
        ("0 not in dense", False),
        ("hidden % heads == 0", True),
    ],
)
def test_conditions(text: str, value: bool) -> None:
    assert holds(text, NAMES) is value


def test_an_uneven_division_is_an_error_that_holds_both_numbers() -> None:
    with pytest.raises(UnevenDivisionError, match="33 is not a multiple of 4") as caught:
        evaluate("33/heads", NAMES)
    assert (caught.value.numerator, caught.value.divisor) == (33, 4)


def test_division_by_zero_is_uneven() -> None:
    with pytest.raises(UnevenDivisionError, match="32 is not a multiple of 0"):
        evaluate("hidden // zero", NAMES | {"zero": 0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("heads*", "expected a name or a number, found 'the end'"),
        ("heads heads", "unexpected 'heads'"),
        ("__import__('os')", "cannot read"),
        ("heads.real", "cannot read"),
        ("heads[0]", "cannot read"),
        ("and", "expected a name or a number, found 'and'"),
        ("not in", "expected a name or a number, found 'not in'"),
        ("heads - 1", "cannot read"),
        ("heads in hidden", "'in' needs a list, found 32"),
        ("dense > 1", "'>' needs numbers"),
        ("dense * 2", r"'\*' needs whole numbers"),
    ],
)
def test_everything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(text, NAMES)


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(KeyError, match="nobody"):
        evaluate("nobody + 1", NAMES)


def test_names_come_in_order_once() -> None:
    assert names_in("b*a + 2*b and not c in d") == ("b", "a", "c", "d")
