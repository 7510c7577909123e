"""Passes that leave at exits, against models that were cut off there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaconvert.modeling.adaptive_exit_schema import check_exits
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.exits_by_hand import PLACES, by_hand
from adaconvert.testing.tiny_models import make

LAYERS, EXITS = 4, (1, 3)
CLASSIFIERS = {"bert": "BertForSequenceClassification", "vit": None}
DECODERS = sorted(set(PLACES) - set(CLASSIFIERS))
#: their own block has the masks of the last one, which the model cut short lacks.
BY_KIND = ("gemma2", "gemma3_text", "olmo3")

Made = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that gives (model with exits, dense model) of a family."""
    root = tmp_path_factory.mktemp("exits")

    def load(family: str, kind: str = "norm", **options: Any) -> tuple[Any, Any]:
        dense = root / family / "dense"
        if not dense.exists():
            make(
                family,
                dense,
                layers=LAYERS,
                max_shard_size="1GB",
                architecture=CLASSIFIERS.get(family),
            )
        folder = root / family / f"{kind}-{len(list((root / family).iterdir()))}"
        by_hand(dense, folder, EXITS, kind, **options)
        # the grouped product of experts knows no float64
        more = {"experts_implementation": "eager"} if family == "mixtral" else {}
        exits = load_model(folder, dtype="float64", **more)
        return exits, load_model(dense, dtype="float64", **more)

    return load


def inputs_of(family: str, model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if family == "vit":
        side = model.config.image_size
        return {"pixel_values": torch.randn(3, 3, side, side, dtype=torch.float64)}
    return {"input_ids": torch.randint(5, 60, (2, 9))}


def cut(family: str, dense: Any, at: int, *, block: bool = False) -> Any:
    """Return the dense model cut off after some blocks, with its last one behind for `block`."""
    path = PLACES[family][0]
    blocks: Any = dense.get_submodule(path)
    kept = [*blocks[:at], blocks[-1]] if block else list(blocks[:at])
    short = copy.deepcopy(dense)
    parent, _, name = path.rpartition(".")
    setattr(short.get_submodule(parent), name, nn.ModuleList(copy.deepcopy(kept)))
    short.config.num_hidden_layers = len(kept)
    return short


def between(values: Tensor) -> float:
    """Return a number in the middle of the widest gap, so that rounding decides nothing."""
    ordered = values.reshape(-1).sort().values
    at = int(ordered.diff().argmax())
    return float(ordered[at : at + 2].mean())


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


@pytest.mark.parametrize("family", sorted(PLACES))
def test_no_exit_taken_is_the_dense_model_bit_for_bit(made: Made, family: str) -> None:
    model, dense = made(family, "shared" if family in CLASSIFIERS else "mlp")
    inputs = inputs_of(family, model)
    assert torch.equal(logits(model, inputs), logits(dense, inputs))


@pytest.mark.parametrize("kind", ["shared", "affine", "norm", "mlp", "layer", "full"])
@pytest.mark.parametrize("family", sorted(PLACES))
def test_all_taken_at_an_exit_is_the_model_cut_off_there(
    made: Made, family: str, kind: str
) -> None:
    block = kind in ("layer", "full")
    if (PLACES[family][2] is None and kind in ("mlp", "full")) or (block and family in BY_KIND):
        return
    model, dense = made(family, kind)
    inputs = inputs_of(family, model)
    for order, at in enumerate(EXITS):
        levels = [None] * order + [0.0] * (len(EXITS) - order)
        with model.set_exits(levels):
            output = model(**inputs)
        assert bool((output.exit_layers == at).all())
        short = cut(family, dense, at, block=block)
        given = {**inputs} if family in CLASSIFIERS else {**inputs, "use_cache": False}
        assert torch.equal(output.logits, logits(short, given))


@pytest.mark.parametrize("family", DECODERS)
def test_tokens_leave_where_an_exit_is_sure(made: Made, family: str) -> None:
    model, _ = made(family)
    inputs = inputs_of(family, model)
    with torch.no_grad():
        states = model.exit_states(**inputs)
        of = {at: model.exit_logits(at, states[at]) for at in (*EXITS, LAYERS)}
    sure = {at: of[at].softmax(-1).amax(-1) for at in EXITS}
    level = between(sure[1])
    wanted = torch.where(sure[1] > level, 1, torch.where(sure[3] > level, 3, LAYERS))
    with model.set_exits(level, measure="max"), torch.no_grad():
        output = model(**inputs)
    assert torch.equal(output.exit_layers, wanted)
    for at, found in of.items():
        mine = wanted == at
        assert torch.allclose(output.logits[mine], found[mine], atol=1e-12, rtol=0)


@pytest.mark.parametrize("measure", ["difference", "max", "entropy", "state"])
def test_padding_changes_nothing(made: Made, measure: str) -> None:
    model, _ = made("llama")
    torch.manual_seed(5)
    short, long = torch.randint(5, 60, (1, 5)), torch.randint(5, 60, (1, 9))
    ids = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    level = 0.9 if measure == "state" else 0.02
    with model.set_exits(level, measure=measure), torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, position_ids=mask.cumsum(1) - mask)
        for row, own in enumerate((short, long)):
            one = model(input_ids=own)
            assert torch.equal(both.exit_layers[row, -own.shape[1] :], one.exit_layers[0])
            pair = (both.logits[row, -own.shape[1] :], one.logits[0])
            assert torch.allclose(*pair, atol=1e-12, rtol=0)


