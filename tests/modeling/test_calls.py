"""Every pass knows its knobs and its padding: by the backbone alone, and under masks over pairs."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adaconvert.auto
from adaconvert.modeling.adaptive_masks import seen_lengths, token_mask_of
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

#: rounding of float32 sums in another order, on logits of order 10.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("calls")

    def get(family: str) -> Path:
        adaptive = root / f"{family}-adaptive"
        if not adaptive.exists():
            make_adaptive(tiny_models.make(family, root / family), adaptive)
        return adaptive

    return get


def ids_of(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how", ["as it is", "deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_backbone_called_by_itself_is_the_models(folder: Any, family: str, how: str) -> None:
    model: Any = load_model(folder(family), dtype="float32")
    if how != "as it is":
        model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    stock = type(model.base_model).__mro__[2]
    assert type(model.base_model).__name__ == stock.__name__
    ids, mask = ids_of(), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    seen: dict[str, Any] = {}
    head = model.base_model.register_forward_hook(lambda *a: seen.update(hidden=a[-1][0]))
    with torch.no_grad():
        dense = model.base_model(ids, attention_mask=mask)[0]
        with model.set_select("top-k", k=2), model.account() as whole:
            model(ids, attention_mask=mask)
        want = seen["hidden"]
        with (
            model.set_select("top-k", k=2),
            model.account() as alone,
            model.collect("router_scores") as got,
        ):
            found = model.base_model(ids, attention_mask=mask)[0]
        after = model.base_model(ids, attention_mask=mask)[0]
    head.remove()
    assert torch.equal(found, want)
    assert torch.equal(after, dense)
    assert not torch.equal(found, dense)
    assert alone.tokens == 12 + 7
    assert alone.flops_per_token() == whole.flops_per_token()
    assert {scores[0].shape[0] for scores in got.values()} == {19}


def test_knobs_set_through_generate_do_not_reach_another_model(folder: Any) -> None:
    one: Any = load_model(folder("llama"), dtype="float32")
    other: Any = load_model(folder("llama"), dtype="float32")
    ids = ids_of()
    with torch.no_grad():
        dense = other.model(ids)[0]
        with one.set_select("top-k", k=1):
            assert torch.equal(other.model(ids)[0], dense)


def test_backbone_of_the_auto_class_obeys_its_own_knobs(folder: Any) -> None:
    assert adaconvert.auto
    bare = transformers.AutoModel.from_pretrained(folder("llama"), dtype=torch.float32).eval()
    whole: Any = load_model(folder("llama"), dtype="float32")
    ids = ids_of()
    with torch.no_grad(), bare.set_select("top-k", k=2), whole.set_select("top-k", k=2):
        got = bare(ids).last_hidden_state
        assert torch.equal(got, whole.model(ids).last_hidden_state)
        assert torch.equal(whole.lm_head(got), whole(ids).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text"])
def test_static_cache_neither_routes_nor_counts_padding(
    folder: Any, family: str, attention: str
) -> None:
    model: Any = load_model(folder(family), dtype="float32", attn_implementation=attention)
    ids, mask = ids_of(), torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    counts = []
    for cache in (None, "static"):
        with torch.no_grad(), model.set_select("top-k", k=3), model.account() as account:
            grown = model.generate(
                ids,
                attention_mask=mask,
                cache_implementation=cache,
                disable_compile=True,
                **options,
            )
        sites = [(s.tokens, s.neurons, s.experts.tolist()) for s in account.sites.values()]
        counts.append((account.tokens, account.attention_flops, sites, grown.tolist()))
    assert counts[0][0] == 12 + 7 + 2 * 3
    assert counts[1] == counts[0]


def test_padding_shows_in_masks_over_pairs(folder: Any) -> None:
    model: Any = load_model(folder("llama"), dtype="float32")
    ids, mask = ids_of(), torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    pairs = (mask[:, None, None, :] * torch.ones(12, 12).tril()).bool()
    with torch.no_grad(), model.set_select("top-k", k=3):
        with model.account() as flat:
            want = model(ids, attention_mask=mask).logits[1, :9]
        with model.account() as paired:
            got = model(ids, attention_mask=pairs).logits[1, :9]
    assert (got - want).abs().max() <= CLOSE * want.abs().max()
    assert paired.tokens == flat.tokens == 12 + 9
    assert paired.attention_flops == flat.attention_flops


def test_token_mask_is_the_part_of_this_pass() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    first = [[False, True, True, True], [True] * 4]
    pairs = (mask[:, None, None, :] * torch.ones(4, 4).tril()).bool()
    added = torch.zeros(2, 1, 4, 4).masked_fill(~pairs, torch.finfo(torch.float32).min)

    def found(*args: Any, **kwargs: Any) -> Any:
        got = token_mask_of(*args, **kwargs)
        return None if got is None else got.tolist()

    for given in (mask, pairs, pairs[:, 0], added, {"full_attention": pairs}):
        assert found(given, 4) == first
    # the rest of a static cache of 6 positions, and one of which 2 are filled
    assert found(torch.nn.functional.pad(mask, (0, 2)), 4) == first
    assert found(torch.nn.functional.pad(pairs, (0, 2)), 4) == first
    assert found(torch.tensor([[1, 1, 0, 1, 0, 0]]), 2, cached=2) == [[False, True]]
    assert found(mask, 2, cached=2) is None, "all are real"
    assert found(pairs[1:], 4, batch=2) is None
    assert found(pairs[:1], 4, batch=2) == [first[0]] * 2
    for nothing in (None, mask[0], pairs[:, :, :3], {}, {"full_attention": None}, mask[:, :3]):
        assert found(nothing, 4) is None


def test_seen_lengths_leave_padding_out_whatever_the_mask() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    pairs = (mask[:, None, None, :] * torch.ones(4, 4).tril()).bool()
    real = mask.bool()
    for given in (mask, pairs, {"full_attention": pairs}):
        got = seen_lengths(real, given, 0, causal=True)
        assert got[real].tolist() == [1, 2, 3, 1, 2, 3, 4]
    last = torch.ones(2, 1, dtype=torch.bool)
    for given in (mask, torch.nn.functional.pad(pairs[:, :, 3:], (0, 2))):
        assert seen_lengths(last, given, 3, causal=True).tolist() == [[3], [4]]
    assert seen_lengths(last, None, 3, causal=True).tolist() == [[4], [4]]
    assert seen_lengths(real, mask, 0, causal=False).tolist() == [[3] * 4, [4] * 4]
