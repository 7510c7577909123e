"""Documents cut into blocks of token ids by the tokenizer of a checkpoint.

Shapes: N blocks, L tokens of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.data.text import Documents
from adaconvert.errors import DataError, OptionError
from adaconvert.io.names import escape
from adaconvert.io.source_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adaconvert.io.strict_json import load_object
from adaconvert.layerwise.quiet import quiet
from adaconvert.progress import bar

if TYPE_CHECKING:
    import numpy

#: any one of these means that a folder has a tokenizer; without them transformers may make an empty
#: one up.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
_POSITIONS = ("max_position_embeddings", "n_positions")
#: fewer tokens predict nothing.
_LEAST = 2
#: position of a document, and token ids of it.
Piece = tuple[int, list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBlocks:
    """Blocks of token ids; a block never crosses a document.

    Attributes:
        ids: int64 [N, L]; what pads a block is a real token id, hidden by `weights`.
        document: int64 [N], index of each block's document in `Documents.texts`.
        weights: bool [N, L], False for padding, which is always at the end.
        digest: sha256 over all of the above.
    """

    ids: numpy.ndarray[Any, Any]
    document: numpy.ndarray[Any, Any]
    weights: numpy.ndarray[Any, Any]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Return the number of real tokens."""
        return int(self.weights.sum())

    @property
    def length(self) -> int:
        """Return L."""
        return int(self.ids.shape[1])


def token_blocks(
    documents: Documents,
    folder: Path,
    *,
    length: int = 512,
    max_tokens: int | None = None,
    seed: int = 0,
    spread: bool = False,
    progress: bool = False,
) -> TokenBlocks:
    """Return documents as blocks of at most `length` tokens, cut by the tokenizer of `folder`.

    Documents come in an order drawn from `seed`, the blocks of one in their own order. The
    tokenizer adds to every document what it adds to a text. A last block of a single token is left
    out, because nothing predicts it.

    Args:
        documents: what `read_documents` returned.
        folder: a checkpoint: its tokenizer and config.json are used.
        length: tokens of a block; no more than the positions the config states are used.
        max_tokens: real tokens after which to stop, None for all; the last block is cut to fit.
        seed: of the order of documents.
        spread: take one block of every document, at a place drawn from `seed`, before a second of
            any: `max_tokens` of a long text then stand for all of it.
        progress: show a progress bar on a terminal.

    Raises:
        DataError: no tokenizer can be loaded, it gives ids the model does not have, or no document
            has two tokens.
        OptionError: `length` or `max_tokens` is below 2.
        SourceError: config.json is missing or damaged.
    """
    for name, value in (("length", length), ("max_tokens", max_tokens)):
        if value is not None and value < _LEAST:
            raise OptionError("is out of range", where=name, expected="2 or more", found=value)
    limits = Limits.of(folder)
    length = min(length, limits.positions or length)
    tokenizer = load_tokenizer(folder)
    with bar(len(documents), "tokens", "docs", enabled=progress) as shown:

        def texts() -> Iterator[tuple[int, list[int]]]:
            for index in _order(len(documents), seed):
                shown.update()
                ids = encode(tokenizer, documents.texts[index])
                limits.check(ids, tokenizer, documents.names[index])
                yield index, ids

        found = _in_turn(texts(), length, seed) if spread else _one_by_one(texts(), length)
        pieces = list(_within(found, max_tokens))
    if not pieces:
        raise DataError("no document has two tokens", where=documents.names[0])
    return _packed(pieces, length, padding_id(tokenizer, limits.vocab))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a config.json says a model can take.

    Attributes:
        vocab: token ids it has, 0 when it does not say.
        positions: longest sequence, 0 when it does not say.
    """

    vocab: int
    positions: int

    @staticmethod
    def of(folder: Path) -> Limits:
        """Return the limits of the checkpoint in `folder`.

        Raises:
            SourceError: config.json is missing or damaged.
        """
        config = load_object(folder / CONFIG_FILE, CONFIG_FILE, MAX_CONFIG_BYTES)
        positions = [_whole(config.get(name)) for name in _POSITIONS]
        return Limits(vocab=_whole(config.get("vocab_size")), positions=max(positions))

    def check(self, ids: list[int], tokenizer: Any, name: str) -> None:
        """Return only when the model has every one of `ids`.

        Raises:
            DataError: it lacks one; the tokenizer is another model's.
        """
        highest = max(ids, default=-1)
        if self.vocab and highest >= self.vocab:
            token = escape(str(tokenizer.convert_ids_to_tokens(highest)), 40)
            raise DataError(
                "the tokenizer of the checkpoint does not fit its model",
                where=name,
                expected=f"token ids below {self.vocab} (vocab_size)",
                found=f"id {highest} ('{token}')",
                hint="Copy the tokenizer files of the model this checkpoint was made from.",
            )


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint, the one its dense source would load.

    An adaptive checkpoint has a `model_type` of its own, and transformers chooses some tokenizer
    classes by it; so it is asked for under the type of the dense source. No code of the checkpoint
    runs.

    Raises:
        DataError: there is none, or transformers cannot load it.
        SourceError: config.json is damaged.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise DataError(
            "the checkpoint has no tokenizer",
            where=escape(folder.name),
            expected=f"one of {', '.join(TOKENIZER_FILES)}",
        )
    from transformers import AutoConfig, AutoTokenizer

    config = load_object(folder / CONFIG_FILE, CONFIG_FILE, MAX_CONFIG_BYTES)
    base = base_type(config)
    try:
        with quiet():
            known = {} if base is None else {"config": AutoConfig.for_model(base)}
            return AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, **known
            )
    # tokenizer files are foreign data to half a dozen parsers, which raise what they like
    except Exception as error:
        raise DataError(
            f"the tokenizer cannot be loaded ({type(error).__name__})", where=escape(folder.name)
        ) from error


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, with what the tokenizer adds to one."""
    with quiet():
        return [int(i) for i in tokenizer(text)["input_ids"]]


