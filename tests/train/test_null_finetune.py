"""Fine-tuning with null experts from start to end: budgets, what is stored, resuming, errors."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from adaconvert.errors import InterruptedRunError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.result import FinetuneResult
from adaconvert.train.validation import hold_out, measure
from adaconvert.train.work import folder_of

Tune = Callable[..., FinetuneResult]
WORDS = ["the", "cat", "dog", "number", "sat", "ran", "on", "mat", ",", ".", "and", "slept", "far"]
WORDS += ["1", "22", "333", "red", "blue", "house", "why"]
#: enough for the tiny models to reach what they are to reach.
LONG = {"steps": 40, "batch_size": 8, "log_every": 10}


def write_text(path: Path, seed: int) -> Path:
    draw = random.Random(seed)
    rows = [{"text": " ".join(draw.choices(WORDS, k=60))} for _ in range(60)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return a text to train on, and one that is held out."""
    folder = tmp_path_factory.mktemp("texts")
    names = ("train.jsonl", "held.jsonl")
    first, second = (write_text(folder / name, seed) for seed, name in enumerate(names))
    return str(first), str(second)


@pytest.fixture
def train(tune: Tune, texts: tuple[str, str]) -> Tune:
    """Return what fine-tunes on one text and measures on the other."""

    def run(source: Path, name: str = "out", **options: Any) -> FinetuneResult:
        held = {"valid": [texts[1]], "valid_tokens": 4000}
        return tune(source, name, **{"data": [texts[0]], **held, **options})

    return run


