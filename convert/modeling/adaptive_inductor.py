"""torch.compile for functions that are called often and do little.

Of the 70 us that a compiled function of five operations takes to start, guards and their Python
cost 10, torch.compile's own wrapper 30. A caller that knows what a function was compiled for can go
without them: `compiled` keeps only the guards on tensors, `Inductor.bound` calls the result itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: run-time checks of what guards check, and of indices that are right by construction.
_UNCHECKED = ("size_asserts", "scalar_asserts", "assert_indirect_indexing")


class Inductor:
    """Inductor as a backend of torch.compile that keeps what it made."""

    def __init__(self) -> None:
        self._made: Any = None
        self._names: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        """Return the compiled graph."""
        # seconds to import, and only where something is compiled
        from torch._inductor import list_options
        from torch._inductor.compile_fx import compile_fx

        known = list_options()
        patches = {name: False for name in _UNCHECKED if name in known}
        self._names = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        self._made = compile_fx(graph, inputs, config_patches=patches)
        return self._made

    def bound(
        self,
        named: Mapping[str, Tensor | None],
        size: int,
        varying: Sequence[str] = ("x",),
    ) -> Callable[..., tuple[Tensor, ...]] | None:
        """Return what was compiled as a function of some of its arguments.

        It checks nothing. None where the arguments are not recognised.

        Args:
            named: the other arguments by name; `tensors_0` is the first of `*tensors`.
            size: the size that the compiler knows nothing about.
            varying: what the function takes; the size that was marked dynamic is the first's first.
        """
        made = self._made
        given: list[Any] = []
        slots: list[tuple[int, int]] = []
        lengths: list[int] = []
        for place, called in enumerate(self._names):
            # torch calls an argument l_<name>_, an open size u<number>, a dynamic one s<number>
            name = called.removeprefix("l_").removesuffix("_")
            open_size = name[:1] in ("u", "s") and name[1:].isdigit()
            if name in varying:
                slots.append((place, varying.index(name)))
            elif open_size and name[0] == "s":
                lengths.append(place)
            elif not open_size and named.get(name) is None:
                return None
            given.append(size if open_size else named.get(name))
        if made is None or len(lengths) > 1:
            return None
        if slots == [(0, 0)] and not lengths:
            rest = tuple(given[1:])
            return lambda x: tuple(made(x, *rest))

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            full = given.copy()
            for place, which in slots:
                full[place] = tensors[which]
            for place in lengths:
                full[place] = tensors[0].shape[0]
            return tuple(made(*full))

        return run


def compiled(function: Callable[..., Any], name: str, backend: Inductor) -> Callable[..., Any]:
    """Return the function compiled when it is first called, guarded on its tensors alone."""
    # a code object of its own: torch counts recompilations per code object and gives up after a few
    own = types.FunctionType(
        function.__code__.replace(co_name=name),
        function.__globals__,
        closure=function.__closure__,
    )
    options: dict[str, Any] = {"guard_filter_fn": _on_tensors}
    return torch.compile(own, fullgraph=True, backend=backend, options=options)


def _on_tensors(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type == "TENSOR_MATCH" for guard in guards]
