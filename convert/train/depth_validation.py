"""What blocks that tokens may skip do on held-out text, as the written model decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from adaconvert.train.validation import Held

#: key of a history entry -> name in Trainer's log.
DEPTH_LOGGED: Final = {
    "run": "validation_run",
    "compute": "validation_compute",
    "top_k": "validation_top_k",
}


@contextmanager
def deciding(trainer: Any) -> Iterator[Callable[[], dict[str, float]]]:
    """Let passes inside the body decide as the written model does; yield what says what they ran,
    by the names it is logged under: the share of (token, block) pairs, of blocks whose tokens are
    chosen, and FLOPs per token as a fraction of the reference's. Nothing without such blocks.

    Args:
        trainer: with the attribute `depth`.
    """
    if trainer.depth is None:
        yield dict
        return
    with trainer.depth.causal(), trainer.model.account() as account:

        def said() -> dict[str, float]:
            layers = [account.layers[path] for path in trainer.depth.thresholds]
            run = sum(layer.run for layer in layers) / max(sum(layer.tokens for layer in layers), 1)
            return {DEPTH_LOGGED["run"]: run, DEPTH_LOGGED["compute"]: account.compute()}

        yield said


def looking_ahead(
    trainer: Any, held: Sequence[Held], *, batch_size: int, bf16: bool
) -> dict[str, float]:
    """Return the loss where the best tokens of each text run, as in training, by the name it is
    logged under. No generation can choose so: it is optimistic. Nothing but for mixture-of-depths.

    Args:
        trainer: with the attribute `depth`.
        held: the text.
        batch_size: blocks that run together.
        bf16: multiply matrices in bfloat16.
    """
    from adaconvert.train.validation import measure

    if trainer.depth is None or not trainer.depth.is_mod:
        return {}
    found = [measure(trainer.model, one, batch_size=batch_size, bf16=bf16) for one in held]
    total, count = (sum(part) for part in zip(*found, strict=True))
    return {DEPTH_LOGGED["top_k"]: total / count}


def depth_words(logged: Mapping[str, Any]) -> str:
    """Return what a line about a measurement says besides; "" without routed blocks."""
    if DEPTH_LOGGED["run"] not in logged:
        return ""
    run, compute = (logged[DEPTH_LOGGED[name]] for name in ("run", "compute"))
    text = f", run {run:.1%}, compute {compute:.3f}"
    ahead = logged.get(DEPTH_LOGGED["top_k"])
    return text if ahead is None else f"{text} (looking ahead, optimistic: {ahead:.4f})"
