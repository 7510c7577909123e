"""Which class each token of a measured text is of, so that what it costs can be told by class.

Classes are those of the words, numbers and punctuation marks a text is made of, told apart by the
kinds of its characters (Unicode's general categories). A token belongs to the unit that its first
character other than white space lies in, so all pieces of a word go with their word.

- number: digits, with marks between them as in 3.14, 1,000 or 2026-11-22.
- word: letters, or letters and digits, with apostrophes inside; 3rd or 5km is a word, but letters
  after a number such as 1.5 or 1,000 are a word of their own.
- function word: a word on a short list of English ones (`function_words`).
- rare word: any other word that occurs at most c times in the measured text. c is the largest
  number for which such words are no more than a quarter of all words that are no function words,
  and at least 1. Upper and lower case are alike.
- punctuation: every other character but white space.
- space: tokens of white space alone; special: tokens the tokenizer adds, such as those of an end.

Shapes: N blocks, L tokens of a block.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adaconvert.data.tokens import load_tokenizer
from adaconvert.errors import DataError
from adaconvert.evaluate.function_words import is_function_word
from adaconvert.layerwise.quiet import quiet

if TYPE_CHECKING:
    import numpy

    from adaconvert.data.text import Documents
    from adaconvert.data.tokens import TokenBlocks

CLASSES: Final = (
    *("punctuation", "number", "function word", "rare word", "other word"),
    *("space", "special"),
)
_PUNCTUATION, _NUMBER, _FUNCTION, _RARE, _OTHER, _SPACE, _SPECIAL = range(len(CLASSES))
#: largest share of the words that are no function words that rare words may be.
RARE_SHARE: Final = 0.25

#: what a character counts as, by the first letter of its category; marks go with letters.
_KINDS: Final = {"L": "w", "M": "w", "N": "d", "Z": " "}
_KEPT: Final = ".,:/'-"
_UNIT: Final = re.compile(
    r"(?P<number>d+(?:[.,]d+)+(?=w)|d+(?:[.,:/-]d+)*(?![wd]))"
    r"|(?P<word>[wd]+(?:'[wd]+)*)|(?P<mark>[^ ])"
)
#: a word that was found, before it is known whether it is rare: its place in the vocabulary.
_FIRST_WORD: Final = len(CLASSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClasses:
    """The class of every token of some blocks.

    Attributes:
        codes: int8 [N, L], positions in `CLASSES`, -1 where there is no token.
        rare: a word that is no function word is rare when it occurs at most so often.
    """

    codes: numpy.ndarray[Any, Any]
    rare: int


@dataclass(slots=True)
class _Vocabulary:
    """Words that are no function words: the number of each, and how often it occurs."""

    numbers: dict[str, int] = field(default_factory=dict)
    counts: Counter[int] = field(default_factory=Counter)

    def number(self, word: str) -> int:
        return self.numbers.setdefault(word, len(self.numbers))


def token_classes(blocks: TokenBlocks, documents: Documents, folder: Path) -> TokenClasses | None:
    """Return the class of each token, None when the tokenizer cannot say where its tokens lie.

    Args:
        blocks: what `token_blocks` cut.
        documents: what it was given.
        folder: the checkpoint, whose tokenizer is used.

    Raises:
        DataError: the tokenizer cannot be loaded, or cuts the text in another way than before.
    """
    import numpy

    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "is_fast", False):
        return None
    special = frozenset(int(i) for i in tokenizer.all_special_ids)
    found = numpy.full(blocks.ids.shape, -1, dtype=numpy.int64)
    words = _Vocabulary()
    rows: dict[int, list[int]] = {}
    for row, document in enumerate(blocks.document.tolist()):
        rows.setdefault(document, []).append(row)
    for document, own in rows.items():
        text = documents.texts[document]
        with quiet():
            encoded = tokenizer(text, return_offsets_mapping=True)
        ids = numpy.array(encoded["input_ids"], dtype=numpy.int64)
        _check_same(blocks, own, ids, documents.names[document])
        measured = int(blocks.weights[own].sum())
        of = _classed(text, ids, encoded["offset_mapping"][:measured], special, words)
        for at, row in enumerate(own):
            part = of[at * blocks.length :][: int(blocks.weights[row].sum())]
            found[row, : len(part)] = part
    return _settled(found, words)


def _check_same(
    blocks: TokenBlocks, rows: Sequence[int], ids: numpy.ndarray[Any, Any], name: str
) -> None:
    """Return only when the blocks of a document hold its first ids, in order."""
    known = blocks.ids[rows][blocks.weights[rows]]
    if not (known == ids[: len(known)]).all():
        raise DataError("the tokenizer cuts a text in two different ways", where=name)


def _classed(
    text: str,
    ids: numpy.ndarray[Any, Any],
    spans: Sequence[tuple[int, int]],
    special: frozenset[int],
    words: _Vocabulary,
) -> numpy.ndarray[Any, Any]:
    """Return the class of each token that has a span, and the place of each other word after the
    classes; counts these words."""
    import numpy

    owner, units = units_of(text)
    kinds = [_kind_of(word, kind, words) for word, kind in units]
    seen: set[int] = set()
    found = numpy.full(len(spans), _SPACE, dtype=numpy.int64)
    for at, (start, end) in enumerate(spans):
        unit = next((u for u in owner[start:end] if u >= 0), None)
        if int(ids[at]) in special:
            found[at] = _SPECIAL
        elif unit is not None:
            found[at] = kinds[unit]
            seen.add(unit)
    words.counts.update(kinds[u] - _FIRST_WORD for u in seen if kinds[u] >= _FIRST_WORD)
    return found


def _kind_of(word: str, kind: str, words: _Vocabulary) -> int:
    if kind == "mark":
        return _PUNCTUATION
    if kind == "number":
        return _NUMBER
    plain = word.casefold().replace("\u2019", "'")
    return _FUNCTION if is_function_word(plain) else _FIRST_WORD + words.number(plain)


def units_of(text: str) -> tuple[list[int], list[tuple[str, str]]]:
    """Return for each character the unit it belongs to, -1 for white space, and for each unit its
    text and its kind: "word", "number" or "mark"."""
    shape = "".join(map(_shape, text))
    owner = [-1] * len(text)
    found: list[tuple[str, str]] = []
    for match in _UNIT.finditer(shape):
        start, end = match.span()
        owner[start:end] = [len(found)] * (end - start)
        found.append((text[start:end], str(match.lastgroup)))
    return owner, found


@functools.cache
def _shape(character: str) -> str:
    """Return one character for the kind of another."""
    if character in _KEPT:
        return character
    if character == "\u2019":
        return "'"
    if character.isspace():
        return " "
    return _KINDS.get(unicodedata.category(character)[0], "p")


def rare_limit(counts: Sequence[int]) -> int:
    """Return how often a word may occur and be rare, from how often each word occurs."""
    total, within, limit = sum(counts), 0, 1
    for often, words in sorted(Counter(counts).items()):
        within += often * words
        if within > RARE_SHARE * total:
            break
        limit = often
    return limit


def _settled(found: numpy.ndarray[Any, Any], words: _Vocabulary) -> TokenClasses:
    """Return the classes, now that it is known which words are rare."""
    import numpy

    limit = rare_limit(list(words.counts.values()))
    classes = [_RARE if words.counts[n] <= limit else _OTHER for n in range(len(words.numbers))]
    table = numpy.array([*range(len(CLASSES)), *classes, -1], dtype=numpy.int8)
    return TokenClasses(codes=table[found], rare=limit)
