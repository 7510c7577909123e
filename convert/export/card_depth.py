"""What a card tells of less depth: blocks that went, and blocks that tokens may skip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from adaconvert.arch.routed_layers import routed_of, words
from adaconvert.errors import AdaconvertError
from adaconvert.export.card_text import fenced, is_number, plain

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
    """Yield how tokens skip blocks; nothing where there are none."""
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
