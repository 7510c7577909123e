"""Which knobs of a model a calibration moves, where there are knobs of two kinds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_output import of_blocks
from adaconvert.evaluate.sweep import Select
from adaconvert.evaluate.whole_compute import chooses
from adaconvert.io.names import escape
from adaconvert.modeling.adaptive_knobs import DEPTH, has_exits
from adaconvert.modeling.adaptive_schema import routed_layers, routed_specs

#: what may be moved: thresholds of blocks that tokens skip, or what experts run.
BLOCKS: Final = "depth"
EXPERTS: Final = "experts"
KNOBS: Final = (BLOCKS, EXPERTS)


def check_knob(adaptive: Mapping[str, Any], knob: str | None) -> None:
    """Return only when it is clear what a calibration moves.

    Raises:
        OptionError: exits come with knobs of another kind, or blocks and experts are there and
            none is named, or one is named where there is no choice.
    """
    depth, experts = bool(routed_layers(adaptive)), _has_experts(adaptive)
    if has_exits(adaptive) and (depth or routed_specs(adaptive)):
        other = "experts to choose" if routed_specs(adaptive) else "blocks that tokens skip"
        raise OptionError(
            f"the model has exits and {other}: only one of them can be calibrated",
            where="calibrate",
            hint="Calibrate the model without exits first, keep its chosen default, and set the "
            "thresholds of exits by `model.set_exits(...)`.",
        )
    if depth and experts:
        if knob not in KNOBS:
            raise OptionError(
                "the model has blocks that tokens skip and experts to choose: say which of them "
                "to calibrate; the others stay as they are configured",
                where="--knob",
                expected=" or ".join(KNOBS),
                found="none of them" if knob is None else escape(knob),
            )
    elif knob is not None:
        raise OptionError(
            "is for models with both blocks that tokens skip and experts to choose",
            where="--knob",
            found=escape(knob),
        )


def moves_blocks(adaptive: Mapping[str, Any], knob: str | None) -> bool:
    """Return whether thresholds of blocks are what is calibrated."""
    return bool(routed_layers(adaptive)) and knob != EXPERTS


def held(adaptive: Mapping[str, Any], knob: str | None) -> Select:
    """Return the selections, as stored now, of what a calibration leaves as it is."""
    if knob == BLOCKS:
        return {path: dict(spec["select"]) for path, spec in routed_specs(adaptive).items()}
    return {DEPTH: of_blocks(routed_layers(adaptive))} if knob == EXPERTS else {}


def _has_experts(adaptive: Mapping[str, Any]) -> bool:
    return any(chooses(spec) for spec in routed_specs(adaptive).values())
