"""How much memory a comparison needs; bytes throughout."""

from __future__ import annotations

import math
from collections.abc import Iterable

from adaconvert.io.source import Source
from adaconvert.layerwise.names import block_of

#: share of the available memory a verification may use unless it is told a number.
SHARE = 0.6
#: what is in memory besides weights, states and logits: transformers' modules and copy buffers.
_BASE = 64 << 20
_FP32 = 4
_GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer"}


def _places(source: Source) -> dict[int | None, int]:
    """Return the float32 size of every block, and under None that of everything outside them."""
    places: dict[int | None, int] = {}
    for name, ref in source.tensors.items():
        place = block_of(name)
        places[place] = places.get(place, 0) + math.prod(ref.shape) * _FP32
    return places


def whole_need(sources: Iterable[Source], *, tokens: int) -> int:
    """Return what comparing whole models takes: twice the larger one in float32, and the caches.

    Twice, because transformers casts single experts on threads of its own far ahead of stacking
    them: SmolLM2-135M with 8 experts, 2.75 GB in float32, took 5.4 GB.
    """
    return max(_whole(source, tokens) for source in sources)


def _whole(source: Source, tokens: int) -> int:
    places = _places(source)
    hidden, layers = _size(source, "hidden_size"), _size(source, "num_hidden_layers")
    # the states after each block, and with granular experts what each router received
    cached = 2 * tokens * hidden * layers * _FP32 + _logits(source, tokens)
    return _BASE + 2 * sum(places.values()) + max(places.values()) + cached


def layerwise_need(sources: Iterable[Source], *, tokens: int) -> int:
    """Return what comparing block by block takes: one block of one model, and two caches.

    While a block is loaded its experts exist up to twice more, as transformers stacks and joins
    them.
    """
    return _BASE + max(3 * max(_places(s).values()) + _logits(s, tokens) for s in sources)


def _logits(source: Source, tokens: int) -> int:
    return 2 * tokens * _size(source, "vocab_size") * _FP32


def _size(source: Source, key: str) -> int:
    value = source.config.get(key, source.config.get(_GPT2_NAMES.get(key, key)))
    return value if isinstance(value, int) else 0
