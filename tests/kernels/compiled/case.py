"""What one compile-only case is: a kernel, what a launch would pass it, and what must come out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from triton.runtime.jit import JITFunction


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel with the arguments of one launch.

    Triton compiles for what the arguments are (types, divisibility by 16, ones), so they are real
    CPU tensors and numbers, in the order in which the launch passes them.

    Attributes:
        name: unique within its file.
        kernel: the function under `triton.jit`.
        arguments: the positional arguments of the launch.
        constants: the `tl.constexpr` keywords, and other options of the compiler.
        warps, stages: as the launch passes them.
        targets: the capabilities on which a launch has these tiles; what is never launched together
            need not compile together.
        wants: per capability the SASS mnemonics that must occur; "LDG.E.128" is met by LDG.E.EF.128
            as well.
        wide: arguments or constants (strides, sizes) whose products with an index may pass 2^31:
            every product with one of them is in 64 bits. Give a constant a value of its own, for it
            is found by that, and an argument one other than 1, which Triton drops.
    """

    name: str
    kernel: JITFunction[Any]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 3
    targets: tuple[int, ...] = (80, 90)
    wants: dict[int, tuple[str, ...]] = field(default_factory=dict)
    wide: tuple[str, ...] = ()
