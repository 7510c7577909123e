"""Routers from prompts: each expert is chosen where hidden states look like those of its prompts.

H hidden size, N experts, P groups of prompts.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.io.regular import read_text
from adaconvert.planning.functions import LOGIT_STD_RANGE

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: a prompts file is a page or two; anything larger is a mistake.
MAX_PROMPT_BYTES = 1 << 20


def read_prompts(path: str, groups: int) -> tuple[tuple[tuple[str, ...], ...], str]:
    """Return the prompts of each group and the sha256 of the file.

    One prompt a line; a blank line ends a group. A file without blank lines holds one prompt per
    group.

    Args:
        path: UTF-8 text file.
        groups: full experts, N / G.

    Raises:
        OptionError: it cannot be read as UTF-8 text or does not hold `groups` groups.
    """
    where = f"--router-prompts {escape(Path(path).name)}"
    text = read_text(Path(path), where, MAX_PROMPT_BYTES)
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line.strip())
        elif blocks[-1]:
            blocks.append([])
    blocks = [block for block in blocks if block]
    if len(blocks) == 1 and groups > 1:
        blocks = [[prompt] for prompt in blocks[0]]
    if len(blocks) != groups:
        raise OptionError(
            "wrong number of prompt groups (one prompt a line, a blank line between groups)",
            where=where,
            expected=f"{groups}, one per full expert",
            found=len(blocks),
        )
    return tuple(tuple(block) for block in blocks), hashlib.sha256(text.encode()).hexdigest()


def routers_from_means(means: Array, repeat: int) -> Array:
    """Return router rows [P * repeat, H] from mean FFN inputs [P, H].

    What all groups share, their mean, is subtracted and also projected out of the rows: a router
        has no bias that
    could take it back. Rows get unit length, so each group's mean scores highest on its own row
    (Cauchy-Schwarz), and one factor brings the logits of the means to standard deviation 1.
    """
    import numpy

    common = means.mean(axis=0, dtype=numpy.float64)
    centred = means.astype(numpy.float64) - common
    square = float(common @ common)
    if square > 0:
        centred -= numpy.outer(centred @ common / square, common)
    length = numpy.linalg.norm(centred, axis=1, keepdims=True)
    if square > 0 and len(means) > 1 and bool((length <= 1e-6 * math.sqrt(square)).any()):
        raise OptionError(
            "two groups of prompts look the same to the model",
            where="--router-prompts",
            hint="Give each expert prompts of its own kind.",
        )
    rows = centred / numpy.where(length > 0, length, 1.0)
    logits = means.astype(numpy.float64) @ rows.T
    spread = float(logits.std(axis=1).mean())
    if not math.isfinite(spread):
        raise OptionError("the prompts give non-finite hidden states", where="--router-prompts")
    if spread > 0:
        rows *= LOGIT_STD_RANGE[1] / spread
    routers: Array = rows.astype(numpy.float32).repeat(repeat, axis=0)
    return routers


def fit_routers(
    folder: Path, prompts: Sequence[Sequence[str]], layers: frozenset[int], repeat: int
) -> dict[str, Array]:
    """Return the router [N, H] of every converted block, keyed as `ops.Fitted` names it.

    The dense model is streamed block by block, so memory holds one block and the prompts' hidden
    states.

    Args:
        folder: the dense checkpoint.
        prompts: one sequence of prompts per group.
        layers: blocks to fit.
        repeat: granularity G; each row stands G times.

    Raises:
        OptionError: the checkpoint has no tokenizer.
    """
    import numpy

    from adaconvert.layerwise.ffn_inputs import ffn_input_means

    encode = _encoder(folder)
    ids = [[encode(prompt) for prompt in group] for group in prompts]
    means = ffn_input_means(folder, ids, layers)
    return {
        f"router.{layer}": routers_from_means(numpy.stack(rows), repeat)
        for layer, rows in means.items()
    }


def _encoder(folder: Path) -> Callable[[str], list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError):
        raise OptionError(
            "the source has no tokenizer to read prompts with",
            where="--router-init hidden",
            hint="Choose small or orthogonal.",
        ) from None

    def encode(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])

    return encode
