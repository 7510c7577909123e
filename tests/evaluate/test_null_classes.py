"""Classes of tokens by their text, and what the tokens of each class run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.data.text import Documents, documents_of
from adaconvert.data.tokens import TokenBlocks, load_tokenizer, token_blocks
from adaconvert.errors import DataError
from adaconvert.evaluate import measures
from adaconvert.evaluate.function_words import WORDS, is_function_word
from adaconvert.evaluate.perplexity import Variant, score_texts
from adaconvert.evaluate.real_experts import null_sites
from adaconvert.evaluate.settings import STORED
from adaconvert.evaluate.token_classes import (
    CLASSES,
    RARE_SHARE,
    TokenClasses,
    rare_limit,
    token_classes,
    units_of,
)
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.null_by_hand import make_nulled

TEXTS = (
    'The router doesn\'t run 3.14 experts on 2026-11-22, it runs two; "unfathomable" tokens ask.\n',
    "An expert, an expert and the router: 1,000 tokens run through experts.  The tokens run.",
    "Tokens run 7 times.",
)


@pytest.fixture(scope="module")
def nulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classes")
    stock = tiny_models.make("mixtral", root / "stock")

    def apart(tensors: dict[str, torch.Tensor]) -> None:
        # a bias at which tokens differ, and blocks that differ
        for n, name in enumerate(sorted(t for t in tensors if t.endswith("null_experts.bias"))):
            tensors[name].fill_(0.3 + 0.4 * n)

    return make_nulled(stock, root / "nulled", edit=apart)


def cut(folder: Path, length: int = 16, **options: Any) -> tuple[TokenBlocks, Documents]:
    documents = documents_of(TEXTS)
    return token_blocks(documents, folder, length=length, **options), documents


def classes(folder: Path, blocks: TokenBlocks, documents: Documents) -> TokenClasses:
    found = token_classes(blocks, documents, folder)
    assert found is not None
    return found


def told(folder: Path, blocks: TokenBlocks, found: TokenClasses) -> list[tuple[str, str]]:
    """Return every token's text with its class, in the order of the blocks."""
    tokenizer = load_tokenizer(folder)
    places = zip(*np.nonzero(blocks.weights), strict=True)
    return [(tokenizer.decode([int(blocks.ids[at])]), CLASSES[found.codes[at]]) for at in places]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Don\u2019t pay $1,000.50!", "w:Don\u2019t w:pay m:$ n:1,000.50 m:!"),
        ("2026-11-22, 10:30", "n:2026-11-22 m:, n:10:30"),
        ("3rd x1 33rd", "w:3rd w:x1 w:33rd"),
        ("1.5km or 1,000km", "n:1.5 w:km w:or n:1,000 w:km"),
        ("5km 2-3rd 1.5-6km", "w:5km n:2 m:- w:3rd n:1.5 m:- w:6km"),
        ("snake_case", "w:snake m:_ w:case"),
        ("na\u00efve cafe\u0301", "w:na\u00efve w:cafe\u0301"),
        ("3.", "n:3 m:."),
        ("'tis rock'n'roll'", "m:' w:tis w:rock'n'roll m:'"),
        ("a\tb\n\u00a0c", "w:a w:b w:c"),
        ("", ""),
    ],
)
def test_words_numbers_and_marks_are_told_apart(text: str, kinds: str) -> None:
    owner, units = units_of(text)
    assert " ".join(f"{kind[0]}:{word}" for word, kind in units) == kinds
    assert len(owner) == len(text)
    for at, unit in enumerate(owner):
        assert (unit < 0) == text[at].isspace()
        assert unit < 0 or text[at] in units[unit][0]


@pytest.mark.parametrize("word", ["the", "it's", "they'd", "don't", "can't", "cannot", "of"])
def test_function_words_with_their_contractions(word: str) -> None:
    assert is_function_word(word)


@pytest.mark.parametrize("word", ["model", "model's", "rock'n'roll", "won", "don", "t", "the's'x"])
def test_other_words_are_none(word: str) -> None:
    assert not is_function_word(word)


def test_the_list_is_short_and_has_no_word_twice() -> None:
    assert 180 < len(WORDS) < 260
    assert all(word == word.lower() and word.isalpha() for word in WORDS)


@pytest.mark.parametrize(
    ("counts", "limit"),
    [
        ([1] * 10, 1),
        ([1, 1, 2, 3, 100], 3),
        ([1, 99], 1),
        ([5, 5, 90], 5),
        ([26, 74], 1),
        ([], 1),
    ],
)
def test_rare_words_are_at_most_a_quarter_unless_all_occur_once(
    counts: list[int], limit: int
) -> None:
    assert rare_limit(counts) == limit
    within = sum(count for count in counts if count <= limit)
    assert limit == 1 or within <= RARE_SHARE * sum(counts)


