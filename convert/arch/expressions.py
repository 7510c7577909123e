"""The small language of family files: sizes ("heads*head_dim + 2*hidden") and conditions.

A condition looks like "moe and not tied" or "ordinal % step == 0". Grammar, without calls,
attributes or parentheses, so that nothing a file says is ever run as Python:

  condition := all ("or" all)*          all := test ("and" test)*
  test      := "not" test | sum [("==" | "!=" | ">=" | "<=" | ">" | "<" | "in" | "not in") sum]
  sum       := product ("+" product)*   product := atom (("*" | "/" | "//" | "%") atom)*
  atom      := number | name

"/" must come out even, "//" rounds down.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, partial

Names = Mapping[str, object]
#: an expression, ready to be given its names.
Compiled = Callable[[Names], object]

_TOKEN = re.compile(r"\s*([A-Za-z_]\w*|\d+|==|!=|>=|<=|//|[+*/%<>])")
_COMPARISONS = ("==", "!=", ">=", "<=", ">", "<", "in", "not in")
_WORDS = frozenset({"and", "or", "not", "in", "not in"})


class UnevenDivisionError(ArithmeticError):
    """A quotient has a remainder; `numerator` and `divisor` are the values divided."""

    def __init__(self, numerator: int, divisor: int) -> None:
        super().__init__(f"{numerator} is not a multiple of {divisor}")
        self.numerator = numerator
        self.divisor = divisor


def evaluate(text: str, names: Names) -> object:
    """Return the value of the expression `text` with `names` filled in.

    Raises:
        UnevenDivisionError: a division leaves a remainder.
        KeyError: a name is unknown (a mistake in a family file).
        ValueError: the text is no expression of this language (likewise).
    """
    return _compiled(text)(names)


def holds(text: str, names: Names) -> bool:
    """Return whether the condition `text` is true; the empty condition is."""
    return not text or bool(evaluate(text, names))


def names_in(text: str) -> tuple[str, ...]:
    """Return the names an expression uses, in order of appearance, each once."""
    words = (token for token in _tokens(text) if _is_name(token))
    return tuple(dict.fromkeys(words))


@cache
def _compiled(text: str) -> Compiled:
    tokens = _tokens(text)
    compiled = _any_of(tokens)
    if tokens:
        raise ValueError(f"{text!r}: unexpected {tokens[0]!r}")
    return compiled


def _tokens(text: str) -> list[str]:
    text = text.strip()
    found: list[str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"{text!r}: cannot read {text[position:]!r}")
        position = match.end()
        if found[-1:] == ["not"] and match[1] == "in":
            found[-1] = "not in"
        else:
            found.append(match[1])
    return found


def _is_name(token: str) -> bool:
    return token not in _WORDS and (token[0].isalpha() or token[0] == "_")


def _take(tokens: list[str], *wanted: str) -> str:
    return tokens.pop(0) if tokens and tokens[0] in wanted else ""


def _any_of(tokens: list[str]) -> Compiled:
    left = _all_of(tokens)
    while _take(tokens, "or"):
        left = partial(_or, left, _all_of(tokens))
    return left


def _all_of(tokens: list[str]) -> Compiled:
    left = _test(tokens)
    while _take(tokens, "and"):
        left = partial(_and, left, _test(tokens))
    return left


def _test(tokens: list[str]) -> Compiled:
    if _take(tokens, "not"):
        return partial(_not, _test(tokens))
    left = _sum(tokens)
    sign = _take(tokens, *_COMPARISONS)
    return partial(_compare, sign, left, _sum(tokens)) if sign else left


def _sum(tokens: list[str]) -> Compiled:
    left = _product(tokens)
    while sign := _take(tokens, "+"):
        left = partial(_arithmetic, sign, left, _product(tokens))
    return left


def _product(tokens: list[str]) -> Compiled:
    left = _atom(tokens)
    while sign := _take(tokens, "*", "/", "//", "%"):
        left = partial(_arithmetic, sign, left, _atom(tokens))
    return left


def _atom(tokens: list[str]) -> Compiled:
    token = tokens.pop(0) if tokens else "the end"
    if token.isdigit():
        number = int(token)
        return lambda names: number
    if " " in token or not _is_name(token):
        raise ValueError(f"expected a name or a number, found {token!r}")
    return lambda names: names[token]


def _or(left: Compiled, right: Compiled, names: Names) -> object:
    return left(names) or right(names)


def _and(left: Compiled, right: Compiled, names: Names) -> object:
    return left(names) and right(names)


def _not(operand: Compiled, names: Names) -> object:
    return not operand(names)


def _compare(sign: str, left: Compiled, right: Compiled, names: Names) -> bool:
    one, other = left(names), right(names)
    if sign in {"in", "not in"}:
        if not isinstance(other, list | tuple):
            raise ValueError(f"{sign!r} needs a list, found {other!r}")
        return (one in other) == (sign == "in")
    if sign in {"==", "!="}:
        return (one == other) == (sign == "==")
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        raise ValueError(f"{sign!r} needs numbers, found {one!r} and {other!r}")
    return {">=": one >= other, "<=": one <= other, ">": one > other, "<": one < other}[sign]


def _arithmetic(sign: str, left: Compiled, right: Compiled, names: Names) -> int:
    one, other = left(names), right(names)
    if not isinstance(one, int) or not isinstance(other, int):
        raise ValueError(f"{sign!r} needs whole numbers, found {one!r} and {other!r}")
    if sign == "+":
        return one + other
    if sign == "*":
        return one * other
    if other == 0 or (sign == "/" and one % other):
        raise UnevenDivisionError(one, other)
    return one % other if sign == "%" else one // other
