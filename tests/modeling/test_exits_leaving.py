"""Forward passes of models with exits: nobody leaves, all leave, and some do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.modeling.adaptive_checks import AdaptiveConfigError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import PLACES, by_hand
from adaconvert.testing.exits_decoded import BLOCKS, DECODERS, alone, model_with_exits, prompts

EXITS = (1, 3)
TEXTS = "BertForSequenceClassification"
Get = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("leaving")


@pytest.fixture(scope="module")
def pair(root: Path) -> Get:
    """Return what gives the tiny dense model of a family, and one with exits that are copies."""

    def get(family: str, kind: str = "norm", **options: Any) -> tuple[Any, Any]:
        dense = root / f"{family}-dense"
        if not dense.exists():
            named = TEXTS if family == "bert" else None
            tiny_models.make(family, dense, layers=BLOCKS, max_shard_size="1GB", architecture=named)
        folder = root / f"{family}-{len(list(root.iterdir()))}"
        return load_model(dense), load_model(by_hand(dense, folder, EXITS, kind, **options))

    return get


@pytest.fixture(scope="module")
def tuned(root: Path) -> Callable[..., Any]:
    """Return what gives a model whose exits differ a little from its end."""

    def get(family: str = "llama", places: tuple[int, ...] = EXITS, **options: Any) -> Any:
        (root / "tuned").mkdir(exist_ok=True)
        dense = root / "tuned" / family
        if family == "bert" and not dense.exists():
            tiny_models.make(family, dense, layers=BLOCKS, max_shard_size="1GB", architecture=TEXTS)
        return model_with_exits(root / "tuned", family, places, **options)

    return get


def inputs_of(family: str, rows: int = 3) -> dict[str, Any]:
    if family == "vit":
        return {"pixel_values": torch.rand(rows, 3, 16, 16, generator=torch.manual_seed(0))}
    return prompts(rows, 9)


def cut(model: Any, family: str, blocks: int) -> Any:
    """Return the dense model without the blocks behind the first `blocks`."""
    short = copy.deepcopy(model)
    path = PLACES[family][0]
    parent, _, name = path.rpartition(".")
    setattr(short.get_submodule(parent), name, short.get_submodule(path)[:blocks])
    short.config.num_hidden_layers = blocks
    return short


def forced(model: Any, batch: dict[str, Any], rule: Callable[..., Any]) -> tuple[Any, Any]:
    """Return logits and blocks run, taken token by token from the states of all exits."""
    with torch.no_grad():
        states = model.exit_states(**batch)
        logits = {at: model.exit_logits(at, state) for at, state in states.items()}
    chosen = logits[BLOCKS].clone()
    depth = torch.full(chosen.shape[:2], BLOCKS)
    for row in range(chosen.shape[0]):
        for position in range(chosen.shape[1]):
            for at in EXITS:
                if rule(at, logits[at][row, position]):
                    chosen[row, position], depth[row, position] = logits[at][row, position], at
                    break
    return chosen, depth


@pytest.mark.parametrize("family", PLACES)
def test_nobody_leaves(pair: Get, family: str) -> None:
    dense, model = pair(family)
    batch = inputs_of(family)
    with torch.no_grad():
        wanted = dense(**batch).logits
        assert torch.equal(model(**batch).logits, wanted)
        # a level that no token is above runs every check and changes nothing
        with model.set_exits(1.0, measure="max"):
            out = model(**batch)
    assert torch.equal(out.logits, wanted)
    mask = batch.get("attention_mask") if family not in ("bert", "vit") else None
    ran = out.exit_layers if mask is None else out.exit_layers[mask.bool()]
    assert set(ran.unique().tolist()) == {BLOCKS}


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("family", PLACES)
def test_all_leave_at_one_exit(pair: Get, family: str, kv: str) -> None:
    dense, model = pair(family)
    batch = inputs_of(family)
    with torch.no_grad():
        for order, at in enumerate(EXITS):
            wanted = cut(dense, family, at)(**batch).logits
            levels = [0.0 if i == order else None for i in range(len(EXITS))]
            with model.set_exits(levels, measure="max", kv=kv):
                out = model(**batch)
            torch.testing.assert_close(out.logits, wanted, atol=1e-5, rtol=1e-5)
            assert (out.exit_layers == at).any()
            assert set(out.exit_layers.unique().tolist()) <= {0, at}


@pytest.mark.parametrize("kind", ["shared", "affine", "norm", "mlp", "layer", "full"])
@pytest.mark.parametrize("measure", ["max", "difference", "entropy"])
def test_logits_are_of_the_first_exit_that_is_sure(
    tuned: Callable[..., Any], kind: str, measure: str
) -> None:
    from adaconvert.modeling.adaptive_exit_decide import confidence

    model = tuned(kind=kind)
    batch = prompts(3, 9)
    with torch.no_grad():
        states = model.exit_states(**batch)
        sure = [
            confidence(measure, model.exit_logits(at, s), state=s, previous_state=None, head=None)
            for at, s in states.items()
        ]
    level = float(torch.stack(sure[:2]).median())
    wanted, depth = forced(
        model,
        batch,
        lambda at, logits: (
            confidence(measure, logits[None], state=logits, previous_state=None, head=None) > level
        ),
    )
    with torch.no_grad(), model.set_exits(level, measure=measure):
        out = model(**batch)
    real = batch["attention_mask"].bool()
    assert len(out.exit_layers[real].unique()) > 1
    assert torch.equal(out.exit_layers[real], depth[real])
    assert not out.exit_layers[~real].any()
    torch.testing.assert_close(out.logits[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_a_padded_batch_is_its_texts_alone(tuned: Callable[..., Any], family: str, kv: str) -> None:
    model = tuned(family)
    batch = prompts(3, 9)
    if family == "bert":
        batch = {name: value.flip(1) for name, value in batch.items()}
    else:
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    level = middle(model, batch)
    decay = None if family == "bert" else {"rate": 4.0, "length": 9}
    with torch.no_grad(), model.set_exits(level, measure="max", kv=kv, decay=decay):
        together = model(**batch)
        for row in range(3):
            single = model(**alone(batch, row))
            real = batch["attention_mask"][row].bool()
            if family == "bert":
                torch.testing.assert_close(together.logits[row], single.logits[0])
                assert together.exit_layers[row] == single.exit_layers[0]
            else:
                found = together.logits[row][real]
                torch.testing.assert_close(found, single.logits[0], atol=1e-5, rtol=1e-5)
                assert torch.equal(together.exit_layers[row][real], single.exit_layers[0])


def middle(model: Any, batch: dict[str, Any]) -> float:
    """Return a level of the largest probability that some tokens are above, and some not."""
    causal = model.adaptive_runtime.exits["kind"] == "causal"
    with torch.no_grad():
        states = model.exit_states(**batch)
        more = {} if causal else {k: v for k, v in batch.items() if k == "pixel_values"}
        sure = [model.exit_logits(at, s, **more).softmax(-1).amax(-1) for at, s in states.items()]
    return float(torch.stack(sure[:1]).median())


def test_propagation_freezes_what_left(tuned: Callable[..., Any]) -> None:
    model = tuned()
    batch = prompts(1, 12)
    level = middle(model, batch)
    blocks = model.model.layers
    ids = batch["input_ids"]
    frozen = torch.zeros(1, 12, dtype=torch.bool)
    depth = torch.full((1, 12), BLOCKS)
    with torch.no_grad():
        state = model.model.embed_tokens(ids)
        angles = model.model.rotary_emb(state, torch.arange(12)[None])
        mask = torch.full((12, 12), float("-inf")).triu(1)[None, None]
        logits = torch.zeros(1, 12, model.config.vocab_size)
        for index, block in enumerate(blocks):
            new = block(state, attention_mask=mask, position_embeddings=angles)
            state = torch.where(frozen[..., None], state, new)
            if index + 1 in EXITS:
                said = model.exit_logits(index + 1, state)
                leave = (said.softmax(-1).amax(-1) > level) & ~frozen
                logits[leave], depth[leave] = said[leave], index + 1
                frozen |= leave
        rest = model.lm_head(model.model.norm(state))
        logits[~frozen] = rest[~frozen]
        with model.set_exits(level, measure="max", kv="propagate"):
            out = model(**batch)
    assert len(depth.unique()) > 1
    assert torch.equal(out.exit_layers, depth)
    torch.testing.assert_close(out.logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_texts_of_a_classifier_that_left_are_dropped(
    tuned: Callable[..., Any], family: str
) -> None:
    model = tuned(family)
    batch = inputs_of(family, rows=6)
    level = middle(model, batch)
    seen: list[int] = []
    blocks = model.get_submodule(PLACES[family][0])
    part = blocks[-1].attention
    hook = part.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    with torch.no_grad(), model.set_exits(level, measure="max"):
        out = model(**batch)
        labels = torch.arange(6) % model.config.num_labels
        loss = model(**batch, labels=labels).loss
    hook.remove()
    wanted = torch.nn.functional.cross_entropy(out.logits, labels)
    torch.testing.assert_close(loss, wanted)
    deep = int((out.exit_layers == BLOCKS).sum())
    assert (out.exit_layers < BLOCKS).any()
    assert seen == ([deep, deep] if deep else [])


def test_labels_give_the_loss_of_what_left(tuned: Callable[..., Any]) -> None:
    model = tuned()
    batch = prompts(1, 9)
    with torch.no_grad(), model.set_exits(middle(model, batch), measure="max"):
        out = model(**batch, labels=batch["input_ids"])
        parts = model(**batch, return_dict=False)
        last = model(**batch, logits_to_keep=2)
    wanted = torch.nn.functional.cross_entropy(out.logits[0, :-1], batch["input_ids"][0, 1:])
    torch.testing.assert_close(out.loss, wanted)
    assert isinstance(parts, tuple)
    assert torch.equal(parts[0], out.logits)
    torch.testing.assert_close(last.logits, out.logits[:, -2:])


@pytest.mark.parametrize("measure", ["state", "classifier", "patience"])
def test_other_measures(tuned: Callable[..., Any], measure: str) -> None:
    model = tuned(places=(1, 2, 3))
    batch = prompts(2, 9)
    if measure == "classifier":
        with pytest.raises(AdaptiveConfigError, match="confidence"):
            model.set_exits(0.5, measure=measure)
        return
    with torch.no_grad():
        states = model.exit_states(**batch)
    if measure == "state":
        near = torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1)
        level = float(near.median())
        setting = model.set_exits([None, level, None], measure=measure)
        left = near > level
    else:
        said = {at: model.exit_logits(at, s).argmax(-1) for at, s in states.items()}
        setting = model.set_exits(patience=1)
        left = said[1] == said[2]
    with setting, torch.no_grad():
        depth = model(**batch).exit_layers
    real = batch["attention_mask"].bool()
    assert torch.equal((depth == 2)[real], left[real])
    assert not (depth == 1).any()


def test_knobs_hold_until_their_end(tuned: Callable[..., Any]) -> None:
    model = tuned(decide={**DECIDE, "thresholds": [0.0, None]})
    batch = prompts(1, 5)

    def depths() -> set[int]:
        with torch.no_grad():
            out = model(**batch)
        found = getattr(out, "exit_layers", torch.tensor([BLOCKS]))
        return set(found.unique().tolist())

    assert depths() == {1}
    with model.set_exits(thresholds=None):
        assert depths() == {BLOCKS}
        with model.set_exits([None, 0.0], measure="max"):
            assert depths() == {3}
            with model.set_exits(thresholds="config"):
                assert depths() == {1}
        assert depths() == {BLOCKS}
    with model.set_compute(1.0):
        assert depths() == {BLOCKS}
    assert depths() == {1}
    model.train()
    assert depths() == {BLOCKS}
    with pytest.raises(ValueError, match="calibrate"):
        model.eval().set_compute(0.5)
    for wrong in (1.5, [0.5], [0.5, 2], "often"):
        with pytest.raises(AdaptiveConfigError):
            model.set_exits(wrong, measure="max")


DECIDE = {"measure": "max", "thresholds": [None, None], "decay": None, "patience": None}


def test_a_row_of_calibration_holds_a_rule(tuned: Callable[..., Any]) -> None:
    model = tuned()
    rule = {"measure": "max", "thresholds": [0.0, None]}
    model.config.adaptive["calibration"] = {
        "rows": [{"compute": 0.5, "loss": 2.0, "exits": rule}, {"compute": 1.0, "loss": 1.0}]
    }
    with model.set_compute(0.6), torch.no_grad():
        assert model.adaptive_runtime.leaving()["kv"] == "recompute"
        assert set(model(**prompts(1, 5)).exit_layers.unique().tolist()) == {1}


@pytest.mark.parametrize("kind", ["norm", "mlp", "affine"])
def test_a_model_cut_off_at_an_exit_ends_with_it(tuned: Callable[..., Any], kind: str) -> None:
    model = tuned(kind=kind)
    batch = prompts(1, 9)
    with torch.no_grad():
        wanted = model.exit_logits(3, model.exit_states(**batch)[3])
        model.config.num_hidden_layers = 3
        found = model(**batch).logits
        model.config.num_hidden_layers = BLOCKS
        ids = batch["input_ids"]
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        drafted = model.generate(
            ids, max_new_tokens=8, do_sample=False, pad_token_id=0, assistant_early_exit=3
        )
    torch.testing.assert_close(found, wanted)
    assert torch.equal(plain, drafted)


def test_copies_leave_alike(tuned: Callable[..., Any], tmp_path: Path) -> None:
    model = tuned(kind="mlp", decide={**DECIDE, "thresholds": [0.004, 0.004]})
    batch = prompts(2, 9)
    model.save_pretrained(tmp_path / "again")
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        load_model(tmp_path / "again"),
    ]
    with torch.no_grad():
        wanted = model(**batch)
        for other in copies:
            found = other(**batch)
            assert torch.equal(found.logits, wanted.logits)
            assert torch.equal(found.exit_layers, wanted.exit_layers)


def test_bfloat16(tuned: Callable[..., Any]) -> None:
    model = tuned().to(torch.bfloat16)
    batch = prompts(2, 9)
    with torch.no_grad(), model.set_exits(0.0, measure="max"):
        out = model(**batch)
    assert out.logits.dtype == torch.bfloat16
    assert set(out.exit_layers.unique().tolist()) <= {0, 1}


def test_gradient_checkpointing_changes_nothing(tuned: Callable[..., Any]) -> None:
    model = tuned(kind="mlp").train()
    batch = prompts(2, 9)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        loss = sum(s.square().mean() for s in model.exit_states(**batch).values())
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
