"""What a card tells of less depth: blocks that went, blocks that tokens may skip, and blocks that
share matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from adaconvert.arch import recursion
from adaconvert.arch.projections import stock_spec
from adaconvert.arch.routed_layers import routed_of, words
from adaconvert.errors import AdaconvertError
from adaconvert.export.card_facts import known_costs
from adaconvert.export.card_text import fenced, is_number, percent, plain

if TYPE_CHECKING:
    from adaconvert.export.card_stages import Stage
    from adaconvert.export.card_told import Told

#: method whose stages take depth away.
METHOD: Final = "depth"


def found(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the routed blocks of a config.json; empty where there are none that can be read."""
    adaptive = config.get("adaptive")
    try:
        return routed_of(adaptive if isinstance(adaptive, dict) else None)
    except AdaconvertError:
        return {}


def beside(config: Mapping[str, Any]) -> list[str]:
    """Return what an adaptive checkpoint's blocks are, in words."""
    skipped = ["blocks that tokens may skip"] if found(config) else []
    return [*skipped, *(["blocks that share matrices"] if _shared(config) else [])]


def _shared(config: Mapping[str, Any]) -> str:
    """Return which blocks of a config.json share matrices, in words; "" where none can be read."""
    adaptive = config.get("adaptive")
    try:
        return recursion.words(adaptive if isinstance(adaptive, dict) else None)
    except AdaconvertError:
        return ""


def became(options: Mapping[str, Any]) -> str:
    """Return what `depth` made of a model."""
    if options.get("kind") == "recursive":
        return (
            f"with blocks that share matrices, each run {plain(options.get('loops'))} times, and "
            f"residuals of rank {plain(options.get('rank'))}"
        )
    if options.get("kind") in ("skip", "mod"):
        return f"with routers by which tokens skip blocks {plain(options.get('layers'))}"
    blocks = options.get("blocks")
    gone = [plain(block) for block in blocks] if isinstance(blocks, list) else []
    return f"without {'block' if len(gone) == 1 else 'blocks'} {', '.join(gone)}"


def stage_sentence(stage: Stage) -> str:
    """Return what `depth` did."""
    return f"{stage.names} {became(stage.options)}"


def section(told: Told) -> Iterator[str]:
    """Yield which blocks share matrices, and how tokens skip blocks; nothing where there are none
    of either."""
    yield from _sharing(told)
    slots = found(told.config)
    if not slots:
        return
    layers = told.config.get("num_hidden_layers")
    yield from ("## Skipping blocks", "")
    lines = [
        "model.set_depth('all')   # every token runs every block",
        "model.set_depth('threshold', threshold=0.5)   # where the router's logit is above",
        "model.set_depth()   # as configured again",
    ]
    yield from fenced(lines, "python")
    count = layers if is_number(layers) else len(slots)
    said = words(told.config["adaptive"], int(count))
    yield from ("", f"{said[:1].upper()}{said[1:]}.", "")


def _sharing(told: Told) -> Iterator[str]:
    """Yield which blocks share matrices, and how many numbers that leaves."""
    said = _shared(told.config)
    if not said:
        return
    yield from ("## Blocks that share matrices", "")
    yield from (f"{said[:1].upper()}{said[1:]}.", "")
    after = known_costs(told.facts.get("after"))
    made = None if told.spec is None else recursion.recursion_of(told.spec.adaptive)
    if after is None or told.spec is None or made is None:
        return
    stock, total = stock_spec(told.spec), after["total_params"]
    residuals = recursion.residual_parameters(stock, made)
    dense = total - residuals + recursion.saved_parameters(stock, made)
    yield (
        f"It has {total:,} parameters, each counted once, embeddings, norms, biases and "
        f"{residuals:,} of residuals included. With matrices of their own for all blocks and no "
        f"residuals there would be {dense:,}; this is {percent(total / dense)} of that. FLOPs do "
        "not fall, and neither do keys and values, which every block has."
    )
    yield ""
