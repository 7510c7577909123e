"""Triton kernel of the grouped expert feed-forward: gather, first matrix and activation as one.

One program computes a tile of [BM rows, BN hidden values] of one expert: it gathers the rows of x
by the plan, multiplies them by the gate's and the up matrix (one tile of x for both), adds biases,
writes the pre-activations, which the backward needs, and the hidden values times the routing
weights. Rows of dropped pairs are in no tile: they are neither read nor written.

T tokens, K slots per token, E experts, d hidden size, i intermediate size of one expert, R rows.

Source: the activation within the GEMM as in SonicMoE, Guo et al. 2025, arXiv 2512.14080, section 4.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaconvert.kernels import triton_support
from adaconvert.kernels.grouped_gemm import ALIGNMENT_BYTES
from adaconvert.kernels.grouped_steps import Inputs, Kind
from adaconvert.kernels.plan import RoutePlan
from adaconvert.kernels.triton_activations import activated
from adaconvert.kernels.triton_tiles import (
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

#: experts whose counts one program adds up.
MOST_EXPERTS = 4096


def refuses(facts: dict[str, Any]) -> str | None:
    """Return why the kernels cannot run a call of these facts, None when they can."""
    if facts["experts"] > MOST_EXPERTS:
        return f"{facts['experts']} experts; expected at most {MOST_EXPERTS}"
    sizes = (facts["hidden"], facts["width"])
    if not all(sizes):
        return "there is nothing to multiply"
    each = ALIGNMENT_BYTES // facts["dtype"].itemsize
    if not triton_support.interpreting() and any(size % each for size in sizes):
        # they would be right, but load value by value and spill
        return f"sizes {list(sizes)} are not multiples of {each}"
    return None


def run(inputs: Inputs, plan: RoutePlan, kind: Kind, rows: int) -> tuple[Tensor, Tensor]:
    """Return the pre-activations [R, 2i] or [R, i], and the hidden values [R, i], weighted.

    Args:
        rows: R.
    """
    x, first, down = inputs.x.contiguous(), inputs.first, inputs.down
    (_, wide, hidden), width = first.shape, down.shape[2]
    pre, out = x.new_empty(rows, wide), x.new_empty(rows, width)
    if not rows:
        return pre, out
    capability = triton_support.capability_on(x.device)
    tiles = tiles_of(x.dtype, capability, inner=hidden, columns=width, matrices=wide // width)
    table = table_of(plan.ends, rows, tiles)
    biased = inputs.first_bias is not None
    arguments = (
        *(x, first, inputs.first_bias.contiguous() if inputs.first_bias is not None else first),
        *(inputs.weights_of.reshape(-1).contiguous(), plan.pairs, plan.tokens, plan.ends),
        *(table.experts, table.rows, table.count, pre, out),
    )
    strides = ("STRIDE_TOKEN", "STRIDE_EXPERT", "STRIDE_COLUMN", "STRIDE_INNER")
    with torch.cuda.device_of(x):
        first_matrix[grid_of(table, tiles, width)](
            *arguments,
            **constants_of(tiles, x, hidden=hidden, width=width, kind=kind),
            **dict(zip(strides, (hidden, *first.stride()), strict=True)),
            BIAS=biased,
            num_warps=tiles.warps,
            enable_fp_fusion=True,
            num_stages=tiles.stages,
        )
    return pre, out


@triton.jit
def first_matrix(
    x,
    first,
    bias,
    weights_of,
    pairs,
    tokens,
    ends,
    tile_expert,
    tile_row,
    tile_count,
    pre,
    hidden,
    STRIDE_TOKEN: tl.constexpr,
    STRIDE_EXPERT: tl.constexpr,
    STRIDE_COLUMN: tl.constexpr,
    STRIDE_INNER: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    GLU: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Writes a tile of the pre-activations and the weighted hidden values."""
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

    at_x = x + token[:, None] * STRIDE_TOKEN + inner[None, :]
    matrix = first + expert * STRIDE_EXPERT + inner.to(tl.int64)[:, None] * STRIDE_INNER
    at_gate = matrix + columns.to(tl.int64)[None, :] * STRIDE_COLUMN
    at_up = matrix + (columns + WIDTH).to(tl.int64)[None, :] * STRIDE_COLUMN
    gate = tl.zeros((BM, BN), dtype=ACC)
    up = tl.zeros((BM, BN), dtype=ACC)
    for done in range(0, HIDDEN, BK):
        within = inner < HIDDEN - done
        values = load_rows(at_x, within, HIDDEN % BK == 0)
        weights = load_weights(at_gate, within, inside, HIDDEN % BK == 0, WIDTH % BN == 0)
        gate = add_product(gate, values, weights, ACC, UPCAST, PRECISION)
        if GLU:
            weights = load_weights(at_up, within, inside, HIDDEN % BK == 0, WIDTH % BN == 0)
            up = add_product(up, values, weights, ACC, UPCAST, PRECISION)
        at_x += BK
        at_gate += BK * STRIDE_INNER
        at_up += BK * STRIDE_INNER

    WIDE: tl.constexpr = WIDTH * 2 if GLU else WIDTH
    stored = live[:, None] & inside[None, :]
    at_pre = pre + row.to(tl.int64) * WIDE + offsets(BM, columns, WIDE)
    if BIAS:
        at_bias = bias + expert * WIDE + columns
        gate += tl.load(at_bias, mask=inside, other=0.0).to(ACC)[None, :]
        if GLU:
            up += tl.load(at_bias + WIDTH, mask=inside, other=0.0).to(ACC)[None, :]
    if pre.dtype.element_ty == tl.float16:
        # what is stored as infinite must be infinite here too, as the backward knows that alone
        gate = gate.to(tl.float16).to(ACC)
        up = up.to(tl.float16).to(ACC)
    tl.store(at_pre, gate.to(pre.dtype.element_ty), mask=stored)
    values = activated(gate, ACTIVATION)
    if GLU:
        tl.store(at_pre + WIDTH, up.to(pre.dtype.element_ty), mask=stored)
        values *= up
    pair = tl.load(pairs + rows, mask=live, other=0)
    share = tl.load(weights_of + pair, mask=live, other=0.0).to(ACC)
    at_hidden = hidden + row.to(tl.int64) * WIDTH + offsets(BM, columns, WIDTH)
    tl.store(at_hidden, (values * share[:, None]).to(hidden.dtype.element_ty), mask=stored)
