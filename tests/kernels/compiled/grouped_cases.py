"""The kernels of the grouped expert feed-forward, cut as for A100, RTX 4090 and H100."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from case import Case

from adaconvert.kernels import triton_grouped, triton_grouped_backward, triton_tiles
from adaconvert.kernels.grouped_steps import Kind
from adaconvert.kernels.triton_grouped_backward import tiles_of_backward
from adaconvert.kernels.triton_tiles import Tiles, constants_of, tiles_of

T, K, E = 64, 2, 8
ROWS = T * K
#: name -> hidden size, intermediate size: of Qwen3-30B-A3B, of SmolLM2-135M (whose loop is
#: unrolled) and multiples of 8 that are none of a tile.
SIZES = {"qwen": (2048, 768), "smol": (576, 1536), "odd": (200, 328)}
CAPABILITIES = [(8, 0), (8, 9), (9, 0)]
#: what tensor cores multiply on sm_80 and sm_90; float32 is computed without them.
HALF = {80: ("HMMA", "LDGSTS"), 90: ("HGMMA", "LDGSTS")}
WIDE = ("STRIDE_TOKEN", "STRIDE_EXPERT")


def plan_of() -> tuple[torch.Tensor, ...]:
    """Return routing weights, pairs, tokens and ends, as a plan holds them."""
    places = torch.arange(ROWS)
    return torch.ones(ROWS), places, places, torch.arange(E, dtype=torch.int32)


def table_of() -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(size, dtype=torch.int32) for size in (E + 2, E + 2, 1))


def case_of(
    name: str, kernel: Any, arguments: Any, tiles: Tiles, constants: Any, **more: Any
) -> Case:
    made = (kernel, tuple(arguments), constants, tiles.warps, tiles.stages)
    fields = zip(("kernel", "arguments", "constants", "warps", "stages"), made, strict=True)
    return Case(name=name, **dict(fields), **more)


def wants_of(dtype: torch.dtype) -> dict[int, tuple[str, ...]]:
    return HALF if dtype.itemsize == 2 else {80: ("LDGSTS",), 90: ("LDGSTS",)}


def forward(
    capability: tuple[int, int], dtype: torch.dtype, size: str, activation: str, glu: bool
) -> Case:
    hidden, width = SIZES[size]
    matrices = 1 + glu
    tiles = tiles_of(dtype, capability, inner=hidden, columns=width, matrices=matrices)
    x = torch.zeros(T, hidden, dtype=dtype)
    first, bias = x.new_zeros(E, matrices * width, hidden), x.new_zeros(E, matrices * width)
    pre, out = x.new_zeros(ROWS, matrices * width), x.new_zeros(ROWS, width)
    arguments = (*(x, first, bias, *plan_of(), *table_of(), pre, out),)
    kind = Kind(activation=activation, glu=glu, backend="grouped_mm")  # type: ignore[arg-type]
    constants = {**constants_of(tiles, x, hidden=hidden, width=width, kind=kind), "BIAS": True}
    strides = ("STRIDE_TOKEN", "STRIDE_EXPERT", "STRIDE_COLUMN", "STRIDE_INNER")
    constants |= zip(strides, (x.stride(0), *first.stride()), strict=True)
    name = name_of("forward", capability, dtype, size, activation, glu)
    kernel = triton_grouped.first_matrix
    more = {"wants": wants_of(dtype), "wide": WIDE}
    return case_of(name, kernel, arguments, tiles, constants, **more)


def backward(
    capability: tuple[int, int], dtype: torch.dtype, size: str, activation: str, glu: bool
) -> Case:
    hidden, width = SIZES[size]
    tiles = tiles_of_backward(dtype, capability, inner=hidden, columns=width)
    grad = torch.zeros(T, hidden, dtype=dtype)
    down, pre = grad.new_zeros(E, hidden, width), grad.new_zeros(ROWS, (1 + glu) * width)
    parts = torch.zeros(ROWS, -(-width // tiles.columns))
    arguments = (
        *(grad, down, *plan_of(), *table_of(), pre, pre, grad.new_zeros(ROWS, width), parts),
    )
    kind = Kind(activation=activation, glu=glu, backend="grouped_mm")  # type: ignore[arg-type]
    constants = constants_of(tiles, grad, hidden=hidden, width=width, kind=kind)
    strides = ("STRIDE_TOKEN", "STRIDE_EXPERT", "STRIDE_INNER", "STRIDE_COLUMN")
    constants |= zip(strides, (grad.stride(0), *down.stride()), strict=True)
    name = name_of("backward", capability, dtype, size, activation, glu)
    kernel = triton_grouped_backward.down_and_activation
    more = {"wants": wants_of(dtype), "wide": WIDE}
    return case_of(name, kernel, arguments, tiles, constants, **more)


def name_of(
    way: str, capability: tuple[int, int], dtype: torch.dtype, size: str, activation: str, glu: bool
) -> str:
    kind = f"{activation}{'_glu' if glu else ''}"
    short = str(dtype).removeprefix("torch.")
    return f"grouped_{way}_{kind}_{short}_{size}_for{capability[0]}{capability[1]}"


def table() -> Case:
    arguments = (torch.arange(E, dtype=torch.int32), *table_of())
    constants = {"EXPERTS": E, "EXPERTS_BLOCK": E, "BM": 64, "BLOCK": 128, "REVERSE": False}
    return Case(
        name="grouped_table",
        kernel=triton_tiles.tile_table,
        arguments=arguments,
        constants=constants,
    )


def cases() -> list[Case]:
    made = [table()]
    for way, capability in itertools.product((forward, backward), CAPABILITIES):
        made.append(way(capability, torch.bfloat16, "qwen", "silu", True))
    for way in (forward, backward):
        made.append(way((9, 0), torch.float32, "qwen", "silu", True))
        made.append(way((9, 0), torch.bfloat16, "smol", "silu", True))
        made.append(way((9, 0), torch.bfloat16, "odd", "silu", True))
        made.append(way((9, 0), torch.float16, "smol", "relu2", False))
        made.append(way((9, 0), torch.bfloat16, "qwen", "gelu", False))
    return made


CASES = cases()
