"""What a fine-tune would do, said before it does anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.train.config import FinetuneConfig

if TYPE_CHECKING:
    from adaconvert.train.memory_advice import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetunePlan:
    """A fine-tune that was not run.

    Attributes:
        destination: where the result would be.
        config: the fine-tune.
        budget: what it needs in memory, and what there is.
    """

    destination: Path
    config: FinetuneConfig
    budget: Budget

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON data."""
        return {
            "destination": self.destination.name,
            "dry_run": True,
            "memory": self.budget.to_json(),
            "options": self.config.to_json(),
            "save_steps": self.config.save_steps,
            "steps": self.config.total_steps,
            "tokens": self.config.total_steps * self.config.step_tokens,
            **self._parts(),
        }

    def lines(self) -> list[str]:
        """Return the plan as text."""
        config, parts = self.config, self._parts()
        named = ", ".join(f"{part} {count}" for part, count in parts["by_part"].items())
        many = f" in {config.processes} processes" if config.processes > 1 else ""
        kept = f"every {config.save_steps} steps" if config.save_steps else "none"
        tokens = config.total_steps * config.step_tokens
        return [
            f"train       {parts['trained']} of {parts['trained'] + parts['frozen']} parameters "
            f"({named})",
            f"steps       {config.total_steps} of {config.batch_size} x {config.accumulate} "
            f"sequences of {config.seq_len} tokens{many}, {tokens} tokens",
            f"data        {', '.join(source.label for source in config.data)}",
            f"checkpoints {kept}",
            *self.budget.lines(),
            f"nothing was written; {self.destination} would be",
        ]

    def _parts(self) -> dict[str, Any]:
        chosen = self.budget.need.chosen
        if chosen is None:
            return {"trained": 0, "frozen": 0, "by_part": {}}
        return {
            "trained": chosen.trained,
            "frozen": chosen.frozen,
            "by_part": dict(chosen.by_part),
        }


def plan_of(config: FinetuneConfig, destination: Path, budget: Budget) -> FinetunePlan:
    """Return the plan of a fine-tune."""
    return FinetunePlan(destination=destination, config=config, budget=budget)
