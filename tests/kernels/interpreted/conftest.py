"""Tests of Triton kernels in Triton's interpreter: on the CPU, against fp64.

Triton reads TRITON_INTERPRET when a kernel is defined, so it holds for a whole process. The files
here are collected only in a process that has it set; tests/kernels/test_interpreted.py starts one
per file, because an index out of range is a real write into the memory of the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch

_READY = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
collect_ignore_glob = [] if _READY else ["test_*.py"]


def compiled_kernels() -> list[str]:
    """Return the kernels of adaconvert, among the modules loaded, that would need a GPU."""
    from triton.runtime.jit import JITFunction

    return sorted(
        f"{name}.{attribute}"
        for name, module in list(sys.modules.items())
        if name.startswith("adaconvert.kernels.triton_")
        for attribute, value in vars(module).items()
        if isinstance(value, JITFunction)
    )


@pytest.fixture(autouse=True)
def _really_interpreted() -> Iterator[None]:
    """Every kernel that a test touched was the interpreter's."""
    yield
    assert compiled_kernels() == []


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `make` whose result holds NaN, or the extreme numbers of an integer type in turn."""

    def allocate(*arguments: object, **keywords: object) -> torch.Tensor:
        made = make(*arguments, **keywords)
        with torch.no_grad():
            if made.is_floating_point() or made.is_complex():
                return made.fill_(float("nan"))
            low, high = (
                (False, True)
                if made.dtype == torch.bool
                else (torch.iinfo(made.dtype).min, torch.iinfo(made.dtype).max)
            )
            made.fill_(high)
            if made.dim():
                made[..., ::2] = low
        return made

    return allocate


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out uninitialised holds what no result may show.

    NaN for floats; for integers the smallest and the largest number in turn, so that neither `< 0`
    nor `>= size` hides all of them.
    """
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))
