"""What a fine-tune does about early exits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.train.bounds import among, flag, number, whole

EXIT_LOSSES: Final = ("ce", "kd", "both")
WEIGHTS: Final = ("uniform", "linear")
NONE, GRADUAL, ROTATIONAL = "none", "gradual", "rotational"
#: option -> field of `Exiting`.
EXIT_OPTIONS: Final = {
    "exit_loss": "loss",
    "exit_weights": "weights",
    "exit_layers": "layers",
    "exit_chunk": "chunk",
    "early_exit_loss": "scale",
    "layer_dropout": "dropout",
    "exit_curriculum": "curriculum",
    "exit_objective": "objective",
    "objective_factor": "factor",
    "halting_prior": "prior",
    "halting_cost": "cost",
}
#: those of classifiers, all others being of language models.
OF_CLASSIFIERS: Final = ("objective", "factor", "prior", "cost")
OBJECTIVES: Final = ("weighted", "geometric", "ponder")
#: of a trained trunk: a quarter of the blocks weighs 0.1 and half of them 0.2 in EE-LLM's script
#: for 7B (2312.04916).
TRUNK_WEIGHT: Final = 0.4
_ROTATIONAL = re.compile(r"rotational:([1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exiting:
    """How exits learn.

    Attributes:
        loss: of each exit: "ce", next tokens (EE-Tuning, 2402.00518); "kd", divergence from what
            the last layer of the same pass predicts, which learns nothing from it (FREE,
            2310.05424); "both", their sum.
        weights: of the exits' losses: "uniform", 1 each; "linear", blocks before it / L (CALM,
            2207.07061, PABEE, 2006.04152); or one number for each, by place, all 0 for none. None:
            1 each while the trunk is frozen (EE-Tuning), 0.4 x blocks / L where it learns too
            (EE-LLM, 2312.04916, whose 7B script has 0.1 at a quarter and 0.2 at half).
        layers: blocks before the exits that learn; None for every exit there is, and with `scale`
            on a checkpoint without exits for every block.
        chunk: positions whose logits exist at a time; changes nothing but memory and speed.
        scale: e_scale of LayerSkip's early-exit loss (2404.16710, section 4.1.2), 0 for none: every
            block exits through the final norm and head, which learn together with all blocks.
        dropout: p_max of LayerSkip's layer dropout: block l is left out of a sequence with
            probability p_max (2^(l / (L - 1)) - 1).
        curriculum: which blocks' exits count at a step: "none", all; "rotational:R", every R-th,
            shifted by one each step; "gradual", from the last down, all from half the steps on.
        objective, factor, prior, cost: of classifiers, see `exit_classifiers.Objective`, whose
            `kind` the first is; None for what that has.
    """

    loss: str = "ce"
    weights: str | None = None
    layers: tuple[int, ...] | None = None
    chunk: int = 256
    scale: float = 0.0
    dropout: float = 0.0
    curriculum: str = NONE
    objective: str | None = None
    factor: float | None = None
    prior: float | None = None
    cost: float | None = None

    def __post_init__(self) -> None:
        among("--exit-loss", self.loss, EXIT_LOSSES)
        whole("exit_chunk", self.chunk, 1)
        number("--early-exit-loss", self.scale, 0.0)
        number("--layer-dropout", self.dropout, 0.0, 1.0)
        if self.weights is not None and self.weights not in WEIGHTS:
            self.listed()
        if self.rotation == 0:
            raise OptionError(
                "is unknown",
                where="--exit-curriculum",
                expected="none, gradual or rotational:R",
                found=escape(str(self.curriculum)),
            )
        self._check_objective()
        for layer in self.layers or ():
            whole("exit_layers", layer, 1)
        if self.layers is not None and (
            not self.layers or list(self.layers) != sorted(set(self.layers))
        ):
            raise OptionError(
                "are not ascending, each once",
                where="--exit-layers",
                found=", ".join(map(str, self.layers)) or "none",
            )
        self._check_together()

    def _check_objective(self) -> None:
        """Each number means something to the objectives that use it only."""
        if self.objective is not None:
            among("--exit-objective", self.objective, OBJECTIVES)
        uses = {"factor": ("geometric", "ponder"), "prior": ("ponder",), "cost": ("geometric",)}
        for name, kinds in uses.items():
            value, where = getattr(self, name), flag_of(name)
            if value is None:
                continue
            number(
                where, value, 0.0, 1.0 if name == "prior" else math.inf, open_low=name == "prior"
            )
            if self.objective not in kinds:
                wanted = " or ".join(f"--exit-objective {kind}" for kind in kinds)
                raise OptionError(f"does nothing without {wanted}", where=where)

    def _check_together(self) -> None:
        if self.curriculum != NONE and not self.scale:
            raise OptionError("does nothing without --early-exit-loss", where="--exit-curriculum")
        if self.scale and self.weights is not None:
            raise OptionError(
                "cannot be combined with --early-exit-loss, which has weights of its own",
                where="--exit-weights",
            )
        if self.scale and self.loss != "ce":
            raise OptionError(
                "cannot be combined with --early-exit-loss, which is of next tokens",
                where=f"--exit-loss {self.loss}",
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Exiting:
        """Return what options with the names of `EXIT_OPTIONS` ask for.

        Raises:
            OptionError: a value is wrong.
        """
        given = {EXIT_OPTIONS[name]: value for name, value in options.items()}
        if isinstance(given.get("weights"), Sequence) and not isinstance(given["weights"], str):
            given["weights"] = ",".join(map(str, given["weights"]))
        elif "weights" in given:
            given["weights"] = str(given["weights"])
        if "layers" in given:
            given["layers"] = _layers(given["layers"])
        return cls(**given)

    @property
    def skips(self) -> bool:
        """Return whether anything of LayerSkip is asked for."""
        return bool(self.scale or self.dropout)

    @property
    def rotation(self) -> int:
        """Return R of a rotational curriculum, 1 for another, 0 where it is none that is known."""
        found = _ROTATIONAL.fullmatch(self.curriculum)
        if found:
            return int(found[1])
        return 1 if self.curriculum in (NONE, GRADUAL) else 0

    @property
    def asked(self) -> list[str]:
        """Return the flags of what differs from the defaults."""
        usual = {item.name: item.default for item in fields(self)}
        return [flag_of(name) for name in usual if getattr(self, name) != usual[name]]

    def listed(self) -> tuple[float, ...]:
        """Return the weights as numbers.

        Raises:
            OptionError: they are none.
        """
        try:
            found = tuple(float(part) for part in str(self.weights).split(","))
        except ValueError:
            raise OptionError(
                "is no list of numbers",
                where="--exit-weights",
                expected="uniform, linear, or a number for each exit such as 0.1,0.2",
                found=escape(str(self.weights)),
            ) from None
        for value in found:
            number("--exit-weights", value, 0.0)
        return found

    @property
    def is_off(self) -> bool:
        """Return whether no exit is to have a loss."""
        listed = self.weights is not None and self.weights not in WEIGHTS
        return listed and not any(self.listed())

    def weights_of(self, places: Sequence[int], layers: int, *, frozen: bool) -> dict[int, float]:
        """Return the factor of each exit's loss.

        Args:
            places: blocks before each exit.
            layers: L.
            frozen: the trunk is.

        Raises:
            OptionError: there are not as many numbers as exits.
        """
        if self.weights is None:
            return {at: 1.0 if frozen else TRUNK_WEIGHT * at / layers for at in places}
        if self.weights in WEIGHTS:
            return {at: 1.0 if self.weights == "uniform" else at / layers for at in places}
        listed = self.listed()
        if len(listed) == 1:
            return dict.fromkeys(places, listed[0])
        if len(listed) != len(places):
            raise OptionError(
                "needs a number for each exit that learns",
                where="--exit-weights",
                expected=f"{len(places)}, of the exits at {', '.join(map(str, places))}",
                found=len(listed),
            )
        return dict(zip(places, listed, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Return every option that decides the result."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        del found["chunk"]
        return found | {"layers": None if self.layers is None else list(self.layers)}


def flag_of(field: str) -> str:
    """Return the flag of a field of `Exiting`."""
    return next(flag(name) for name, own in EXIT_OPTIONS.items() if own == field)


def _layers(given: Any) -> tuple[int, ...]:
    """Return the numbers of `8,16` or of a sequence."""
    parts = given.split(",") if isinstance(given, str) else given
    parts = [parts] if isinstance(parts, int) else list(parts)
    try:
        return tuple(int(part) for part in parts)
    except (TypeError, ValueError):
        raise OptionError(
            "is no list of blocks",
            where="--exit-layers",
            expected="numbers such as 8,16",
            found=escape(str(given)),
        ) from None