def test_a_threshold_is_only_passed_from_above(made: Made) -> None:
    model, _ = made("llama")
    inputs = inputs_of("llama", model)
    with model.set_exits([1.0, 1.0], measure="max"), torch.no_grad():
        assert bool((model(**inputs).exit_layers == LAYERS).all())


def test_patience_counts_exits_that_agree(made: Made) -> None:
    model, _ = made("llama", "shared")
    inputs = inputs_of("llama", model)
    with torch.no_grad():
        states = model.exit_states(**inputs)
        choices = {at: model.exit_logits(at, states[at]).argmax(-1) for at in EXITS}
    wanted = torch.where(choices[1] == choices[3], 3, LAYERS)
    with model.set_exits(patience=1), torch.no_grad():
        assert torch.equal(model(**inputs).exit_layers, wanted)
    with model.set_exits(patience=2), torch.no_grad():
        assert not hasattr(model(**inputs), "exit_layers")


def test_frozen_states_are_what_later_blocks_read(made: Made) -> None:
    model, dense = made("llama", "norm", kv="propagate")
    inputs = inputs_of("llama", model)
    with torch.no_grad():
        states = model.exit_states(**inputs)
        sure = model.exit_logits(1, states[1]).softmax(-1).amax(-1)
        level = between(sure)
        with model.set_exits([level, None], measure="max"):
            output = model(**inputs)
        gone = sure > level
        hidden = states[1]
        rope = dense.model.rotary_emb(hidden, torch.arange(9)[None])
        for block in dense.model.layers[1:]:
            after = block(hidden, position_embeddings=rope, attention_mask=None)
            hidden = torch.where(gone[..., None], hidden, after)
        last = dense.lm_head(dense.model.norm(hidden))
    assert torch.equal(output.exit_layers == 1, gone)
    assert torch.allclose(output.logits[~gone], last[~gone], atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", sorted(CLASSIFIERS))
def test_texts_that_leave_are_dropped_from_the_batch(made: Made, family: str) -> None:
    model, _ = made(family, "norm")
    inputs = inputs_of(family, model)
    rows: list[int] = []
    blocks: Any = model.get_submodule(PLACES[family][0])
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    with torch.no_grad():
        first = model.exit_logits(1, model.exit_states(**inputs)[1], **_pixels(inputs))
        sure = first.softmax(-1).amax(-1)
        level = between(sure)
        rows.clear()
        with model.set_exits([level, None], measure="max"):
            output = model(**inputs)
    gone = sure > level
    assert torch.equal(output.exit_layers == 1, gone)
    assert rows[0] == len(gone)
    # blocks hand on what they do not run, so every stage calls all of them
    assert min(rows) == int((~gone).sum())
    assert torch.allclose(output.logits[gone], first[gone], atol=1e-12, rtol=0)
    for row in range(len(gone)):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        with model.set_exits([level, None], measure="max"), torch.no_grad():
            assert torch.allclose(model(**one).logits[0], output.logits[row], atol=1e-12, rtol=0)


def _pixels(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if name == "pixel_values"}


def test_labels_give_the_loss_of_the_logits_that_are_returned(made: Made) -> None:
    model, dense = made("llama")
    inputs = inputs_of("llama", model)
    short = cut("llama", dense, 1)
    with model.set_exits(0.0), torch.no_grad():
        found = model(**inputs, labels=inputs["input_ids"]).loss
        wanted = short(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    assert torch.allclose(found, wanted)


def test_knobs_are_put_back_and_refused_when_wrong(made: Made) -> None:
    model, _ = made("llama")
    with model.set_exits(0.5):
        assert model.adaptive_runtime.leaving()["thresholds"] == [0.5, 0.5]
        with model.set_compute(1.0):
            assert model.adaptive_runtime.leaving() is None
    assert model.adaptive_runtime.leaving() is None
    with pytest.raises(AdaptiveConfigError, match="thresholds is"):
        model.set_exits([0.5])
    with pytest.raises(AdaptiveConfigError, match="measure is 'sure'"):
        model.set_exits(0.5, measure="sure")
    with pytest.raises(ValueError, match="how early tokens may leave for it only data can tell"):
        model.set_compute(0.8)


def test_stock_assistant_early_exit_drafts_with_the_own_head(made: Made) -> None:
    model, dense = made("llama", "mlp")
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ids = torch.randint(5, 60, (1, 6))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    plain = dense.generate(ids, **options)
    assert torch.equal(model.generate(ids, assistant_early_exit=3, **options), plain)
    model.config.num_hidden_layers = 3
    with torch.no_grad():
        early = model(ids, use_cache=False).logits
    model.config.num_hidden_layers = LAYERS
    with model.set_exits([None, 0.0]), torch.no_grad():
        assert torch.equal(model(ids).logits, early)


@pytest.mark.parametrize("kind", ["mlp", "layer"])
def test_copies_and_saved_models_are_the_same(made: Made, tmp_path: Path, kind: str) -> None:
    model, _ = made("llama", kind)
    with torch.no_grad():
        for parameter in model.exits.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    inputs = inputs_of("llama", model)
    model.save_pretrained(tmp_path / "saved")
    others = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        load_model(tmp_path / "saved", dtype="float64"),
    ]
    with model.set_exits(0.02), torch.no_grad():
        wanted = model(**inputs)
    for other in others:
        with other.set_exits(0.02), torch.no_grad():
            found = other(**inputs)
        assert torch.equal(found.logits, wanted.logits)
        assert torch.equal(found.exit_layers, wanted.exit_layers)


def test_an_account_leaves_out_what_tokens_did_not_run(made: Made) -> None:
    model, _ = made("llama", "shared")
    inputs = inputs_of("llama", model)
    config = model.config
    with torch.no_grad():
        with model.account() as whole:
            model(**inputs)
        with model.set_exits([0.0, None]), model.account() as early:
            model(**inputs)
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() == 2)
    heads = config.num_attention_heads * config.head_dim
    seen = sum(range(1, 10)) / 9
    gone = (LAYERS - 1) * (2 * block + 4 * heads * seen)
    assert early.flops_per_token()["exits"] == 2 * config.vocab_size * config.hidden_size
    saved = whole.flops_per_token()["total"] - early.flops_per_token()["total"]
    assert saved == pytest.approx(gone, abs=1)
    assert whole.flops_per_token()["exits"] == 0


