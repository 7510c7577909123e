"""Fine-tunes of adapter folders: adapters and routers alone are trained, and a folder comes out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.errors import InterruptedRunError, OptionError, OutputConflictError
from adaconvert.io import manifest
from adaconvert.methods.molora.view import viewed
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adapter_folders_by_hand import make_folder, make_lora
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.train import session
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def routed(dense: Path) -> Path:
    """Return routed adapters of `dense`, as a folder."""
    return make_folder(make_adapted(dense, dense.parent / "alone"), dense, dense.parent / "routed")


def changed(before: Path, after: Path) -> set[str]:
    """Return the kinds of tensors that are not what they were."""
    a, b = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in b.items()
    }
    return {name.rpartition(".")[2] for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize(
    ("train", "kinds"),
    [
        ("router", {"molora_router"}),
        ("adapters", {"molora_A", "molora_B"}),
        ("all", {"molora_A", "molora_B", "molora_router"}),
        (r"q_proj\.adapters\.b", {"molora_B"}),
    ],
)
def test_trains_what_it_is_asked_to(
    routed: Path, tune: Tune, tmp_path: Path, train: str, kinds: set[str]
) -> None:
    result = tune(routed, "out", train=train)
    out = tmp_path / "out"
    assert changed(routed, out) == kinds
    assert sorted(os.listdir(out)) == ["README.md", "adaconvert.json", CONFIG, WEIGHTS]
    assert json.loads((out / CONFIG).read_text()) == json.loads((routed / CONFIG).read_text())
    assert result.curve[-1]["lm"] < result.curve[0]["lm"]


def test_result_computes_what_was_measured(
    routed: Path, tune: Tune, tmp_path: Path, text: Path
) -> None:
    result = tune(routed, "out", valid=[str(text)])
    again = api.evaluate(tmp_path / "out", data=text, device="cpu", length=32, speed=False)
    measured = again.results[0].loss
    assert measured is not None
    assert measured.value == pytest.approx(result.summary["validation"][-1]["loss"], rel=1e-6)


def test_same_as_the_standalone_form(dense: Path, routed: Path, tune: Tune, tmp_path: Path) -> None:
    tune(routed, "folder", train=["adapters", "router"])
    tune(dense.parent / "alone", "alone", train=["adapters", "router"])
    found = load_file(tmp_path / "folder" / WEIGHTS)
    alone: dict[str, Any] = {}
    for file in (tmp_path / "alone").glob("*.safetensors"):
        alone |= load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    for ours, theirs in (("adapters.a", "molora_A"), ("router.weight", "molora_router")):
        assert torch.equal(
            found[f"base_model.model.{name}.{theirs}"],
            alone[f"{name}.{ours}"],
        )


def test_stock_lora_stays_one(dense: Path, tune: Tune, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = make_lora(dense, tmp_path / "lora")
    tune(lora, "out")
    out = tmp_path / "out"
    names = load_file(lora / WEIGHTS).keys()
    assert load_file(out / WEIGHTS).keys() == names
    assert json.loads((out / CONFIG).read_text())["peft_type"] == "LORA"
    ids = torch.arange(24).reshape(2, 12)
    with viewed(out) as view, torch.inference_mode():
        found: Any = load_model(view.root)
        wanted = peft.PeftModel.from_pretrained(load_model(dense), out)
        assert torch.equal(found(ids).logits, wanted(ids).logits)


def test_resumed_run_equals_an_uninterrupted_one(routed: Path, tune: Tune, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 7/"):
            raise KeyboardInterrupt

    options = {"log_every": 1, "save_every": 4}
    with pytest.raises(InterruptedRunError, match="--resume"):
        tune(routed, "out", report=stop, **options)
    kept = tmp_path / ".out.adaconvert-training" / "checkpoint-4" / "model.safetensors"
    names = load_file(kept).keys()
    assert all(".adapters." in name or name.endswith(".router.weight") for name in names)
    tune(routed, "out", resume=True, **options)
    tune(routed, "whole", **options)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert not list(tmp_path.glob(".*"))
    # a complete one is found
    tune(routed, "out", resume=True, **options)


def test_resume_refuses_other_adapters(
    dense: Path, routed: Path, tune: Tune, tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 7/"):
            raise KeyboardInterrupt

    options = {"log_every": 1, "save_every": 4}
    own = make_folder(dense.parent / "alone", dense, tmp_path / "own")
    with pytest.raises(InterruptedRunError):
        tune(own, "out", report=stop, **options)
    weights = own / WEIGHTS
    weights.write_bytes(weights.read_bytes())
    os.utime(weights, ns=(1, 1))
    with pytest.raises(OutputConflictError, match="differs in source files"):
        tune(own, "out", resume=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "experts"}, "--train experts: names 'experts', which is of the base"),
        ({"train": "mlp"}, "--train mlp: names 'model.layers.0.mlp"),
        ({"lora": 4}, "--lora: would change the base"),
        ({"activation": "relu"}, "--activation: would change the base"),
        ({"target_compute": 0.5}, "--target-compute: would change the base"),
    ],
)
def test_base_is_not_trained(
    routed: Path, tune: Tune, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        tune(routed, **options)


def test_routers_of_the_base_stay(tune: Tune, tmp_path: Path) -> None:
    base = tiny_models.make("mixtral", tmp_path / "base")
    alone = make_adapted(base, tmp_path / "alone")
    routed = make_folder(alone, base, tmp_path / "routed")
    result = tune(routed, "out", train="router")
    assert result.summary["by_part"] == {"router": 2 * 2 * 4 * 32}
    assert changed(routed, tmp_path / "out") == {"molora_router"}


def test_null_experts_of_the_base_stay(stock: Path, tune: Tune, tmp_path: Path) -> None:
    base = make_nulled(stock, tmp_path / "base")
    routed = make_folder(make_adapted(base, tmp_path / "alone"), base, tmp_path / "routed")
    tune(routed, "out")
    assert "molora_B" in changed(routed, tmp_path / "out")


def test_blocks_of_the_base_that_tokens_skip_stay(
    dense: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    api.convert(dense, destination=base, method="depth", kind="skip", layers="0", adapter_width=4)
    api.convert(base, destination=tmp_path / "routed", method="molora", rank=2, experts=2)
    seen: set[str] = set()
    shown = session.Session._trainer

    def keep(self: Any, model: Any, *given: Any) -> Any:
        seen.update(name for name, p in model.named_parameters() if p.requires_grad)
        return shown(self, model, *given)

    monkeypatch.setattr(session.Session, "_trainer", keep)
    tune(tmp_path / "routed", "out", train="all")
    assert seen
    assert not any(".depth." in name for name in seen)


def test_manifest_and_card(routed: Path, tune: Tune, tmp_path: Path) -> None:
    tune(routed, "first")
    tune(tmp_path / "first", "second", steps=4)
    record = manifest.read(tmp_path / "second")
    assert [source["label"] for source in record["sources"]] == ["first"]  # type: ignore[attr-defined]
    assert [stage["method"] for stage in manifest.history(record)] == ["finetune"]
    card = (tmp_path / "second" / "README.md").read_text()
    assert "Adapters for `dense`" in card
    assert "import adaconvert.auto" in card
    assert str(tmp_path) not in card


def test_overwrites_only_what_it_wrote(routed: Path, tune: Tune, tmp_path: Path) -> None:
    tune(routed, "out")
    tune(routed, "out", overwrite=True, steps=4)
    with pytest.raises(OutputConflictError, match="is the source itself"):
        tune(tmp_path / "out", "out", overwrite=True)


def test_dropout_of_the_folder_holds_in_training(
    dense: Path, routed: Path, tune: Tune, tmp_path: Path
) -> None:
    dropped = make_folder(dense.parent / "alone", dense, tmp_path / "dropped", dropout=0.5)
    plain, other = tune(routed, "plain"), tune(dropped, "other")
    assert plain.curve[0]["lm"] != other.curve[0]["lm"]


def test_recomputing_changes_nothing(routed: Path, tune: Tune, tmp_path: Path) -> None:
    tune(routed, "plain")
    tune(routed, "again", checkpointing=True)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "again"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_stored_in_another_dtype(routed: Path, tune: Tune, tmp_path: Path) -> None:
    tune(routed, "out", dtype="bfloat16", steps=2)
    found = load_file(tmp_path / "out" / WEIGHTS)
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in found.items()}
    assert kinds == {
        "molora_A": torch.bfloat16,
        "molora_B": torch.bfloat16,
        "molora_router": torch.float32,
    }


def test_half_precision_base(tune: Tune, tmp_path: Path) -> None:
    base = tiny_models.make("llama-tied", tmp_path / "base", dtype="bfloat16")
    alone = make_adapted(base, tmp_path / "alone", reads="layer")
    routed = make_folder(alone, base, tmp_path / "routed")
    result = tune(routed, "out")
    assert result.summary["options"]["precision"] == "bf16"
    assert changed(routed, tmp_path / "out") == {"molora_A", "molora_B", "molora_router"}


def test_taught_by_itself(routed: Path, tune: Tune) -> None:
    result = tune(routed, distill=1.0, lm=0.0, train="router", steps=3)
    assert result.curve[0]["distill"] == pytest.approx(0.0, abs=1e-6)


def test_trains_from_values_that_the_base_has_no_room_for(tune: Tune, tmp_path: Path) -> None:
    base = tiny_models.make("llama-tied", tmp_path / "base", dtype="bfloat16")
    lora = make_lora(base, tmp_path / "lora")
    wide = {k: v.float() * (1 + 2**-12) for k, v in load_file(lora / WEIGHTS).items()}
    save_file(wide, lora / WEIGHTS)
    tune(lora, "out", steps=1, lr=1e-12, weight_decay=0.0)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert all((found[name] - wide[name]).abs().max() <= 1e-9 for name in wide)