def padding_id(tokenizer: Any, vocab: int) -> int:
    """Return an id that may stand where nothing is: the padding id when the model has it."""
    for name in ("pad_token_id", "eos_token_id"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int) and 0 <= found < (vocab or found + 1):
            return found
    return 0


def base_type(config: Mapping[str, object]) -> str | None:
    """Return the `model_type` of an adaptive checkpoint's dense source, None for others."""
    adaptive = config.get("adaptive")
    base = adaptive.get("base") if isinstance(adaptive, Mapping) else None
    found = base.get("model_type") if isinstance(base, Mapping) else None
    return found if isinstance(found, str) else None


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _order(count: int, seed: int) -> list[int]:
    import numpy

    generator = numpy.random.Generator(numpy.random.Philox(seed))
    return [int(i) for i in generator.permutation(count)]


def _one_by_one(texts: Iterator[Piece], length: int) -> Iterator[Piece]:
    """Yield the blocks of one document after the other."""
    for index, ids in texts:
        for piece in _cut(ids, length):
            yield index, piece


def _in_turn(texts: Iterator[Piece], length: int, seed: int) -> Iterator[Piece]:
    """Yield one block of every document, then another of those that have more, and so on."""
    import numpy

    generator = numpy.random.Generator(numpy.random.Philox(seed))
    left: list[tuple[int, list[list[int]]]] = []
    for index, ids in texts:
        own = list(_cut(ids, length))
        if own:
            own = [own[int(i)] for i in generator.permutation(len(own))]
            yield index, own.pop()
            left.append((index, own))
    while left:
        left = [(index, own) for index, own in left if own]
        for index, own in left:
            yield index, own.pop()


def _within(pieces: Iterator[Piece], room: int | None) -> Iterator[Piece]:
    """Yield pieces while there is room for two tokens; the last one is cut to fit."""
    for index, piece in pieces:
        piece = piece if room is None else piece[:room]
        yield index, piece
        room = None if room is None else room - len(piece)
        if room is not None and room < _LEAST:
            return


def _cut(ids: list[int], length: int) -> Iterator[list[int]]:
    """Yield the ids in pieces of `length`; none has fewer than two."""
    for start in range(0, len(ids), length):
        piece = ids[start : start + length]
        if len(piece) >= _LEAST:
            yield piece


def _packed(pieces: list[tuple[int, list[int]]], length: int, padding: int) -> TokenBlocks:
    import numpy

    ids = numpy.full((len(pieces), length), padding, dtype=numpy.int64)
    weights = numpy.zeros((len(pieces), length), dtype=bool)
    for row, (_, piece) in enumerate(pieces):
        ids[row, : len(piece)] = piece
        weights[row, : len(piece)] = True
    document = numpy.array([index for index, _ in pieces], dtype=numpy.int64)
    digest = hashlib.sha256(repr(ids.shape).encode())
    for array in (ids, document, weights):
        digest.update(numpy.ascontiguousarray(array).tobytes())
    return TokenBlocks(ids=ids, document=document, weights=weights, digest=digest.hexdigest())