def test_half_precision_and_gradients_pass(made: Made) -> None:
    model, _ = made("llama", "mlp")
    model = model.to(torch.bfloat16)
    with model.set_exits(0.01), torch.no_grad():
        assert bool(model(**inputs_of("llama", model)).logits.isfinite().all())
    model.train()
    model.gradient_checkpointing_enable()
    states = model.exit_states(**inputs_of("llama", model))
    model.exit_logits(1, states[1]).float().square().mean().backward()
    assert model.exits["1"].network.gate_proj.weight.grad is not None


def test_the_loss_is_the_first_of_a_tuple(made: Made) -> None:
    for family in ("llama", "bert"):
        model, _ = made(family)
        inputs = inputs_of(family, model)
        labels = inputs["input_ids"] if family == "llama" else torch.tensor([0, 1])
        with model.set_exits(0.0), torch.no_grad():
            whole = model(**inputs, labels=labels)
            parts = model(**inputs, labels=labels, return_dict=False)
        assert torch.equal(parts[0], whole.loss)
        assert torch.equal(parts[1], whole.logits)


def test_stock_drafts_are_checked_by_the_whole_model(made: Made) -> None:
    model, dense = made("llama")
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0}
    plain = dense.generate(ids, **options)
    with model.set_exits(0.0), pytest.warns(UserWarning, match="no token leaves early"):
        found = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert torch.equal(found, plain)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), plain)


def test_a_cache_without_all_sequences_is_not_returned(made: Made) -> None:
    model, _ = made("llama")
    ids = torch.randint(5, 60, (3, 6), generator=torch.manual_seed(2))
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    output = model.generate(
        ids, max_new_tokens=9, draft_exit=3, return_dict_in_generate=True, **options
    )
    cache = output.past_key_values
    assert cache is None or cache.layers[0].keys.shape[0] == 3
    again = model.generate(output.sequences, past_key_values=cache, max_new_tokens=4, **options)
    assert torch.equal(again, model.generate(ids, max_new_tokens=13, **options))


def test_a_rule_of_config_json_needs_the_classifiers_it_asks(made: Made) -> None:
    model, _ = made("llama")
    exits = copy.deepcopy(model.config.adaptive["model"]["exits"])
    check_exits("exits", exits)
    exits["decide"] |= {"measure": "classifier", "thresholds": [0.5] * len(exits["heads"])}
    with pytest.raises(AdaptiveConfigError, match="no classifier of confidence"):
        check_exits("exits", exits)
