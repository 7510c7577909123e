"""`router_select` as one kernel forward and one backward (K1), in Triton.

A program holds whole rows of logits, so that scores, K rounds of arg-max, weights and sums are made
from one read. What belongs to a slot is kept in the column of its expert, which is written to the
place its rank tells; there is nothing to gather. Sums over tokens are added up per program and then
over the programs in a fixed order: no atomics, a second call is bit-identical.

Everything is computed in ACC, tau and scaling in float32. Scores and weights agree with those of
`routing_steps` to rounding, and so does a selection that a bias or tau decides.

Shapes: T tokens, E experts, N null experts, A = E + N, K slots of a token, G programs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adaconvert.kernels import triton_support
from adaconvert.kernels.routing_steps import Rule

#: widest row a program can hold.
WIDEST = 4096
#: logits of a block, 8 of each thread; with 16, some routers spill registers.
_BLOCK = 1024
#: most programs, each of which writes A sums and A counts.
_PROGRAMS = 1024


@triton.jit
def _log_sigmoid(x):
    # the sum rounds to 1 for high x, an absolute error that powers of the result do not show
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _clean(raw, SIGMOID: tl.constexpr):
    """Return the rows, all NaN where one is unusable, and the highest of each."""
    highest = tl.max(tl.where(raw != raw, float("-inf"), raw), axis=1)
    broken = tl.max((raw != raw).to(tl.int32), axis=1) > 0
    broken = broken | (highest == float("-inf"))
    if not SIGMOID:
        broken = broken | (highest == float("inf"))
    return tl.where(broken[:, None], float("nan"), raw), highest


@triton.jit
def _shares(logarithms, pool):
    """Return the softmax of each row over its pool; 0 outside, and where all of it is -inf."""
    inside = tl.where(pool, logarithms, float("-inf"))
    highest = tl.max(inside, axis=1)
    # of a row with NaN the maximum is not defined, but the powers are NaN whatever it is
    lower = tl.where(highest == float("-inf"), 0.0, highest)
    powers = tl.exp(inside - lower[:, None])
    total = tl.sum(powers, axis=1)
    return powers / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _best(keys, free, columns, BLOCK_A: tl.constexpr):
    """Return the column of the highest free key of each row, the lower of equal ones."""
    highest = tl.max(tl.where(free, keys, float("-inf")), axis=1)
    found = free & (keys == highest[:, None])
    return tl.min(tl.where(found, columns[None, :], BLOCK_A), axis=1)


@triton.jit
def _rounds(keys, inside, columns, TOP_K: tl.constexpr, BLOCK_A: tl.constexpr):
    """Return in which round each column has the highest key, -1 where in none of TOP_K."""
    # NaN goes first, so that an unusable row selects 0, 1, ...
    keys = tl.where(keys != keys, float("inf"), keys)
    rank = tl.where(inside, -1, -1)
    for k in range(TOP_K):
        best = _best(keys, inside & (rank < 0), columns, BLOCK_A)
        rank = tl.where(columns[None, :] == best[:, None], k, rank)
    return rank


@triton.jit
def _force_real(keys, rank, kept, real, columns, TOP_K: tl.constexpr, BLOCK_A: tl.constexpr):
    """Return ranks and what is kept, where rows without a real expert have one in the last slot."""
    keys = tl.where(keys != keys, float("inf"), keys)
    best = _best(keys, real, columns, BLOCK_A)
    served = tl.max((kept & real).to(tl.int32), axis=1) > 0
    chosen = (columns[None, :] == best[:, None]) & (served == 0)[:, None]
    # tau may have left it out of a slot; the column that gives way takes that slot, left out too
    former = tl.max(tl.where(chosen, rank, -1), axis=1)
    evicted = (rank == TOP_K - 1) & (served == 0)[:, None]
    rank = tl.where(chosen, TOP_K - 1, tl.where(evicted, former[:, None], rank))
    return rank, chosen | (kept & (evicted == 0))


@triton.jit
def _slot_shares(
    values, logarithms, kept, real, inside, NORMALISE: tl.constexpr, SIGMOID: tl.constexpr
):
    """Return what each column's weight is before scaling, and which columns share it."""
    if NORMALISE == "none":
        shares = values
        pool = inside
        if SIGMOID:
            pool = inside & (inside == 0)
    else:
        pool = real
        if NORMALISE == "selected":
            pool = kept
        elif NORMALISE == "real":
            pool = kept & real
        shares = _shares(logarithms, pool)
    return shares, pool


