"""`run`: the stages in order, nothing done twice, the destination whole or not there."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import (
    DataError,
    InterruptedRunError,
    OptionError,
    OutputConflictError,
    ResourceError,
)
from adaconvert.io import manifest
from adaconvert.recipe.load import load

pytestmark = pytest.mark.usefixtures("uncounted")
FIRST = ["convert", "finetune", "evaluate"]


def statuses(result: Any) -> list[str]:
    """Return the status of each stage."""
    return [stage.status for stage in result.stages]


def test_every_stage_is_called_with_its_options(bench: Any) -> None:
    bench.run()
    work = bench.folder / ".out.run"
    convert, finetune, evaluate = bench.called
    assert convert[1] == (str(bench.folder / "dense"),)
    assert convert[2] == {
        "destination": work / "dense-upcycle",
        "method": "upcycle",
        "experts": 2,
        "overwrite": True,
        "resume": False,
        "progress": False,
    }
    assert finetune[1] == (str(work / "dense-upcycle"), work / "dense-tune")
    given = finetune[2]
    assert given.pop("report") == bench.heard.append
    assert given == {
        "data": (str(bench.folder / "train.jsonl"),),
        "steps": 2,
        "seq_len": 8,
        "batch_size": 1,
        "train": ("router",),
        "overwrite": True,
        "resume": False,
        "progress": False,
    }
    assert evaluate[1] == (str(work / "dense-tune"),)
    assert evaluate[2] == {
        "data": str(bench.folder / "valid.jsonl"),
        "reference": str(bench.folder / "dense"),
        "progress": False,
    }


def test_the_plan_is_said_first_and_the_table_last(bench: Any) -> None:
    result = bench.run()
    assert bench.heard[0] == "r: T"
    plan = bench.heard.index("stage upcycle: upcycle")
    assert any(line.startswith("tune ") and "16 tokens in 2 steps" in line
               for line in bench.heard[:plan])  # fmt: skip
    assert result.lines() == [
        "r: T",
        "upcycle      done       mixtral, , not verified",
        "tune         done       16 tokens",
        "evaluate     done       valid.jsonl: as stored loss 1.5000",
        "push         left out   nothing is pushed; to do so: --set push.repo=ORG/NAME",
        f"wrote {bench.folder / 'out'}",
    ]
    json.dumps(result.to_json())


def test_the_destination_is_the_last_checkpoint_with_its_recipe(bench: Any) -> None:
    bench.run()
    out, last = bench.folder / "out", bench.folder / ".out.run" / "dense-tune"
    found = manifest.read(out)
    names = {path.name for path in last.iterdir()} | {"adaconvert_recipe.yaml"}
    assert {path.name for path in out.iterdir()} == names
    for shard in manifest.records(found):
        assert (out / shard).samefile(last / shard)
    text = (out / "adaconvert_recipe.yaml").read_text()
    assert str(bench.folder) not in text
    assert "adaconvert_recipe.yaml" in found["files"]  # type: ignore[operator]
    assert "steps: 2" in (out / "README.md").read_text()
    again = load(out / "adaconvert_recipe.yaml")
    assert again.stage("tune").options["steps"] == 2
    assert again.source == "dense"


def test_the_report_of_an_evaluation_is_kept_whole(bench: Any) -> None:
    result = bench.run()
    kept = json.loads((bench.folder / ".out.run" / "evaluate.json").read_text())
    assert kept["results"][0]["settings"][0]["documents"] == [1, 2]
    shown = result.stages[2].to_json()["result"]
    assert "documents" not in shown["results"][0]["settings"][0]  # type: ignore[index]


def test_every_text_is_evaluated_alone(bench: Any) -> None:
    texts = f"data.valid=[{bench.folder}/valid.jsonl, '{bench.folder}/train.jsonl,2']"
    result = bench.run(settings=(texts,))
    measured = [given["data"] for verb, _, given in bench.called if verb == "evaluate"]
    assert [Path(name).name for name in measured] == ["valid.jsonl", "train.jsonl"]
    assert result.stages[2].facts == (
        "valid.jsonl: as stored loss 1.5000; train.jsonl: as stored loss 1.5000"
    )


def test_nothing_is_done_twice(bench: Any) -> None:
    first = bench.run()
    assert bench.verbs == FIRST
    before = (bench.folder / "out" / "adaconvert.json").stat()
    again = bench.run()
    assert bench.verbs == []
    assert statuses(again) == ["unchanged", "unchanged", "unchanged", "left out"]
    assert [stage.facts for stage in again.stages] == [stage.facts for stage in first.stages]
    assert (bench.folder / "out" / "adaconvert.json").stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(
    ("settings", "redone"),
    [
        (("upcycle.seed=1",), FIRST),
        (("tune.lr=1e-3",), ["finetune", "evaluate"]),
        (("evaluate.length=16",), ["evaluate"]),
        (("push.repo=me/mine",), ["push"]),
    ],
)
def test_a_changed_setting_redoes_its_stage_and_those_after(
    bench: Any, settings: tuple[str, ...], redone: list[str]
) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    bench.run(settings=settings)
    assert bench.verbs == redone
    bench.run(settings=settings)
    assert bench.verbs == []


def test_a_new_title_changes_the_recipe_in_the_destination_only(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    path = bench.folder / "r.yaml"
    path.write_text(path.read_text().replace("title: T", "title: Other"))
    bench.run()
    assert bench.verbs == []
    assert "title: Other" in (bench.folder / "out" / "adaconvert_recipe.yaml").read_text()


def test_changed_text_redoes_what_reads_it(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    os.utime(bench.folder / "train.jsonl")
    bench.run()
    assert bench.verbs == []
    (bench.folder / "valid.jsonl").write_text('{"text": "other words"}')
    bench.run()
    assert bench.verbs == ["evaluate"]


def test_changed_weights_of_the_source_redo_everything(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    shard = sorted((bench.folder / "dense").glob("*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    shard.write_bytes(raw)
    bench.run()
    # the same bytes written again are hashed, and found to be the same
    assert bench.verbs == []
    raw[-3] ^= 1
    shard.write_bytes(raw)
    bench.run()
    assert bench.verbs == FIRST


def test_a_changed_tokenizer_of_the_source_redoes_everything(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    (bench.folder / "dense" / "special_tokens_map.json").write_text("{}")
    bench.run()
    assert bench.verbs == FIRST


def test_a_damaged_stage_is_redone(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    shutil.rmtree(bench.folder / ".out.run" / "dense-tune")
    bench.run()
    assert bench.verbs == ["finetune", "evaluate"]


def test_from_redoes_a_stage_and_those_after(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    result = bench.run(from_stage="tune")
    assert bench.verbs == ["finetune", "evaluate"]
    assert statuses(result) == ["unchanged", "done", "done", "left out"]
    with pytest.raises(OptionError, match=r"--from: unknown stage 'tun'. Did you mean 'tune'"):
        bench.run(from_stage="tun")


# interruption


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InterruptedRunError("stopped by SIGTERM")])
def test_an_interrupted_stage_is_gone_on_from(bench: Any, error: BaseException) -> None:
    def stop(verb: str, given: dict[str, Any]) -> None:
        if verb == "finetune":
            raise error

    bench.act = stop
    with pytest.raises(
        InterruptedRunError,
        match=r"Run the same command again to go on from there; what is finished is kept in .out",
    ):
        bench.run()
    assert not (bench.folder / "out").exists()
    bench.act = lambda verb, given: None
    assert bench.verbs == ["convert", "finetune"]
    result = bench.run()
    assert bench.called[0][2]["resume"] is True
    assert bench.verbs == ["finetune", "evaluate"]
    assert statuses(result) == ["unchanged", "done", "done", "left out"]


def test_an_interrupted_stage_with_other_settings_starts_again(bench: Any) -> None:
    def stop(verb: str, given: dict[str, Any]) -> None:
        if verb == "finetune":
            raise KeyboardInterrupt

    bench.act = stop
    with pytest.raises(InterruptedRunError, match="interrupted"):
        bench.run(from_stage="upcycle")
    bench.act = lambda verb, given: None
    bench.verbs  # noqa: B018
    bench.run(settings=("tune.lr=1e-3",))
    assert bench.called[0][2]["resume"] is False


def test_from_is_left_out_of_the_advice(bench: Any) -> None:
    def stop(verb: str, given: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    bench.act = stop
    with pytest.raises(InterruptedRunError, match="Run the same command without --from again"):
        bench.run(from_stage="upcycle")


def test_what_cannot_be_resumed_starts_again(bench: Any) -> None:
    def stop(verb: str, given: dict[str, Any]) -> None:
        if verb == "finetune":
            raise KeyboardInterrupt

    def refuse(verb: str, given: dict[str, Any]) -> None:
        if given.get("resume"):
            raise OutputConflictError("the interrupted run differs")

    bench.act = stop
    with pytest.raises(InterruptedRunError):
        bench.run()
    bench.act = refuse
    bench.verbs  # noqa: B018
    bench.run()
    assert bench.verbs == ["finetune", "finetune", "evaluate"]
    assert "stage tune: cannot be resumed, starts again" in bench.heard


def test_a_run_killed_before_it_recorded_the_destination(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("adaconvert.running.state.State.remember_placed", _killed)
        with pytest.raises(InterruptedRunError):
            bench.run()
    assert (bench.folder / "out" / "adaconvert.json").is_file()
    bench.verbs  # noqa: B018
    bench.run()
    assert bench.verbs == ["evaluate"]
    bench.run()
    assert bench.verbs == []


def _killed(*args: object) -> None:
    raise KeyboardInterrupt


def test_errors_name_the_stage(bench: Any) -> None:
    def fail(verb: str, given: dict[str, Any]) -> None:
        if verb == "finetune":
            raise ResourceError("no space left on the disk", where="out")

    bench.act = fail
    with pytest.raises(ResourceError, match=r"^stage 'tune': out: no space left on the disk"):
        bench.run()


# what is refused before anything runs


def test_texts_must_be_given_and_be_there(bench: Any) -> None:
    with pytest.raises(
        OptionError,
        match=r"data.train: is empty, and stage 'tune' reads it. Give text like that the model is "
        r"for: --set data.train=FILE",
    ):
        bench.run(settings=("data.train=[]",))
    with pytest.raises(DataError, match=r"stage 'tune': gone.jsonl: no such file or folder"):
        bench.run(settings=("data.train=gone.jsonl",))
    assert bench.verbs == []
    assert not (bench.folder / ".out.run").exists()


def test_a_source_must_be_given(bench: Any) -> None:
    with pytest.raises(OptionError, match=r"SRC: no source given. The recipe names none"):
        bench.run(source=None)


def test_f10_a_method_that_does_not_fit_the_model(bench: Any) -> None:
    text = (bench.folder / "r.yaml").read_text()
    (bench.folder / "r.yaml").write_text(
        text.replace("experts: 2", "experts: 2, target: flex_olmo")
    )
    with pytest.raises(OptionError, match=r"stage 'upcycle': .*flex_olmo"):
        bench.run()
    assert bench.verbs == []


def test_a_full_disk_is_seen_first(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaconvert.running.outline.free_bytes", lambda folder: 1000)
    with pytest.raises(
        ResourceError, match=r"\.out\.run: the disk is too small for the stages of this recipe"
    ):
        bench.run()
    assert bench.verbs == []


def test_two_runs_do_not_share_a_work_folder(bench: Any) -> None:
    found: list[str] = []

    def again(verb: str, given: dict[str, Any]) -> None:
        if verb == "finetune":
            with pytest.raises(OutputConflictError, match="another run is writing here") as caught:
                type(bench)(folder=bench.folder, made=bench.made).run()
            found.append(str(caught.value))

    bench.act = again
    bench.run()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mine.txt": "x"}, "cannot be the work folder: it holds 'mine.txt'"),
        ({"run.json": "{"}, r"run.json: is damaged. Remove the work folder"),
        ({"run.json": '{"format": 9, "stages": {}}'}, "was written by another version"),
        ({"run.json": '{"format": 1, "stages": {"a": 1}}'}, "was written by another version"),
    ],
)
def test_a_work_folder_of_somebody_else(bench: Any, content: dict[str, str], message: str) -> None:
    work = bench.folder / "work"
    work.mkdir()
    for name, text in content.items():
        (work / name).write_text(text)
    with pytest.raises(OutputConflictError, match=message):
        bench.run(work=work)
    assert {path.name for path in work.iterdir()} == set(content)
