"""Fine-tunes of mixtures and adaptive models: what is balanced, trained, reported and refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert.errors import InterruptedRunError, OptionError, SourceError, TrainingError
from adaconvert.io import manifest
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.stored import tensors_of
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]
BALANCED: dict[str, Any] = {"balance": 0.1, "z_loss": 0.01, "log_every": 1, "steps": 4}


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("mixtral", tmp_path_factory.mktemp("mixtral") / "mixtral")


@pytest.fixture(scope="session")
def predicting(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predicting") / "predicting"
    return make_adaptive(dense, folder, router="contribution", experts=8)


def with_tensors(folder: Path, **changed: float) -> None:
    """Fill single entries: `name__index` -> value."""
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for key, value in changed.items():
            name, _, index = key.rpartition("__")
            if name in held:
                held[name][int(index)] = value
        save_file(held, file, metadata={"format": "pt"})


def values(result: FinetuneResult, name: str) -> list[float]:
    return [float(entry[name]) for entry in result.curve]


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_accumulation_equals_one_large_batch(family: str, tune: Tune, tmp_path: Path) -> None:
    source = tiny_models.make(family, tmp_path / "src")
    # rates that Adam does not turn into steps of their own size where gradients are rounding alone
    options = {**BALANCED, "lr": 1e-4, "warmup": 0.0}
    one = tune(source, "one", batch_size=8, **options)
    many = tune(source, "many", batch_size=2, accumulate=4, **options)
    for name in ("lm", "balance", "z", "router_entropy", "load"):
        assert values(one, name) == pytest.approx(values(many, name), rel=1e-6), name
    # a norm of thousands of float32 sums
    assert values(one, "grad_norm") == pytest.approx(values(many, "grad_norm"), rel=1e-5)


def test_recomputation_changes_nothing(mixtral: Path, tune: Tune, tmp_path: Path) -> None:
    plain = tune(mixtral, "plain", **BALANCED)
    again = tune(mixtral, "again", checkpointing=True, **BALANCED)
    for name in ("lm", "balance", "z", "grad_norm", "router_entropy", "load"):
        # the same operations on the same numbers
        assert values(plain, name) == values(again, name)
    a, b = tensors_of(tmp_path / "plain"), tensors_of(tmp_path / "again")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_balance_of_the_model_itself_is_not_added(
    mixtral: Path, tune: Tune, tmp_path: Path
) -> None:
    import shutil

    asks = tmp_path / "asks"
    shutil.copytree(mixtral, asks)
    config = json.loads((asks / "config.json").read_text())
    config |= {"output_router_logits": True, "router_aux_loss_coef": 0.05}
    (asks / "config.json").write_text(json.dumps(config))
    plain = tune(mixtral, "plain", **BALANCED)
    ours = tune(asks, "ours", **BALANCED)
    assert values(ours, "loss") == values(plain, "loss")
    assert values(ours, "grad_norm") == values(plain, "grad_norm")
    # what the checkpoint says is kept
    assert json.loads((tmp_path / "ours/config.json").read_text())["output_router_logits"] is True
    # without --balance, the factor is what transformers' own loss comes to: k times ours
    usual = tune(asks, "usual", steps=1)
    assert usual.summary["routing"]["balance"] == 0.1


@pytest.mark.parametrize(
    ("options", "factor"),
    [({}, 0.002), ({"train": ("experts",)}, 0.0), ({"balance": 0.5}, 0.5), ({"balance": 0.0}, 0.0)],
)
def test_balance_is_on_where_routers_of_a_mixture_are_trained(
    options: dict[str, Any], factor: float, mixtral: Path, tune: Tune
) -> None:
    result = tune(mixtral, steps=1, **options)
    assert result.summary["routing"]["balance"] == factor
    told = any("no balance loss was used" in note for note in result.summary["notes"])
    assert told == (factor == 0)


def test_balance_evens_the_load(mixtral: Path, tune: Tune) -> None:
    common: dict[str, Any] = {"steps": 30, "log_every": 30, "lr": 1e-2, "train": ("router",)}
    free = tune(mixtral, "free", balance=0.0, **common)
    even = tune(mixtral, "even", balance=1.0, **common)
    assert even.curve[-1]["balance"] < free.curve[-1]["balance"]
    loads = [
        max(layer["load"] for layer in result.summary["routing"]["layers"])
        for result in (free, even)
    ]
    assert loads[1] < loads[0]


def test_line_summary_and_manifest_say_how_routers_fared(
    mixtral: Path, tune: Tune, tmp_path: Path
) -> None:
    lines: list[str] = []
    result = tune(mixtral, report=lines.append, steps=10, z_loss=0.001)
    for word in ("balance ", "z ", "entropy ", "load ", "dead 0", "tokens/s"):
        assert word in lines[-1]
    # no peak of the CPU is known
    assert "MFU" not in lines[-1]
    routing = result.summary["routing"]
    assert routing["steps"] == 2
    assert [layer["layer"] for layer in routing["layers"]] == [0, 1]
    for layer in routing["layers"]:
        assert 0 < layer["entropy"] < 1
        assert 1 <= layer["load"] <= 2
    assert any(line.startswith("routers     entropy 0.") for line in result.lines())
    assert manifest.read(tmp_path / "out")["training"]["routing"] == routing


def test_dead_expert_is_reported_and_a_bias_revives_it(tune: Tune, tmp_path: Path) -> None:
    source = tiny_models.make("glm4_moe", tmp_path / "src")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    with_tensors(source, **{f"{name}__3": -4.0})
    dead = tune(source, "dead", steps=10)
    assert dead.summary["routing"]["layers"][0]["dead"] == [3]
    assert dead.curve[-1]["dead_experts"] == 1
    note = "layer 1: 1 of 4 experts got no token over the last 2 steps (3)"
    assert note in dead.summary["notes"]
    alive = tune(source, "alive", steps=10, balance_kind="bias", balance_rate=0.5)
    assert alive.summary["routing"]["layers"][0]["dead"] == []
    assert alive.summary["routing"]["balance"] == 0
    assert alive.summary["routing"]["kind"] == "bias"
    before, after = tensors_of(source)[name], tensors_of(tmp_path / "alive")[name]
    moves = (after - before) / 0.5
    assert torch.equal(moves, moves.round())
    assert moves[3] > 4
    assert torch.equal(tensors_of(tmp_path / "dead")[name], before)


def test_collapse_fails_with_the_last_good_state_kept(
    mixtral: Path, tune: Tune, tmp_path: Path
) -> None:
    lines: list[str] = []
    # two of four experts always have half of the choices or more
    with pytest.raises(TrainingError, match=r"layer \d: the router collapsed") as caught:
        tune(mixtral, collapse=0.5, steps=6, save_every=2, log_every=2, report=lines.append)
    assert caught.value.exit_code == 5
    assert (
        "The state of step 6 is kept in .out.adaconvert-training/checkpoint-6"
        in caught.value.describe()
    )
    assert any(line.startswith("warning: routers collapsed in layer 0, 1") for line in lines)
    assert os.listdir(tmp_path) == [".out.adaconvert-training"]
    # what refuses a result does not decide it, so the run can be ended
    result = tune(mixtral, collapse=0.0, steps=6, save_every=2, log_every=2, resume=True)
    assert len(result.summary["routing"]["layers"]) == 2
    # routers that are not trained are not judged
    tune(mixtral, "frozen", collapse=0.5, steps=2, train=("experts",))


def test_resumed_run_judges_the_same_steps(mixtral: Path, tune: Tune) -> None:
    options: dict[str, Any] = {"steps": 20, "save_every": 2, "log_every": 1}

    def stop(line: str) -> None:
        if line.startswith("step 19/"):
            raise KeyboardInterrupt

    whole = tune(mixtral, "whole", **options)
    with pytest.raises(InterruptedRunError):
        tune(mixtral, "out", report=stop, **options)
    resumed = tune(mixtral, "out", resume=True, **options)
    assert resumed.summary["routing"] == whole.summary["routing"]


@pytest.mark.parametrize("save_every", [0, 1])
def test_loss_that_is_no_number_ends_with_code_five(
    save_every: int, dense: Path, tune: Tune, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=r"step \d+: ") as caught:
        tune(dense, lr=1e30, warmup=0.0, save_every=save_every)
    assert caught.value.exit_code == 5
    kept = "is kept in" if save_every else "nothing was kept"
    assert kept in caught.value.describe()
    assert not (tmp_path / "out").exists()


def test_learning_rates_of_parts(mixtral: Path, tune: Tune, tmp_path: Path) -> None:
    rates = ("router=1e-9", r"layers\.1\..*experts=1e-9", "attn|norm|embed|lm_head=1e-9")
    tune(mixtral, lr_of=rates, warmup=0.0, weight_decay=0.0)
    before, after = tensors_of(mixtral), tensors_of(tmp_path / "out")
    moved = {n: float((before[n] - after[n]).abs().max()) for n in before}
    fast = {name for name, much in moved.items() if much > 1e-4}
    assert fast == {name for name in before if ".experts." in name and "layers.0." in name}
    # Adam moves a weight by about its rate a step; the rest is rounding
    assert max(much for name, much in moved.items() if name not in fast) <= 12 * 1e-9 + 1e-7


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        ("router", "--lr-of router: is malformed; expected PART=RATE"),
        ("router=0", "is malformed"),
        ("router=inf", "is malformed"),
        ("(=1e-3", "is malformed"),
        ("=1e-3", "is malformed"),
    ],
)
def test_malformed_rates_are_refused(rate: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        FinetuneConfig.of(["a"], {"steps": 1, "lr_of": (rate,)})
    assert message in str(caught.value)


def test_rate_of_what_is_not_trained_is_refused(mixtral: Path, tune: Tune) -> None:
    with pytest.raises(OptionError, match="--lr-of router: matches nothing that is trained"):
        tune(mixtral, train=("experts",), lr_of=("router=1e-3",))


def test_routers_no_loss_reaches_are_not_said_to_be_trained(
    adaptive: Path, tune: Tune, tmp_path: Path
) -> None:
    result = tune(adaptive, steps=2, select="rule=top-k,k=4")
    assert "router" not in result.summary["by_part"]
    held = sum(t.numel() for name, t in tensors_of(adaptive).items() if ".router." in name)
    assert result.summary["frozen"] == held
    assert any("routers stay as they were" in note for note in result.summary["notes"])
    with pytest.raises(OptionError, match="nothing that is trained changes the loss of routers"):
        tune(adaptive, "both", steps=2, train=("router", "experts"))


def test_balanced_adaptive_routers_are_trained(adaptive: Path, tune: Tune, tmp_path: Path) -> None:
    common: dict[str, Any] = {"steps": 20, "log_every": 20, "select": "rule=top-k,k=2"}
    result = tune(adaptive, train=("router",), balance=1.0, lr=3e-2, **common)
    assert result.summary["by_part"] == {"router": result.summary["trained"]}
    assert result.curve[-1]["balance"] < result.curve[0]["balance"]
    before, after = tensors_of(adaptive), tensors_of(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".router." in name
    }


def test_contribution_routers_learn_by_regression(
    predicting: Path, tune: Tune, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"steps": 40, "log_every": 10, "router_regression": 1.0}
    result = tune(predicting, train=("router",), lm=0.0, lr=1e-2, **common)
    assert result.curve[-1]["regression"] < 0.5 * result.curve[0]["regression"]
    before, after = tensors_of(predicting), tensors_of(tmp_path / "out")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if ".router." in name
    }
    # every expert ran, so nothing was chosen
    assert "routing" not in result.summary


def test_hidden_states_hold_the_student_to_its_teacher(dense: Path, tune: Tune) -> None:
    alone = tune(dense, "alone", distill_hidden=1e-6)
    held = tune(dense, "held", lm=0.0, distill_hidden=1.0, distill=0.5)
    assert held.curve[0]["distill_hidden"] < 1e-6
    assert held.curve[-1]["distill_hidden"] < 0.2 * alone.curve[-1]["distill_hidden"]
    assert {"distill", "distill_hidden"} <= set(held.summary["last"])
    assert "distill" not in alone.curve[-1]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (
            "mixtral",
            {"balance_kind": "bias"},
            "--balance-kind bias: a checkpoint of mixtral cannot store a bias",
        ),
        ("glm4_moe", {"z_loss": 0.1}, "--z-loss: the routers of glm4_moe have no softmax logits"),
        (
            "mixtral",
            {"router_regression": 1.0},
            "--router-regression: src has no contribution routers",
        ),
        ("llama", {"balance": 0.1}, "--balance: src has no routers with tensors"),
        ("llama", {"z_loss": 0.1}, "--z-loss: src has no routers with tensors"),
    ],
)
def test_what_the_routers_cannot_do_is_refused_by_name(
    family: str, options: dict[str, Any], message: str, tune: Tune, tmp_path: Path
) -> None:
    source = tiny_models.make(family, tmp_path / "src")
    with pytest.raises(OptionError) as caught:
        tune(source, **options)
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": 0.1}, "which is even already. Say which experts run"),
        ({"router_regression": 1.0, "train": ("experts",)}, "routers are not trained"),
        ({"z_loss": 0.1}, "--z-loss: the routers of llama have no softmax logits"),
    ],
)
def test_what_adaptive_routers_cannot_do_is_refused(
    options: dict[str, Any], message: str, predicting: Path, tune: Tune
) -> None:
    with pytest.raises(OptionError) as caught:
        tune(predicting, **options)
    assert message in str(caught.value)


def test_teacher_of_another_depth_has_other_hidden_states(
    dense: Path, tune: Tune, tmp_path: Path
) -> None:
    deep = tiny_models.make("llama-tied", tmp_path / "deep", layers=3)
    with pytest.raises(OptionError, match=r"expected 2 layers of width 32 for --distill-hidden"):
        tune(dense, teacher=str(deep), distill_hidden=1.0)


def test_coefficient_that_is_no_number_is_refused(
    mixtral: Path, tune: Tune, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(mixtral, tmp_path / "src")
    config = json.loads((mixtral / "config.json").read_text())
    (tmp_path / "src/config.json").write_text(json.dumps({**config, "router_aux_loss_coef": -1.0}))
    with pytest.raises(SourceError, match=r"router_aux_loss_coef: is no coefficient; expected a"):
        tune(tmp_path / "src")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": float("inf")}, "--balance: is out of range; expected 0 or more, found inf"),
        ({"balance": "much"}, "--balance: is no number; expected 0 or more, found much"),
        ({"balance_kind": "both"}, "--balance-kind: is unknown; expected loss or bias"),
        ({"balance_rate": 0.0}, "--balance-rate: is out of range; expected above 0"),
        ({"z_loss": float("nan")}, "--z-loss: is out of range"),
        ({"router_regression": -1}, "--router-regression: is out of range"),
        ({"collapse": 1.1}, "--collapse: is out of range; expected 0 to 1"),
        ({"distill_hidden": float("inf")}, "--distill-hidden: is out of range"),
        ({"lr": float("inf")}, "--lr: is out of range; expected above 0, found inf"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        FinetuneConfig.of(["a.jsonl"], {"steps": 1, **options})
    assert message in str(caught.value)
