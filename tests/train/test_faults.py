"""What goes wrong while training is said, with what to do, and nothing good is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from adaconvert.errors import InterruptedRunError, OptionError, OutputConflictError, ResourceError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.stored import tensors_of
from adaconvert.train import checkpoints, trackers, work
from adaconvert.train.result import FinetuneResult
from adaconvert.train.session import Session
from adaconvert.train.work import Work

Tune = Callable[..., FinetuneResult]
SCRIPT = Path(__file__).with_name("killed_run.py")
KILLED: dict[str, Any] = {
    **{"steps": 6, "seq_len": 16, "batch_size": 2, "accumulate": 3, "lr": 3e-3},
    **{"log_every": 1, "save_every": 2},
}
#: where a run is killed: after a batch (three a step, two steps a checkpoint), half-way through the
#: weights of a checkpoint, or when all but its mark is there -> logged steps that are left.
MOMENTS = {"batch-2": 6, "batch-10": 4, "batch-14": 2, "weights-2": 4, "mark-2": 4, "mark-3": 2}


def work_of(tmp_path: Path, name: str = "out") -> Path:
    return tmp_path / f".{name}.adaconvert-training"


# -- kill


@pytest.mark.slow
def test_killed_run_equals_an_uninterrupted_one_bit_for_bit(
    text: Path, tune: Tune, tmp_path: Path
) -> None:
    source = tiny_models.make("mixtral", tmp_path / "src")
    whole = tune(source, "whole", **KILLED)
    command = [sys.executable, str(SCRIPT), str(source), str(text), str(tmp_path)]
    done = subprocess.run(
        [*command, json.dumps(KILLED), *MOMENTS], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    expected = tensors_of(tmp_path / "whole")
    for moment in MOMENTS:
        assert not (tmp_path / moment).exists()
        resumed = tune(source, moment, resume=True, **KILLED)
        assert [e["lm"] for e in resumed.curve] == [e["lm"] for e in whole.curve], moment
        found = tensors_of(tmp_path / moment)
        assert all(torch.equal(found[name], expected[name]) for name in expected), moment
    assert sorted(os.listdir(tmp_path)) == sorted([*MOMENTS, "src", "whole"])


# -- damage


def interrupted(tune: Tune, source: Path, step: int, **options: Any) -> None:
    def stop(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        tune(source, report=stop, **options)


SAVED: dict[str, Any] = {"steps": 7, "save_every": 2, "log_every": 1}


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("model.safetensors", "model.safetensors is damaged"),
        ("optimizer.pt", "optimizer.pt is damaged"),
        ("complete.json", "it was not written to the end"),
    ],
)
def test_damaged_checkpoint_is_passed_over_for_the_one_before(
    file: str,
    what: str,
    dense: Path,
    tune: Tune,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupted(tune, dense, 7, **SAVED)
    assert sorted(p.name for p in work_of(tmp_path).glob("checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    broken = work_of(tmp_path) / "checkpoint-6" / file
    if file == "complete.json":
        broken.unlink()
    else:
        raw = bytearray(broken.read_bytes())
        raw[-1] ^= 1
        broken.write_bytes(raw)
    with caplog.at_level(logging.WARNING, logger="adaconvert"):
        resumed = tune(dense, resume=True, **SAVED)
    said = [record.getMessage() for record in caplog.records if "checkpoint" in record.message]
    assert said == [f"checkpoint-6 is not used: {what}", "going on from checkpoint-4"]
    whole = tune(dense, "whole", **SAVED)
    assert resumed.summary == whole.summary
    a, b = (tensors_of(tmp_path / name) for name in ("out", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_when_every_checkpoint_is_damaged_training_starts_again(
    dense: Path, tune: Tune, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(tune, dense, 7, **SAVED)
    for weights in work_of(tmp_path).glob("checkpoint-*/model.safetensors"):
        weights.write_bytes(b"")
    lines: list[str] = []
    with caplog.at_level(logging.WARNING, logger="adaconvert"):
        tune(dense, resume=True, report=lines.append, **SAVED)
    assert "no checkpoint is complete, so training starts from the beginning" in caplog.text
    assert any(line.startswith("step 1/") for line in lines)


# -- disk


def full(tmp_path: Path, step: int, file: str) -> Callable[[str], None]:
    """Return what makes one file of a checkpoint end on a full disk."""

    def prepare(line: str) -> None:
        if line.startswith(f"step {step}/"):
            folder = work_of(tmp_path) / f"checkpoint-{step}"
            folder.mkdir()
            (folder / file).symlink_to("/dev/full")

    return prepare


@pytest.mark.parametrize("file", ["optimizer.pt", "trainer_state.json"])
def test_disk_that_is_full_at_a_checkpoint_keeps_the_one_before(
    file: str, dense: Path, tune: Tune, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError) as caught:
        tune(dense, report=full(tmp_path, 4, file), **SAVED)
    text = str(caught.value)
    assert text.startswith(".out.adaconvert-training/checkpoint-4: ")
    assert "no space left on the disk" in text or "the disk is full" in text
    assert "Free some space. Run the same command with --resume to go on from the last" in text
    assert caught.value.exit_code == 6
    assert os.listdir(tmp_path) == [".out.adaconvert-training"]
    assert [p.name for p in work_of(tmp_path).glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = tune(dense, resume=True, **SAVED)
    whole = tune(dense, "whole", **SAVED)
    assert resumed.summary == whole.summary


def test_limit_for_files_is_said(dense: Path, tune: Tune, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(line: str) -> None:
        if line.startswith("step 4/"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    try:
        with pytest.raises(ResourceError, match=r"a limit for files is reached.*--resume"):
            tune(dense, report=limit, **SAVED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in work_of(tmp_path).glob("checkpoint-*")] == ["checkpoint-2"]


def test_disk_that_is_full_at_the_first_checkpoint_leaves_nothing(
    dense: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "save_file", save)
    with pytest.raises(ResourceError, match="No checkpoint was complete, so nothing was kept"):
        tune(dense, **SAVED)
    assert os.listdir(tmp_path) == []


def test_disk_that_is_full_when_training_is_done_keeps_the_checkpoints(
    dense: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", save)
        with pytest.raises(ResourceError, match=r"disk is full.*--resume to go on") as caught:
            tune(dense, **SAVED)
    assert str(caught.value).startswith(".out.adaconvert-training/trained: ")
    resumed = tune(dense, resume=True, **SAVED)
    whole = tune(dense, "whole", **SAVED)
    assert resumed.summary == whole.summary


def test_old_checkpoint_that_cannot_be_removed_is_a_warning(
    dense: Path,
    tune: Tune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = work.shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        if Path(path).name == "checkpoint-2":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        real(path, **options)

    monkeypatch.setattr(work.shutil, "rmtree", rmtree)
    with caplog.at_level(logging.WARNING, logger="adaconvert"):
        tune(dense, **SAVED)
    said = "checkpoint-2 cannot be removed (permission denied); remove it yourself"
    assert said in [record.getMessage() for record in caplog.records]
    assert (tmp_path / "out" / "config.json").exists()


def test_facts_of_a_run_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(ResourceError, match="no space left"):
            Work.open(tmp_path / "out", {"a": 1}, resume=False)
    assert not (work_of(tmp_path) / "run.json").exists()
    assert Work.open(tmp_path / "out", {"a": 1}, resume=True).resumed is None


def test_facts_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    Work.open(tmp_path / "out", {"a": 1}, resume=False)
    (work_of(tmp_path) / "run.json").write_text("{")
    with pytest.raises(OutputConflictError, match=r"run.json: cannot be read .*--resume out"):
        Work.open(tmp_path / "out", {"a": 1}, resume=True)


# -- memory


def test_running_out_of_memory_says_what_to_lower(dense: Path, tune: Tune, tmp_path: Path) -> None:
    def take_all(line: str) -> None:
        if line.startswith("step 3/"):
            torch.empty(1 << 62, dtype=torch.uint8)

    with pytest.raises(ResourceError) as caught:
        tune(dense, report=take_all, **SAVED)
    text = str(caught.value)
    assert text.startswith("out of memory while training. Give a lower --batch-size (now 4) with ")
    assert "--checkpointing, or a lower --seq-len (now 32), or --lora 8; --dry-run says" in text
    assert text.endswith("Run the same command with --resume to go on from the last checkpoint.")
    assert caught.value.exit_code == 6


def take_all(*args: Any, **options: Any) -> None:
    torch.empty(1 << 62, dtype=torch.uint8)


def test_memory_that_ends_before_the_first_step_is_said(
    dense: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "_trainer", take_all)
    with pytest.raises(ResourceError, match=r"out of memory while training\. Give a lower"):
        tune(dense, **SAVED)
    assert os.listdir(tmp_path) == []


def test_model_too_large_is_said(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", take_all)
    with pytest.raises(ResourceError, match="dense: this machine's memory cannot hold it"):
        load_model(dense)


# -- compiling


def compiled_by(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    from adaconvert.train import session

    original = session.arguments_of

    def arguments_of(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        if found.torch_compile:
            found.torch_compile_backend = backend
        return found

    monkeypatch.setattr(session, "arguments_of", arguments_of)


@pytest.mark.parametrize("model", ["dense", "adaptive"])
def test_compiled_run_equals_a_plain_one(
    model: str, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    # what traces the model, without what takes minutes to compile it
    compiled_by(monkeypatch, "aot_eager")
    source = request.getfixturevalue(model)
    plain = tune(source, "plain", steps=3, log_every=1)
    compiled = tune(source, "compiled", steps=3, log_every=1, compile=True)
    found, expected = ([e["lm"] for e in r.curve] for r in (compiled, plain))
    assert found == pytest.approx(expected, rel=1e-5)
    torch._dynamo.reset()


def test_model_that_cannot_be_compiled_is_refused(
    dense: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}):
        message = r"--compile: torch cannot compile this model here \(.*Leave --compile out"
        with pytest.raises(ResourceError, match=message):
            tune(dense, steps=2, compile=True)
    torch._dynamo.reset()


# -- trackers


class Writer:
    """What TensorBoard's writer is called with."""

    folders: list[str] = []  # noqa: RUF012

    def __init__(self, log_dir: str) -> None:
        self.folders.append(log_dir)
        Path(log_dir).mkdir(parents=True)
        self.file = Path(log_dir) / "events"

    def add_text(self, *args: Any) -> None:
        return None

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self.file.open("a") as file:
            file.write(f"{name} {step}\n")

    def flush(self) -> None:
        return None

    def close(self) -> None:
        return None


def test_files_of_a_tracker_stay_beside_the_result(
    dense: Path, tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import integration_utils

    callback: Any = integration_utils.TensorBoardCallback

    def made(self: Any, tb_writer: Any = None) -> None:
        self._SummaryWriter, self.tb_writer, self.logging_dir = Writer, tb_writer, None

    monkeypatch.setattr(callback, "__init__", made)
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: object())
    tune(dense, steps=2, log_every=1, report_to=("tensorboard",))
    assert sorted(os.listdir(tmp_path)) == ["out", "out.logs"]
    assert "train/loss 2" in (tmp_path / "out.logs" / "events").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", r"--report-to wandb: the package wandb is not installed. Run: pip install wandb"),
        ("tensorboard", r"--report-to tensorboard: the package tensorboard is not installed"),
        ("board\n", r"--report-to board\\n: is unknown; expected azure_ml, .*tensorboard"),
    ],
)
def test_tracker_that_is_not_there_is_named(
    name: str,
    message: str,
    dense: Path,
    tune: Tune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trackers.util, "find_spec", lambda name: None)
    with pytest.raises(OptionError, match=message):
        tune(dense, report_to=(name,))
    assert os.listdir(tmp_path) == []
