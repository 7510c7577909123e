"""How the kernels of the grouped expert feed-forward cut their work, and what they share.

A tile is BM rows of one expert times BN columns of its matrix. E experts, R rows sorted by expert,
M = ceil(R / BM) + E: a number of tiles of rows that always suffices, and is known without the ends
of the experts' rows, so that the host waits for nothing; programs beyond the real number end at
once.

Source: tile tables in place of padded rows as in ScatterMoE, Tan et al. 2024, arXiv 2403.08245,
section 3.1.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaconvert.kernels import triton_support
from adaconvert.kernels.grouped_steps import Kind

#: row tiles that share their columns' weights in the L2 cache before the next columns come.
_GROUP = 8
#: rows of a tile: on average half a tile of an expert is computed in vain.
_ROWS = 64
#: bytes of shared memory of one block; what is not named has at least `_LEAST_SHARED`.
_SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024}
_LEAST_SHARED = 99 * 1024
_MOST_STAGES = 4
_TABLE_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """How a GEMM is cut.

    Attributes:
        rows: BM.
        columns: BN.
        inner: BK, summed over in one step.
        warps: of a program.
        stages: steps in flight.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Which rows each tile computes, on the device.

    Attributes:
        experts: [M] int32, the expert of each tile.
        rows: [M] int32, the first row of each tile.
        count: [1] int32, how many tiles there are; what follows them is not initialised.
    """

    experts: Tensor
    rows: Tensor
    count: Tensor


def tiles_of(
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    *,
    inner: int,
    columns: int,
    matrices: int,
    most: int = 128,
) -> Tiles:
    """Return how to cut a GEMM so that it spills no register and its shared memory fits.

    Args:
        dtype: of the operands.
        capability: of the device; None when interpreting.
        inner: what is summed over.
        columns: of one matrix.
        matrices: how many share a tile of rows; each has its accumulator [BM, BN].
        most: columns of a tile.
    """
    small = dtype.itemsize <= 2
    room = _SHARED.get(capability, _LEAST_SHARED) if capability else _LEAST_SHARED
    bn = _fitting(columns, most if small else min(most, 64))
    bk = _fitting(inner, 64 if small and room > _LEAST_SHARED else 32)
    step = (_ROWS + matrices * bn) * bk * dtype.itemsize
    stages = max(1, min(_MOST_STAGES, room // step))
    return Tiles(rows=_ROWS, columns=bn, inner=bk, warps=8 if bn > 32 else 4, stages=stages)


def table_of(ends: Tensor, rows: int, tiles: Tiles, *, reverse: bool = False) -> Table:
    """Return the tiles of the experts' rows, without a look at `ends` from the host.

    Args:
        ends: [E] int32, the end of each expert's rows.
        rows: R, an upper bound of the last end.
        reverse: run the programs in the opposite order, for tests.
    """
    experts = ends.shape[0]
    most = -(-rows // tiles.rows) + experts
    table = Table(
        experts=ends.new_empty(most, dtype=torch.int32),
        rows=ends.new_empty(most, dtype=torch.int32),
        count=ends.new_empty(1, dtype=torch.int32),
    )
    with torch.cuda.device_of(ends):
        tile_table[(experts,)](
            *(ends, table.experts, table.rows, table.count),
            EXPERTS=experts,
            EXPERTS_BLOCK=triton.next_power_of_2(experts),
            BM=tiles.rows,
            BLOCK=_TABLE_BLOCK,
            REVERSE=reverse,
            enable_fp_fusion=True,
        )
    return table


def constants_of(tiles: Tiles, x: Tensor, *, hidden: int, width: int, kind: Kind) -> dict[str, Any]:
    """Return the constants that both kernels take."""
    return {
        **{"HIDDEN": hidden, "WIDTH": width, "GLU": kind.glu, "ACTIVATION": kind.activation},
        **{"BM": tiles.rows, "BN": tiles.columns, "BK": tiles.inner, "GROUP": _GROUP},
        "ACC": triton_support.accumulator(x.dtype),
        "UPCAST": triton_support.upcast(),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "REVERSE": False,
    }


def grid_of(table: Table, tiles: Tiles, columns: int) -> tuple[int]:
    """Return the number of programs: every tile that there may be times the tiles of columns."""
    return (table.experts.shape[0] * triton.cdiv(columns, tiles.columns),)


def _fitting(size: int, most: int) -> int:
    """Return a power of 2 from 16 on that covers `size`, or `most`."""
    return int(min(most, max(16, triton.next_power_of_2(size))))


@triton.jit
def tile_table(
    ends,
    tile_expert,
    tile_row,
    tile_count,
    EXPERTS: tl.constexpr,
    EXPERTS_BLOCK: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Writes the tiles of one expert per program; the last expert's also their number."""
    expert = tl.program_id(0)
    if REVERSE:
        expert = EXPERTS - 1 - expert
    each = tl.arange(0, EXPERTS_BLOCK)
    end = tl.load(ends + each, mask=each < EXPERTS, other=0)
    start = tl.load(ends + each - 1, mask=(each > 0) & (each < EXPERTS), other=0)
    tiles = (end - start + BM - 1) // BM
    before = tl.sum(tl.where(each < expert, tiles, 0), axis=0)
    mine = tl.sum(tl.where(each == expert, tiles, 0), axis=0)
    row = tl.sum(tl.where(each == expert, start, 0), axis=0)
    done = 0
    while done < mine:
        tile = done + tl.arange(0, BLOCK)
        tl.store(tile_expert + before + tile, tile * 0 + expert, mask=tile < mine)
        tl.store(tile_row + before + tile, row + tile * BM, mask=tile < mine)
        done += BLOCK
    if expert == EXPERTS - 1:
        tl.store(tile_count, before + mine)


@triton.jit
def offsets(BM: tl.constexpr, columns, WIDTH: tl.constexpr):
    """Returns the places of a tile's values, [BM, BN], from the start of its first row.

    In 32 bits, because a tile is never that large; where it begins is computed in 64.
    """
    return tl.arange(0, BM)[:, None] * WIDTH + columns[None, :]


@triton.jit
def place(COLUMNS: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, REVERSE: tl.constexpr):
    """Returns the tile of rows and the tile of columns of this program."""
    TILES: tl.constexpr = (COLUMNS + BN - 1) // BN
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    first = program // (GROUP * TILES) * GROUP
    size = tl.minimum(tl.num_programs(0) // TILES - first, GROUP)
    within = program % (GROUP * TILES)
    return first + within % size, within // size


@triton.jit
def load_rows(at, within, EVEN: tl.constexpr):
    """Returns a tile [BM, BK] of gathered rows, 0 beyond their end."""
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=within[None, :], other=0.0)


@triton.jit
def load_weights(at, within, inside, EVEN_INNER: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """Returns a tile [BK, BN] of a matrix, 0 beyond its sizes."""
    if EVEN_INNER and EVEN_COLUMNS:
        return tl.load(at)
    elif EVEN_INNER:
        return tl.load(at, mask=inside[None, :], other=0.0)
    else:
        return tl.load(at, mask=within[:, None] & inside[None, :], other=0.0)


@triton.jit
def add_product(
    sums, left, right, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):
    """Returns sums + left @ right, in ACC."""
    if UPCAST:
        left = left.to(ACC)
        right = right.to(ACC)
    return tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=ACC)
