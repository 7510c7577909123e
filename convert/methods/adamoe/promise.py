"""What a start with null experts promises against its source, and what is said of it.

Letters: n real experts, M null ones, k experts per token of the source, K' slots.
"""

from __future__ import annotations

from adaconvert.arch.null_experts import NullExperts
from adaconvert.methods.adamoe.base import Base
from adaconvert.methods.adamoe.plan import Nulling
from adaconvert.planning.ops import Exactness

_EXACT = ("exact", "exact-fp32")


def exactness_of(nulling: Nulling) -> Exactness:
    """Return what step 0 promises: the source where every token runs what it runs there, or where
    one copy of a dense network is as good as several."""
    base, start = nulling.base, nulling.start
    if base.exactness is not None and base.exactness.kind not in _EXACT:
        return base.exactness
    if start.same and nulling.digest is None:
        return _as_source(nulling)
    if _any_copy_does(nulling) and base.exactness is not None:
        return Exactness(
            kind=base.exactness.kind,
            why="every token runs at least one expert, all of them hold the dense feed-forward "
            "network, and the weights of those that run sum to 1",
        )
    why = (
        f"{start.nulls.slots} slots cut groups of equal logits, which the null bias then decides"
        if nulling.digest is None
        else "tokens run fewer real experts than the source, as many as their blocks' shares say"
    )
    return Exactness(kind="approximate", why=f"{why}; with null experts off it is the source")


def _as_source(nulling: Nulling) -> Exactness:
    base, start = nulling.base, nulling.start
    why = (
        f"null rows are copies of the router's, so {start.nulls.slots} slots hold the best groups "
        "of equal logits, one real expert in each"
        if start.init == "exact"
        else "the null bias keeps null experts from every slot"
    )
    if base.exactness is None:
        return Exactness(kind="exact", why=why)
    return Exactness(kind=base.exactness.kind, why=f"{base.exactness.why}; {why}")


def _any_copy_does(nulling: Nulling) -> bool:
    """Return whether any one expert of a token gives what all of them give together."""
    base, nulls = nulling.base, nulling.start.nulls
    whole = base.options.get("via") == "upcycle" and base.options.get("granularity") == 1
    return whole and nulls.min_real == 1 and nulls.weights == "real" and _renormalises(base)


def _renormalises(base: Base) -> bool:
    return all(block.combine == "renorm" for block in base.blocks)


def notes_of(nulling: Nulling, runtimes: str) -> list[str]:
    """Return what the user should know of a checkpoint with null experts.

    Args:
        nulling: what is done.
        runtimes: which runtimes run it materialised, in words; "" where that cannot be.
    """
    base, start = nulling.base, nulling.start
    nulls, block = start.nulls, base.blocks[0]
    low, high = nulls.reach(block)
    notes = [
        *base.notes,
        f"{len(base.blocks)} blocks of {block.count} real experts top-{block.top_k} get "
        f"{nulls.count} null experts of kind {nulls.kind} and {nulls.slots} slots; {_runs(nulling)}"
        f"; random logits would run {nulls.at_random(block) * block.top_k:.3g}",
        f"the null bias reaches {low:.4g} to {high:.4g} of the source's real-expert compute, "
        f"{low * block.top_k:.3g} to {high * block.top_k:.3g} real experts per token",
        *_target_notes(nulling),
        *_kind_notes(nulls),
        *_runtime_notes(runtimes),
    ]
    return notes


def _runs(nulling: Nulling) -> str:
    start = nulling.start
    if nulling.digest is not None:
        return "biases found on text say how many real ones a token runs"
    if start.real is None:
        return "how many real ones a token runs depends on ties that the null bias breaks"
    return f"every token runs {start.real} real experts at the start"


def _target_notes(nulling: Nulling) -> list[str]:
    if not nulling.targets or nulling.digest is not None:
        return []
    shares = sorted(set(nulling.targets.values()))
    said = f"{shares[0]:g}" if len(shares) == 1 else f"{shares[0]:g} to {shares[-1]:g}"
    return [
        f"the share of {said} is kept for `finetune`, and costs are stated at it; without --data "
        "nothing is spent less yet"
    ]


def _kind_notes(nulls: NullExperts) -> list[str]:
    if nulls.kind == "zero":
        return []
    return [f"null experts of kind {nulls.kind} start at nothing and have to be trained"]


def _runtime_notes(runtimes: str) -> list[str]:
    found = [
        "LongCat-Flash's zero-computation experts cannot hold this exactly: they are identity "
        "experts of an architecture with other attention, other blocks and weights that are not "
        "renormalised"
    ]
    if runtimes:
        found.append(f"--materialize writes a stock mixture that saves nothing: {runtimes}")
    return found


def stock_exactness(base: Base, start: str) -> Exactness:
    """Return what a stock mixture with experts of zeros promises before anything is rounded."""
    why = f"experts of zeros take the slots of null experts, and a factor on down {start}"
    if base.exactness is None:
        return Exactness(kind="exact", why=why)
    return Exactness(kind=base.exactness.kind, why=f"{base.exactness.why}; {why}")


def saves_nothing(nulls: NullExperts) -> str:
    """Return what a stock mixture with experts of zeros costs, in a sentence."""
    return (
        f"{nulls.count} experts of zeros a block are stored and run like any other: this form is "
        "for stacks that cannot load the adaptive one; where logits are computed in 16 bits, those "
        "of two experts can tie, and a token then gets a part of one"
    )
