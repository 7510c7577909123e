"""Triton kernel of the backward of the grouped expert feed-forward, up to the first matrix.

One program computes a tile of [BM rows, BN hidden values] of one expert: it gathers the rows of the
output's gradient by the plan, multiplies them by the down matrix, and writes the gradients of the
pre-activations, the hidden values times the routing weights (for the gradient of `down`), and its
part of each row's scalar product of hidden values and gradient (that of the routing weight). The
parts are added up afterwards in a fixed order: no atomics, the same bits every time.

R rows, d hidden size, i intermediate size of one expert, N = ceil(i / BN) tiles of columns.

Source: what is saved and what is computed again follow SonicMoE, Guo et al. 2025, arXiv 2512.14080,
section 3.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaconvert.kernels import triton_support
from adaconvert.kernels.expert_activations import Gradients
from adaconvert.kernels.grouped_steps import Inputs, Kind
from adaconvert.kernels.plan import RoutePlan
from adaconvert.kernels.triton_activations import activated, derived
from adaconvert.kernels.triton_tiles import (
    Tiles,
    add_product,
    constants_of,
    grid_of,
    load_rows,
    load_weights,
    offsets,
    place,
    table_of,
    tiles_of,
)


def run(grad: Tensor, pre: Tensor, inputs: Inputs, plan: RoutePlan, kind: Kind) -> Gradients:
    """Return the gradients at the activation; rows of dropped pairs are not initialised.

    Args:
        grad: [T, d], of the output.
        pre: [R, 2i] or [R, i].
    """
    grad, down, weights = grad.contiguous(), inputs.down, inputs.weights_of.reshape(-1)
    (_, hidden, width), rows = down.shape, pre.shape[0]
    capability = triton_support.capability_on(grad.device)
    tiles = tiles_of_backward(grad.dtype, capability, inner=hidden, columns=width)
    at_pre, out = torch.empty_like(pre), pre.new_empty(rows, width)
    parts = pre.new_empty(rows, triton.cdiv(width, tiles.columns), dtype=inputs.weights_of.dtype)
    if rows:
        table = table_of(plan.ends, rows, tiles)
        arguments = (
            *(grad, down, weights.contiguous(), plan.pairs, plan.tokens, plan.ends),
            *(table.experts, table.rows, table.count, pre, at_pre, out, parts),
        )
        strides = ("STRIDE_TOKEN", "STRIDE_EXPERT", "STRIDE_INNER", "STRIDE_COLUMN")
        with torch.cuda.device_of(grad):
            down_and_activation[grid_of(table, tiles, width)](
                *arguments,
                **constants_of(tiles, grad, hidden=hidden, width=width, kind=kind),
                **dict(zip(strides, (hidden, *down.stride()), strict=True)),
                num_warps=tiles.warps,
                enable_fp_fusion=True,
                num_stages=tiles.stages,
            )
    return Gradients(at_pre, parts.sum(1), out)


def tiles_of_backward(
    dtype: torch.dtype, capability: tuple[int, int] | None, *, inner: int, columns: int
) -> Tiles:
    """Return how to cut the GEMM; with 128 columns what follows it spills registers."""
    return tiles_of(dtype, capability, inner=inner, columns=columns, matrices=1, most=64)


@triton.jit
def down_and_activation(
    grad,
    down,
    weights_of,
    pairs,
    tokens,
    ends,
    tile_expert,
    tile_row,
    tile_count,
    pre,
    at_pre,
    hidden,
    parts,
    STRIDE_TOKEN: tl.constexpr,
    STRIDE_EXPERT: tl.constexpr,
    STRIDE_INNER: tl.constexpr,
    STRIDE_COLUMN: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    GLU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Writes a tile of the gradients at the activation."""
    tile, column_tile = place(WIDTH, BN, GROUP, REVERSE)
    if tile >= tl.load(tile_count):
        return
    expert = tl.load(tile_expert + tile).to(tl.int64)
    row = tl.load(tile_row + tile)
    rows = row + tl.arange(0, BM)
    live = rows < tl.load(ends + expert)
    # rows after the expert's last compute token 0 once more, and are not written
    token = tl.load(tokens + rows, mask=live, other=0).to(tl.int64)
    columns = column_tile * BN + tl.arange(0, BN)
    inside = columns < WIDTH
    inner = tl.arange(0, BK)

    at_grad = grad + token[:, None] * STRIDE_TOKEN + inner[None, :]
    matrix = down + expert * STRIDE_EXPERT + inner.to(tl.int64)[:, None] * STRIDE_INNER
    at_down = matrix + columns.to(tl.int64)[None, :] * STRIDE_COLUMN
    above = tl.zeros((BM, BN), dtype=ACC)
    for done in range(0, HIDDEN, BK):
        within = inner < HIDDEN - done
        values = load_rows(at_grad, within, HIDDEN % BK == 0)
        weights = load_weights(at_down, within, inside, HIDDEN % BK == 0, WIDTH % BN == 0)
        above = add_product(above, values, weights, ACC, UPCAST, PRECISION)
        at_grad += BK
        at_down += BK * STRIDE_INNER

    WIDE: tl.constexpr = WIDTH * 2 if GLU else WIDTH
    TILES: tl.constexpr = (WIDTH + BN - 1) // BN
    stored = live[:, None] & inside[None, :]
    first = row.to(tl.int64)
    offset = offsets(BM, columns, WIDE)
    pre += first * WIDE
    at_pre += first * WIDE
    pair = tl.load(pairs + rows, mask=live, other=0)
    share = tl.load(weights_of + pair, mask=live, other=0.0).to(ACC)
    gate = tl.load(pre + offset, mask=stored, other=0.0).to(ACC)
    values = activated(gate, ACTIVATION)
    if GLU:
        up = tl.load(pre + offset + WIDTH, mask=stored, other=0.0).to(ACC)
        at_up = (above * share[:, None] * values).to(at_pre.dtype.element_ty)
        tl.store(at_pre + offset + WIDTH, at_up, mask=stored)
        values *= up
    # columns beyond the width are 0 in both factors
    part = tl.sum(above * values, axis=1)
    tl.store(parts + rows.to(tl.int64) * TILES + column_tile, part, mask=live)
    hidden += first * WIDTH
    at_hidden = (values * share[:, None]).to(hidden.dtype.element_ty)
    tl.store(hidden + offsets(BM, columns, WIDTH), at_hidden, mask=stored)
    above *= share[:, None]
    if GLU:
        above *= up
    at_gate = derived(above, gate, ACTIVATION).to(at_pre.dtype.element_ty)
    tl.store(at_pre + offset, at_gate, mask=stored)