@pytest.mark.parametrize("length", [16, 7, 256])
def test_pieces_go_with_their_word_whatever_the_blocks_are(nulled: Path, length: int) -> None:
    blocks, documents = cut(nulled, length)
    found = classes(nulled, blocks, documents)
    assert (found.codes >= 0).tolist() == blocks.weights.tolist()
    per_class: dict[str, str] = {}
    for text, kind in told(nulled, blocks, found):
        per_class[kind] = per_class.get(kind, "") + text
    squeezed = {kind: "".join(sorted(said.replace(" ", ""))) for kind, said in per_class.items()}
    # what follows from reading the three texts, in the order of the characters
    wanted = {
        "punctuation": ',;""..,:..',
        "number": "3.142026-11-221,0007",
        "function word": "Thedoesn'tonitAnanandthethroughThe",
        "rare word": "runstwounfathomableasktimes",
    }
    assert found.rare == 1
    if length == 256:
        for kind, said in wanted.items():
            assert squeezed[kind] == "".join(sorted(said)), kind
    assert "unfathomable" in per_class["rare word"].replace(" ", "")


def test_only_what_is_measured_counts_as_frequent(nulled: Path) -> None:
    blocks, documents = cut(nulled, 256, max_tokens=30)
    found = classes(nulled, blocks, documents)
    assert (found.codes >= 0).sum() == blocks.tokens == 30


def test_special_tokens_and_white_space_are_classes_of_their_own(nulled: Path) -> None:
    tokenizer = load_tokenizer(nulled)
    documents = documents_of((f"Two  words\n\n{tokenizer.eos_token}end of it",))
    blocks = token_blocks(documents, nulled, length=64)
    kinds = dict(told(nulled, blocks, classes(nulled, blocks, documents)))
    assert kinds[tokenizer.eos_token] == "special"
    assert kinds["\n"] == "space"


def test_another_cut_of_the_text_is_refused(nulled: Path) -> None:
    blocks, documents = cut(nulled)
    blocks.ids[0, 0] += 1
    with pytest.raises(DataError, match="cuts a text in two different ways"):
        token_classes(blocks, documents, nulled)


# -- what each class runs


