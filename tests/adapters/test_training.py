"""Training routed adapters under PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adaconvert.adapters import MoloraLinear
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_in_peft import attach, batch_of, logits_of

Bases = Callable[..., Path]
IDS = {"input_ids": torch.arange(5, 45).reshape(2, 20)}


def grads_of(model: Any, **options: Any) -> dict[str, Tensor]:
    """Return the gradient of everything that has one after a backward pass."""
    model.zero_grad()
    model(**IDS, labels=IDS["input_ids"], **options).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in found.items()}


def kind_of(name: str) -> str:
    """Return which of the tensors of adapters a parameter is, "" for none."""
    return name.rpartition("molora_")[2].partition(".")[0] if "molora_" in name else ""


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_the_first_step_moves_only_b(base_of: Bases, reads: str) -> None:
    model = attach(base_of("llama"), seed=None, router={"reads": reads}).train()
    asked = {kind_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert asked == {"A", "B", "router"}
    grads = grads_of(model)
    assert {kind_of(name) for name, grad in grads.items() if grad.any()} == {"B"}
    assert {kind_of(name) for name in grads} == {"A", "B", "router"}


@pytest.mark.parametrize("way", ["module", "layer", "shared", "top-k", "ia3", "dropout"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    base_of: Bases, way: str, reentrant: bool
) -> None:
    options: dict[str, Any] = {
        "top-k": {"router": {"reads": "layer"}, "select": {"rule": "top-k", "k": 2}},
        "ia3": {"experts_kind": "ia3"},
        "dropout": {"dropout": 0.3},
    }.get(way, {"router": {"reads": way}})
    model = attach(base_of("llama"), **options).train()
    torch.manual_seed(0)
    want = grads_of(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    if reentrant and way in ("layer", "shared", "top-k"):
        with pytest.raises(ValueError, match="routers of blocks need use_reentrant=False"):
            grads_of(model)
        return
    found = grads_of(model)
    assert all(name in found and torch.equal(found[name], grad) for name, grad in want.items())
    assert "router" in {kind_of(name) for name, grad in found.items() if grad.any()}


@pytest.mark.parametrize("reads", ["module", "layer"])
def test_under_autocast_gates_stay_float32(base_of: Bases, reads: str) -> None:
    model = attach(base_of("llama"), router={"reads": reads})
    layer = next(module for module in model.modules() if isinstance(module, MoloraLinear))
    name = "default"
    logits: list[Tensor] = []
    plain = layer.logits

    def kept(given: str, x: Tensor) -> Tensor:
        logits.append(plain(given, x))
        return logits[-1]

    layer.logits = kept  # type: ignore[method-assign]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**IDS, labels=IDS["input_ids"])
        out.loss.backward()
    assert logits
    assert {found.dtype for found in logits} == {torch.float32}
    grad = layer.molora_router[name].grad
    assert grad is not None
    assert grad.dtype == torch.float32
    assert bool(grad.isfinite().all())


def test_dropout_acts_in_training_alone(base_of: Bases) -> None:
    model = attach(base_of("llama"), dropout=0.5)
    want = logits_of(model)
    assert torch.equal(logits_of(attach(base_of("llama"))), want)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(logits_of(model), want)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": {"reads": "layer"}, "select": {"rule": "top-k", "k": 2, "renormalize": True}},
        {"experts_kind": "ia3", "feedforward_modules": ["down_proj"]},
    ],
    ids=["soft", "top-2", "ia3"],
)
def test_the_trainer_trains_saves_and_resumes(
    base_of: Bases, tmp_path: Path, options: dict[str, Any]
) -> None:
    from transformers import Trainer, TrainingArguments

    base = base_of("llama")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(5, 85).reshape(4, 20)]

    def train(steps: int, *, resume: bool = False) -> Any:
        torch.manual_seed(0)
        model = attach(base, seed=None, task_type="CAUSAL_LM", init_std=0.3, **options)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=0.05,
            save_steps=2,
            lr_scheduler_type="constant",
            gradient_checkpointing=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=resume)
        return model.eval()

    dense: Any = load_model(base)
    frozen = dense.state_dict()
    before = float(dense(**IDS, labels=IDS["input_ids"]).loss)
    model = train(4)
    assert float(model(**IDS, labels=IDS["input_ids"]).loss) < before
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, frozen[name])
    model = train(6, resume=True)
    want = logits_of(model, **batch_of(model))
    model.save_pretrained(tmp_path / "saved")
    again: Any = PeftModel.from_pretrained(load_model(base), tmp_path / "saved").eval()
    assert torch.equal(logits_of(again), want)
    moved = {
        kind_of(name)
        for name, parameter in model.named_parameters()
        if kind_of(name) and bool(parameter.any())
    }
    assert moved == ({"vectors", "router"} if "experts_kind" in options else {"A", "B", "router"})


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_asks_for_gradients_where_it_is_to_be_trained(
    base_of: Bases, tmp_path: Path, is_trainable: bool
) -> None:
    base = base_of("llama")
    attach(base).save_pretrained(tmp_path / "saved")
    model: Any = PeftModel.from_pretrained(
        load_model(base), tmp_path / "saved", is_trainable=is_trainable
    )
    asked = {kind_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert asked == ({"A", "B", "router"} if is_trainable else set())


def test_a_compiled_model_computes_the_same(base_of: Bases) -> None:
    model = attach(base_of("llama"), router={"reads": "layer"})
    want = logits_of(model)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager")
    found = compiled(**IDS).logits
    assert (found - want).norm() <= 20 * torch.finfo(torch.float32).eps * want.norm()
    torch._dynamo.reset()
