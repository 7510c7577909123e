"""Tasks of lm-evaluation-harness on our model objects."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from adaconvert.api import evaluate
from adaconvert.errors import OptionError, ResourceError
from adaconvert.evaluate import tasks
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

needs_harness = "lm_eval is an optional dependency: pip install 'adaconvert[tasks]'"

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    data = tmp_path / "questions.jsonl"
    rows = [{"question": f"Is {i} even? ", "answer": i % 2} for i in range(6)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    path = folder / "choice.yaml"
    path.write_text(TASK.format(data=data))
    return path


def test_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ResourceError,
        match=r"package lm_eval: not installed: .*\. Run: pip install 'adaconvert\[tasks\]'",
    ):
        tasks.find_tasks(("arc_easy",))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("task: one\n", "one"),
        ("group: g\ntask:  'two words'  # why\nnum_fewshot: 0\n", "two words"),
        ('description: "task: no"\ntask: "three"\r\n', "three"),
    ],
)
def test_name_in_a_task_file(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "t.yaml").write_text(text)
    assert tasks.name_in(tmp_path / "t.yaml") == name


def test_files_that_define_no_task(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("subtask: one\n")
    with pytest.raises(OptionError, match=r"--tasks t\.yaml: defines no task; expected a line"):
        tasks.name_in(tmp_path / "t.yaml")
    with pytest.raises(OptionError, match=r"--tasks none\.yaml: file is missing"):
        tasks.name_in(tmp_path / "none.yaml")


def test_local_task_on_every_setting(task: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=needs_harness)
    adaptive = make_adaptive(tiny_models.make("llama", tmp_path / "d"), tmp_path / "a")
    report = evaluate(adaptive, tasks=str(task), set_compute=(1, 0.7), task_limit=4)
    assert report.data == {}
    assert [result.label for result in report.results] == ["compute 1", "compute 0.7"]
    for result in report.results:
        (found,) = (one for one in result.tasks if one.metric == "acc")
        assert (found.task, found.samples) == ("tiny_choice", 4)
        assert found.value in (0, 0.25, 0.5, 0.75, 1)
    assert any("tiny_choice" in line for line in report.lines())
    dense = evaluate(tmp_path / "d", tasks=(str(task),), task_limit=4)
    # every expert on is the dense model
    assert dense.results[0].tasks == report.results[0].tasks


@pytest.mark.slow
def test_unknown_task(task: Path) -> None:
    pytest.importorskip("lm_eval", reason=needs_harness)
    with pytest.raises(OptionError, match=r"--tasks: lm_eval knows no such task; found no_such_"):
        tasks.find_tasks((str(task), "no_such_task"))


def test_task_that_fails(task: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason=needs_harness)
    (tmp_path / "questions.jsonl").unlink()
    made = tiny_models.make("llama", tmp_path / "d")
    with pytest.raises((OptionError, ResourceError), match=r"--tasks tiny_choice: "):
        evaluate(made, tasks=(str(task),))
