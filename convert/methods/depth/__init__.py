"""Less depth: whole transformer blocks go, or each token skips some.

Sources: EvoPress 2410.14649 (the search); ShortGPT 2403.03853 (many blocks of pretrained models add
little); mixture-of-depths 2404.02258; FlexiDepth 2503.23798 and Router-Tuning 2410.13184 (skipping
with keys and values kept); relaxed recursive transformers 2410.20672 (blocks that share matrices).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.base import RuntimeVerdict
from adaconvert.io.names import escape
from adaconvert.methods.depth.choose import check_stock, dropped_of
from adaconvert.methods.depth.config import LAYER_DROP, RECURSIVE, DepthOptions
from adaconvert.methods.depth.plan import drop_plan
from adaconvert.methods.depth.recursive import recursive_plan
from adaconvert.methods.depth.routed import routed_plan
from adaconvert.methods.planned import PlainPlan, Prepared
from adaconvert.methods.sources import Described
from adaconvert.planning.ops import Plan

_UNSEARCHED = (
    "which blocks go is found by a search on text when this is run; until then they are taken to "
    "be evenly spaced"
)
_TUNE = (
    "`adaconvert evaluate --reference` says what the model lost, and `adaconvert finetune` teaches "
    "the blocks that stay to make up for some of it"
)


def prepare(options: DepthOptions, described: Sequence[Described]) -> Prepared:
    """Return the planned run over an opened source; reads no weights.

    Raises:
        SourceError: the model is adaptive, or cannot lose these blocks.
        OptionError: the options do not fit the model.
    """
    item = described[0]
    if options.kind != LAYER_DROP:
        plan = _adaptive_plan(options, item)
        return Prepared(
            planned=PlainPlan(
                plan=plan,
                described=tuple(described),
                target=str(plan.config["model_type"]),
                runtimes=adaptive.verdicts(),
                files={},
            )
        )
    planned = PlainPlan(
        plan=_plan(options, item),
        described=tuple(described),
        target=item.spec.model_type,
        runtimes=(
            RuntimeVerdict(
                runtime="transformers 5",
                verdict="right",
                why="the stock class with fewer blocks; it computes what the source does with the "
                "others skipped",
            ),
        ),
        files={},
    )
    return Prepared(planned=planned)


def replan(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest."""
    given: dict[str, Any] = {name: options[name] for name in options if name != "blocks"}
    made = DepthOptions(**given)
    if made.kind != LAYER_DROP:
        return _adaptive_plan(made, described[0])
    return _plan(made, described[0])


def _adaptive_plan(options: DepthOptions, item: Described) -> Plan:
    return (recursive_plan if options.kind == RECURSIVE else routed_plan)(options, item)


def _plan(options: DepthOptions, item: Described) -> Plan:
    check_stock(item)
    gone = dropped_of(options, item.spec)
    data = None if options.data is None else Path(options.data).name
    said = {**asdict(options), "data": data, "blocks": list(gone)}
    notes = [*_on_search(options, data), _TUNE]
    return drop_plan(said, item, gone, notes=tuple(notes))


def _on_search(options: DepthOptions, data: str | None) -> list[str]:
    """Return who found the blocks, or that nobody has yet."""
    if not options.searches:
        return []
    if options.found is None:
        return [_UNSEARCHED]
    return [
        f"the blocks were found by a search ({options.search}, {options.fitness}) on "
        f"{options.data_tokens} tokens of {escape(data, 80)}: measure the result on another text"
    ]
