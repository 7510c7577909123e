"""What a comparison runs on, and whether both checkpoints cut text into the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.io.regular import read_text
from adaconvert.layerwise.quiet import quiet

if TYPE_CHECKING:
    import torch

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
#: shape of the probe: together 512 tokens, and sequences long enough for a window or a rope scaling
#: to show.
SEQUENCES, LENGTH = 4, 128
_SEED = 20_240_607
#: a probe file is read into memory whole, and only its beginning is used.
_MAX_BYTES = 16 << 20
_MAX_CHARACTERS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Token ids both models are run on.

    Attributes:
        ids: sequences of equal length.
        origin: where they come from, for the report.
        text: what the tokenizers are compared on.
    """

    ids: tuple[tuple[int, ...], ...]
    origin: str
    text: str

    @property
    def tokens(self) -> int:
        """Return the number of tokens."""
        return sum(len(sequence) for sequence in self.ids)

    def tensor(self) -> torch.Tensor:
        """Return the ids as int64 [B, S]."""
        import torch

        return torch.tensor(self.ids, dtype=torch.int64)

    @staticmethod
    def shipped(source_dir: Path) -> Probe:
        """Return the text that comes with adaconvert, cut by the tokenizer of `source_dir`."""
        return Probe.from_text(shipped_text(), source_dir, origin="shipped text")

    @staticmethod
    def from_file(path: Path, source_dir: Path) -> Probe:
        """Return the text of a file, cut by the tokenizer of `source_dir`.

        Args:
            path: a text file, or JSON lines (`.jsonl`) whose "text" values are joined.
            source_dir: the source checkpoint.

        Raises:
            OptionError: the file cannot be read as text or holds none.
        """
        text = _read_text(path)
        if not text.strip():
            raise OptionError("holds no text", where=f"--probe {escape(path.name)}")
        return Probe.from_text(text, source_dir, origin=f"text of {escape(path.name)}")

    @staticmethod
    def from_text(
        text: str,
        source_dir: Path,
        *,
        origin: str = "text",
        sequences: int = SEQUENCES,
        length: int = LENGTH,
    ) -> Probe:
        """Return a text cut by the tokenizer of `source_dir`, or random ids when none fits.

        Args:
            text: at least a few words.
            source_dir: the source checkpoint.
            origin: what the report calls the text.
            sequences, length: the largest shape; a short text or a model with few positions gets a
                smaller one.
        """
        text = text[:_MAX_CHARACTERS]
        vocab, positions = _limits(source_dir)
        length = min(length, positions) if positions else length
        tokenizer = load_tokenizer(source_dir)
        ids = _encode(tokenizer, text) if tokenizer is not None else []
        if not ids:
            why = "there is no tokenizer"
        elif max(ids) >= vocab:
            why = f"the tokenizer gives id {max(ids)}, the model has {vocab}"
        else:
            return Probe(ids=_cut(ids, sequences, length), origin=origin, text=text)
        drawn = _random_ids(vocab, sequences, length)
        return Probe(ids=drawn, origin=f"random ids ({why})", text=text)


def shipped_text() -> str:
    """Return the text that comes with adaconvert: prose, code, numbers and several scripts."""
    return files("adaconvert.verification").joinpath("probe.txt").read_text(encoding="utf-8")


def _read_text(path: Path) -> str:
    where = f"--probe {escape(path.name)}"
    text = read_text(path, where, _MAX_BYTES)
    return text if path.suffix != ".jsonl" else "\n\n".join(_texts(text, where))


def _texts(lines: str, where: str) -> list[str]:
    found = []
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise OptionError(f'line {number} is no JSON object with a "text"', where=where)
        found.append(row["text"])
    return found


def _limits(source_dir: Path) -> tuple[int, int]:
    """Return the vocabulary size and the number of positions (0: no limit) a config.json states."""
    from adaconvert.arch.registry import describe
    from adaconvert.io.source import Source

    source = Source.open(source_dir, ignore_unindexed=True)
    spec = describe(source.config, source.tensors.keys())
    return spec.vocab, spec.max_positions


def load_tokenizer(folder: Path) -> Any | None:
    """Return the tokenizer transformers loads from a folder, None when there is none it can load.

    No code of the checkpoint runs.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except Exception:
        # tokenizer files are foreign data to half a dozen parsers, which raise what they like
        return None


def _encode(tokenizer: Any, text: str) -> list[int]:
    with quiet():
        return [int(i) for i in tokenizer(text)["input_ids"]]


def _cut(ids: Sequence[int], sequences: int, length: int) -> tuple[tuple[int, ...], ...]:
    length = min(length, len(ids))
    count = min(sequences, len(ids) // length)
    return tuple(tuple(ids[i * length : (i + 1) * length]) for i in range(count))


def _random_ids(vocab: int, sequences: int, length: int) -> tuple[tuple[int, ...], ...]:
    import numpy

    generator = numpy.random.Generator(numpy.random.Philox(_SEED))
    drawn = generator.integers(0, vocab, size=(sequences, length))
    return tuple(tuple(int(i) for i in row) for row in drawn)


def compare_tokenizers(source_dir: Path, target_dir: Path, text: str) -> str | None:
    """Return where the tokenizers of two checkpoints first differ, None when they agree.

    `model_type` can choose the tokenizer class whatever tokenizer_config.json says: under qwen2,
    qwen2_moe and qwen3 names transformers 5 loads Qwen2Tokenizer, which replaces the pre-tokenizer
    of tokenizer.json. So an unchanged tokenizer.json proves nothing, and both are loaded as a user
    would load them.

    Args:
        source_dir: the dense checkpoint.
        target_dir: the converted one.
        text: what both cut.
    """
    source, target = load_tokenizer(source_dir), load_tokenizer(target_dir)
    if source is None or target is None:
        if source is target:
            return None
        return "only the source has one" if target is None else "only the target has one"
    return (
        _first_different_token(source, target, text)
        or _different_special(source, target)
        or _different_template(source, target)
    )


def _first_different_token(source: Any, target: Any, text: str) -> str | None:
    left, right = _encode(source, text), _encode(target, text)
    if left == right:
        return None
    same = 0
    while same < min(len(left), len(right)) and left[same] == right[same]:
        same += 1
    before = escape(str(source.decode(left[max(same - 4, 0) : same])), 40)
    return (
        f"token {same} differs, after {before}: the source has {_shown(source, left, same)}, "
        f"the target {_shown(target, right, same)}"
    )


def _shown(tokenizer: Any, ids: Sequence[int], at: int) -> str:
    if at >= len(ids):
        return "no more"
    return f"{ids[at]} ({escape(str(tokenizer.convert_ids_to_tokens(ids[at])), 40)})"


def _different_special(source: Any, target: Any) -> str | None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        left, right = getattr(source, name, None), getattr(target, name, None)
        if left != right:
            return f"{name} is {left} in the source, {right} in the target"
    if len(source) != len(target):
        return f"the source has {len(source)} tokens, the target {len(target)}"
    return None


def _different_template(source: Any, target: Any) -> str | None:
    left, right = getattr(source, "chat_template", None), getattr(target, "chat_template", None)
    return None if left == right else "the chat templates differ"
