"""The functions a plan may apply to weights, by name; each takes and returns float32 numpy arrays.

Shapes: O output rows, C input columns, I intermediate neurons, H hidden size, N experts.
Random numbers come from numpy's Philox generator, so they depend on neither torch nor thread count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adaconvert.planning.arrays import from_float32, to_float32
from adaconvert.planning.ops import Param

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: routing is neither tied nor saturated while the standard deviation of router logits lies in this
#: range.
LOGIT_STD_RANGE = (0.25, 1.0)
#: standard deviation of a freshly drawn router, as in the published upcycling recipes.
ROUTER_STD = 0.02


def generator(seed: int) -> numpy.random.Generator:
    """Return the random stream of one seed."""
    import numpy

    return numpy.random.Generator(numpy.random.Philox(seed))


def normal(shape: tuple[int, ...], seed: int) -> Array:
    """Return standard normal float32 numbers of `shape`."""
    import numpy

    return generator(seed).standard_normal(shape, dtype=numpy.float32)


def orthogonal(rows: int, columns: int, seed: int) -> Array:
    """Return `rows` float32 rows of unit length, mutually orthogonal as far as `columns` allows."""
    import numpy

    draw = normal((max(rows, columns), min(rows, columns)), seed).astype(numpy.float64)
    q, r = numpy.linalg.qr(draw)
    q *= numpy.sign(numpy.diagonal(r))
    q = q if rows >= columns else q.T
    return numpy.ascontiguousarray(q, dtype=numpy.float32)


def _number(params: dict[str, Param], key: str) -> float:
    return float(params[key])


def _scale(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return x * factor; exact in any binary dtype when factor is a power of two."""
    return args[0] * _number(params, "factor")


