"""Which blocks go, as far as config.json alone can say: how many, and evenly spaced ones.

Letters: L blocks, n of them dropped.
"""

from __future__ import annotations

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.depth import config_without
from adaconvert.arch.registry import describe
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.names import escape
from adaconvert.methods.depth.config import DepthOptions
from adaconvert.methods.sources import Described
from adaconvert.planning.estimate import reference

#: a difference of shares that is rounding of sums and no preference.
_EQUAL = 1e-12


def check_stock(item: Described) -> None:
    """Refuse an adaptive checkpoint.

    Raises:
        SourceError: it is one.
    """
    if item.spec.adaptive is not None:
        raise SourceError(
            f"is adaptive ({escape(item.spec.model_type)}), and its parts name blocks by number",
            where=f"{escape(item.source.label)}/config.json",
            hint="Drop blocks of the stock checkpoint it was made of, and convert the result.",
        )


def evenly(blocks: int, count: int) -> tuple[int, ...]:
    """Return `count` blocks in the middles of as many equal parts of those between the first and
    the last: 2, 6 and 9 of 12.

    Args:
        blocks: L.
        count: n, at most L - 2.
    """
    between = blocks - 2
    return tuple(1 + (2 * part + 1) * between // (2 * count) for part in range(count))


def dropped_of(options: DepthOptions, spec: ModelSpec) -> tuple[int, ...]:
    """Return the blocks that go, ascending: those that are named or were found, else evenly spaced
    ones.

    Raises:
        OptionError: a block does not exist, or so many cannot go.
    """
    named = options.named(spec.layers)
    return evenly(spec.layers, count_of(options, spec)) if named is None else named


def count_of(options: DepthOptions, spec: ModelSpec) -> int:
    """Return how many blocks go.

    Raises:
        OptionError: so many cannot, or none does.
    """
    named = options.named(spec.layers)
    if named is not None:
        return len(named)
    most = spec.layers - 2
    if most < 1:
        raise OptionError(
            f"the model has {spec.layers} blocks, and the first and the last stay",
            where="--keep" if options.compute is None else "--compute",
            expected="a model of three blocks or more",
            hint="--drop names any block.",
        )
    if options.compute is not None:
        return _nearest(options.compute, spec)
    assert options.keep is not None
    if not 2 <= options.keep < spec.layers:
        raise OptionError(
            f"the model has {spec.layers} blocks, and the first and the last stay",
            where="--keep",
            expected=f"2 to {spec.layers - 1}",
            found=options.keep,
        )
    return spec.layers - options.keep


def _nearest(wanted: float, spec: ModelSpec) -> int:
    """Return how many evenly spaced blocks to drop to come nearest to a share of compute; of two
    that are as near, fewer.

    Raises:
        OptionError: nothing is nearer than the whole model or what must stay of it.
    """
    every = range(1, spec.layers - 1)
    shares = [share_without(spec, evenly(spec.layers, count)) for count in every]
    if not shares[-1] - (1 - shares[0]) / 2 <= wanted <= (1 + shares[0]) / 2:
        raise OptionError(
            "no number of blocks comes near it",
            where="--compute",
            expected=f"{shares[-1]:.3f} ({spec.layers - len(shares)} of {spec.layers} blocks) to "
            f"{shares[0]:.3f} ({spec.layers - 1})",
            found=wanted,
        )
    best = min(abs(share - wanted) for share in shares)
    return 1 + next(n for n, s in enumerate(shares) if abs(s - wanted) <= best + _EQUAL)


def share_without(spec: ModelSpec, dropped: tuple[int, ...]) -> float:
    """Return FLOPs per token without some blocks as a share of the model's, head included.

    They are counted as `config.adaptive.reference` does: texts of 512 tokens, attention at the mean
    length a token sees.
    """
    left = describe(config_without(spec, kept_of(spec, dropped)))
    own, whole = (reference(one, frozenset())["flops_per_token"] for one in (left, spec))
    return own / whole


def kept_of(spec: ModelSpec, dropped: tuple[int, ...]) -> tuple[int, ...]:
    """Return the blocks that stay, ascending."""
    return tuple(number for number in range(spec.layers) if number not in dropped)
