"""Arrow: an adapter is chosen where a token lies along the direction it acts on most.

Source: Ostapenko et al. 2024, arXiv 2405.11157, section 3.2: the prototype of an adapter is the
top right singular vector of B A, the score of a token |x . prototype|, weights the softmax of the k
largest scores. No data is needed.
Shapes: n inputs and m outputs of a linear, E adapters of rank R.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: adapters per token, of the paper and of PEFT.
K = 3


def router(temperature: float = 1.0) -> dict[str, object]:
    """Return what an adapter_config.json says of Arrow's routers.

    Args:
        temperature: scores are divided by it; 1 in the paper and in PEFT.
    """
    return {
        "kind": "linear",
        "reads": "module",
        "score": "abs",
        "norm": "none",
        "scale": 1.0 / temperature,
    }


def select(experts: int, k: int | None = None) -> dict[str, object]:
    """Return the rule of Arrow's gates: the softmax over the k chosen, 3 or all there are."""
    return {"rule": "top-k", "k": min(k or K, experts), "renormalize": True}


def arrow_rows(a: Array, b: Array) -> Array:
    """Return the prototypes of adapters, float32 [E, n]; zeros of an adapter that adds nothing.

    Computed in float64 from factors alone: with A^T = Q_a R_a and B = Q_b R_b, the singular vectors
    of B A are those of the small R_b R_a^T, turned by Q_a. A prototype is a direction without a
    sign; its largest component is made positive.

    Args:
        a: [E, R, n].
        b: [E, m, R].
    """
    import numpy

    rows = [_prototype(one, other) for one, other in zip(a, b, strict=True)]
    stacked: Array = numpy.stack(rows).astype(numpy.float32)
    return stacked


def _prototype(a: Array, b: Array) -> Array:
    """Return the top right singular vector of b a, float64 [n]."""
    import numpy

    wide, right = numpy.linalg.qr(a.astype(numpy.float64).T)
    left = numpy.linalg.qr(b.astype(numpy.float64), mode="r")
    _, sizes, vectors = numpy.linalg.svd(left @ right.T)
    if not sizes[0] > 0:
        return numpy.zeros(a.shape[1])
    found: Array = wide @ vectors[0]
    signed: Array = found * numpy.sign(found[numpy.abs(found).argmax()])
    return signed