def inputs_of(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what each block with null experts is given, [1, S, d]."""
    kept: dict[str, torch.Tensor] = {}

    def keep(path: str) -> Any:
        return lambda module, args: kept.__setitem__(path, args[0].detach())

    sites = model.adaptive_sites().items()
    hooks = [site.register_forward_pre_hook(keep(path)) for path, site in sites]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return kept


def by_hand(folder: Path, blocks: TokenBlocks, found: TokenClasses) -> dict[str, Counter[Any]]:
    """Return, for each block of the model, tokens by (class, real experts), one text at a time."""
    model = load_model(folder)
    counts: dict[str, Counter[Any]] = {path: Counter() for path in null_sites(model)}
    for row in range(len(blocks)):
        size = int(blocks.weights[row].sum())
        ids = torch.from_numpy(blocks.ids[row, :size])[None]
        kept = inputs_of(model, ids)
        for path, site in model.adaptive_sites().items():
            with torch.no_grad():
                run = site.adaptive_decide(kept[path][0]).kept.sum(dim=-1)
            counts[path].update(zip(found.codes[row, :size].tolist(), run.tolist(), strict=True))
    return counts


def test_who_skips_a_block_runs_no_expert_there(nulled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "routed"
    api.convert(nulled, destination=folder, method="depth", kind="skip", layers="0,1")
    name = next(folder.glob("*.safetensors"))
    tensors = load_file(name)
    for key in [key for key in tensors if key.endswith("depth.router.weight")]:
        tensors[key] = torch.randn(
            tensors[key].shape, generator=torch.Generator().manual_seed(len(key))
        )
    save_file(tensors, name, metadata={"format": "pt"})
    blocks, documents = cut(nulled)
    found = classes(nulled, blocks, documents)
    model: Any = load_model(folder)
    path, block = next(iter(model.adaptive_depth().items()))
    block.__dict__["adaptive_layer"] = {**block.adaptive_layer, "select": {"rule": "none"}}
    variant = Variant(label="x", model=model, setting=STORED)
    (score,) = score_texts([variant], blocks, documents.names, batch_size=2, classes=found)
    assert score.classes is not None
    result = score.classes.result()
    assert result is not None
    idle = {
        site: sum(row[0] for row in rows)
        for site, rows in zip(result.sites, result.counts, strict=True)
    }
    for rows in result.counts:
        assert sum(map(sum, rows)) == blocks.tokens
    none = next(site for site in result.sites if site.startswith(f"{path}."))
    assert idle[none] == blocks.tokens
    assert 0 < min(idle.values()) < blocks.tokens


@pytest.mark.parametrize("batch", [1, 4])
def test_real_experts_of_each_class_are_those_counted_by_hand(nulled: Path, batch: int) -> None:
    blocks, documents = cut(nulled)
    assert not blocks.weights.all()
    found = classes(nulled, blocks, documents)
    variant = Variant(label="x", model=load_model(nulled), setting=STORED)
    (score,) = score_texts([variant], blocks, documents.names, batch_size=batch, classes=found)
    assert score.classes is not None
    result = score.classes.result()
    assert result is not None
    wanted = by_hand(nulled, blocks, found)
    for at, path in enumerate(result.sites):
        for kind, name in enumerate(result.classes):
            code = CLASSES.index(name)
            row = result.counts[at][kind]
            assert {n: c for n, c in enumerate(row) if c} == {
                n: c for (k, n), c in wanted[path].items() if k == code
            }
    assert sum(result.tokens) == blocks.tokens
    # the account counts the same
    for at, usage in enumerate(score.tally.usage()):
        columns = zip(*result.counts[at], strict=True)
        total = sum(n * sum(column) for n, column in enumerate(columns))
        assert usage.active == total / blocks.tokens
        none = sum(row[0] for row in result.counts[at])
        assert usage.idle == none / blocks.tokens
        assert usage.source_k == 2


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v2"])
def test_every_family_is_counted_alike(family: str, tmp_path: Path) -> None:
    def spend(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith("null_experts.bias"):
                tensors[name].fill_(0.3)

    stock = tiny_models.make(family, tmp_path / "stock")
    folder = make_nulled(stock, tmp_path / "nulled", edit=spend)
    blocks, documents = cut(folder)
    found = classes(folder, blocks, documents)
    variant = Variant(label="x", model=load_model(folder), setting=STORED)
    (score,) = score_texts([variant], blocks, documents.names, classes=found)
    assert score.classes is not None
    result = score.classes.result()
    assert result is not None
    for at, counts in enumerate(by_hand(folder, blocks, found).values()):
        total = sum(run * count for (_, run), count in counts.items())
        ours = sum(result.mean(at, n) * count for n, count in enumerate(result.tokens))
        assert abs(ours - total) <= 1e-9 * total
        # some tokens do without some expert
        assert 0 < total < result.of[at] * blocks.tokens


def test_evaluate_tells_real_experts_by_layer_and_class(nulled: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    given = {"data": data, "length": 16, "speed": False}
    report = api.evaluate(str(nulled), select=("rule=null", "rule=top-k,k=1", "rule=all"), **given)
    stored, single, whole = report.results
    assert stored.realised is not None
    assert 0 < stored.realised.share < 1
    assert stored.realised.idle > 0
    assert single.realised is not None
    assert (single.realised.active, single.realised.idle) == (1.0, 0.0)
    assert whole.realised is not None
    assert (whole.realised.share, whole.realised.blocks) == (1.0, 2)
    said = json.loads(json.dumps(report.to_json()))["settings"][0]
    assert set(said["real_experts"]) == {"mean", "of", "share", "idle_share", "blocks"}
    layer = said["token_classes"]["layers"][0]
    assert layer["site"] == "model.layers.0.mlp"
    assert layer["of"] == 2
    assert sum(layer["tokens_by_real"]) == report.data["tokens"]
    assert said["experts"][0]["realised"] == said["experts"][0]["mean_active"] / 2
    text = "\n".join(report.lines())
    assert "real experts, null: " in text
    assert "  class of token  of tokens  real experts  none for\n  punctuation" in text
    assert "100.0 % of 2" in text


def test_other_models_are_told_of_as_before(tmp_path: Path) -> None:
    stock = tiny_models.make("mixtral", tmp_path / "stock")
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    report = api.evaluate(str(stock), data=data, length=16, speed=False)
    (said,) = report.to_json()["settings"]  # type: ignore[misc]
    assert not {"real_experts", "token_classes"} & set(said)
    assert "real experts" not in "\n".join(report.lines())
    assert null_sites(object()) == {}


def test_layer_ten_comes_after_layer_two() -> None:
    class Site:
        adaptive_spec: Mapping[str, Any] = {"mixture": {"top_k": 2}}

    class Model:
        def adaptive_sites(self) -> dict[str, Site]:
            return {f"model.layers.{n}.mlp": Site() for n in (0, 1, 10, 11, 2, 3)}

    found = [path.split(".")[2] for path in null_sites(Model())]
    assert found == ["0", "1", "2", "3", "10", "11"]


def test_a_tokenizer_without_places_is_told(
    nulled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text(json.dumps({"text": TEXTS[1]}) + "\n")
    monkeypatch.setattr(measures, "token_classes", lambda *given: None)
    report = api.evaluate(str(nulled), data=data, length=16, speed=False)
    assert report.results[0].classes is None
    assert report.notes == (
        "real experts are not told by class of token: the tokenizer does not say where its "
        "tokens lie",
    )
