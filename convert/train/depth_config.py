"""What a fine-tune does about blocks that tokens may skip."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final

from adaconvert.train.bounds import flag, number, whole

#: option -> field of `Depthing`.
DEPTH_OPTIONS: Final = {
    "depth_compute": "compute",
    "depth_ramp": "ramp",
    "predictor_loss": "predictor",
    "adapter_loss": "adapter",
    "depth_fit": "fit",
}
DEPTH_FIT: Final = "--depth-fit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Depthing:
    """How blocks that tokens may skip learn.

    Attributes:
        compute: FLOPs per token the model is to spend at the end, as a fraction of the dense
            model's, head included. None: mixture-of-depths goes to the capacity it was made with,
            and other blocks keep the thresholds they have.
        ramp: share of the run over which skipping grows from what it is to that, in equal steps.
            None: at once where routers were fitted, else half; our choice.
        predictor: of mixture-of-depths: factor of the loss by which the causal predictor learns
            what the sequence's best tokens were; it reaches nothing but the predictor, or the
            router where that decides itself. None: 1 for a predictor, 0 for a router, which
            decides as well without and whose order of tokens the loss would change.
        adapter: of other blocks: factor of the loss by which what skipped tokens run instead learns
            what the block does, on all tokens, those that run it too. It reaches nothing else.
        fit: tokens of the run on which, before the first step, what skipped tokens run instead is
            fitted in closed form where it adds nothing yet, and routers where a budget is held and
            they tell no token from another yet; 0 for not. Our choice.
    """

    compute: float | None = None
    ramp: float | None = None
    predictor: float | None = None
    adapter: float = 1.0
    fit: int = 8192

    def __post_init__(self) -> None:
        if self.compute is not None:
            number("--depth-compute", self.compute, 0.0, 1.0, open_low=True)
        if self.ramp is not None:
            number("--depth-ramp", self.ramp, 0.0, 1.0)
        if self.predictor is not None:
            number("--predictor-loss", self.predictor, 0.0)
        number("--adapter-loss", self.adapter, 0.0)
        whole("depth_fit", self.fit, 0)

    @property
    def asked(self) -> list[str]:
        """Return the flags of what differs from the defaults."""
        usual = {item.name: item.default for item in fields(self)}
        return [
            flag(option)
            for option, name in DEPTH_OPTIONS.items()
            if getattr(self, name) != usual[name]
        ]

    def to_json(self) -> dict[str, Any]:
        """Return every option that decides the result."""
        return {item.name: getattr(self, item.name) for item in fields(self)}
