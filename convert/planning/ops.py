"""What a plan is made of: frozen data that says where every byte of the target comes from.

Shapes: sizes outermost first, row-major. Offsets and lengths are bytes.
An expression tree has three kinds of leaves (`Bytes`, `Init`, `Fitted`) and two kinds of nodes
(`Apply`, `Gather`). A target whose expression is a bare `Bytes` of its own dtype is copied by the
kernel, file to file, and never enters the process; a bare `Gather` moves elements as they are
stored; everything else is computed with numpy in float32, one tensor at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Param = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """`count` runs of `nbytes` bytes out of one source tensor, `stride` bytes apart.

    Attributes:
        source: position of the checkpoint in the plan's list of sources.
        tensor: name of the source tensor.
        start: offset of the first run from the first byte of the tensor.
        nbytes: length of each run.
        stride: distance between the starts of two runs; 0 when `count` is 1.
        count: number of runs.
    """

    source: int
    tensor: str
    start: int
    nbytes: int
    stride: int = 0
    count: int = 1

    @property
    def total(self) -> int:
        """Return the number of bytes the piece contributes."""
        return self.nbytes * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """The concatenation of `pieces`, read as a tensor of `dtype` and `shape`."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Init:
    """A tensor made from nothing but its parameters.

    Attributes:
        kind: "constant" (params: value), or "identity" of a square matrix.
        shape: shape of the result.
    """

    kind: str
    shape: tuple[int, ...]
    params: tuple[tuple[str, Param], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A small tensor computed from the source model and user data, before it is first needed.

    Attributes:
        key: under which the method's fitter hands the array to the executor: float32, or int64
            where the target holds integers.
        shape: shape of the result.
        digest: sha256 of everything the fit depends on besides the source weights.
    """

    key: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """`fn(*args, **params)`, `fn` being a name in `planning.functions`; computed in float32.

    The result has `shape`; it is rounded once, to the dtype of the target tensor.
    """

    fn: str
    shape: tuple[int, ...]
    args: tuple[Expr, ...]
    params: tuple[tuple[str, Param], ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Elements of one stored tensor in another order, bit for bit whatever their dtype.

    `arg` is `runs` equal runs along `axis`, one behind the other, that are reordered alike (gate
    and up in one tensor). In each, position j of the result holds element order[first + j]; with
    `inverse`, position order[j] holds element j.

    Attributes:
        arg: the stored tensor, one piece without gaps.
        shape: shape of the result.
        order: a permutation of the n elements of a run: fitted, or stored as I32.
        axis: 0 or 1.
        runs: how many runs `arg` consists of.
        first: first position that is taken.
        inverse: undo the order instead of applying it; then all positions are taken.
    """

    arg: Bytes
    shape: tuple[int, ...]
    order: Fitted | Bytes
    axis: int = 0
    runs: int = 1
    first: int = 0
    inverse: bool = False

    @property
    def length(self) -> int:
        """Return n, the elements of one run."""
        return self.arg.shape[self.axis] // self.runs


Expr = Bytes | Init | Fitted | Apply | Gather


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTensor:
    """One tensor of the target checkpoint.

    Attributes:
        group: tensors that follow each other with the same group never straddle two shards.
        expert: position of the expert this tensor belongs to, None outside experts.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    expr: Expr
    group: str
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """A source tensor that does not reach the target, and why."""

    source: int
    tensor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """What a conversion promises about step 0 against the dense model.

    Attributes:
        kind: "exact" (<= 1e-5 x max|logit| in float32 as stored), "exact-fp32" (exact before the
            stored dtype rounds computed tensors), "approximate" (quality is measured),
            "needs-training".
        why: one sentence for the card.
    """

    kind: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a run will do, known before a byte of weights is read.

    Attributes:
        method: registered name of the method.
        options: resolved options, JSON values only.
        sources: fingerprint of each source, in order.
        targets: every tensor of the target, in the order it is written.
        drops: every source tensor that is not used.
        config: the target's config.json.
        exactness: the promise `verify` holds the result to.
        notes: what the user should know, one sentence each.
    """

    method: str
    options: dict[str, object]
    sources: tuple[str, ...]
    targets: tuple[TargetTensor, ...]
    drops: tuple[Drop, ...]
    config: dict[str, object]
    exactness: Exactness
    notes: tuple[str, ...] = field(default=())
