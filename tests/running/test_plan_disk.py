"""The disk a plan asks for holds what a run has on it, checkpoints to resume from included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.errors import ResourceError
from adaconvert.train import work

SAVING = ("tune.train=all", "tune.steps=8", "tune.save_every=1", "tune.log_every=1")


def plan_of(bench: Any, *settings: str) -> Any:
    return bench.run(dry_run=True, settings=(*SAVING, *settings)).outline


def tune_of(plan: Any) -> Any:
    return next(stage for stage in plan.stages if stage.verb == "finetune")


def test_what_training_keeps_is_what_the_plan_says(
    bench: Any, moe_made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = tune_of(plan_of(bench)).kept
    sizes: list[int] = []
    completed = work.Work.completed

    def watched(self: Any, step: int) -> None:
        found = [path for path in self.path.glob("checkpoint-*/*") if path.is_file()]
        sizes.append(sum(path.stat().st_size for path in found))
        completed(self, step)

    monkeypatch.setattr(work.Work, "completed", watched)
    given: dict[str, Any] = {"steps": 8, "save_every": 1, "log_every": 1, "train": "all"}
    data = [str(bench.folder / "train.jsonl")]
    api.finetune(moe_made, bench.folder / "tuned", data=data, batch_size=1, seq_len=8, **given)
    # tokenizer, settings and random states come on top of weights and optimizer
    assert planned <= max(sizes) <= planned + (1 << 18)


def test_no_more_is_counted_than_is_saved(bench: Any) -> None:
    whole = tune_of(plan_of(bench)).kept
    assert tune_of(plan_of(bench, "tune.save_every=0")).kept == 0
    assert tune_of(plan_of(bench, "tune.save_every=5")).kept * (work.KEPT + 1) == whole


def test_the_peak_is_shown_and_asked_for(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(bench)
    kept = tune_of(plan).kept
    assert plan.disk < plan.peak <= plan.disk + kept
    assert " at a time" in plan.lines()[-1]
    assert "to resume from" in "\n".join(plan.lines())
    found = plan.to_json()
    assert (found["disk_bytes"], found["peak_bytes"]) == (plan.disk, plan.peak)
    monkeypatch.setattr("adaconvert.running.outline.free_bytes", lambda _: plan.peak - 1)
    with pytest.raises(ResourceError, match="the disk is too small for the stages"):
        bench.run(settings=SAVING)
    assert not Path(bench.folder / "out").exists()
