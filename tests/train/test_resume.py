"""An interrupted run that is resumed ends where an uninterrupted one does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import InterruptedRunError, OutputConflictError
from adaconvert.testing import tiny_models
from adaconvert.testing.stored import tensors_of
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]
STAGE_ONE: dict[str, Any] = {"activation": "relu", "sparsity": 0.01, "steps": 12, "save_every": 4}


class Stopper:
    """Interrupts the run when a step is reported, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, line: str) -> None:
        if line.startswith(f"step {self.step}/"):
            raise KeyboardInterrupt


def interrupted(tune: Tune, source: Path, step: int, **options: Any) -> InterruptedRunError:
    with pytest.raises(InterruptedRunError) as caught:
        tune(source, "out", report=Stopper(step), log_every=1, **options)
    return caught.value


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_resumed_run_equals_an_uninterrupted_one(family: str, tune: Tune, tmp_path: Path) -> None:
    # gpt2 has dropout, mixtral fused experts that Trainer's own resume leaves as they were
    options = {"steps": 12, "save_every": 4} if family == "mixtral" else STAGE_ONE
    source = tiny_models.make(family, tmp_path / "src")
    error = interrupted(tune, source, 7, **options)
    assert "--resume" in str(error)
    assert not (tmp_path / "out").exists()
    resumed = tune(source, "out", resume=True, log_every=1, **options)
    whole = tune(source, "whole", log_every=1, **options)
    a, b = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    for name in a:
        assert torch.equal(a[name], b[name]), name
    assert [e["lm"] for e in resumed.curve] == pytest.approx([e["lm"] for e in whole.curve])
    assert sorted(os.listdir(tmp_path)) == ["out", "src", "whole"]


def test_checkpoint_that_was_not_finished_is_not_used(
    dense: Path, tune: Tune, tmp_path: Path
) -> None:
    interrupted(tune, dense, 11, **STAGE_ONE)
    work = tmp_path / ".out.adaconvert-training"
    last = work / "checkpoint-8"
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    resumed = tune(dense, "out", resume=True, log_every=1, **STAGE_ONE)
    whole = tune(dense, "whole", log_every=1, **STAGE_ONE)
    assert [e["lm"] for e in resumed.curve] == pytest.approx([e["lm"] for e in whole.curve])


def test_resume_refuses_another_run(dense: Path, tune: Tune) -> None:
    interrupted(tune, dense, 7, **STAGE_ONE)
    differs = r"the interrupted run differs in options\.lr, options\.sparsity\.penalty\. "
    with pytest.raises(OutputConflictError, match=differs):
        tune(dense, "out", resume=True, **{**STAGE_ONE, "lr": 1e-5, "sparsity_loss": "l1"})


def test_resumed_run_logs_and_saves_as_it_is_asked_to(dense: Path, tune: Tune) -> None:
    interrupted(tune, dense, 5, steps=10, save_every=2)
    result = tune(dense, "out", resume=True, steps=10, save_every=3, log_every=4)
    # 1 to 4 are those of the run before; a checkpoint is logged too
    assert [entry["step"] for entry in result.curve] == [1, 2, 3, 4, 6, 8, 9, 10]


def test_interruption_before_a_checkpoint_leaves_nothing(
    dense: Path, tune: Tune, tmp_path: Path
) -> None:
    error = interrupted(tune, dense, 2, **STAGE_ONE)
    assert "No checkpoint was complete" in str(error)
    assert os.listdir(tmp_path) == []


def test_resume_of_a_finished_run_finds_it(dense: Path, tune: Tune) -> None:
    first = tune(dense, "out", **STAGE_ONE)
    again = tune(dense, "out", resume=True, **STAGE_ONE)
    assert again.summary["last"] == first.summary["last"]
    assert again.curve == ()


def test_without_resume_a_run_starts_again(
    dense: Path, tune: Tune, tmp_path: Path, capsys: Callable[..., Any]
) -> None:
    interrupted(tune, dense, 7, **STAGE_ONE)
    result = tune(dense, "out", log_every=1, **STAGE_ONE)
    assert len(result.curve) == 12
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_interruption_while_writing_goes_on_from_the_end_of_training(
    dense: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaconvert.train import export

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export, "write_files", stop)
        with pytest.raises(InterruptedRunError, match="--resume"):
            tune(dense, "out", **STAGE_ONE)
    resumed = tune(dense, "out", resume=True, **STAGE_ONE)
    whole = tune(dense, "whole", **STAGE_ONE)
    assert resumed.summary == whole.summary
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole"))
    assert a == b
