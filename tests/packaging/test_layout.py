"""Guards on the folder mapping: each reproduces a way in which it broke when it was laid out."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {
    "adaconvert": "convert",
    "adaconvert.kernels": "kernels/ops",
    "adaconvert.recipes": "recipes",
}


def run(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run this Python with `arguments`."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **kwargs)  # type: ignore[call-overload,no-any-return]


def packages_in_tree() -> set[str]:
    """Return the packages that the folders hold, under their import names."""
    found = set()
    for package, folder in FOLDERS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    return found


def test_kernels_is_a_folder_and_never_a_package() -> None:
    # with an __init__.py it is imported in place of the Hugging Face package of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_test_lies_under_kernels() -> None:
    # pytest would put a module `kernels` into sys.modules to import it
    assert list((ROOT / "kernels").rglob("test_*.py")) == []
    assert list((ROOT / "kernels").rglob("*_test.py")) == []
    assert list((ROOT / "kernels").rglob("conftest.py")) == []


def test_nothing_puts_the_root_on_the_path() -> None:
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    options = PROJECT["tool"]["pytest"]["ini_options"]
    assert "--import-mode=importlib" in options["addopts"]
    assert "pythonpath" not in options


@pytest.mark.packaging
def test_transformers_imports_from_the_repository_root() -> None:
    code = (
        "import sys, transformers\n"
        "from transformers import LlamaForCausalLM\n"
        "found = sys.modules.get('kernels')\n"
        "print(getattr(found, '__file__', None))\n"
    )
    done = run("-c", code, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    # absent, an empty namespace (transformers probes for the name), or the one in site-packages
    assert done.stdout.strip() == "None" or "site-packages" in done.stdout


def test_the_folder_is_not_importable_under_its_own_name() -> None:
    done = run("-c", "import convert", cwd=ROOT)
    assert done.returncode == 1
    assert "this folder is the package 'adaconvert': run `pip install -e .`" in done.stderr


def test_the_list_of_packages_is_the_tree() -> None:
    assert PROJECT["tool"]["setuptools"]["package-dir"] == FOLDERS
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == packages_in_tree()


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in FOLDERS.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_data_is_found_by_its_package() -> None:
    assert (files("adaconvert.verification") / "probe.txt").read_text(encoding="utf-8")
    assert (files("adaconvert") / "py.typed").is_file()
    assert (files("adaconvert.recipes") / "__init__.py").is_file()


def test_only_python_and_listed_data_lie_in_the_packages() -> None:
    listed = PROJECT["tool"]["setuptools"]["package-data"]
    for package in packages_in_tree():
        top = max((name for name in FOLDERS if package.startswith(name)), key=len)
        folder = ROOT / FOLDERS[top] / Path(*package.removeprefix(top).strip(".").split("."))
        allowed = {path for pattern in listed.get(package, []) for path in folder.glob(pattern)}
        found = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
        assert found <= allowed, f"{package}: not in package-data: {found - allowed}"


def test_the_version_has_one_source() -> None:
    from importlib.metadata import version

    import adaconvert

    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    assert version("adaconvert") == adaconvert.__version__
