"""Fine-tunes of exits: what learns, what stays as it was, what is measured, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.errors import InterruptedRunError, OptionError
from adaconvert.io import manifest
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.testing.labelled import with_confidence
from adaconvert.testing.stored import moved, tensors_of
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]
SKIP: dict[str, Any] = {"early_exit_loss": 0.5, "layer_dropout": 0.3}


@pytest.fixture
def exits(deep: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return what makes a checkpoint with exits after blocks 1 and 3."""

    def make(kind: str = "mlp", *, confidence: bool = False, **more: Any) -> Path:
        source = by_hand(deep, tmp_path / kind, [1, 3], kind, **more)
        return with_confidence(source) if confidence else source

    return make


@pytest.mark.parametrize("kind", ["affine", "norm", "mlp", "layer", "full"])
def test_heads_learn_and_the_trunk_stays_as_it_was(
    kind: str, exits: Callable[..., Path], tune: Tune, tmp_path: Path, text: Path
) -> None:
    source = exits(kind)
    lines: list[str] = []
    result = tune(
        source, train=("exits",), valid=[str(text)], valid_tokens=300, report=lines.append
    )
    own = {name for name in tensors_of(source) if name.startswith("exits.")}
    assert moved(source, tmp_path / "out") == own
    for at in (1, 3):
        assert result.curve[-1][f"exit_{at}"] < result.curve[0][f"exit_{at}"] - 0.1
    assert "lm" not in result.curve[0]
    first, last = result.summary["validation"]
    assert first["loss"] == last["loss"]
    for at in ("1", "3"):
        assert last["exits"][at]["loss"] < first["exits"][at]["loss"]
        assert 0 <= last["exits"][at]["agreement"] <= 1
    assert any("exit after 3 blocks: validation" in line for line in lines)
    before, after = load_model(source), load_model(tmp_path / "out")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        a: Any = before(input_ids=ids).logits
        b: Any = after(input_ids=ids).logits
    assert torch.equal(a, b)
    assert manifest.read(tmp_path / "out")["training"]["by_part"] == {
        "exits": sum(tensors_of(source)[name].numel() for name in own)
    }