def share_of(folder: Path, text: str) -> list[float]:
    """Return the share every block of a stored model spends on the held-out text."""
    options = {"steps": 1, "seq_len": 32, "valid": [text], "valid_tokens": 4000}
    (held,) = hold_out(FinetuneConfig.of(["none"], options), folder)
    model: Any = load_model(folder)
    with model.collect("experts_run") as runs:
        measure(model, held, batch_size=8)
    top_k = model.config.num_experts_per_tok
    return [float(torch.cat(found).double().mean()) / top_k for found in runs.values()]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def nulls_of(folder: Path) -> list[dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return [site["ffn"]["null"] for site in config["adaptive"]["sites"].values()]


@pytest.mark.parametrize(
    ("family", "init", "options"),
    [
        ("mixtral", "exact", {"target_compute": 0.7}),
        ("qwen2_moe", "exact", {"target_compute": 0.5, "compute_ramp": 0.5}),
        ("granitemoe", "bias", {"target_compute": 0.85}),
        ("olmoe", "bias", {"target_compute": 0.6, "compute_ramp": 0.3}),
        ("deepseek_v2", "exact", {"target_compute": 0.6, "checkpointing": True}),
    ],
)
def test_budgets_are_reached_on_held_out_text_and_stored(
    family: str,
    init: str,
    options: dict[str, Any],
    train: Tune,
    texts: tuple[str, str],
    tmp_path: Path,
) -> None:
    stock = tiny_models.make(family, tmp_path / "src")
    source = make_nulled(stock, tmp_path / "nulled", init=init)
    result = train(source, **LONG, **options)
    target = options["target_compute"]
    first, last = result.summary["validation"]
    assert (first["share"], last["step"]) == (1.0, 40)
    assert abs(last["share"] - target) <= 0.02
    assert last["loss"] < first["loss"]
    budgets = result.summary["routing"]["budgets"]
    assert {budget["target"] for budget in budgets} == {target}
    found = tensors_of(result.destination)
    biases = {name: t for name, t in found.items() if name.endswith("null_experts.bias")}
    assert {t.dtype for t in biases.values()} == {torch.float32}
    assert [float(biases[name]) for name in sorted(biases)] == [b["bias"] for b in budgets]
    assert {null["target"] for null in nulls_of(result.destination)} == {target}
    # the model that is loaded again spends the same
    spent = share_of(result.destination, texts[1])
    # batches of another size are rounded in another order
    assert abs(sum(spent) / len(spent) - last["share"]) <= 1e-3


def test_what_the_checkpoint_states_is_held_without_being_asked(
    nulled: Path, train: Tune, tmp_path: Path
) -> None:
    first = train(nulled, "first", target_compute=0.7, **LONG)
    again = train(first.destination, "again", **LONG)
    shares = [entry["share"] for entry in again.summary["validation"]]
    assert all(abs(share - 0.7) <= 0.02 for share in shares)
    assert again.summary["options"]["routing"]["target"] is None
    assert {null["target"] for null in nulls_of(again.destination)} == {0.7}


def test_budgets_of_layers(nulled: Path, train: Tune, texts: tuple[str, str]) -> None:
    result = train(nulled, layer_budget="0=0.9,1-=0.4", train=["router"], **LONG)
    spent = share_of(result.destination, texts[1])
    assert spent == [pytest.approx(0.9, abs=0.03), pytest.approx(0.4, abs=0.03)]
    assert [null["target"] for null in nulls_of(result.destination)] == [0.9, 0.4]
    # nothing but rows of routers, real and null, and the biases moved
    before, after = tensors_of(nulled), tensors_of(result.destination)
    moved = {name.split("block_sparse_moe.")[-1] for name in before if _moved(name, before, after)}
    assert moved == {"gate.weight", "null_experts.weight", "null_experts.bias"}


def _moved(name: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return not torch.equal(before[name], after[name])


def test_one_layer_alone_may_have_a_budget(nulled: Path, train: Tune) -> None:
    result = train(nulled, layer_budget="1=0.5", steps=20, batch_size=8)
    assert [null["target"] for null in nulls_of(result.destination)] == [None, 0.5]
    targets = [budget["target"] for budget in result.summary["routing"]["budgets"]]
    assert targets == [None, 0.5]
    # the bias of the other one is trained
    assert result.summary["by_part"]["router"] == 2 * (4 + 4) * 32 + 1


def select_of(folder: Path) -> list[dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return [site["ffn"]["select"] for site in config["adaptive"]["sites"].values()]


def edited(source: Path, folder: Path, select: dict[str, Any], target: float) -> Path:
    """Return a copy of a checkpoint whose sites have another rule, and a target."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    for site in config["adaptive"]["sites"].values():
        site["ffn"]["select"] = select
        site["ffn"]["null"]["target"] = target
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("flag", [True, False])
def test_a_rule_with_a_bias_of_its_own_is_where_the_stored_one_begins(
    flag: bool, nulled: Path, train: Tune, texts: tuple[str, str], tmp_path: Path
) -> None:
    source = edited(nulled, tmp_path / "src", {"rule": "null", "bias": 0.02}, 0.6)
    started = share_of(source, texts[1])
    assert max(started) < 0.99
    result = train(source, **({"target_compute": 0.6} if flag else {}), **LONG)
    first, last = result.summary["validation"]
    assert first["share_by_layer"] == pytest.approx(started, abs=1e-3)
    assert abs(last["share"] - 0.6) <= 0.02
    assert select_of(result.destination) == [{"rule": "null"}] * 2
    assert share_of(result.destination, texts[1]) == pytest.approx(last["share_by_layer"], abs=1e-3)


@pytest.mark.parametrize("select", [{"rule": "top-k", "k": 1}, {"rule": "all"}])
def test_other_rules_give_way_to_a_budget_that_is_asked_for(
    select: dict[str, Any], nulled: Path, train: Tune, texts: tuple[str, str], tmp_path: Path
) -> None:
    source = edited(nulled, tmp_path / "src", select, 0.8)
    options = {"target_compute": 0.6, "compute_ramp": 0.0}
    result = train(source, **options, **LONG)
    assert abs(result.summary["validation"][-1]["share"] - 0.6) <= 0.02
    assert select_of(result.destination) == [{"rule": "null"}] * 2
    assert share_of(result.destination, texts[1]) == pytest.approx([0.6, 0.6], abs=0.03)
    # nothing was asked for: what the checkpoint does goes on
    kept = train(source, "kept", steps=4)
    assert kept.summary["last"]["share"] == (0.5 if "k" in select else 1.0)
    assert kept.summary["routing"]["budgets"] == []
    assert select_of(kept.destination) == [select] * 2
    # of one layer alone
    one = train(source, "one", layer_budget="1=0.6", steps=4)
    assert select_of(one.destination) == [select, {"rule": "null"}]
    assert [budget["layer"] for budget in one.summary["routing"]["budgets"]] == [1]


def test_a_budget_that_is_missed_is_told(nulled: Path, train: Tune) -> None:
    # nothing but the loss of the language moves the biases
    options = {"target_compute": 0.7, "null_rate": 0, "balance": 0.0, "steps": 4}
    held = train(nulled, "held", **options)
    budgets = held.summary["routing"]["budgets"]
    assert {budget["measured"] for budget in budgets} == {"validation"}
    shares = held.summary["validation"][-1]["share_by_layer"]
    assert [budget["share"] for budget in budgets] == [round(share, 4) for share in shares]
    told = [note for note in held.summary["notes"] if note.endswith("budget 0.70")]
    assert len(told) == 1
    assert told[0].startswith("layers 0, 1: ran ")
    none = train(nulled, "none", valid=(), valid_tokens=100, **options)
    budgets = none.summary["routing"]["budgets"]
    layers = none.summary["routing"]["layers"]
    assert {budget["measured"] for budget in budgets} == {"last steps"}
    assert [b["share"] for b in budgets] == [layer["share"] for layer in layers]
    assert any(note.endswith("budget 0.70") for note in none.summary["notes"])
    reached = train(nulled, "reached", target_compute=0.7, **LONG)
    assert not any("budget" in note for note in reached.summary["notes"])
    assert any("at the end (on held-out text)" in line for line in reached.lines())
    assert any("before the biases moved last" in line for line in none.lines())


def test_budgets_near_nothing_are_no_collapse(nulled: Path, train: Tune) -> None:
    result = train(nulled, target_compute=0.02, compute_ramp=0.0, **LONG)
    assert result.summary["validation"][-1]["share"] <= 0.05
    assert all(layer["busiest"] == 0.0 for layer in result.summary["routing"]["layers"])
    assert not any("got no token" in note for note in result.summary["notes"])


def test_the_ramp_that_held_is_recorded(nulled: Path, train: Tune) -> None:
    for name, options, ramp in (
        ("asked", {"target_compute": 0.7}, 0.5),
        ("given", {"target_compute": 0.7, "compute_ramp": 0.25}, 0.25),
        ("none", {}, None),
    ):
        result = train(nulled, name, steps=2, **options)
        assert result.summary["options"]["routing"]["ramp"] == ramp


def test_rate_zero_pulls_towards_the_target(nulled: Path, train: Tune) -> None:
    options = {"null_rate": 0, "balance": 1.0, "lr_of": ["router=0.02"], **LONG}
    aimed = train(nulled, "aimed", target_compute=0.5, **options)
    free = train(nulled, "free", **options)
    ends = [result.summary["validation"][-1]["share"] for result in (aimed, free)]
    assert ends[1] - ends[0] >= 0.1


def test_rate_zero_trains_the_bias_by_the_losses(nulled: Path, train: Tune) -> None:
    result = train(nulled, target_compute=0.7, null_rate=0, balance=1.0, **LONG)
    biases = [budget["bias"] for budget in result.summary["routing"]["budgets"]]
    assert all(0 < abs(bias) < 0.2 for bias in biases)
    assert result.summary["by_part"]["router"] == 2 * ((4 + 4) * 32 + 1)
    shares = [entry["share"] for entry in result.summary["validation"]]
    assert shares[1] < shares[0]


def test_a_step_of_many_batches_is_one_large_batch(nulled: Path, train: Tune) -> None:
    shared = {"steps": 12, "target_compute": 0.6, "compute_ramp": 0.5, "precision": "fp64"}
    # without rounding both take the same decisions
    large = train(nulled, "large", batch_size=8, **shared)
    small = train(nulled, "small", batch_size=2, accumulate=4, **shared)
    for name in ("share_by_layer", "idle", "balance", "lm"):
        assert large.summary["last"][name] == pytest.approx(small.summary["last"][name], rel=1e-9)
    pairs = zip(*(r.summary["routing"]["budgets"] for r in (large, small)), strict=True)
    assert all(one["bias"] == pytest.approx(other["bias"], rel=1e-6) for one, other in pairs)


def test_resuming_goes_on_with_the_same_targets_and_biases(
    nulled: Path, train: Tune, tmp_path: Path
) -> None:
    options = {
        **{"steps": 18, "batch_size": 4, "log_every": 3, "save_every": 6},
        **{"target_compute": 0.6, "compute_ramp": 0.8},
    }
    whole = train(nulled, "whole", **options)
    seen: list[str] = []

    def stop(line: str) -> None:
        seen.append(line)
        if line.startswith("step 15/"):
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        train(nulled, "parts", report=stop, **options)
    kept = folder_of(tmp_path / "parts") / "checkpoint-12" / "budgets.json"
    state = json.loads(kept.read_text())
    assert state["control"]["updates"] == 12
    assert state["control"]["targets"][0] == pytest.approx(1.0 - 0.4 * 12 / (0.8 * 18), abs=0.01)
    parts = train(nulled, "parts", resume=True, **options)
    assert parts.summary["last"] == whole.summary["last"]
    assert parts.summary["validation"] == whole.summary["validation"]
    assert parts.summary["routing"]["budgets"] == whole.summary["routing"]["budgets"]
    one, other = tensors_of(whole.destination), tensors_of(parts.destination)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_adapters_on_experts_with_the_router_in_full(nulled: Path, train: Tune) -> None:
    lora = {"lora": 4, "lora_targets": ["experts"], "train": ["router"]}
    result = train(nulled, target_compute=0.7, **lora, **LONG)
    assert abs(result.summary["validation"][-1]["share"] - 0.7) <= 0.02
    assert result.summary["by_part"]["router"] == 2 * (4 + 4) * 32
    before, after = tensors_of(nulled), tensors_of(result.destination)
    assert set(before) == set(after)
    moved = {name for name in before if _moved(name, before, after)}
    assert {name for name in moved if "null_experts" in name or ".gate." in name} == {
        name for name in before if "null_experts" in name or ".gate." in name
    }
    assert any(".experts." in name for name in moved)
    assert not any(".self_attn." in name for name in moved)


def test_distillation_from_the_model_without_null_experts(
    nulled: Path, stock: Path, train: Tune
) -> None:
    options = {"target_compute": 0.7, "distill": 1.0, "lm": 0.0, "steps": 20, "batch_size": 8}
    given = train(nulled, "given", teacher=str(stock), **options)
    # the checkpoint as it was runs no null experts when it teaches
    own = train(nulled, "own", **options)
    assert given.summary["first"]["distill"] <= 1e-7
    assert given.summary["last"]["distill"] > 1e-5
    assert own.summary["last"]["distill"] == pytest.approx(given.summary["last"]["distill"])
    assert own.summary["last"]["share"] == given.summary["last"]["share"]


def test_half_precision_and_stored_dtypes(stock: Path, train: Tune, tmp_path: Path) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            is_own = name.endswith("null_experts.bias")
            tensors[name] = value if is_own else value.to(torch.bfloat16)

    source = make_nulled(stock, tmp_path / "half", edit=halve)
    result = train(source, target_compute=0.7, precision="bf16", train=["router"], **LONG)
    assert abs(result.summary["validation"][-1]["share"] - 0.7) <= 0.02
    found = tensors_of(result.destination)
    kinds = {name: t.dtype for name, t in found.items() if "null_experts" in name}
    assert {d for n, d in kinds.items() if n.endswith(".bias")} == {torch.float32}
    assert {d for n, d in kinds.items() if n.endswith(".weight")} == {torch.bfloat16}
    narrow = train(source, "narrow", target_compute=0.7, dtype="float16", steps=2)
    kinds = {name: t.dtype for name, t in tensors_of(narrow.destination).items()}
    assert {d for n, d in kinds.items() if n.endswith("null_experts.bias")} == {torch.float32}
    assert {d for n, d in kinds.items() if not n.endswith("null_experts.bias")} == {torch.float16}


@pytest.mark.parametrize("kind", ["identity", "constant"])
def test_kinds_that_compute_learn_what_they_add(
    kind: str, stock: Path, train: Tune, tmp_path: Path
) -> None:
    source = make_nulled(stock, tmp_path / kind, kind=kind)
    result = train(source, target_compute=0.7, **LONG)
    assert abs(result.summary["validation"][-1]["share"] - 0.7) <= 0.02
    name = {"identity": "scale", "constant": "value"}[kind]
    found = {
        n: t for n, t in tensors_of(result.destination).items() if n.endswith(f"experts.{name}")
    }
    assert len(found) == 2
    assert all(float(t.abs().max()) > 0 and t.dtype == torch.float32 for t in found.values())


def test_log_lines_and_records_say_what_is_spent(nulled: Path, train: Tune) -> None:
    lines: list[str] = []
    result = train(nulled, target_compute=0.7, steps=6, log_every=3, report=lines.append)
    steps = [line for line in lines if line.startswith("step") and "validation" not in line]
    assert all("share " in line and "idle " in line for line in steps)
    measured = [line for line in lines if "validation" in line]
    assert measured[0].endswith("share 1.000")
    layers = result.summary["routing"]["layers"]
    assert all(0 < layer["share"] <= 1 and 0 <= layer["idle"] < 1 for layer in layers)
    assert {"share", "share_by_layer", "idle"} <= set(result.summary["last"])
    told = result.lines()
    assert any(line.startswith("share  ") and "tokens run none" in line for line in told)
    record = json.loads((result.destination / "adaconvert.json").read_text())["training"]
    assert record["routing"]["budgets"] == result.summary["routing"]["budgets"]
    assert record["validation"][-1]["share"] == result.summary["validation"][-1]["share"]


def test_without_a_budget_nothing_is_held(nulled: Path, train: Tune) -> None:
    result = train(nulled, steps=4)
    assert {budget["target"] for budget in result.summary["routing"]["budgets"]} == {None}
    assert {null["target"] for null in nulls_of(result.destination)} == {None}
    chosen = train(nulled, "chosen", select={"rule": "all"}, steps=4)
    assert chosen.summary["last"]["share"] == 1.0
