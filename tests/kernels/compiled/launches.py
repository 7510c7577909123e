"""Takes down what a function would launch, so that cases are compiled for exactly that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from case import Case
from triton.runtime.jit import JITFunction

#: what the launch passes to the compiler itself
_OPTIONS = {"num_warps": "warps", "num_stages": "stages"}


class _Recorder:
    """Stands in for a kernel: keeps the arguments of its launches and runs nothing."""

    def __init__(self, kernel: JITFunction[Any], found: list[dict[str, Any]]) -> None:
        self.kernel = kernel
        self.found = found

    def __getitem__(self, grid: object) -> Callable[..., None]:
        """Return what a launch calls."""
        return self.launch

    def launch(self, *arguments: Any, **constants: Any) -> None:
        """Keep one launch."""
        options = {ours: constants.pop(key) for key, ours in _OPTIONS.items() if key in constants}
        given = {"kernel": self.kernel, "arguments": arguments, "constants": constants}
        self.found.append(given | options)


@contextmanager
def _recorded(module: ModuleType, found: list[dict[str, Any]]) -> Iterator[None]:
    kernels = {name: k for name, k in vars(module).items() if isinstance(k, JITFunction)}
    for name, kernel in kernels.items():
        setattr(module, name, _Recorder(kernel, found))
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def cases(name: str, module: ModuleType, call: Callable[[], object], **more: Any) -> list[Case]:
    """Return a case of every kernel of the module that `call` launches.

    Args:
        name: of the cases; that of the kernel is added.
        module: holds the kernels.
        call: a call of one of its functions with CPU tensors; its results are not initialised.
        more: further fields of the cases.
    """
    found: list[dict[str, Any]] = []
    with _recorded(module, found):
        call()
    assert found, f"{name} launches nothing"
    return [
        Case(name=f"{name}-{each['kernel'].__name__.strip('_')}", **each, **more) for each in found
    ]
