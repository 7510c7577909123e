"""The memory table says what is then taken, and what does not fit is refused with what does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import OptionError, ResourceError
from adaconvert.io.available import available_memory
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import open_source
from adaconvert.modeling import stock_experts
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.kept import kept_bytes
from adaconvert.train.checkpoints import ResumableTrainer
from adaconvert.train.checks import is_usable
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.memory import need_of
from adaconvert.train.memory_advice import Room, budget_of
from adaconvert.train.result import FinetuneResult
from adaconvert.train.run import RunSettings, finetune

Tune = Callable[..., FinetuneResult]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("qwen2_moe", tmp_path_factory.mktemp("mixture") / "qwen2_moe")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return what gets the bytes that are held after the last optimiser step."""
    found: dict[str, int] = {}
    original = ResumableTrainer.create_optimizer

    def create(self: Any, model: Any = None) -> Any:
        optimizer = original(self, model)
        optimizer.register_step_post_hook(lambda *_: found.update(measured(self)))
        return optimizer

    monkeypatch.setattr(ResumableTrainer, "create_optimizer", create)
    return found


def size_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def measured(trainer: Any) -> dict[str, int]:
    parameters = list(trainer.model.parameters())
    scales = [
        p.quant_state.absmax for p in parameters if getattr(p, "quant_state", None) is not None
    ]
    states = trainer.optimizer.state.values()
    return {
        "weights": size_of([*parameters, *trainer.model.buffers(), *scales]),
        "gradients": size_of(p.grad for p in parameters),
        "optimizer": sum(size_of(state.values()) for state in states),
        "states": len(states),
        "trained": len([p for p in parameters if p.requires_grad]),
        "wide": size_of(p for p in parameters if p.dtype == torch.float32),
    }


ADAPTED = {"lora": 4, "lora_targets": ("all",)}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("dense", {}),
        ("dense", {"optimizer": "sgd"}),
        ("mixture", {}),
        ("mixture", {"train": ("router",)}),
        ("mixture", {"train": ("experts",), "precision": "bf16"}),
        ("mixture", ADAPTED),
        ("mixture", {**ADAPTED, "load_in_4bit": True}),
        ("adaptive", {"train": ("experts",)}),
        ("adaptive", {**ADAPTED, "load_in_4bit": True, "precision": "bf16"}),
    ],
)
def test_weights_gradients_and_state_are_as_estimated(
    model: str, options: dict[str, Any], taken: dict[str, int], tune: Tune, request: Any
) -> None:
    if options.get("load_in_4bit"):
        pytest.importorskip("bitsandbytes")
    result = tune(request.getfixturevalue(model), steps=1, **options)
    assert result.memory is not None
    for kind in ("weights", "gradients", "optimizer"):
        assert sum(result.memory[kind].values()) == taken[kind], kind


@pytest.mark.parametrize("family", ["llama-tied", "mixtral", "gpt_neox"])
def test_activations_are_estimated(family: str, tmp_path: Path) -> None:
    folder = tiny_models.make(family, tmp_path / "m")
    config = FinetuneConfig.of(["x"], {"steps": 1, "seq_len": 64, "batch_size": 2})
    with quiet():
        estimate = need_of(load_model(folder, device_map="meta"), config).activations
        model: Any = load_model(folder).float().train()
        stock_experts.use(model)
        with kept_bytes(model) as kept:
            logits = model(input_ids=torch.zeros(2, 64, dtype=torch.long), use_cache=False).logits
    logit_bytes = 4 * logits.numel() * 4
    # counted in bfloat16, where norms keep a float32 copy that float32 does not need
    assert 0.9 * kept.total <= estimate - logit_bytes <= 1.6 * kept.total


def test_frozen_parameters_keep_no_state_and_no_wide_copy(
    taken: dict[str, int], tune: Tune, tmp_path: Path
) -> None:
    mixture = tiny_models.make("qwen2_moe", tmp_path / "src", dtype="bfloat16")
    result = tune(mixture, steps=1, train=("router",), precision="bf16")
    # a state and a float32 copy for what is trained, and only for that
    assert taken["states"] == taken["trained"] > 0
    routers = 4 * result.summary["by_part"]["router"]
    assert result.memory is not None
    assert taken["wide"] == routers
    assert result.memory["gradients"] == {"router": routers}
    assert taken["optimizer"] == 2 * routers + 4 * taken["trained"]


def test_checkpointing_and_a_smaller_batch_need_less(mixture: Path) -> None:
    def activations(**options: Any) -> int:
        common = {"steps": 1, "seq_len": 64, "batch_size": 4}
        config = FinetuneConfig.of(["x"], {**common, **options})
        with quiet():
            return need_of(load_model(mixture, device_map="meta"), config).activations

    usual = activations()
    assert activations(checkpointing=True) < usual
    assert activations(batch_size=1) * 4 == pytest.approx(usual, rel=0.05)
    # PEFT adds adapters to stacked experts before they are used
    assert activations(lora=4, lora_targets=("experts",), batch_size=1) > 4 * 3 * 32 * 32 * 4


