"""What two processes run in test_distributed.py: fine-tunes one after the other, or one command.

torchrun ... distributed_cases.py CASES.json RESULTS.json
torchrun ... distributed_cases.py --fail-in-rank 1 -- finetune ARGUMENTS
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

RANK = int(os.environ["RANK"])
#: in place of a rank: the second process is killed.
KILLED = -1


def stop_at(step: int) -> Any:
    """Return a `training_step` that raises KeyboardInterrupt when a step is done."""
    from adaconvert.train.trainer import FinetuneTrainer

    original = FinetuneTrainer.training_step

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    FinetuneTrainer.training_step = patched  # type: ignore[method-assign]
    return original


def tune(case: dict[str, Any]) -> dict[str, Any] | None:
    from adaconvert.errors import InterruptedRunError
    from adaconvert.train.config import FinetuneConfig
    from adaconvert.train.run import RunSettings, finetune
    from adaconvert.train.trainer import FinetuneTrainer

    config = FinetuneConfig.of(case["data"], dict(case["options"]))
    place = {"destination": Path(case["destination"]), "device": "cpu"}
    if "stop" in case:
        original = stop_at(case["stop"])
        with suppress(InterruptedRunError):
            finetune(case["source"], config, RunSettings(**place))
        FinetuneTrainer.training_step = original  # type: ignore[method-assign]
    found: Any = finetune(case["source"], config, RunSettings(**place, resume="stop" in case))
    return {"curve": [dict(entry) for entry in found.curve], "summary": found.summary}


def fail_in(rank: int) -> None:
    """Let one process meet a loss that is no number."""
    from adaconvert.errors import TrainingError
    from adaconvert.train.trainer import FinetuneTrainer

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if rank == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        raise TrainingError("the loss is nan", where="step 1")

    if rank == RANK or (rank == KILLED and RANK == 1):
        FinetuneTrainer.compute_loss = failing  # type: ignore[method-assign]


def main(arguments: list[str]) -> None:
    if arguments[0] == "--fail-in-rank":
        from adaconvert.cli.main import run

        fail_in(int(arguments[1]))
        sys.exit(run(arguments[3:]))
    cases = json.loads(Path(arguments[0]).read_text())
    results = {case["name"]: tune(case) for case in cases}
    if RANK == 0:
        Path(arguments[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
