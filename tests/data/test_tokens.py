"""Blocks hold every token of every document once, and never two documents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaconvert.data.text import Documents, documents_of
from adaconvert.data.tokens import TokenBlocks, encode, load_tokenizer, token_blocks
from adaconvert.errors import DataError, OptionError, SourceError
from adaconvert.testing import tiny_models

TEXTS = ("The converter reads a folder.", "x", "Every tensor is used once. " * 9, "no", "A and B")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("tokens") / "model")


def pieces(blocks: TokenBlocks) -> dict[int, list[int]]:
    """Return the tokens of each document, in the order of the blocks."""
    found: dict[int, list[int]] = {}
    for row, document in enumerate(blocks.document):
        kept = blocks.ids[row][blocks.weights[row]]
        found.setdefault(int(document), []).extend(int(i) for i in kept)
    return found


def test_blocks_are_the_documents(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    blocks = token_blocks(documents_of(TEXTS), folder, length=16)
    found = pieces(blocks)
    for index, text in enumerate(TEXTS):
        ids = encode(tokenizer, text)
        # one token, or one left over after full blocks, predicts nothing
        expected = ids[: len(ids) - 1] if len(ids) % 16 == 1 else ids
        assert found.get(index, []) == expected
    assert 1 not in found


def test_shapes_types_and_padding(folder: Path) -> None:
    blocks = token_blocks(documents_of(TEXTS), folder, length=16)
    assert blocks.ids.shape == blocks.weights.shape == (len(blocks), 16)
    assert (blocks.ids.dtype, blocks.document.dtype) == (numpy.int64, numpy.int64)
    assert blocks.weights.dtype == bool
    assert blocks.tokens == blocks.weights.sum()
    assert blocks.length == 16
    # padding stands at the end alone, as the padding token
    assert not numpy.any(blocks.weights[:, 1:] & ~blocks.weights[:, :-1])
    assert set(blocks.ids[~blocks.weights]) == {0}
    assert blocks.weights.sum(1).min() >= 2


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    length=st.integers(2, 12),
    max_tokens=st.none() | st.integers(2, 60),
    seed=st.integers(0, 3),
)
def test_any_documents(
    folder: Path, lengths: list[int], length: int, max_tokens: int | None, seed: int
) -> None:
    documents = documents_of(tuple("q" * count for count in lengths))
    if max(lengths) < 2:
        with pytest.raises(DataError, match="no document has two tokens"):
            token_blocks(documents, folder, length=length, max_tokens=max_tokens, seed=seed)
        return
    blocks = token_blocks(documents, folder, length=length, max_tokens=max_tokens, seed=seed)
    found = pieces(blocks)
    assert max_tokens is None or blocks.tokens <= max_tokens
    for index, ids in found.items():
        assert len(ids) <= lengths[index]
    if max_tokens is None:
        usable = [count - (count % length == 1) for count in lengths]
        assert [len(found.get(i, [])) for i in range(len(lengths))] == usable


def test_seed_orders_documents_and_nothing_else(folder: Path) -> None:
    documents = documents_of(TEXTS)
    some = [token_blocks(documents, folder, length=8, seed=seed) for seed in range(6)]
    assert len({tuple(b.document) for b in some}) > 1
    assert all(pieces(b) == pieces(some[0]) for b in some)
    assert len({b.digest for b in some}) > 1
    again = token_blocks(documents, folder, length=8, seed=0)
    assert again.digest == some[0].digest
    assert numpy.array_equal(again.ids, some[0].ids)


def test_max_tokens_cuts_the_shuffled_documents(folder: Path) -> None:
    documents = documents_of(TEXTS)
    full = token_blocks(documents, folder, length=8, seed=1)
    for count in (2, 7, 8, 20):
        cut = token_blocks(documents, folder, length=8, seed=1, max_tokens=count)
        assert count - 1 <= cut.tokens <= count
        kept = cut.ids[cut.weights]
        assert list(kept) == list(full.ids[full.weights][: len(kept)])


def test_length_follows_the_positions_of_the_model(folder: Path) -> None:
    blocks = token_blocks(documents_of(("a b c " * 300,)), folder, length=4096)
    assert blocks.length == 256


@pytest.mark.parametrize("name", ["length", "max_tokens"])
def test_numbers_out_of_range(folder: Path, name: str) -> None:
    with pytest.raises(OptionError, match=f"{name}: is out of range; expected 2 or more, found 1"):
        token_blocks(documents_of(TEXTS), folder, **{name: 1})


def changed(folder: Path, to: Path, **values: object) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | values
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    small = changed(folder, tmp_path / "small", vocab_size=40)
    documents = Documents(texts=("zzz",), names=("data.jsonl:7",), digest="")
    with pytest.raises(
        DataError,
        match=r"data\.jsonl:7: the tokenizer of the checkpoint does not fit its model; expected "
        r"token ids below 40 \(vocab_size\), found id \d+ \('z'\)\. Copy the tokenizer files",
    ):
        token_blocks(documents, small, length=8)


def test_checkpoint_without_tokenizer(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    with pytest.raises(DataError, match=r"bare: the checkpoint has no tokenizer; expected one of"):
        token_blocks(documents_of(TEXTS), bare)
    (bare / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"bare: the tokenizer cannot be loaded"):
        token_blocks(documents_of(TEXTS), bare)


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json: file is missing"):
        token_blocks(documents_of(TEXTS), tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_adaptive_checkpoint_cuts_text_as_its_source(family: str, tmp_path: Path) -> None:
    source = tiny_models.make(family, tmp_path / "source")
    adaptive = changed(
        source,
        tmp_path / "adaptive",
        model_type=f"adaptive_{family}",
        adaptive={"version": 1, "base": {"model_type": family}},
    )
    documents = documents_of(
        (*TEXTS, "\N{LATIN SMALL LETTER E WITH ACUTE}t\N{CYRILLIC SMALL LETTER ZHE} 12345")
    )
    expected = token_blocks(documents, source, length=16)
    assert token_blocks(documents, adaptive, length=16).digest == expected.digest


def rows(blocks: TokenBlocks) -> list[tuple[int, ...]]:
    """Return each block as its document and tokens."""
    found = zip(blocks.document, blocks.ids, blocks.weights, strict=True)
    return [(int(index), *(int(i) for i in ids[kept])) for index, ids, kept in found]


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 26), min_size=1, max_size=5),
    length=st.integers(2, 12),
    max_tokens=st.none() | st.integers(2, 60),
    seed=st.integers(0, 3),
)
def test_spread_takes_a_block_of_every_document_before_a_second_of_any(
    folder: Path, lengths: list[int], length: int, max_tokens: int | None, seed: int
) -> None:
    documents = documents_of(tuple("".join(map(chr, range(97, 97 + n))) for n in lengths))

    def cut(most: int | None, *, spread: bool) -> TokenBlocks:
        return token_blocks(
            documents, folder, length=length, max_tokens=most, seed=seed, spread=spread
        )

    if max(lengths) < 2:
        with pytest.raises(DataError, match="no document has two tokens"):
            cut(max_tokens, spread=True)
        return
    whole, plain = cut(None, spread=True), cut(None, spread=False)
    assert sorted(rows(whole)) == sorted(rows(plain))
    # the blocks of a document are taken once around, in the same turn of documents
    left = {int(index): list(plain.document).count(index) for index in set(plain.document)}
    turn = list(dict.fromkeys(int(index) for index in plain.document))
    expected = [index for time in range(max(left.values())) for index in turn if left[index] > time]
    assert list(whole.document) == expected
    # what is cut is the start of all of it, to the token or one less
    some = cut(max_tokens, spread=True)
    if max_tokens is not None:
        assert min(max_tokens, whole.tokens) - 1 <= some.tokens <= max_tokens
    kept = whole.ids[whole.weights][: some.tokens]
    assert list(some.ids[some.weights]) == list(kept)
    assert some.weights.sum(1).min() >= 2


def test_seed_draws_the_places_of_a_spread(folder: Path) -> None:
    documents = documents_of((" ".join(str(n) for n in range(200)),))
    some = [
        token_blocks(documents, folder, length=8, seed=seed, spread=True, max_tokens=8)
        for seed in range(8)
    ]
    assert len({rows(b)[0] for b in some}) > 1
    again = token_blocks(documents, folder, length=8, seed=0, spread=True, max_tokens=8)
    assert again.digest == some[0].digest
    # without it a long text is its beginning
    first = [token_blocks(documents, folder, length=8, seed=seed, max_tokens=8) for seed in (0, 1)]
    ids = encode(load_tokenizer(folder), documents.texts[0])
    assert [rows(b) for b in first] == [[(0, *ids[:8])]] * 2


def test_spread_leaves_out_documents_of_one_token(folder: Path) -> None:
    documents = documents_of(("x", "", "x y z", "x"))
    blocks = token_blocks(documents, folder, length=8, spread=True)
    assert set(blocks.document) == {2}
    with pytest.raises(DataError, match="no document has two tokens"):
        token_blocks(documents_of(("x", "y")), folder, length=8, spread=True)


def test_spread_reads_no_more_documents_than_it_needs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaconvert.data import tokens

    read: list[str] = []

    def watched(tokenizer: object, text: str) -> list[int]:
        read.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(tokens, "encode", watched)
    documents = documents_of(("Every tensor is used once. " * 9,) * 20)
    token_blocks(documents, folder, length=8, spread=True, max_tokens=24)
    assert len(read) == 3
