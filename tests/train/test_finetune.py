"""Fine-tunes of tiny models: what they reach, what they leave alone, what they write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import DataError, OptionError, OutputConflictError, SourceError
from adaconvert.io import manifest
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.stored import tensors_of
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]


def losses(result: FinetuneResult) -> list[float]:
    return [float(entry["lm"]) for entry in result.curve]


def test_loss_goes_down_and_every_log_step_is_reported(dense: Path, tune: Tune) -> None:
    lines: list[str] = []
    result = tune(dense, report=lines.append)
    found = losses(result)
    # from above 9 at random to what letters' frequencies alone give
    assert found[-1] < found[0] - 2
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == [
        f"step {step}/12" for step in (1, 3, 6, 9, 12)
    ]
    assert all("tokens/s" in line and "lr " in line for line in steps)


def test_result_is_a_stock_checkpoint_with_the_names_and_files_of_its_source(
    dense: Path, tune: Tune, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tune(dense)
    out = tmp_path / "out"
    before, after = tensors_of(dense), tensors_of(out)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (dense / name).read_bytes()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    record = manifest.read(out)
    assert record["method"] == "finetune"
    assert str(tmp_path) not in (out / manifest.MANIFEST_FILE).read_text()
    assert sorted(os.listdir(tmp_path)) == ["out"]
    open_source(str(out))


def test_stored_dtype_is_kept(tmp_path: Path, tune: Tune) -> None:
    source = tiny_models.make("qwen2", tmp_path / "bf16", dtype="bfloat16")
    tune(source)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    tune(source, "wide", dtype="float32")
    assert {t.dtype for t in tensors_of(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_are_bit_identical_and_have_no_state(
    tmp_path: Path, tune: Tune, precision: str
) -> None:
    source = tiny_models.make("llama", tmp_path / "src", dtype="bfloat16")
    result = tune(source, train=(r"mlp\.",), precision=precision, save_every=6)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".mlp." in name}
    assert result.summary["trained"] == sum(t.numel() for n, t in before.items() if "mlp" in n)


def test_routers_learn_at_their_own_rate(tmp_path: Path, tune: Tune) -> None:
    source = tiny_models.make("mixtral", tmp_path / "src")
    tune(source, train=("router", "experts"), router_lr=1e-9, warmup=0.0, weight_decay=0.0)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    moved = {n: float((before[n] - after[n]).abs().max()) for n in before}
    gates = [moved[name] for name in before if name.endswith("gate.weight")]
    # Adam moves a weight by about its rate a step
    assert gates
    assert max(gates) <= 12 * 1e-9 + 1e-7
    assert max(moved.values()) > 1e-3


def test_accumulation_equals_one_large_batch(dense: Path, tune: Tune, tmp_path: Path) -> None:
    options: dict[str, Any] = {"activation": "relu", "sparsity": 0.01, "log_every": 1, "steps": 5}
    one = tune(dense, "one", batch_size=8, **options)
    many = tune(dense, "many", batch_size=2, accumulate=4, **options)
    for name in ("lm", "hoyer", "sparsity"):
        a = [float(entry[name]) for entry in one.curve]
        b = [float(entry[name]) for entry in many.curve]
        # float32 sums in another order; Adam divides by gradients, which keeps errors relative
        assert a == pytest.approx(b, rel=1e-5)


def test_recomputation_changes_neither_loss_nor_penalty(
    dense: Path, adaptive: Path, tune: Tune, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"activation": "relu", "sparsity": 0.01, "log_every": 1, "steps": 5}
    for source, more in ((dense, {}), (adaptive, {"select": "rule=top-k,k=4"})):
        plain = tune(source, f"{source.name}-plain", **options, **more)
        again = tune(source, f"{source.name}-again", checkpointing=True, **options, **more)
        for name in ("lm", "hoyer", "sparsity", "grad_norm"):
            # the same operations on the same numbers
            assert [e[name] for e in plain.curve] == [e[name] for e in again.curve]
        a, b = (tensors_of(tmp_path / f"{source.name}-{name}") for name in ("plain", "again"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_penalty_raises_sparsity(dense: Path, tune: Tune) -> None:
    common: dict[str, Any] = {"activation": "relu", "steps": 30, "log_every": 30}
    plain = tune(dense, "plain", **common)
    pressed = tune(
        dense, "pressed", **common, sparsity=20.0, sparsity_norm="width", sparsity_ramp="constant"
    )
    assert plain.curve[-1]["coefficient"] == 0
    assert pressed.curve[-1]["hoyer"] < 0.8 * plain.curve[-1]["hoyer"]
    assert pressed.curve[-1]["sparsity"] > plain.curve[-1]["sparsity"] + 0.02


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "gpt2", "gpt_neox", "gemma"])
def test_activation_is_replaced_in_the_config_and_computed_with(
    family: str, tune: Tune, tmp_path: Path
) -> None:
    source = tiny_models.make(family, tmp_path / "src")
    result = tune(source, steps=2, activation="relu", sparsity=0.001)
    assert 0.2 < result.curve[-1]["sparsity"] < 0.8
    spec = open_source(str(tmp_path / "out")).spec
    assert spec.traits.activation == "relu"
    assert len(result.curve[-1]["sparsity_by_layer"]) == 2


def test_adaptive_checkpoints_keep_their_experts(
    adaptive: Path, tune: Tune, tmp_path: Path
) -> None:
    tune(adaptive, activation="relu", sparsity=0.001, select="rule=top-k,k=4")
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "adaptive_llama"
    assert (
        config["auto_map"]["AutoModelForCausalLM"] == "modeling_adaptive.AdaptiveLlamaForCausalLM"
    )
    for slots in config["adaptive"]["sites"].values():
        assert slots["ffn"]["activation"] == "relu"
        assert slots["ffn"]["select"] == {"rule": "all"}
    before, after = tensors_of(adaptive), tensors_of(out)
    assert set(before) == set(after)
    for name in before:
        # routers get no gradient when experts weigh one; orders are no parameters
        same = ".router." in name or name.endswith("neuron_order")
        assert torch.equal(before[name], after[name]) == same, name
    model: Any = load_model(out)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        every = model(input_ids=ids).logits
        with model.set_select("top-k", k=2):
            few = model(input_ids=ids).logits
    assert torch.isfinite(every).all()
    assert not torch.equal(every, few)


def test_stale_calibration_is_dropped_and_said(adaptive: Path, tune: Tune, tmp_path: Path) -> None:
    import shutil

    source = tmp_path / "calibrated"
    shutil.copytree(adaptive, source)
    config = json.loads((source / "config.json").read_text())
    config["adaptive"]["calibration"] = {"rows": [], "chosen": None}
    (source / "config.json").write_text(json.dumps(config))
    result = tune(source, steps=1)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["adaptive"]["calibration"] is None
    assert any("calibration table was dropped" in note for note in result.summary["notes"])


def test_native_mixtures_keep_their_names_on_disk(tune: Tune, tmp_path: Path) -> None:
    source = tiny_models.make("mixtral", tmp_path / "src")
    result = tune(source)
    assert losses(result)[-1] < losses(result)[0] - 1
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert set(before) == set(after)
    assert any("block_sparse_moe.experts.3.w2" in name for name in after)


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_experts_of_a_stock_mixture_run_by_our_kernels(
    precision: str, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaconvert.modeling import stock_experts

    seen: list[str] = []
    ours = stock_experts.experts.experts_forward
    monkeypatch.setattr(
        stock_experts.experts,
        "experts_forward",
        lambda module, *call: (seen.append(str(call[0].dtype)), ours(module, *call))[1],
    )
    tune(tiny_models.make("mixtral", tmp_path / "src"), steps=1, precision=precision)
    assert "torch.float64" in seen if precision == "fp64" else "torch.float32" in seen
    # stock transformers, which does not know the name, loads what was written
    assert "experts_implementation" not in (tmp_path / "out" / "config.json").read_text()


def test_distillation_holds_the_student_to_its_teacher(dense: Path, tune: Tune) -> None:
    alone = tune(dense, "alone", distill=1e-6)
    held = tune(dense, "held", lm=0.0, distill=1.0)
    assert held.curve[-1]["distill"] < 0.2 * alone.curve[-1]["distill"]
    # the teacher is the checkpoint as it was
    assert held.curve[0]["distill"] < 1e-5


def test_mixture_teaches_in_float64(tune: Tune, tmp_path: Path) -> None:
    source = tiny_models.make("mixtral", tmp_path / "src", dtype="bfloat16")
    result = tune(source, steps=1, precision="fp64", distill=1.0, distill_hidden=1.0)
    # it is what it teaches, to the last bit
    assert result.curve[0]["distill"] == pytest.approx(0.0, abs=1e-15)
    assert result.curve[0]["distill_hidden"] == 0.0


def test_rerun_writes_the_same_bytes(dense: Path, tune: Tune, tmp_path: Path) -> None:
    tune(dense, "a")
    tune(dense, "b")
    for name in ("model.safetensors", "adaconvert.json", "config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_routers_of_adaptive_checkpoints_alone_cannot_be_trained(
    adaptive: Path, tune: Tune, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="nothing that is trained changes the loss"):
        tune(adaptive, train=("router",))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("family", "options", "error", "message"),
    [
        ("bert", {}, SourceError, "a BertForMaskedLM is no causal language model"),
        ("mixtral", {"sparsity": 0.1}, OptionError, "mixtral is a mixture of experts already"),
        ("llama", {"select": "rule=top-k,k=2"}, OptionError, "--select: src is not adaptive"),
        ("llama", {"train": ("exits",)}, OptionError, "--train exits: matches no parameter"),
        ("llama", {"data": ["no-such-file"]}, DataError, "no-such-file: no such file or folder"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    family: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
    tune: Tune,
    tmp_path: Path,
) -> None:
    source = tiny_models.make(family, tmp_path / "src")
    with pytest.raises(error, match=message):
        tune(source, **options)
    assert os.listdir(tmp_path) == ["src"]


def test_destination_that_is_taken_is_refused_before_training(
    dense: Path, tune: Tune, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(OutputConflictError, match="exists and is not empty"):
        tune(dense)


def test_selection_the_experts_do_not_allow_is_refused(adaptive: Path, tune: Tune) -> None:
    with pytest.raises(OptionError, match=r"--select or --compute: .*k is 99, expected 1 to 8"):
        tune(adaptive, select="rule=top-k,k=99")


def test_device_that_is_not_there_is_refused(dense: Path, text: Path, tmp_path: Path) -> None:
    from adaconvert import api

    with pytest.raises(OptionError, match="--device: is not here; expected auto"):
        api.finetune(dense, tmp_path / "out", data=[text], steps=1, device="abacus")
