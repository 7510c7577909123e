"""The function words of English: words of grammar, which carry little meaning by themselves.

The list is ours: articles, determiners, pronouns, prepositions, conjunctions, auxiliary verbs and a
few particles, with their contractions. It holds no other language.
"""

from __future__ import annotations

from typing import Final

_ARTICLES: Final = "a an the"
_DETERMINERS: Final = (
    "this that these those each every either neither some any no none all both few many much more "
    "most less least several such other another own same enough"
)
_PRONOUNS: Final = (
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his "
    "himself she her hers herself it its itself they them their theirs themselves one oneself who "
    "whom whose which what whoever whatever whichever someone somebody something anyone anybody "
    "anything everyone everybody everything nobody nothing there"
)
_PREPOSITIONS: Final = (
    "of in to for with on at by from up about into over after under above below between among "
    "through during before against within without along across behind beyond beside besides near "
    "off out down around toward towards upon onto via per despite except until till since"
)
_CONJUNCTIONS: Final = (
    "and or but nor so yet if then than because although though while whereas unless whether as "
    "when where why how once"
)
_AUXILIARIES: Final = (
    "be am is are was were been being have has had having do does did doing will would shall "
    "should can could may might must ought cannot"
)
_PARTICLES: Final = "not too very just also only even still again ever never here"
#: what follows the apostrophe of a contraction.
_ENDINGS: Final = frozenset({"s", "m", "re", "ve", "d", "ll"})

WORDS: Final = frozenset(
    " ".join(
        (_ARTICLES, _DETERMINERS, _PRONOUNS, _PREPOSITIONS, _CONJUNCTIONS, _AUXILIARIES, _PARTICLES)
    ).split()
)
#: what stands before the apostrophe of a negated auxiliary.
_NEGATED_STEMS: Final = (
    "isn aren wasn weren haven hasn hadn don doesn didn won wouldn shan shouldn can couldn mayn "
    "mightn mustn ain needn"
)
_NEGATED: Final = frozenset(_NEGATED_STEMS.split())


def is_function_word(word: str) -> bool:
    """Return whether a word is one of grammar.

    Args:
        word: in lower case, with a straight apostrophe if it has one.
    """
    stem, apostrophe, ending = word.partition("'")
    if not apostrophe:
        return word in WORDS
    if ending == "t":
        return stem in _NEGATED
    return ending in _ENDINGS and stem in WORDS