def _plus_one(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return w + 1: Gemma stores norm weights minus one."""
    return args[0] + 1.0


def _subtract(left: Array, right: Array) -> Array:
    """Return left - right."""
    difference: Array = left - right
    return difference


def _center_rows(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return x [O, C] with the mean of each row subtracted: embeddings of a LayerNorm model."""
    mean: Array = args[0].mean(axis=-1, keepdims=True, dtype="float64").astype("float32")
    return _subtract(args[0], mean)


def _center_out(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return W [O, C] whose outputs have mean zero: each column's mean over O subtracted."""
    mean: Array = args[0].mean(axis=0, keepdims=True, dtype="float64").astype("float32")
    return _subtract(args[0], mean)


def _interleave_rope(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return q or k rows [heads * head_dim, ...] moved from half-split to interleaved rotary
    order."""
    heads = int(params["heads"])
    x = args[0]
    head_dim = x.shape[0] // heads
    split = x.reshape(heads, 2, head_dim // 2, *x.shape[1:])
    return split.swapaxes(1, 2).reshape(x.shape)


def _mean(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return the arithmetic mean of several sources' tensors.

    Source: Branch-Train-MiX, 2403.07816; averaged in float32 where the published script uses bf16.
    """
    total = args[0].copy()
    for arg in args[1:]:
        total += arg
    return total / len(args)


def _concat(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return the arguments one behind the other along the first axis."""
    import numpy

    return numpy.concatenate([a.reshape(-1) for a in args])


def _noise(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return x plus normal noise of `std` times the standard deviation of x."""
    x = args[0]
    draw = normal(x.shape, seed)
    draw *= _number(params, "std") * float(x.std(dtype="float64"))
    return x + draw


def drop_indices(neurons: int, ratio: float, index_seed: int) -> Array:
    """Return the sorted indexes of the floor(ratio * neurons) neurons an expert loses."""
    import numpy

    chosen = generator(index_seed).permutation(neurons)[: math.floor(ratio * neurons)]
    return numpy.sort(chosen)


def _drop(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return x with a share of its neurons re-drawn from N(mean, std) of the replaced values.

    Neurons are rows of gate and up (axis 0) and columns of down (axis 1). A shared `index_seed`
    makes the three matrices of an expert lose the same neurons.
    Source: Drop-Upcycling, 2502.19261, section 3; the published script draws one set per matrix
        instead.
    """
    import numpy

    x, axis = args[0].copy(), int(params["axis"])
    chosen = drop_indices(x.shape[axis], _number(params, "ratio"), int(params["index_seed"]))
    if not len(chosen):
        return x
    old = numpy.take(x, chosen, axis=axis)
    new = normal(old.shape, seed) * float(old.std(dtype="float64")) + float(
        old.mean(dtype="float64")
    )
    view = numpy.moveaxis(x, axis, 0)
    view[chosen] = numpy.moveaxis(new, axis, 0)
    return x


def router_std(norm: Array | None) -> float:
    """Return the standard deviation of router entries for logits that neither tie nor saturate.

    The router reads x * w with x of unit mean square and w the norm weight [H], so logits have
    standard deviation std * |w|. 0.02 is kept where that lies inside `LOGIT_STD_RANGE` and moved to
    its edge elsewhere.
    """
    if norm is None:
        return ROUTER_STD
    length = math.sqrt(float((norm.astype("float64") ** 2).sum()))
    low, high = LOGIT_STD_RANGE
    return min(max(ROUTER_STD * length, low), high) / length if length > 0 else ROUTER_STD


def _router(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return a router [N, H]; each of N / repeat drawn rows stands `repeat` times in a row.

    Args: the norm weight [H] the router's input is multiplied by, or nothing when there is none.
    Params: kind "small" or "orthogonal", rows, columns, repeat.
    Source: repeated rows are the virtual groups of 2410.07524, section 3.2.
    """
    rows, columns, repeat = int(params["rows"]), int(params["columns"]), int(params["repeat"])
    std = router_std(args[0] if args else None)
    if params["kind"] == "orthogonal":
        draw = orthogonal(rows // repeat, columns, seed) * math.sqrt(columns)
    else:
        draw = normal((rows // repeat, columns), seed)
    return (draw * std).astype("float32").repeat(repeat, axis=0)


def _normal(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return `size` normal numbers of standard deviation `std`."""
    return (normal((int(params["size"]),), seed) * _number(params, "std")).astype("float32")


def _side_by_side(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return B [E, O, r] as [O, E r]: the columns of one matrix after those of the other.

    With `factors` (E numbers, separated by commas) each is multiplied by its own.
    """
    import numpy

    b = args[0]
    if params["factors"]:
        each = [float(number) for number in str(params["factors"]).split(",")]
        b = b * numpy.asarray(each, dtype=numpy.float32)[:, None, None]
    return numpy.ascontiguousarray(b.transpose(1, 0, 2)).reshape(b.shape[1], -1)


def _add_low_rank(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return rows of a matrix W plus those of sum_e f_e B_e A_e.

    Args: W [O, C], A [E, r, C] (or [1, r, C] for all), B [E, all rows, r].
    Params: `factors`, f of adapters `expert`, `expert` + 1, ...; `first`, the first of the rows;
        `transposed`: W is [C, all columns] and keeps all of them.
    """
    w, a, b = args
    at, first = int(params["expert"]), int(params["first"])
    added = 0.0
    for number, factor in enumerate(str(params["factors"]).split(",")):
        low = a[0] if len(a) == 1 else a[at + number]
        added = added + float(factor) * (b[at + number].astype("float64") @ low)
    delta: Any = added
    found: Array = w + (delta.T if params["transposed"] else delta[first : first + len(w)])
    return found.astype("float32")


def _rounded(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return x as storing it in `dtype` leaves it."""
    dtype = str(params["dtype"])
    return to_float32(from_float32(args[0], dtype, "a mean"), dtype)


def _part(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return `size` numbers of an array that holds several tensors, from number `first` on."""
    first = int(params["first"])
    return args[0].reshape(-1)[first : first + int(params["size"])]


def _residual(args: list[Array], params: dict[str, Param], seed: int) -> Array:
    """Return the factors of the best matrix of rank r to R = W - W', one behind the other: up
    [O, r] and down [r, C].

    R's leading singular vectors on its smaller side are orthonormal columns of up (up down = U U^T
    R) or rows of down (R V V^T); the other factor has the singular values. Of full rank they are
    those of the identity, which no dtype rounds, and the other factor is R. Source: 2410.20672,
    equation 3.

    Args: W and W', [O, C].
    Params: `rank`; `transposed`: they are [C, O].
    """
    import numpy

    apart = args[0].astype("float64") - args[1]
    apart = apart.T if params["transposed"] else apart
    rows, rank = apart.shape[0], int(params["rank"])
    is_wide, is_full = rows <= apart.shape[1], rank == min(apart.shape)
    vectors = numpy.eye(rank) if is_full else _leading(apart, rank)
    found = numpy.empty(rank * sum(apart.shape), dtype=numpy.float32)
    up, down = found[: rank * rows].reshape(rows, rank), found[rank * rows :].reshape(rank, -1)
    if is_wide:
        up[:], down[:] = vectors, apart if is_full else vectors.T @ apart
    else:
        up[:], down[:] = apart if is_full else apart @ vectors, vectors.T
    return found


def _leading(matrix: Array, count: int) -> Array:
    """Return the leading singular vectors of a matrix on its smaller side, [side, count]."""
    import numpy

    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    vectors: Array = numpy.linalg.eigh(gram)[1][:, ::-1][:, :count]
    # the sign of a vector is anybody's choice
    largest = numpy.abs(vectors).argmax(axis=0)
    signs = numpy.where(vectors[largest, range(count)] < 0, -1.0, 1.0)
    return vectors * signs


Function = Callable[["list[Array]", dict[str, Param], int], "Array"]

#: every function a plan may name.
FUNCTIONS: dict[str, Function] = {
    "add_low_rank": _add_low_rank,
    "center_out": _center_out,
    "center_rows": _center_rows,
    "concat": _concat,
    "drop": _drop,
    "interleave_rope": _interleave_rope,
    "mean": _mean,
    "noise": _noise,
    "normal": _normal,
    "part": _part,
    "plus_one": _plus_one,
    "residual": _residual,
    "rounded": _rounded,
    "router": _router,
    "scale": _scale,
    "side_by_side": _side_by_side,
}
#: of these, what makes several tensors at once and is not made again for the next of them.
SEVERAL = frozenset({"residual"})
