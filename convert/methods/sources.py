"""Opened, described and audited sources; what several of them must agree on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING

from adaconvert.arch import rope
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.check import Audit, audit
from adaconvert.arch.exits import exits_of
from adaconvert.arch.registry import describe
from adaconvert.errors import OptionError, SourceError
from adaconvert.io import aux_files
from adaconvert.io.card_file import FIGURES, RECIPE
from adaconvert.io.reader import iter_chunks
from adaconvert.io.regular import read_whole
from adaconvert.io.source import Source

if TYPE_CHECKING:
    from adaconvert.methods.molora.view import View

_MAX_TOKENIZER = 512 << 20
#: config keys that must agree as they stand.
_SAME_KEYS = (
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)
_OWN_FILES = re.compile(
    r"adaptive_\w+\.py|(configuration|modeling)_adaptive\.py|dense_config\.json"
)
#: side files that decide how text becomes token ids.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One source, what it is, and which of its tensors are needed.

    Attributes:
        view: the adapter folder that it stands for, None where it is what was given.
    """

    source: Source
    spec: ModelSpec
    audit: Audit
    view: View | None = None


def open_source(
    where: str, *, revision: str | None = None, ignore_unindexed: bool = False
) -> Described:
    """Return a checkpoint whose config, files and tensors agree with each other.

    Args:
        where: folder, hub-cache snapshot or hub id.
        revision: branch, tag or commit of a hub id.
        ignore_unindexed: leave out tensors the index does not list instead of refusing them.

    Raises:
        SourceError: the checkpoint is damaged, incomplete or of an unknown family.
    """
    source = Source.open(where, revision=revision, ignore_unindexed=ignore_unindexed)
    spec = describe(source.config, source.tensors)
    return Described(source=source, spec=spec, audit=audit(spec, source.tensors))


def refuse_exits(item: Described, why: str = "which would be lost") -> None:
    """Hold a source to having no early exits.

    Raises:
        SourceError: it has some; `why` says what would become of them.
    """
    if exits_of(item.spec.adaptive) is not None:
        raise SourceError(
            f"has early exits ({item.spec.model_type}), {why}",
            where=f"{item.source.label}/config.json",
            hint="Convert the checkpoint they were added to; `adaconvert early-exit` then adds "
            "exits to the result.",
        )


def check_ties(item: Described) -> None:
    """Hold stored copies of tied tensors to their originals; reads both.

    Raises:
        SourceError: config.json says the tensors are tied and their bytes differ.
    """
    for head, embedding in item.audit.compare_ties:
        refs = item.source.tensors[head], item.source.tensors[embedding]
        pairs = zip_longest(*(iter_chunks(item.source, ref) for ref in refs))
        if refs[0].dtype != refs[1].dtype or any(a != b for a, b in pairs):
            raise SourceError(
                f"tie_word_embeddings is true, yet {head!r} differs from {embedding!r}",
                where=refs[0].file,
                hint="Set tie_word_embeddings to false in config.json, or delete the stored head.",
            )


def check_vocabulary(item: Described) -> None:
    """Hold the tokenizer to the embedding: every id it gives must have a row.

    Only tokenizer.json is read; other formats do not say their largest id without being run.

    Raises:
        SourceError: the tokenizer knows ids the embedding has no row for.
    """
    name = "tokenizer.json"
    if name not in item.source.side_files or not item.spec.vocab:
        return
    try:
        content = json.loads(read_whole(item.source.path(name), name, _MAX_TOKENIZER))
        ids = [int(entry["id"]) for entry in content.get("added_tokens", [])]
        vocab = content["model"]["vocab"]
        ids += vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]
        largest = max(ids)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    if largest >= item.spec.vocab:
        raise SourceError(
            f"the tokenizer gives id {largest}, which has no row in the embedding",
            where=name,
            expected=f"ids below vocab_size={item.spec.vocab}",
            found=largest,
            hint="Resize the embedding, or use the tokenizer the model came with.",
        )


def _files_digest(source: Source, name: str) -> str | None:
    if name not in source.side_files:
        return None
    raw = read_whole(source.path(name), name, _MAX_TOKENIZER)
    return hashlib.sha256(raw).hexdigest()


def check_agreement(described: Sequence[Described]) -> None:
    """Hold several sources to the same shapes, features and tokenizer.

    Raises:
        OptionError: two sources differ; names the first difference.
    """
    first = described[0]
    for other in described[1:]:
        pair = f"{first.source.label} and {other.source.label}"
        mine, theirs = _facts(first.spec), _facts(other.spec)
        for key, value in mine.items():
            if theirs[key] != value:
                raise OptionError(
                    f"{pair} differ in {key} ({value} and {theirs[key]})",
                    where="sources",
                    hint="Only models of one architecture and size can share a mixture.",
                )
        for name in _TOKENIZER_FILES:
            if _files_digest(first.source, name) != _files_digest(other.source, name):
                raise OptionError(
                    f"{pair} differ in {name}",
                    where="sources",
                    hint="Experts must read the same token ids: use models of one tokenizer.",
                )


def left_behind(item: Described) -> dict[str, str]:
    """Return the side files that do not go along, with the reasons; the code and the kept config of
    an adaptive checkpoint go without saying, and so does what belongs to a card."""
    dropped = dict(aux_files.classify(item.source).dropped)
    for name in (*FIGURES, RECIPE):
        dropped.pop(name, None)
    if item.spec.adaptive is None:
        return dropped
    return {name: why for name, why in dropped.items() if not _OWN_FILES.fullmatch(name)}


def differing_files(described: Sequence[Described], names: Sequence[str]) -> list[str]:
    """Return a sentence for each side file in which another source differs from the first."""
    first = described[0].source
    return [
        f"{name} is that of {first.label}; {other.source.label} has another or none"
        for other in described[1:]
        for name in names
        if _files_digest(first, name) != _files_digest(other.source, name)
    ]


def _facts(spec: ModelSpec) -> dict[str, object]:
    """Return what must agree, by the name it has in messages."""
    facts: dict[str, object] = {
        "model_type": spec.model_type,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
    }
    facts.update(asdict(spec.traits))
    facts["rope"] = rope.read(spec)
    for key in _SAME_KEYS:
        facts[key] = spec.config.get(key)
    return facts
