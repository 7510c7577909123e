"""Stock mixtures as targets: what is carried over, what rounds, and what transformers can run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from adaconvert.arch.base import Carry, HostRequest
from adaconvert.dtypes import BY_NAME
from adaconvert.errors import OptionError
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.planning.ops import Apply, Bytes, Expr, Gather, Init, Param, Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """Turns a host's `Carry` into an expression over one source or the average of all."""

    stored: Sequence[Mapping[str, TensorRef]]
    base: int | None

    def build(self, carry: Carry, shape: tuple[int, ...]) -> Expr:
        params: dict[str, Param] = dict(carry.params)
        if carry.tensor is None:
            return Init(kind="constant", shape=shape, params=tuple(sorted(params.items())))
        indexes = range(len(self.stored)) if self.base is None else (self.base,)
        parts = [self._read(index, carry) for index in indexes]
        expr: Expr = parts[0]
        if len(parts) > 1:
            expr = Apply(fn="mean", shape=parts[0].shape, args=tuple(parts))
        if carry.fn is not None:
            expr = Apply(
                fn=carry.fn, shape=shape, args=(expr,), params=tuple(sorted(params.items()))
            )
        return expr

    def _read(self, index: int, carry: Carry) -> Expr:
        assert carry.tensor is not None
        ref = self.stored[index][carry.tensor]
        first, count = carry.rows or (0, ref.shape[0])
        row = ref.nbytes // ref.shape[0]
        piece = Piece(source=index, tensor=ref.name, start=first * row, nbytes=count * row)
        return Bytes(dtype=ref.dtype, shape=(count, *ref.shape[1:]), pieces=(piece,))


def dtype_of(expr: Expr, asked: str | None, default: str) -> str:
    """Return the stored dtype: the one asked for, else the source's, wider for small computed
    vectors.

    A norm weight that is computed (w + 1, an average) would be rounded to 16 bits; it is stored in
    float32 instead, which costs nothing and stays exact.
    """
    if asked is not None:
        return asked
    own = default
    current = expr
    while isinstance(current, Apply) and current.args:
        current = current.args[0]
    if isinstance(current, Gather):
        current = current.arg
    if isinstance(current, Bytes):
        own = current.dtype
    if isinstance(expr, Apply) and len(expr.shape) == 1 and BY_NAME[own].nbytes < 4:
        return "F32"
    return own


def rounds(expr: Expr, dtype: str) -> bool:
    """Return whether storing the expression in `dtype` may round a weight of the dense model."""
    if isinstance(expr, Gather):
        expr = expr.arg
    if isinstance(expr, Bytes):
        return BY_NAME[expr.dtype].nbytes > BY_NAME[dtype].nbytes or (
            expr.dtype != dtype and BY_NAME[expr.dtype].nbytes == BY_NAME[dtype].nbytes
        )
    if not isinstance(expr, Apply) or expr.fn == "router":
        return False
    inner = any(rounds(arg, dtype) for arg in expr.args)
    moves = expr.fn in {"scale", "concat", "interleave_rope"}
    if expr.fn == "scale":
        factor = float(dict(expr.params)["factor"])
        moves = factor > 0 and (factor == 2.0 ** round(math.log2(factor)))
    return inner or (not moves and BY_NAME[dtype].nbytes < 4)


def check_runs(
    request: HostRequest, dtype: str, where: str = "--granularity or --shared-width"
) -> None:
    """Hold experts to what the grouped GEMM of transformers takes: 32 or 16 bits, rows of 16 bytes.

    Raises:
        OptionError: stock transformers would load the result and fail at its first token.
    """
    if dtype == "F64":
        raise OptionError(
            "transformers cannot run experts in float64",
            where="--dtype",
            expected="float32, bfloat16 or float16",
            found="float64",
        )
    item = BY_NAME[dtype].nbytes
    multiple = 16 // item
    for width in (request.expert_width, request.shared_width):
        if width % multiple:
            raise OptionError(
                f"gives experts {width} neurons wide, and transformers wants rows of 16 bytes",
                where=where,
                expected=f"a multiple of {multiple} neurons in {BY_NAME[dtype].config_name}",
                found=width,
            )
