"""Whether a converted checkpoint computes what its source computes, and where it stops doing so.

Both models run on the same tokens in float32. "whole" loads one after the other, the target exactly
as a user would; "layerwise" holds one block of one model at a time (`layerwise.runner`). Both give
the same numbers.

Shapes: B sequences, S positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from adaconvert.errors import ResourceError, VerificationError
from adaconvert.io.available import available_memory
from adaconvert.io.source import Source
from adaconvert.layerwise.build import KeyReport
from adaconvert.units import human_bytes
from adaconvert.verification.comparison import Comparison
from adaconvert.verification.logits import LogitDifference, compare_logits
from adaconvert.verification.memory import SHARE, layerwise_need, whole_need
from adaconvert.verification.quality import Quality
from adaconvert.verification.routing import LayerRouting
from adaconvert.verification.tokens import Probe

#: relative difference of a token's hidden state that float32 arithmetic in another order explains.
NOISE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """How far the target is from the source on the probe.

    Attributes:
        logits: difference of the logits.
        embedding: relative difference of what the first blocks receive.
        layers: relative difference of the hidden states after each block; empty when the models
            have different numbers of blocks.
        tolerance: what the models were held to, as a fraction of the largest logit.
        mode: "whole" or "layerwise".
        probe: where the tokens come from.
        routing: statistics of each converted layer.
        keys: what transformers said about the target's tensor names.
        quality: of an adaptive target as it is configured; `logits` and `layers` are with every
            expert on. None when that is how it is configured, or when it was not run.
    """

    logits: LogitDifference
    embedding: float
    layers: tuple[float, ...]
    tolerance: float
    mode: str
    probe: str
    routing: tuple[LayerRouting, ...] = ()
    keys: KeyReport = field(default_factory=KeyReport)
    quality: Quality | None = None

    @property
    def relative(self) -> float:
        """Return the largest difference of a logit as a fraction of the largest dense logit."""
        return self.logits.relative

    @property
    def close(self) -> bool:
        """Tell whether logits agree within the tolerance and no clear choice of a token changed."""
        return self.logits.finite and self.relative <= self.tolerance and not self.logits.disputed

    @property
    def first_bad_layer(self) -> int | None:
        """Return the first block whose output differs, None when no block is to blame.

        When no block is beyond the tolerance, it is the one that multiplies the difference most.
        """
        if self.close or not self.layers or self.embedding > self._bound:
            return None
        for index, difference in enumerate(self.layers):
            # "not <=" because a difference may be NaN
            if not difference <= self._bound:
                return index
        floor = [max(d, NOISE / 10) for d in (self.embedding, *self.layers)]
        jumps = [after / before for before, after in pairwise(floor)]
        return max(range(len(jumps)), key=jumps.__getitem__) if max(jumps) > 10 else None

    @property
    def _bound(self) -> float:
        return max(self.tolerance, NOISE)

    def blame(self) -> str:
        """Return where the two models part, in words; empty when the logits agree."""
        if self.close:
            return ""
        if not self.embedding <= self._bound:
            return "the embedding is the first part that differs"
        if not self.layers:
            return "the models have different numbers of blocks"
        layer = self.first_bad_layer
        if layer is None:
            return "all blocks agree, so the final norm or the head differs"
        return f"layer {layer} is the first that differs"


def compare(
    source_dir: Path,
    target_dir: Path,
    *,
    probe: Probe,
    memory: int | None = None,
    tolerance: float = 1e-5,
    granularity: int = 1,
    stored_dtype: str | None = None,
    configured: bool = False,
    progress: bool = False,
) -> Equivalence:
    """Return how far the checkpoint in `target_dir` is from the one in `source_dir`.

    Args:
        source_dir: the dense checkpoint.
        target_dir: the converted one.
        probe: tokens to run on.
        memory: bytes the comparison may take; 60 % of what is available when None.
        tolerance: see `Equivalence`.
        granularity: experts per group of siblings, see `routing.RouterWatch`.
        stored_dtype: torch name of the dtype the target is meant to run in, for the routers of
            granular experts.
        configured: run an adaptive target as it is configured, not with every expert on.
        progress: show a progress bar on a terminal.

    Raises:
        SourceError: a checkpoint cannot be read.
        OptionError: the source is no language model.
        VerificationError: transformers refuses the target, or its logits have another shape.
        ResourceError: `memory` does not even suffice for one block.
    """
    sources = (Source.open(source_dir, ignore_unindexed=True), Source.open(target_dir))
    mode = choose_mode(sources, probe.tokens, memory)
    run = Comparison(
        sources,
        probe,
        granularity=granularity,
        stored_dtype=stored_dtype,
        progress=progress,
        tolerance=tolerance,
        configured=configured,
    )
    dense, target = run.whole() if mode == "whole" else run.layerwise()
    if dense.shape != target.shape:
        raise VerificationError(
            "the logits have another shape", expected=list(dense.shape), found=list(target.shape)
        )
    return Equivalence(
        logits=compare_logits(dense, target, tolerance=tolerance),
        embedding=run.differences[0],
        layers=tuple(run.differences[1:]),
        tolerance=tolerance,
        mode=mode,
        probe=probe.origin,
        routing=tuple(run.routing),
        keys=run.keys,
        quality=run.quality,
    )


def choose_mode(sources: tuple[Source, Source], tokens: int, memory: int | None) -> str:
    """Return "whole" when the larger model fits in `memory` bytes in float32, else "layerwise".

    Raises:
        ResourceError: not even one block fits.
    """
    limit = int(available_memory() * SHARE) if memory is None else memory
    if whole_need(sources, tokens=tokens) <= limit:
        return "whole"
    least = layerwise_need(sources, tokens=tokens)
    if least > limit:
        raise ResourceError(
            "the comparison needs more memory than it may take",
            where="--memory",
            expected=f"at least {human_bytes(least)} for one block in float32",
            found=human_bytes(limit),
            hint="Raise --memory, or free some.",
        )
    return "layerwise"
