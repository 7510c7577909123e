"""Which tokens a masked language model is asked for: as in its training, some are hidden."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from adaconvert.data.tokens import Limits, load_tokenizer
from adaconvert.errors import DataError
from adaconvert.io.names import escape

if TYPE_CHECKING:
    from adaconvert.data.tokens import TokenBlocks

#: share of the tokens that are hidden, as in BERT's training (Devlin et al. 2018, 1810.04805); all
#: of them behind the mask token, where its training leaves a fifth visible or false.
SHARE: Final = 0.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden:
    """What is hidden of some blocks, N of L tokens.

    Attributes:
        places: [N, L] True where a token is hidden.
        token: id that stands there.
    """

    places: NDArray[np.bool_]
    token: int


def is_masked(architecture: str) -> bool:
    """Return whether a model of this class predicts hidden tokens."""
    return architecture.endswith("ForMaskedLM")


def hide(blocks: TokenBlocks, folder: Path, seed: int) -> Hidden:
    """Return what is hidden of each block: the same share of its tokens, one at least, and of what
    the tokenizer adds nothing.

    Raises:
        DataError: the tokenizer of the checkpoint has no token for it.
    """
    tokenizer = load_tokenizer(folder)
    token = getattr(tokenizer, "mask_token_id", None)
    if not isinstance(token, int):
        raise DataError("the tokenizer has no mask token", where=escape(folder.name))
    Limits.of(folder).check([token], tokenizer, escape(folder.name))
    own = blocks.weights & ~np.isin(blocks.ids, tokenizer.all_special_ids)
    own = np.where(own.any(axis=1, keepdims=True), own, blocks.weights)
    draws = np.where(own, np.random.default_rng(seed).random(own.shape), 2.0)
    counts = np.maximum(1, np.round(SHARE * own.sum(axis=1)))
    ranks = draws.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return Hidden(places=np.asarray(ranks < counts[:, None]), token=token)
