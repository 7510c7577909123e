"""What a start with null experts promises against its source, and what is said of it.

Letters: n real experts, M null ones, k experts per token of the source, K' slots.
"""

from __future__ import annotations

import math

from adaconvert.arch.null_experts import NullExperts
from adaconvert.methods.adamoe.base import Base
from adaconvert.methods.adamoe.plan import Nulling
from adaconvert.planning.ops import Exactness
from adaconvert.units import human_bytes

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
        _other_slots(nulling)
        if nulling.digest is None
        else "tokens run other numbers of real experts than in the source, on average those of "
        "their blocks' shares"
    )
    return Exactness(kind="approximate", why=f"{why}; with null experts off it is the source")


def _other_slots(nulling: Nulling) -> str:
    """Return why a start with other slots than the exact one's is not the source."""
    start, block = nulling.start, nulling.base.blocks[0]
    slots, runs = start.nulls.slots, f"{start.real} real experts, {block.top_k} in the source"
    if start.init == "bias":
        return f"no null expert is chosen, so every token runs the best {runs}"
    if start.real == block.top_k:
        return (
            f"{slots} slots cut a group of {start.copies} equal logits: every token runs its "
            "source's experts as long as ties go to the real one, which rounding can undo"
        )
    if slots % start.copies:
        return (
            f"{slots} slots cut a group of {start.copies} equal logits, of which the real expert "
            f"comes first: every token runs {runs}"
        )
    return f"{slots} slots hold groups of {start.copies} equal logits: every token runs {runs}"


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
        *_fit_notes(nulling),
        *_kind_notes(nulls),
        *_runtime_notes(nulls, runtimes),
    ]
    return notes


def _runs(nulling: Nulling) -> str:
    start = nulling.start
    if nulling.digest is not None:
        return "biases found on text say how many real ones a token runs"
    return f"every token runs {start.real} real experts at the start"


def _target_notes(nulling: Nulling) -> list[str]:
    if not nulling.targets or nulling.digest is not None:
        return []
    shares = sorted(set(nulling.targets.values()))
    said = f"{shares[0]:g}" if len(shares) == 1 else f"{shares[0]:g} to {shares[-1]:g}"
    return [
        f"the share of {said} is kept for `finetune`; without --data nothing is spent less yet, "
        "and costs are stated as the start runs"
    ]


def _fit_notes(nulling: Nulling) -> list[str]:
    """Return the memory that running the mixture on text takes."""
    if nulling.digest is None:
        return []
    size = 4 * sum(math.prod(target.shape) for target in nulling.base.targets)
    return [
        f"setting biases on the text loads the whole mixture in float32: {human_bytes(size)} of "
        "memory, which is not in the memory stated above"
    ]


def _kind_notes(nulls: NullExperts) -> list[str]:
    if nulls.kind == "zero":
        return []
    return [f"null experts of kind {nulls.kind} start at nothing and have to be trained"]


def _runtime_notes(nulls: NullExperts, runtimes: str) -> list[str]:
    found = [
        "LongCat-Flash's zero-computation experts cannot hold this exactly: they are identity "
        "experts of an architecture with other attention, other blocks and weights that are not "
        "renormalised"
    ]
    if runtimes and nulls.weights == "selected" and not nulls.min_real:
        found.append(f"--materialize writes this as a stock mixture that saves nothing: {runtimes}")
    elif runtimes:
        found.append(
            "`adamoe SRC --materialize`, from the source, writes a stock mixture that saves "
            f"nothing: {runtimes}; weights of the real experts alone, or a real expert in every "
            "token, cannot be written as one later"
        )
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
