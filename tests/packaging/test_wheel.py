"""A wheel holds every module of the tree and nothing else, and runs anywhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "convert": "adaconvert",
    "kernels/ops": "adaconvert/kernels",
    "recipes": "adaconvert/recipes",
}
DATA = {".txt", ".typed", ".yaml"}


def run(command: list[str | Path], **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run `command`, which must succeed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=240, **kwargs
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return done  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without what builds and tests leave behind."""
    target = tmp_path_factory.mktemp("tree") / "source"
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("convert", "kernels", "recipes"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tree."""
    folder = tmp_path_factory.mktemp("dist")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source])
    (built,) = folder.glob("adaconvert-*-py3-none-any.whl")
    return built


def expected() -> set[str]:
    """Return the names the tree should have in a wheel."""
    names = set()
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", *DATA} and "__pycache__" not in path.parts:
                names.add(f"{package}/{path.relative_to(ROOT / folder)}")
    return names


def test_contents_are_the_tree(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected()


def test_no_top_level_package_but_ours(wheel: Path) -> None:
    # a wheel with a top-level `kernels` would overwrite, and on removal delete, another package
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"adaconvert"}


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    (entry,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    points = archive.read(entry).decode().split("\n")
    assert points[:2] == ["[console_scripts]", "adaconvert = adaconvert.cli.main:main"]
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_a_stale_build_would_leak_and_is_removed_by_ci(source: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    ghost = tree / "build" / "lib" / "adaconvert" / "ghost.py"
    ghost.parent.mkdir(parents=True)
    ghost.touch()
    # the first lines of .ci/run, run on this tree
    script = (ROOT / ".ci" / "run").read_text()
    (line,) = (line for line in script.splitlines() if line.startswith("rm -rf"))
    run(["bash", "-c", line], cwd=tree)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, tree])
    (built,) = tmp_path.glob("*.whl")
    assert "adaconvert/ghost.py" not in zipfile.ZipFile(built).namelist()


def test_installed_alone_it_says_what_it_needs(wheel: Path, tmp_path: Path) -> None:
    """Without torch, help works from any folder and a command names what is missing."""
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-deps", "--target", site, wheel])
    import click

    shutil.copytree(Path(click.__file__).parent, site / "click")
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = run([python, "-m", "adaconvert", "--help"], cwd=tmp_path, env=env)
    assert done.stdout.startswith("Usage: adaconvert ")
    command = [str(python), "-m", "adaconvert", "upcycle", "a", "b"]
    refused = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert refused.returncode == 6
    assert refused.stderr.startswith("error: package numpy: not installed")
