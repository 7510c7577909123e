"""Recursion as data: which depths share matrices, the tensors that are left, and how many numbers.

`modeling.adaptive_recursion_schema` says what `config.adaptive.model.recursion` holds.
Letters: L blocks, B loops, K = L / B shared blocks, n inputs and m outputs of a linear, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaconvert.arch.adapters import Linear, block_of, linears
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.projections import stock_spec
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError

#: roles of the tensors a recursion adds.
DOWN, UP = "residual_down", "residual_up"
RESIDUAL_ROLES = frozenset({DOWN, UP})
SHARINGS = ("cycle", "sequence", "middle-cycle", "middle-sequence")
STARTS = ("average", "stepwise", "lower", "upper")
#: rank of residuals that give back every matrix.
FULL = "full"
_MIDDLE = "middle-"
#: groups of blocks that are named.
_MOST_GROUPS = 4
_CYCLE = "cycle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """A linear of one depth whose matrix depths share.

    Attributes:
        linear: of the depth.
        owner: of the first depth of the group, under whose name the matrix is stored.
        rank: r of the residual beside it; 0 for none.
    """

    linear: Linear
    owner: Linear
    rank: int

    @property
    def down(self) -> TensorSpec:
        """Return the residual's first factor, [r, n]."""
        return self._factor("down", DOWN, (self.rank, self.linear.inputs))

    @property
    def up(self) -> TensorSpec:
        """Return its second one, [m, r]."""
        return self._factor("up", UP, (self.linear.outputs, self.rank))

    def _factor(self, name: str, role: str, shape: tuple[int, ...]) -> TensorSpec:
        linear = self.linear
        return TensorSpec(
            name=f"{linear.stored}.residual.{name}", role=role, shape=shape, layer=linear.layer
        )


def depths_of(layers: int, sharing: str) -> range:
    """Return the depths that share: all of them, or all but the first and the last."""
    return range(1, layers - 1) if sharing.startswith(_MIDDLE) else range(layers)


def loops_of(layers: int, sharing: str) -> tuple[int, ...]:
    """Return the numbers of loops that divide the depths that share, ascending."""
    count = len(depths_of(layers, sharing))
    return tuple(loops for loops in range(1, count + 1) if count % loops == 0)


def base_of(layers: int, loops: int, sharing: str) -> list[int]:
    """Return for each depth the first one of its group.

    "cycle": the K blocks run one after the other, B times; "sequence": each runs B times, then the
    next one.

    Args:
        layers: L.
        loops: B, one of `loops_of`.
        sharing: one of `SHARINGS`.
    """
    depths = depths_of(layers, sharing)
    blocks = len(depths) // loops
    base = list(range(layers))
    for place, depth in enumerate(depths):
        first = place % blocks if sharing.endswith(_CYCLE) else place // loops * loops
        base[depth] = depths[first]
    return base


