"""`adaconvert evaluate` hands its options over by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from adaconvert.cli.evaluate import evaluate
from adaconvert.errors import DataError
from adaconvert.evaluate.options import EvaluateOptions

Run = Callable[..., tuple[int, str, str]]


def test_every_option_reaches_the_api(api: Any, run: Run) -> None:
    code, _, err = run(
        *("evaluate", "ckpt", "--data", "d.jsonl", "--field", "body", "--label-field", "class"),
        *("--split", "valid", "--max-documents", "3", "--max-tokens", "99", "--length", "64"),
        *("--seed", "5", "--set-compute", "1,0.5", "--select", "rule=top-k,k=8"),
        *("--select", "rule=all", "--reference", "dense", "--tasks", "a, b", "--tasks", "c.yaml"),
        *("--task-limit", "7", "--device", "cpu", "--dtype", "float32", "--batch-size", "2"),
        *("--no-speed", "--out", "r.json", "--record", "--revision", "abc", "-q"),
        *("--base", "org/base"),
    )
    assert (code, err) == (0, "")
    (call,) = api.calls
    assert call[:2] == ("evaluate", ("ckpt",))
    assert call[2] == {
        "data": "d.jsonl",
        "field": "body",
        "label_field": "class",
        "split": "valid",
        "max_documents": 3,
        "max_tokens": 99,
        "length": 64,
        "seed": 5,
        "reference": "dense",
        "set_compute": (1.0, 0.5),
        "select": ("rule=top-k,k=8", "rule=all"),
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 2,
        "speed": False,
        "tasks": ("a", "b", "c.yaml"),
        "task_limit": 7,
        "revision": "abc",
        "out": "r.json",
        "record": True,
        "progress": False,
        "base": "org/base",
    }


def test_defaults_are_those_of_the_api(api: Any, run: Run) -> None:
    assert run("evaluate", "ckpt", "--data", "d")[0] == 0
    given = dict(api.calls[0][2])
    assert given.pop("base") is None
    assert EvaluateOptions(**given) == EvaluateOptions(data="d", progress=True)
    ours = {"checkpoint", "base", "as_json", "quiet", "verbose"}
    named = {param.name for param in evaluate.params} - ours
    assert named | {"progress"} == {field.name for field in fields(EvaluateOptions)}


@pytest.mark.parametrize("value", ["", "1,", "half", "0.5;1"])
def test_numbers_are_numbers(api: Any, run: Run, value: str) -> None:
    code, _, err = run("evaluate", "ckpt", "--data", "d", "--set-compute", value)
    assert code == 2
    assert f"{value!r} is no list of numbers such as 1,0.75,0.5." in err
    assert api.calls == []


def test_data_errors_end_with_usage(api: Any, run: Run) -> None:
    api.error = DataError("holds no text", where="d.jsonl")
    assert run("evaluate", "ckpt", "--data", "d.jsonl") == (
        2,
        "",
        "error: d.jsonl: holds no text\n",
    )


def test_json(api: Any, run: Run) -> None:
    code, out, _ = run("evaluate", "ckpt", "--data", "d", "--json")
    assert (code, out) == (0, '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n')
