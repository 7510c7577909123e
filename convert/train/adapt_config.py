"""Options for what is trained instead of whole matrices, and for what a fine-tune runs on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.train.bounds import number, whole

#: matrices that adapters are put on, besides a regular expression for their names.
TARGETS: Final = ("experts", "attention", "all")
#: option -> field of `Adapting`.
ADAPT_OPTIONS: Final = {
    "lora": "rank",
    "lora_alpha": "alpha",
    "lora_targets": "targets",
    "load_in_4bit": "four_bit",
}
#: option -> field of `Machine`.
MACHINE_OPTIONS: Final = {
    "compile": "compiled",
    "fsdp": "sharded",
    "expert_parallel": "experts_over",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapting:
    """Low-rank adapters, trained in place of the matrices they sit on and added to them at the end.

    Attributes:
        rank: of the adapters; 0 for none.
        alpha: the product of the two factors is multiplied by alpha / rank; None for the rank, as
            in Hu et al. 2021, 2106.09685, section 4.1.
        targets: "experts", "attention", "all" (every matrix inside the blocks but routers), or a
            regular expression that matches somewhere in the name of a matrix; several add up.
        four_bit: keep the frozen matrices in 4 bits while training (NF4: Dettmers et al. 2023,
            2305.14314); the adapters are added to the matrices as they are stored, not as rounded.
    """

    rank: int = 0
    alpha: float | None = None
    targets: tuple[str, ...] = ("all",)
    four_bit: bool = False

    def __post_init__(self) -> None:
        whole("lora", self.rank, 0)
        if self.alpha is not None:
            number("--lora-alpha", self.alpha, 0.0, open_low=True)
        if not self.rank:
            self._check_unused()
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                where = f"--lora-targets {escape(target)}"
                raise OptionError(f"is no regular expression: {error}", where=where) from None
        if not self.targets:
            raise OptionError("nothing to adapt", where="--lora-targets")

    def _check_unused(self) -> None:
        if self.alpha is not None or self.targets != ("all",):
            flag = "--lora-alpha" if self.alpha is not None else "--lora-targets"
            raise OptionError("does nothing without --lora", where=flag)

    @property
    def scaled_by(self) -> float:
        """Return alpha."""
        return float(self.rank) if self.alpha is None else self.alpha

    def to_json(self) -> dict[str, Any]:
        """Return every option as JSON data."""
        return {**_values(self), "targets": list(self.targets)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """How the work is laid out; results agree up to rounding.

    Attributes:
        compiled: run the model through `torch.compile`.
        sharded: split weights, gradients and optimiser state over the processes (FSDP2).
        experts_over: processes that share the experts of each layer between them, 1 for none.
    """

    compiled: bool = False
    sharded: bool = False
    experts_over: int = 1

    def __post_init__(self) -> None:
        whole("expert_parallel", self.experts_over, 1)
        if self.sharded and self.experts_over > 1:
            raise OptionError(
                "cannot be combined with --fsdp",
                where="--expert-parallel",
                hint="It shards what is no expert over the processes already.",
            )
        if self.compiled and self.experts_over > 1:
            raise OptionError("cannot be combined with --expert-parallel", where="--compile")

    def check(self, processes: int) -> None:
        """Return only when the processes there are suit the layout.

        Raises:
            OptionError: they do not.
        """
        if processes == 1 and (self.sharded or self.experts_over > 1):
            flag = "--fsdp" if self.sharded else "--expert-parallel"
            raise OptionError(
                "needs several processes",
                where=flag,
                expected="2 or more",
                found=processes,
                hint="Run: torchrun --nproc-per-node N -m adaconvert finetune ...",
            )
        if processes % self.experts_over:
            raise OptionError(
                "does not divide the number of processes",
                where="--expert-parallel",
                expected=f"a divisor of {processes}",
                found=self.experts_over,
            )

    def to_json(self) -> dict[str, Any]:
        """Return every option as JSON data."""
        return _values(self)


def taken(options: Mapping[str, str], given: dict[str, Any]) -> dict[str, Any]:
    """Return field -> value for the options of a table, which leave `given`."""
    found = {options[name]: given.pop(name) for name in options if name in given}
    if isinstance(found.get("targets"), str):
        found["targets"] = (found["targets"],)
    elif "targets" in found:
        found["targets"] = tuple(found["targets"])
    return found


def _values(options: Any) -> dict[str, Any]:
    return {item.name: getattr(options, item.name) for item in fields(options)}