def origins_of(layers: int, loops: int, sharing: str, start: str) -> dict[int, tuple[int, ...]]:
    """Return for the first depth of each group the depths whose mean its matrices begin as.

    Args:
        layers: L.
        loops: B, one of `loops_of`.
        sharing: one of `SHARINGS`.
        start: "average": all depths of the group; else one depth for each group: "stepwise":
            evenly spaced from the first to the last, rounded down; "lower" and "upper": the first
            and the last K.
    """
    base, depths = base_of(layers, loops, sharing), depths_of(layers, sharing)
    groups: dict[int, list[int]] = {}
    for depth in depths:
        groups.setdefault(base[depth], []).append(depth)
    if start == "average":
        return {first: tuple(members) for first, members in groups.items()}
    count = len(groups)
    chosen: Sequence[int] = depths[:count] if start == "lower" else depths[-count:]
    if start == "stepwise":
        steps = max(count - 1, 1)
        chosen = [depths[place * (len(depths) - 1) // steps] for place in range(count)]
    return {first: (depth,) for first, depth in zip(groups, chosen, strict=True)}


def common_linears(spec: ModelSpec, depths: Sequence[int]) -> list[str]:
    """Return the linears that all of these blocks have alike, as paths inside a block; experts of a
    mixture are no linears.

    Args:
        spec: of a stock model.
        depths: the blocks.
    """
    sizes: dict[str, dict[int, tuple[int, int]]] = {}
    for linear in linears(spec).values():
        name = linear.path.removeprefix(f"{block_of(linear.path)}.")
        sizes.setdefault(name, {})[linear.layer] = linear.sizes
    return [
        name
        for name, found in sizes.items()
        if set(depths) <= set(found) and len({found[depth] for depth in depths}) == 1
    ]


def blocks_of(spec: ModelSpec) -> str:
    """Return the path of the list of blocks in memory."""
    return block_of(next(iter(linears(spec)))).rpartition(".")[0]


def shared_depths(base: Sequence[int]) -> dict[int, list[int]]:
    """Return the groups of two depths or more: the first depth -> all of them, ascending."""
    groups: dict[int, list[int]] = {}
    for depth, first in enumerate(base):
        groups.setdefault(first, []).append(depth)
    return {first: depths for first, depths in groups.items() if len(depths) > 1}


def rank_of(rank: object, linear: Linear) -> int:
    """Return r of a linear's residuals, never more than its matrix can have."""
    most = min(linear.sizes)
    return min(rank, most) if isinstance(rank, int) else most


def recursion_of(adaptive: Mapping[str, object] | None) -> dict[str, Any] | None:
    """Return `config.adaptive.model.recursion`; None where a model has none.

    Raises:
        SourceError: it is malformed.
    """
    model = None if adaptive is None else adaptive.get("model")
    found = model.get("recursion") if isinstance(model, dict) else None
    if found is None:
        return None
    try:
        usable = _is_usable(found)
    except (KeyError, TypeError, IndexError):
        usable = False
    if not usable:
        raise SourceError(
            "adaptive.model.recursion is not usable",
            where=WHERE,
            expected="blocks, base, rank, linears, sharing and start",
        )
    recursion: dict[str, Any] = found
    return recursion


def _is_usable(found: Any) -> bool:
    """Return whether a recursion says all that it must; raises what its types do otherwise."""
    base, rank, names = found["base"], found["rank"], found["linears"]
    return (
        all(
            type(first) is int and 0 <= first <= at and base[first] == first
            for at, first in enumerate(base)
        )
        and (rank == FULL or (type(rank) is int and 0 <= rank < 2**31))
        and isinstance(found["blocks"], str)
        and isinstance(names, list)
        and len(set(names)) == len(names) > 0
        and found["sharing"] in SHARINGS
        and found["start"] in STARTS
    )


def shared_linears(spec: ModelSpec, recursion: Mapping[str, Any]) -> Iterator[Shared]:
    """Yield the linears of all depths that share their matrices, depth by depth.

    Args:
        spec: of the stock model underneath.
        recursion: `config.adaptive.model.recursion`.

    Raises:
        SourceError: the model has other blocks, or a linear is not there.
    """
    if len(recursion["base"]) != spec.layers:
        raise SourceError(
            f"adaptive.model.recursion is of {len(recursion['base'])} blocks",
            where=WHERE,
            expected=spec.layers,
        )
    known = linears(spec)
    groups = shared_depths(recursion["base"])
    for depth, first in enumerate(recursion["base"]):
        for name in recursion["linears"] if first in groups else ():
            own, owner = (known.get(f"{recursion['blocks']}.{at}.{name}") for at in (depth, first))
            if own is None or owner is None or own.sizes != owner.sizes:
                raise SourceError(
                    f"adaptive.model.recursion shares {name!r} of blocks {first} and {depth}, "
                    "which are no linears of one size",
                    where=WHERE,
                )
            yield Shared(linear=own, owner=owner, rank=rank_of(recursion["rank"], own))


def with_recursion(
    tensors: Sequence[TensorSpec], spec: ModelSpec, adaptive: Mapping[str, object]
) -> tuple[TensorSpec, ...]:
    """Return the tensors of a model without the matrices that depths share with an earlier one, and
    with residuals, each behind the matrix it is beside.

    Args:
        tensors: of the model; each as it is where nothing is shared.
        spec: of the stock model underneath.
        adaptive: `config.adaptive`.

    Raises:
        SourceError: the recursion is malformed.
    """
    recursion = recursion_of(adaptive)
    if recursion is None:
        return tuple(tensors)
    shared = {item.linear.weight: item for item in shared_linears(spec, recursion)}
    found: list[TensorSpec] = []
    for tensor in tensors:
        item = shared.get(tensor.name)
        if item is None or item.owner == item.linear:
            found.append(tensor)
        if item is not None and item.rank:
            found += [item.down, item.up]
    return tuple(found)


def repeated(spec: ModelSpec) -> Iterator[tuple[TensorSpec, str]]:
    """Yield the matrices of later depths of a group, which tokens pass through though they are not
    stored, and the name each is stored under.

    Args:
        spec: of any checkpoint.
    """
    recursion = recursion_of(spec.adaptive)
    if recursion is None:
        return
    stock = stock_spec(spec)
    known = {tensor.name: tensor for tensor in stock.tensors}
    for item in shared_linears(stock, recursion):
        if item.owner != item.linear:
            yield known[item.linear.weight], item.owner.weight


def residual_parameters(spec: ModelSpec, recursion: Mapping[str, Any]) -> int:
    """Return how many numbers residuals have: r (n + m) for every linear of every depth.

    Args as for `shared_linears`.
    """
    shared = shared_linears(spec, recursion)
    return sum(item.rank * (item.linear.inputs + item.linear.outputs) for item in shared)


def saved_parameters(spec: ModelSpec, recursion: Mapping[str, Any]) -> int:
    """Return how many numbers sharing saves, residuals left out: n m for every linear of every
    depth but the first of its group.

    Args as for `shared_linears`.
    """
    shared = shared_linears(spec, recursion)
    later = (item.linear for item in shared if item.owner != item.linear)
    return sum(linear.inputs * linear.outputs for linear in later)


def words(adaptive: Mapping[str, object] | None) -> str:
    """Return which blocks share matrices, and what gives back the rest; "" where none do."""
    recursion = recursion_of(adaptive)
    groups = {} if recursion is None else shared_depths(recursion["base"])
    if recursion is None or not groups:
        return ""
    many = [" and ".join(map(str, depths)) for depths in groups.values()]
    shown = "; ".join([*many[:_MOST_GROUPS], *(["and more"] if len(many) > _MOST_GROUPS else [])])
    rank = recursion["rank"]
    beside = f"residuals of rank {rank}" if rank else "no residuals"
    return f"blocks share matrices ({shown}), with {beside}"


def is_full(recursion: Mapping[str, Any]) -> bool:
    """Return whether residuals have all the rank a matrix can have."""
    return bool(recursion["rank"] == FULL)
