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
        self, named: Mapping[str, Tensor | None], size: int
    ) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        """Return what was compiled as a function of its first argument, which is called x.

        It checks nothing. None where the arguments are not recognised.

        Args:
            named: the other arguments by name; `tensors_0` is the first of `*tensors`.
            size: the one size that was left open.
        """
        made = self._made
        if made is None or self._names[:1] != ["l_x_"]:
            return None
        given: list[Tensor | int] = []
        for name in self._names[1:]:
            # torch calls an argument l_<name>_ and an open size u<number>
            tensor = named.get(name.removeprefix("l_").removesuffix("_"))
            if isinstance(tensor, Tensor):
                given.append(tensor)
            elif name[:1] == "u" and name[1:].isdigit():
                given.append(size)
            else:
                return None
        rest = tuple(given)
        return lambda x: tuple(made(x, *rest))

    def ordered(
        self, arguments: Sequence[str]
    ) -> tuple[Callable[..., Sequence[Tensor]], tuple[int, ...]]:
        """Return what was compiled, and which of the arguments it takes in which place.

        It checks nothing.

        Args:
            arguments: names of the function's; after them comes the one size that was left open.

        Raises:
            ValueError: the arguments are not recognised.
        """
        places = {f"l_{name}_": place for place, name in enumerate(arguments)}
        sizes = [name for name in self._names if name[:1] == "s" and name[1:].isdigit()]
        if len(sizes) == 1:
            places[sizes[0]] = len(arguments)
        if self._made is None or any(name not in places for name in self._names):
            raise ValueError(f"compiled with arguments {self._names}")
        return self._made, tuple(places[name] for name in self._names)


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
