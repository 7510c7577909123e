"""The oldest version of each dependency that is supported; checked when a command starts.

A floor in pyproject.toml does not protect an environment that something else changed later.
A test keeps the two lists equal.
"""

from __future__ import annotations

import re

from adaconvert.errors import ResourceError

#: package -> (floor, why it is needed)
FLOORS = {
    "click": ("8.2", "the command line is built on it"),
    "datasets": ("4.4", "text to evaluate and train on is read with it"),
    "huggingface_hub": ("1.5", "nothing older is tested"),
    "numpy": ("1.26", "routers are made with it"),
    "pyyaml": ("6.0", "recipes are read with it"),
    "safetensors": ("0.8", "nothing older is tested"),
    "torch": ("2.11", "nothing older is tested"),
    "tqdm": ("4.66", "nothing older is tested"),
    "transformers": ("5.17", "nothing older is tested to run adaconvert"),
}
READING = ("numpy",)
PUBLISHING = (*READING, "huggingface_hub")
RECIPES = (*READING, "pyyaml")
COMPUTING = ("numpy", "safetensors", "torch", "transformers")
EVALUATING = (*COMPUTING, "datasets")


def require(packages: tuple[str, ...]) -> None:
    """Each of `packages` is installed and not older than its floor.

    Raises:
        ResourceError: one is missing or too old; says which, what was found and what is needed.
    """
    for package in packages:
        floor, why = FLOORS[package]
        found = installed_version(package)
        if found is None or numbers(found) < numbers(floor):
            raise ResourceError(
                f"{'not installed' if found is None else 'too old'}: {why}",
                where=f"package {package}",
                expected=f">= {floor}",
                found=found or "none",
                hint=f"Run: pip install '{package}>={floor}'",
            )


def installed_version(package: str) -> str | None:
    """Return the version in the package's metadata, None when there is none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found: str | None = version(package)
    except PackageNotFoundError:
        return None
    return found


def numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version in four places, without rc1, +cpu and the like."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    found = [int(part) for part in match[0].split(".")] if match else [0]
    return tuple([*found, 0, 0, 0, 0][:4])
