"""The plan warns of a fine-tune that will be refused for its memory, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.running.room import as_settings
from adaconvert.train import memory_advice
from adaconvert.train.memory_advice import Room

TUNE = ("tune.train=all", "tune.batch_size=4", "tune.seq_len=64")


def tune_of(bench: Any, *settings: str) -> Any:
    """Return the plan of the fine-tune."""
    plan = bench.run(dry_run=True, settings=(*TUNE, *settings)).outline
    return next(stage for stage in plan.stages if stage.verb == "finetune")


def test_what_fits_is_not_warned_of(bench: Any) -> None:
    tune = tune_of(bench)
    assert tune.warnings == ()
    assert "warning" not in "\n".join(tune.lines())
    assert tune_of(bench, f"tune.memory={tune.memory}").warnings == ()


def test_the_nearest_setting_that_fits_is_named_and_fits(bench: Any) -> None:
    usual = tune_of(bench).memory
    saving = tune_of(bench, "tune.checkpointing=true").memory
    tune = tune_of(bench, f"tune.memory={usual - 1}")
    assert saving < usual - 1
    (warning,) = tune.warnings
    assert warning.startswith("will be refused here: it needs ")
    assert " are free on cpu; --set tune.checkpointing=true needs " in warning
    assert f"{'':<24}warning: {warning}" in tune.lines()
    assert tune.to_json()["warnings"] == [warning]
    # with what is asked for next, more is needed
    (warning,) = tune_of(bench, f"tune.memory={saving - 1}").warnings
    advice = "--set tune.checkpointing=true --set tune.batch_size=1 --set tune.accumulate=4 needs "
    assert advice in warning
    taken = [part.split(" ")[0] for part in advice.split("--set ")[1:]]
    assert tune_of(bench, f"tune.memory={saving - 1}", *taken).warnings == ()


def test_where_nothing_fits_the_least_is_named(bench: Any) -> None:
    (warning,) = tune_of(bench, "tune.memory=1000").warnings
    assert "and 1 kB are free on cpu; the least is --set tune." in warning
    assert warning[-1] == "B"


def test_a_warning_stops_no_plan_and_no_run(bench: Any) -> None:
    done = bench.run(settings=("tune.memory=1000",))
    assert [stage.status for stage in done.stages][:2] == ["done", "done"]
    assert [line for line in bench.heard if "warning: will be refused here" in line]


def test_a_model_that_cannot_pass_through_the_machine_is_warned_of(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(device="cuda", free=1 << 40, host=1000)
    monkeypatch.setattr(memory_advice, "room_of", lambda device, **given: room)
    (warning,) = tune_of(bench).warnings
    assert warning.endswith("is loaded through this machine's memory, of which 1 kB are free")


@pytest.mark.parametrize("more", [(), ("tune.distill=1.0", "tune.teacher=$source")])
def test_the_need_is_the_one_finetune_states(
    more: tuple[str, ...], bench: Any, moe_made: Path
) -> None:
    given: dict[str, Any] = {"steps": 2, "batch_size": 4, "seq_len": 64}
    if more:
        given |= {"distill": 1.0, "teacher": str(bench.folder / "dense")}
    stated: Any = api.finetune(
        moe_made,
        bench.folder / "tuned",
        data=[str(bench.folder / "train.jsonl")],
        dry_run=True,
        **given,
    )
    assert tune_of(bench, *more).memory == stated.budget.need.total


def test_options_become_settings_of_the_stage() -> None:
    words = "--lora 8 --lora-targets experts --load-in-4bit --precision bf16 --checkpointing"
    assert as_settings("tune", words) == (
        "--set tune.lora=8 --set tune.lora_targets=experts --set tune.load_in_4bit=true "
        "--set tune.precision=bf16 --set tune.checkpointing=true"
    )
