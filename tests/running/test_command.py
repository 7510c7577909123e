"""`adaconvert run` and `adaconvert recipes`: options by name, exit codes, JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.cli.main import run
from adaconvert.recipe import shipped


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `api.run` is called with; it answers with its own plan only."""
    found: list[dict[str, Any]] = []

    class Nothing:
        def to_json(self) -> dict[str, object]:
            return {"a": 1}

        def lines(self) -> list[str]:
            return ["table"]

    def fake(recipe: str, **given: Any) -> Nothing:
        if given["report"] is not None:
            given["report"]("plan")
        found.append({"recipe": recipe, **given})
        return Nothing()

    monkeypatch.setattr(api, "run", fake)
    return found


def test_run_hands_over_every_option(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "r.yaml", "src", "dst", "--set", "a.b=c", "--set", "d.e=f", "--from", "tune"]
    assert run([*words, "--work", "w", "--overwrite", "--dry-run"]) == 0
    (given,) = calls
    assert given.pop("report") is not None
    assert given == {
        "recipe": "r.yaml",
        "source": "src",
        "destination": "dst",
        "settings": ("a.b=c", "d.e=f"),
        "from_stage": "tune",
        "work": "w",
        "overwrite": True,
        "dry_run": True,
        "progress": True,
    }
    said = capsys.readouterr()
    assert (said.out, said.err) == ("table\n", "plan\n")


def test_run_as_json_and_quietly(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["run", "r.yaml", "--json", "-q"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"a": 1}
    assert said.err == ""
    assert calls[0]["source"] is None
    assert run(["run", "r.yaml", "-q"]) == 0
    assert capsys.readouterr().out == ""


def test_f13_what_is_missing_or_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run"]) == 2
    assert "Missing argument 'RECIPE'" in capsys.readouterr().err
    assert run(["run", "upcycle/smollm2"]) == 2
    assert "unknown recipe 'upcycle/smollm2'. Did you mean" in capsys.readouterr().err
    assert run(["recipes", "list"]) == 2
    assert "no such command 'list'" in capsys.readouterr().err
    assert run(["recipes", "schema", "tune"]) == 2
    assert "unknown verb 'tune'" in capsys.readouterr().err


def test_recipes_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["recipes", "ls"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == shipped.names()
    assert run(["recipes", "ls", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["recipes"]) == shipped.names()
    assert run(["recipes", "show", "btx/smollm2-135m"]) == 0
    assert capsys.readouterr().out.startswith("# adaconvert run btx/smollm2-135m ")
    assert run(["recipes", "cp", "btx/smollm2-135m", "mine.yaml"]) == 0
    assert run(["recipes", "validate", "mine.yaml", "upcycle/mistral-7b"]) == 0
    out = capsys.readouterr().out
    assert "mine: valid, first -> second -> mix -> route -> evaluate -> push" in out
    assert run(["recipes", "validate", "mine.yaml", "--set", "mix.experts=0"]) == 2
    assert "--set mix.experts: stages.mix.upcycle.experts: must be" in capsys.readouterr().err
    assert run(["recipes", "schema", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "adaconvert recipe"


@pytest.mark.parametrize("words", [("run", "--help"), ("recipes", "ls", "--help")])
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        "import sys; from adaconvert.cli.main import run; run(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")


def test_checking_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys; from adaconvert.cli.main import run;"
        "code = run(['recipes', 'validate', 'upcycle/mistral-7b']);"
        "print(code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 []\n")
