"""The shell scripts parse, pin what they install, and end with the right exit code."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "scripts").rglob("*.sh"), ROOT / ".ci" / "run"])
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)


def normal(name: str) -> str:
    """Return a distribution name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_may_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK), f"{path.name} is not executable"
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert re.search(r"^set -e?uo pipefail$", text, re.MULTILINE)


def test_every_dependency_is_pinned_at_or_above_its_floor() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    pins = {normal(name): version for name, version in PINS.items()}
    for text in wanted:
        name, floor = text.partition(";")[0].split(">=")
        assert normal(name) in pins, f"{name} is not in constraints.txt"
        pinned = [int(part) for part in pins[normal(name)].split(".")[:2]]
        assert pinned >= [int(part) for part in floor.split(".")[:2]], name


def test_the_pinned_set_is_the_one_promised() -> None:
    assert PINS["torch"] == "2.13.0"
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["required-version"] == f"=={PINS['ruff']}"


def test_constraints_name_no_place_and_no_build() -> None:
    for version in PINS.values():
        assert re.fullmatch(r"[0-9][0-9a-z.]*", version), version


def test_the_oldest_environment_holds_the_oldest_that_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        text.partition(";")[0].split(">=")[0]: text.partition(";")[0].split(">=")[1]
        for text in [*project["dependencies"], *extras["triton"]]
    }
    check = (ROOT / "scripts" / "check.sh").read_text()
    asked = dict(re.findall(r"--(transformers|triton) ([0-9.]+)", check))
    assert asked == {name: f"{declared[name]}.0" for name in ("transformers", "triton")}
    assert extras["triton"][0] in extras["test"]


def test_torch_is_installed_first_and_alone() -> None:
    text = (ROOT / "scripts" / "env.sh").read_text()
    installs = [line for line in text.splitlines() if re.match(r"install ", line)]
    assert installs[0] == "install torch"
    assert '-c "$constraints"' in text


def test_ci_runs_the_check_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[-1].startswith("exec bash scripts/check.sh")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scripts/env.sh", "--colour"], "env.sh: unknown option --colour"),
        (["scripts/env.sh", "--transformers"], "--transformers needs a version"),
        (["scripts/env.sh", "--triton"], "--triton needs a version"),
        (["scripts/check.sh", "everything"], "check.sh: no step 'everything'"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        ["bash", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert message in done.stderr
