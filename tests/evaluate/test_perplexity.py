"""Loss, agreement and divergence against numbers worked out by hand from the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert.data.text import documents_of
from adaconvert.data.tokens import TokenBlocks, token_blocks
from adaconvert.errors import DataError, SourceError
from adaconvert.evaluate.perplexity import TextScore, Variant, _compare, batches, score_texts
from adaconvert.evaluate.settings import STORED
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models

TEXTS = (
    "The router decides. " * 6,
    "no",
    "Every tensor of the source is used once.",
    "A b c d e f g",
)
NAMES = ("one", "two", "three", "four")
#: float32 logits of order 10: log-probabilities are good to 1e-6, and documents sum up to 60.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("perplexity") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("perplexity") / "other"
    return load_model(tiny_models.make("llama", path, seed=1))


@pytest.fixture(scope="module")
def blocks(folder: Path) -> TokenBlocks:
    return token_blocks(documents_of(TEXTS, NAMES), folder, length=16)


def variant(model: Any, *, is_reference: bool = False) -> Variant:
    return Variant(label="it", model=model, setting=STORED, is_reference=is_reference)


def log_probabilities(model: Any, ids: numpy.ndarray) -> numpy.ndarray:
    """Return the log-probabilities of one block in float64, [S, V]."""
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().numpy()
    top = logits.max(-1, keepdims=True)
    return logits - top - numpy.log(numpy.exp(logits - top).sum(-1, keepdims=True))


def test_loss_of_each_document(model: Any, blocks: TokenBlocks) -> None:
    (score,) = score_texts([variant(model)], blocks, NAMES)
    loss, tokens = numpy.zeros(4), numpy.zeros(4, dtype=int)
    for ids, weights, document in zip(blocks.ids, blocks.weights, blocks.document, strict=True):
        kept = ids[weights]
        own = log_probabilities(model, kept)
        loss[document] -= sum(own[i, kept[i + 1]] for i in range(len(kept) - 1))
        tokens[document] += len(kept) - 1
    assert list(score.tokens) == list(tokens)
    assert score.loss == pytest.approx(loss, rel=CLOSE)
    assert not score.compared


def test_agreement_and_divergence_from_a_reference(
    model: Any, other: Any, blocks: TokenBlocks
) -> None:
    pair = [variant(other, is_reference=True), variant(model)]
    first, score = score_texts(pair, blocks, NAMES)
    agreeing, divergence = numpy.zeros(4, dtype=int), numpy.zeros(4)
    for ids, weights, document in zip(blocks.ids, blocks.weights, blocks.document, strict=True):
        kept = ids[weights]
        own, base = (log_probabilities(m, kept)[:-1] for m in (model, other))
        agreeing[document] += (own.argmax(-1) == base.argmax(-1)).sum()
        divergence[document] += (numpy.exp(base) * (base - own)).sum()
    assert score.compared
    assert not first.compared
    assert list(score.agreeing) == list(agreeing)
    assert score.divergence == pytest.approx(divergence, rel=CLOSE)


def test_a_model_agrees_with_itself(model: Any, blocks: TokenBlocks) -> None:
    _, score = score_texts([variant(model, is_reference=True), variant(model)], blocks, NAMES)
    assert list(score.agreeing) == list(score.tokens)
    assert score.divergence.max() == 0


def test_padded_batches_equal_single_runs(model: Any, blocks: TokenBlocks) -> None:
    (alone,) = score_texts([variant(model)], blocks, NAMES, batch_size=1)
    for size in (2, 3, 100):
        (together,) = score_texts([variant(model)], blocks, NAMES, batch_size=size)
        assert list(together.tokens) == list(alone.tokens)
        assert together.loss == pytest.approx(alone.loss, rel=CLOSE)


def test_batches_hold_every_block_once_and_no_more_padding_than_needed(
    blocks: TokenBlocks,
) -> None:
    found = []
    for batch in batches(blocks, 3):
        longest = max(batch.lengths)
        assert batch.ids.shape == (len(batch.lengths), longest)
        assert (batch.mask is None) == all(length == longest for length in batch.lengths)
        for row, length in enumerate(batch.lengths):
            found.append((batch.documents[row], tuple(batch.ids[row, :length].tolist())))
            if batch.mask is not None:
                assert batch.mask[row].tolist() == [i < length for i in range(longest)]
    expected = [
        (int(d), tuple(int(i) for i in ids[w]))
        for d, ids, w in zip(blocks.document, blocks.ids, blocks.weights, strict=True)
    ]
    assert sorted(found) == sorted(expected)


def test_nan_names_the_document(folder: Path, blocks: TokenBlocks) -> None:
    broken = load_model(folder)
    # only documents that hold this token are affected
    token = int(blocks.ids[list(blocks.document).index(3)][0])
    assert all(
        token not in ids for ids, d in zip(blocks.ids, blocks.document, strict=True) if d != 3
    )
    with torch.no_grad():
        broken.get_input_embeddings().weight[token] = float("nan")
    with pytest.raises(
        SourceError, match=r"it: the model computes NaN; found first in document four\. Its weig"
    ):
        score_texts([variant(broken)], blocks, NAMES)


def test_infinite_loss_is_refused(folder: Path, blocks: TokenBlocks) -> None:
    class Certain(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = torch.full((*hidden.shape[:-1], tiny_models.VOCAB), float("-inf"))
            logits[..., 7] = 0.0
            return logits

    broken = load_model(folder)
    broken.lm_head = Certain()
    with pytest.raises(SourceError, match="the model computes an infinite loss; found first in"):
        score_texts([variant(broken)], blocks, NAMES)


def test_reference_with_another_vocabulary(model: Any, blocks: TokenBlocks, tmp_path: Path) -> None:
    wider = load_model(tiny_models.make("llama", tmp_path / "wider", vocab_size=330))
    with pytest.raises(
        DataError, match=r"--reference: .*; expected logits of 320 tokens, found 33"
    ):
        score_texts([variant(wider, is_reference=True), variant(model)], blocks, NAMES)


def test_small_divergences_are_not_made_larger_by_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(400, 2000, generator=generator)
    other = logits + 1e-4 * torch.randn(400, 2000, generator=generator)
    own, base = (x.double().log_softmax(-1) for x in (logits, other))
    want = float((base.exp() * (base - own)).sum())
    score = TextScore.empty(1)
    _compare(score, 0, logits.log_softmax(-1), other.log_softmax(-1))
    # 3e-9 nats a token; float32 rounding alone, cut off at zero, looked like ten times that
    assert score.divergence[0] == pytest.approx(want, rel=0.01)
    _compare(score, 0, logits.log_softmax(-1), logits.log_softmax(-1))
    assert score.divergence[0] == pytest.approx(want, rel=0.01)
    # chances of nothing, and far apart
    own, base = torch.tensor([[0.0, -200.0, -90.0]]), torch.tensor([[-90.0, -float("inf"), 0.0]])
    _compare(score, 0, own.log_softmax(-1), base.log_softmax(-1))
    # log(1 / e^-90), in float32
    assert score.divergence[0] == pytest.approx(90, rel=1e-6)