def test_what_does_not_fit_is_refused_with_what_does(
    mixture: Path, tune: Tune, tmp_path: Path
) -> None:
    item = open_source(str(mixture))
    config = FinetuneConfig.of(["x"], {"steps": 1, "seq_len": 256, "batch_size": 8})
    room = Room(device="cpu", free=3_000_000, host=1 << 40)
    with pytest.raises(ResourceError) as caught:
        budget_of(item, config, room, changed={})
    text = str(caught.value)
    assert text.startswith("memory of cpu: training qwen2_moe this way does not fit; expected ")
    assert "found 3 MB free (--memory says otherwise). What fits: " in text
    assert "--train router --batch-size 1 --accumulate 8 --checkpointing (" in text
    assert "--train router --precision bf16 --batch-size 1 --accumulate 8 --checkpoint" in text
    assert "--lora 8 --lora-targets experts --precision bf16" in text
    assert ("--load-in-4bit" in text) == is_usable("bitsandbytes")
    assert caught.value.exit_code == 6
    with pytest.raises(ResourceError, match=r"Nothing fits; the least is .*--fsdp"):
        budget_of(item, config, Room(device="cpu", free=1000, host=1 << 40), changed={})
    assert os.listdir(tmp_path) == []


def test_settings_that_are_said_to_fit_do(mixture: Path) -> None:
    item = open_source(str(mixture))
    room = Room(device="cpu", free=3_000_000, host=1 << 40)
    options = {"steps": 1, "seq_len": 256, "batch_size": 1, "accumulate": 8}
    adapted = {"lora": 8, "lora_targets": ("experts",), "precision": "bf16", "checkpointing": True}
    for more in ({"train": ("router",), "checkpointing": True}, adapted):
        config = FinetuneConfig.of(["x"], {**options, **more})
        assert budget_of(item, config, room, changed={}).need.total <= room.free


@pytest.mark.parametrize(("stored", "precision"), [("float32", "fp32"), ("bfloat16", "fp64")])
def test_teacher_is_counted_in_the_dtype_it_is_held_in(
    stored: str, precision: str, tmp_path: Path
) -> None:
    source = tiny_models.make("llama", tmp_path / "src", dtype=stored)
    item = open_source(str(source))
    config = FinetuneConfig.of(["x"], {"steps": 1, "distill": 1.0, "precision": precision})
    room = Room(device="cpu", free=1 << 40, host=1 << 40)
    width = {"fp32": 4, "fp64": 8}[precision]
    expected = sum(p.numel() for p in load_model(source).parameters()) * width
    assert budget_of(item, config, room, changed={}).need.teacher == expected


def test_rate_of_nothing_is_refused_before_any_text_is_read(mixture: Path) -> None:
    config = FinetuneConfig.of(["x"], {"steps": 1, "train": "router", "lr_of": ("experts=1e-3",)})
    room = Room(device="cpu", free=1 << 40, host=1 << 40)
    with pytest.raises(OptionError, match="--lr-of experts: matches nothing that is trained"):
        budget_of(open_source(str(mixture)), config, room, changed={})


def test_model_must_pass_through_the_machines_memory(mixture: Path) -> None:
    config = FinetuneConfig.of(["x"], {"steps": 1, "seq_len": 16, "batch_size": 1})
    room = Room(device="cuda", free=1 << 40, host=1000)
    with pytest.raises(ResourceError, match="does not fit this machine's memory, through which"):
        budget_of(open_source(str(mixture)), config, room, changed={})


def test_memory_can_be_given(dense: Path, text: Path, tmp_path: Path) -> None:
    config = FinetuneConfig.of([str(text)], {"steps": 1, "seq_len": 32})
    settings = RunSettings(destination=tmp_path / "out", device="cpu", memory="1kB")
    with pytest.raises(ResourceError, match="found 1 kB free"):
        finetune(str(dense), config, settings)
    with pytest.raises(OptionError, match="--memory"):
        finetune(str(dense), config, RunSettings(destination=tmp_path / "out", memory="much"))
    assert os.listdir(tmp_path) == []


def test_dry_run_says_everything_and_writes_nothing(
    mixture: Path, text: Path, tmp_path: Path
) -> None:
    config = FinetuneConfig.of([str(text)], {"tokens": 2000, "seq_len": 32, "train": ("router",)})
    settings = RunSettings(destination=tmp_path / "out", device="cpu", dry_run=True)
    plan: Any = finetune(str(mixture), config, settings)
    assert os.listdir(tmp_path) == []
    lines = plan.lines()
    assert lines[0].startswith("train       320 of ")
    assert lines[0].endswith("(router 320)")
    assert lines[1] == "steps       8 of 8 x 1 sequences of 32 tokens, 2048 tokens"
    assert lines[2] == "data        text.jsonl"
    assert any(line.startswith("optimizer ") for line in lines)
    assert lines[-2].startswith("free ")
    assert lines[-2].endswith(" on cpu")
    found = plan.to_json()
    assert found["dry_run"] is True
    assert found["tokens"] == 2048
    assert found["memory"]["total"] == plan.budget.need.total
    assert 0 < plan.budget.room.free <= available_memory() * 1.2
