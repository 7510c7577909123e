"""Floors are checked when a command starts, and are those of pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from adaconvert.cli import versions
from adaconvert.errors import ResourceError

ROOT = Path(__file__).resolve().parents[2]


def test_floors_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = dict(re.fullmatch(r"(.+)>=(.+)", text).groups() for text in project["dependencies"])  # type: ignore[union-attr]
    assert declared == {name: floor for name, (floor, _) in versions.FLOORS.items()}


@pytest.mark.parametrize(
    ("older", "newer"),
    [("2.9.1", "2.11"), ("2.10.0+cpu", "2.11"), ("0.7.9", "0.8"), ("5", "5.17"), ("", "0.1")],
)
def test_versions_compare_by_numbers(older: str, newer: str) -> None:
    assert versions.numbers(older) < versions.numbers(newer)


def test_suffixes_do_not_count() -> None:
    assert versions.numbers("2.11.0a0+git1234") == versions.numbers("2.11") == (2, 11, 0, 0)


def test_this_environment_is_new_enough() -> None:
    versions.require(tuple(versions.FLOORS))


def test_missing_package_is_named() -> None:
    found = versions.installed_version("no-such-package-at-all")
    assert found is None
    with pytest.raises(
        ResourceError, match=r"package torch: not installed: .*; expected >= 2\.11, found none\."
    ):
        _require_with(None)


def test_old_package_is_named_with_the_remedy() -> None:
    with pytest.raises(
        ResourceError,
        match=r"package torch: too old: .*, found 2\.5\.1\. Run: pip install 'torch>=2\.11'",
    ):
        _require_with("2.5.1+cpu")


def _require_with(version: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions, "installed_version", lambda package: version and version[:5])
        versions.require(("torch",))
