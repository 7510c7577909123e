"""adaconvert turns dense Hugging Face checkpoints into ones that spend compute where it is needed.

The documented Python API is `convert`, `inspect`, `plan` and `verify`; they are loaded on first use
so that importing the package costs nothing.
"""

from __future__ import annotations

if __name__ != "adaconvert":
    raise ImportError(
        "this folder is the package 'adaconvert': run `pip install -e .` and import adaconvert"
    )

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["AdaconvertError", "__version__", "convert", "inspect", "plan", "verify"]

if TYPE_CHECKING:
    from adaconvert.api import convert, inspect, plan, verify
    from adaconvert.errors import AdaconvertError


def __getattr__(name: str) -> object:
    if name in {"convert", "inspect", "plan", "verify"}:
        from adaconvert import api

        return getattr(api, name)
    if name == "AdaconvertError":
        from adaconvert.errors import AdaconvertError

        return AdaconvertError
    raise AttributeError(f"module 'adaconvert' has no attribute {name!r}")