def test_validation_of_exits_is_that_of_the_model(
    exits: Callable[..., Path], tune: Tune, text: Path
) -> None:
    """An exit's figures equal those from its whole logits."""
    from adaconvert.train.config import FinetuneConfig
    from adaconvert.train.validation import batches, hold_out

    source = exits("norm")
    options: dict[str, Any] = {"valid": [str(text)], "valid_tokens": 300, "seq_len": 32}
    result = tune(source, train=("exits",), steps=1, **options)
    model: Any = load_model(source)
    (held,) = hold_out(FinetuneConfig.of([str(text)], {"steps": 1, **options}), source)
    loss, agreed, count = 0.0, 0, 0
    with torch.inference_mode():
        for ids, mask, targets in batches(held, 4):
            states = model.exit_states(input_ids=ids, attention_mask=mask)
            logits = model.exit_logits(3, states[3])[:, :-1]
            end = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            wanted = targets[:, 1:]
            loss += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), wanted.flatten(), reduction="sum"
                )
            )
            agreed += int((logits.argmax(-1) == end.argmax(-1))[wanted >= 0].sum())
            count += int((wanted >= 0).sum())
    found = result.summary["validation"][0]["exits"]["3"]
    assert found["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert found["agreement"] == pytest.approx(agreed / count)


def test_distillation_brings_an_exit_to_the_last_layer(
    exits: Callable[..., Path], tune: Tune
) -> None:
    result = tune(exits("layer"), train=("exits",), exit_loss="kd", steps=20)
    # that after block 3 begins as the whole model
    assert result.curve[0]["exit_3_kd"] == pytest.approx(0, abs=1e-5)
    assert result.curve[-1]["exit_1_kd"] < 0.9 * result.curve[0]["exit_1_kd"]


def test_trunk_and_exits_learn_together(
    exits: Callable[..., Path], tune: Tune, tmp_path: Path
) -> None:
    source = exits("mlp")
    result = tune(source, exit_loss="both", temperature=2.0)
    assert moved(source, tmp_path / "out") == set(tensors_of(source))
    # what was trained on is not what it computed before, and that is no fault
    assert api.verify(source, tmp_path / "out").ok
    first, last = result.curve[0], result.curve[-1]
    for name in ("lm", "exit_1", "exit_3"):
        assert last[name] < first[name] - 1
    # 0.4 x blocks / L of the sum of both losses
    both = 0.1 * (first["exit_1"] + first["exit_1_kd"]) + 0.3 * (
        first["exit_3"] + first["exit_3_kd"]
    )
    assert first["exits"] == pytest.approx(first["lm"] + both, rel=1e-5)


def test_weights_choose_how_much_each_exit_counts(
    exits: Callable[..., Path], tune: Tune, tmp_path: Path
) -> None:
    source = exits("norm")
    result = tune(source, train=("exits",), exit_weights="0,2", steps=1, log_every=1)
    first = result.curve[0]
    assert first["exits"] == pytest.approx(2 * first["exit_3"], rel=1e-6)
    tune(source, "some", train=("exits",), exit_layers="1", weight_decay=0.0)
    assert {n.split(".")[1] for n in moved(source, tmp_path / "some")} == {"1"}
    # no exit is looked at: the same as the dense model's
    none = tune(source, "none", exit_weights=0, steps=1, log_every=1)
    assert "exits" not in none.curve[0]


def test_recomputation_accumulation_and_chunks_change_nothing(
    exits: Callable[..., Path], tune: Tune
) -> None:
    source = exits("full")
    options: dict[str, Any] = {"exit_loss": "both", "steps": 4, "log_every": 1}
    plain = tune(source, "plain", batch_size=4, **options)
    for name, more in {
        "again": {"batch_size": 4, "checkpointing": True},
        "many": {"batch_size": 2, "accumulate": 2},
        "small": {"batch_size": 4, "exit_chunk": 9},
    }.items():
        other = tune(source, name, **options, **more)
        for what in ("lm", "exit_1", "exit_3_kd", "grad_norm"):
            a, b = ([entry[what] for entry in run.curve] for run in (plain, other))
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6), (name, what)


def test_bf16_keeps_the_frozen_trunk_in_its_dtype(tmp_path: Path, tune: Tune) -> None:
    dense = tiny_models.make(
        "llama", tmp_path / "dense", layers=3, max_shard_size="1GB", dtype="bfloat16"
    )
    source = by_hand(dense, tmp_path / "exits", [1, 2], "mlp")
    result = tune(source, train=("exits",), steps=12)
    assert result.summary["options"]["precision"] == "bf16"
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert all(name.startswith("exits.") for name in moved(source, tmp_path / "out"))
    assert result.curve[-1]["exit_1"] < result.curve[0]["exit_1"] - 0.1


def test_classifiers_learn_beside_a_trunk_in_bf16(tmp_path: Path, tune: Tune) -> None:
    dense = tiny_models.make(
        "llama", tmp_path / "dense", layers=3, max_shard_size="1GB", dtype="bfloat16"
    )
    source = with_confidence(by_hand(dense, tmp_path / "exits", [1, 2], "norm"))
    result = tune(source, train=("confidence",), steps=3)
    own = {f"exits.{at}.confidence.{kind}" for at in (1, 2) for kind in ("weight", "bias")}
    assert moved(source, tmp_path / "out") <= own
    assert result.curve[0]["confidence_1"] == pytest.approx(0.6931, abs=1e-2)


def test_classifiers_learn_where_their_exit_agrees_with_the_end(
    exits: Callable[..., Path], tune: Tune, tmp_path: Path
) -> None:
    source = exits("norm", confidence=True)
    result = tune(source, train=("confidence",), steps=25, lr=1e-2, batch_size=16)
    own = {f"exits.{at}.confidence.{kind}" for at in (1, 3) for kind in ("weight", "bias")}
    assert moved(source, tmp_path / "out") == own
    # untrained it says one half: log 2, however often the exit is right
    assert result.curve[0]["confidence_3"] == pytest.approx(0.6931, abs=1e-3)
    assert result.curve[-1]["confidence_1"] < 0.67
    both = tune(source, "both", train=("exits",), steps=2)
    assert {"confidence_1", "exit_1"} <= set(both.curve[0])