@triton.jit
def _forward(
    logits,
    bias,
    counted,
    weights,
    experts,
    slots,
    sums,
    counts,
    tokens,
    stride,
    tau,
    scaling,
    ACC: tl.constexpr,
    A: tl.constexpr,
    NULL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_TAU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COUNTED: tl.constexpr,
    FORCE_REAL: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Weights, experts and slots [T, K]; sums and counts [G, A]; grid (G,) of STEPS blocks each."""
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    columns = tl.arange(0, BLOCK_A)
    within = columns < A
    total = tl.zeros([BLOCK_A], dtype=ACC)
    uses = tl.zeros([BLOCK_A], dtype=tl.int32)
    for step in range(STEPS):
        first = (program.to(tl.int64) * STEPS + step) * BLOCK_T
        rows = tl.arange(0, BLOCK_T)
        known = first + rows < tokens
        inside = known[:, None] & within[None, :]
        real = inside & (columns < A - NULL)[None, :]
        places = (first + rows)[:, None] * stride + columns[None, :]
        raw = tl.load(logits + places, mask=inside, other=float("-inf")).to(ACC)
        raw, highest = _clean(raw, SIGMOID)
        if SIGMOID:
            logarithms = _log_sigmoid(raw)
            highest = _log_sigmoid(highest)
            values = 1.0 / (1.0 + tl.exp(-raw))
            shares = _shares(logarithms, inside)
        else:
            logarithms = raw
            values = _shares(raw, inside)
            shares = values

        # scores keep the order of the logits, but some that differ are rounded to the same score
        keys = raw
        if HAS_BIAS:
            keys = values + tl.load(bias + columns, mask=within, other=0.0).to(ACC)[None, :]
        rank = _rounds(keys, inside, columns, TOP_K, BLOCK_A)
        kept = rank >= 0
        if HAS_TAU:
            weak = tl.exp(logarithms - highest[:, None]) < tau
            kept = kept & ((rank == 0) | (weak == 0))
        if FORCE_REAL:
            rank, kept = _force_real(keys, rank, kept, real, columns, TOP_K, BLOCK_A)

        own, _ = _slot_shares(values, logarithms, kept, real, inside, NORMALISE, SIGMOID)
        # within the block, so that 32 bits are enough
        places = rows[:, None] * TOP_K + rank
        taken = inside & (rank >= 0)
        runs = kept & real
        numbers = columns[None, :] + tl.zeros_like(rank)
        tl.store(weights + first * TOP_K + places, tl.where(runs, own * scaling, 0.0), mask=taken)
        chosen = tl.where(runs, numbers, -1).to(tl.int64)
        tl.store(experts + first * TOP_K + places, chosen, mask=taken)
        tl.store(slots + first * TOP_K + places, tl.where(kept, numbers, -1), mask=taken)

        enters = inside
        if HAS_COUNTED:
            flags = tl.load(counted + first + rows, mask=known, other=0)
            enters = inside & (flags != 0)[:, None]
        total += tl.sum(tl.where(enters, shares, 0.0), axis=0)
        uses += tl.sum((kept & enters).to(tl.int32), axis=0)
    places = program.to(tl.int64) * A + columns
    tl.store(sums + places, total, mask=within)
    tl.store(counts + places, uses, mask=within)


@triton.jit
def _backward(
    logits,
    slots,
    counted,
    weights_grad,
    sums_grad,
    grad,
    tokens,
    stride,
    scaling,
    ACC: tl.constexpr,
    A: tl.constexpr,
    NULL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_COUNTED: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Gradient of the logits [T, A], by the formula of `routing_steps.backward`; a block each."""
    program = tl.program_id(0)
    if REVERSE:
        program = tl.num_programs(0) - 1 - program
    columns = tl.arange(0, BLOCK_A)
    within = columns < A
    first = program.to(tl.int64) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    known = first + rows < tokens
    inside = known[:, None] & within[None, :]
    real = inside & (columns < A - NULL)[None, :]
    places = (first + rows)[:, None] * stride + columns[None, :]
    raw = tl.load(logits + places, mask=inside, other=float("-inf")).to(ACC)
    raw, _ = _clean(raw, SIGMOID)
    if SIGMOID:
        logarithms = _log_sigmoid(raw)
        values = 1.0 / (1.0 + tl.exp(-raw))
        probabilities = _shares(logarithms, inside)
    else:
        logarithms = raw
        values = _shares(raw, inside)
        probabilities = values

    result = tl.zeros([BLOCK_T, BLOCK_A], dtype=ACC)
    if HAS_SUMS:
        pull = tl.load(sums_grad + columns, mask=within, other=0.0).to(ACC)[None, :]
        common = tl.sum(tl.where(inside, probabilities * pull, 0.0), axis=1)
        enters = inside
        if HAS_COUNTED:
            flags = tl.load(counted + first + rows, mask=known, other=0)
            enters = inside & (flags != 0)[:, None]
        result += tl.where(enters, probabilities * (pull - common[:, None]), 0.0)
    if HAS_WEIGHTS:
        kept = inside & (inside == 0)
        arriving = tl.zeros([BLOCK_T, BLOCK_A], dtype=ACC)
        for k in range(TOP_K):
            at = first * TOP_K + rows * TOP_K + k
            slot = tl.load(slots + at, mask=known, other=-1)
            part = tl.load(weights_grad + at, mask=known, other=0.0).to(ACC)
            own = columns[None, :] == slot[:, None]
            arriving = tl.where(own, part[:, None], arriving)
            kept = kept | own
        shares, pool = _slot_shares(values, logarithms, kept, real, inside, NORMALISE, SIGMOID)
        parts = tl.where(kept & real, shares * arriving * scaling, 0.0)
        result += parts - tl.where(pool, shares * tl.sum(parts, axis=1)[:, None], 0.0)
    if SIGMOID:
        result = result / (1.0 + tl.exp(raw))
    tl.store(grad + first * A + rows[:, None] * A + columns[None, :], result, mask=inside)


def refuses(facts: dict[str, Any]) -> str | None:
    """Return why the kernels cannot route a call of these facts, None when they can."""
    if facts.get("experts", 0) > WIDEST:
        return f"a row of {facts['experts']} logits is wider than {WIDEST}"
    return None


def router_select(
    logits: Tensor,
    bias: Tensor | None,
    counted: Tensor | None,
    rule: Rule,
    *,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `routing_steps.forward` does; `reverse` starts the last program first."""
    logits = _rows(logits)
    tokens, columns = logits.shape
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = torch.empty(tokens, rule.top_k, dtype=acc, device=logits.device)
    experts = torch.empty_like(weights, dtype=torch.int64)
    slots = torch.empty_like(weights, dtype=torch.int32)
    steps, programs = _steps(tokens, columns)
    sums = torch.empty(programs, columns, dtype=acc, device=logits.device)
    counts = torch.empty_like(sums, dtype=torch.int32)
    if programs:
        with torch.cuda.device_of(logits):
            _forward[(programs,)](
                *(logits, _contiguous(bias), _contiguous(counted)),
                *(weights, experts, slots, sums, counts),
                *(tokens, logits.stride(0), rule.tau or 0.0, float(rule.scaling)),
                **_constants(logits, rule, counted, reverse),
                HAS_TAU=rule.tau is not None,
                HAS_BIAS=bias is not None,
                FORCE_REAL=rule.force_real and rule.null > 0,
                STEPS=steps,
            )
    return weights, experts, slots, sums.sum(dim=0), counts.sum(dim=0)


def backward(
    logits: Tensor,
    slots: Tensor,
    counted: Tensor | None,
    weights_grad: Tensor | None,
    sums_grad: Tensor | None,
    rule: Rule,
    *,
    reverse: bool = False,
) -> Tensor:
    """Return what `routing_steps.backward` does; `reverse` starts the last program first."""
    logits = _rows(logits)
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    blocks = triton.cdiv(logits.shape[0], _block(logits.shape[1]))
    if blocks:
        with torch.cuda.device_of(logits):
            _backward[(blocks,)](
                *(logits, slots.contiguous(), _contiguous(counted)),
                *(_contiguous(weights_grad), _contiguous(sums_grad), grad),
                *(logits.shape[0], logits.stride(0), float(rule.scaling)),
                **_constants(logits, rule, counted, reverse),
                HAS_WEIGHTS=weights_grad is not None,
                HAS_SUMS=sums_grad is not None,
            )
    return grad


def _constants(logits: Tensor, rule: Rule, counted: Tensor | None, reverse: bool) -> dict[str, Any]:
    """Return the constants and options that both kernels have."""
    columns = logits.shape[1]
    return {
        "ACC": triton_support.accumulator(logits.dtype),
        "A": columns,
        "NULL": rule.null,
        "TOP_K": rule.top_k,
        "SIGMOID": rule.scores == "sigmoid",
        "NORMALISE": rule.normalise,
        "HAS_COUNTED": counted is not None,
        "REVERSE": reverse,
        "BLOCK_T": _block(columns),
        "BLOCK_A": triton.next_power_of_2(columns),
        "num_warps": max(triton.next_power_of_2(columns) // 256, 4),
        "enable_fp_fusion": True,
    }


def _block(columns: int) -> int:
    """Return how many rows a block has."""
    rows: int = _BLOCK // triton.next_power_of_2(columns)
    return max(min(rows, 128), 1)


def _steps(tokens: int, columns: int) -> tuple[int, int]:
    """Return how many blocks a program goes through, a power of two, and how many programs run."""
    blocks = triton.cdiv(tokens, _block(columns))
    steps = triton.next_power_of_2(triton.cdiv(blocks, _PROGRAMS)) if blocks else 1
    return steps, triton.cdiv(blocks, steps)


def _rows(logits: Tensor) -> Tensor:
    """Return the logits with neighbouring columns."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