def test_resumed_run_equals_an_uninterrupted_one(
    exits: Callable[..., Path], deep: Path, tune: Tune, tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 5/"):
            raise KeyboardInterrupt

    cases = [(exits("mlp"), {"train": ("exits",)}), (deep, SKIP)]
    for number, (source, more) in enumerate(cases):
        options: dict[str, Any] = {"steps": 8, "save_every": 3, "log_every": 1, **more}
        with pytest.raises(InterruptedRunError):
            tune(source, f"out{number}", report=stop, **options)
        tune(source, f"out{number}", resume=True, **options)
        tune(source, f"whole{number}", **options)
        assert not moved(tmp_path / f"out{number}", tmp_path / f"whole{number}")


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_layerskip_leaves_a_stock_checkpoint_stock(
    family: str, tune: Tune, tmp_path: Path, text: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_models.make(family, tmp_path / "src", layers=4)
    result = tune(
        source,
        **SKIP,
        exit_curriculum="rotational:2",
        checkpointing=True,
        valid=[str(text)],
        valid_tokens=200,
    )
    out = tmp_path / "out"
    assert (out / "config.json").read_text() == json.dumps(
        json.loads((source / "config.json").read_text()), indent=2, sort_keys=True
    ) + "\n"
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__module__.startswith("transformers.")
    assert type(model.base_model).__module__.startswith("transformers.")
    first, last = (entry["exits"] for entry in result.summary["validation"])
    assert set(first) == {"1", "2", "3"}
    assert all(last[at]["loss"] < first[at]["loss"] - 0.5 for at in last)


def test_layerskip_loss_is_the_weighted_sum_of_all_layers(deep: Path, tune: Tune) -> None:
    """Without dropout the first step's loss follows from the stock model's hidden states."""
    from adaconvert.train.exit_losses import skip_weights

    result = tune(deep, early_exit_loss=0.5, steps=1, log_every=1, batch_size=40)
    whole = tune(deep, "whole", steps=1, log_every=1, batch_size=40)
    assert result.curve[0]["lm"] == pytest.approx(whole.curve[0]["lm"], rel=1e-6)
    weights = skip_weights(4, 0.5, [True] * 4)
    assert set(weights) == {2, 3, 4}
    assert sum(weights.values()) == pytest.approx(1)
    assert result.curve[0]["exits"] != pytest.approx(result.curve[0]["lm"], rel=1e-3)


def test_dropout_is_of_training_alone(deep: Path, tune: Tune, text: Path) -> None:
    held: dict[str, Any] = {"valid": [str(text)], "valid_tokens": 300, "steps": 1, "warmup": 1.0}
    dropped = tune(deep, "dropped", layer_dropout=0.9, **held)
    whole = tune(deep, "whole", **held)
    # the first step has rate 0, so both models are the one they began as
    first, last = dropped.summary["validation"]
    assert first["loss"] == last["loss"] == whole.summary["validation"][0]["loss"]
    assert dropped.curve[0]["lm"] != whole.curve[0]["lm"]


def test_layerskip_trains_shared_heads_of_adaptive_checkpoints(
    exits: Callable[..., Path], tune: Tune, tmp_path: Path, text: Path
) -> None:
    source = exits("shared")
    result = tune(source, **SKIP, valid=[str(text)], valid_tokens=200)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["adaptive"]["model"]["exits"]["heads"][0]["own"] == []
    first, last = (entry["exits"] for entry in result.summary["validation"])
    assert set(last) == {"1", "3"}
    assert last["3"]["loss"] < first["3"]["loss"] - 1


def test_low_rank_adapters_on_the_trunk_learn_with_the_exits(
    exits: Callable[..., Path], tune: Tune, tmp_path: Path
) -> None:
    source = exits("mlp")
    result = tune(source, lora=2, train=("exits",))
    changed = moved(source, tmp_path / "out")
    assert {"exits.1.network.up_proj.weight", "model.layers.3.mlp.up_proj.weight"} <= changed
    assert "model.embed_tokens.weight" not in changed
    assert not any("lora" in name for name in tensors_of(tmp_path / "out"))
    assert result.curve[-1]["exit_3"] < result.curve[0]["exit_3"] - 0.1


def test_exits_of_a_split_model_learn_while_its_experts_are_chosen(
    adaptive: Path, tune: Tune, tmp_path: Path
) -> None:
    from adaconvert import api

    source = tmp_path / "split"
    options: dict[str, Any] = {"exits": "1", "head": "mlp", "tie_heads": True, "confidence": True}
    api.convert(adaptive, destination=source, method="early-exit", **options)
    result = tune(source, train=("exits",), select="rule=top-k,k=4")
    assert all(name.startswith("exits.1.") for name in moved(source, tmp_path / "out"))
    assert result.curve[-1]["exit_1"] < result.curve[0]["exit_1"] - 0.1
    assert "exits.1.head.weight" not in tensors_of(tmp_path / "out")


def test_thresholds_do_not_let_tokens_leave_while_training(
    exits: Callable[..., Path], tune: Tune, text: Path
) -> None:
    decide = {"measure": "max", "thresholds": [0.0, 0.0], "decay": None, "patience": None}
    held: dict[str, Any] = {"valid": [str(text)], "valid_tokens": 300, "steps": 1}
    leaving = tune(exits("norm", decide=decide), "leaving", train=("exits",), **held)
    staying = tune(exits("mlp"), "staying", train=("exits",), **held)
    a, b = (run.summary["validation"][0]["loss"] for run in (leaving, staying))
    assert a == b


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("shared", {"train": ("exits",)}, "shared heads have no tensors of their own"),
        ("shared", {**SKIP, "train": ("embed",)}, "--early-exit-loss: the blocks are frozen"),
        ("shared", {"train": ("adapters",)}, "--train adapters: matches no parameter"),
        ("norm", SKIP, "the exit after 1 blocks has a head of its own"),
        ("norm", {"exit_layers": "2"}, "there is no exit after 2 blocks"),
        ("norm", {"exit_weights": "1,2,3"}, "needs a number for each exit"),
        ("norm", {"exit_weights": "soon"}, "--exit-weights: is no list of numbers"),
        ("norm", {"exit_loss": "mse"}, "--exit-loss: is unknown"),
        ("norm", {"compile": True}, "--compile: cannot be combined with the training of exits"),
        ("norm", {"distill": 1.0}, "--distill: cannot be combined with the training of exits"),
        ("norm", {"exit_curriculum": "gradual"}, "does nothing without --early-exit-loss"),
        ("norm", {"temperature": 2.0}, "--temperature: does nothing"),
        ("dense", {"temperature": 2.0}, "--temperature: does nothing"),
        ("dense", {"exit_loss": "kd"}, "--exit-loss: .* has no exits"),
        ("dense", {"exit_chunk": 8}, "--exit-chunk: .* has no exits"),
        ("dense", {"layer_dropout": 0.1, "exit_layers": [1]}, "--exit-layers: .* has no exits"),
        ("norm", {"exit_weights": 0, "exit_loss": "kd"}, "--exit-loss: does nothing with"),
        ("dense", {"early_exit_loss": 0.2, "exit_curriculum": "rotational:0"}, "is unknown"),
        ("dense", {"early_exit_loss": 0.2, "exit_layers": [4]}, "no exit after 4 blocks"),
        ("dense", {"early_exit_loss": -1}, "--early-exit-loss: is out of range"),
        ("dense", {"layer_dropout": 1.5}, "--layer-dropout: is out of range"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    kind: str,
    options: dict[str, Any],
    message: str,
    exits: Callable[..., Path],
    deep: Path,
    tune: Tune,
    tmp_path: Path,
) -> None:
    source = deep if kind == "dense" else exits(kind)
    with pytest.raises(OptionError, match=message):
        tune(source, **options)
    assert not (tmp_path / "out").exists()
