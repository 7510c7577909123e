"""A fine-tune that is killed with SIGKILL at a chosen moment, once for each moment on the command
line; every one happens in a forked child, so that torch is imported once.

    python killed_run.py SOURCE TEXT FOLDER OPTIONS.json MOMENT...
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of(moment: str) -> None:
    """Arrange for the process to be killed then."""
    from adaconvert.train import checkpoints
    from adaconvert.train.work import Work

    trainer: Any = checkpoints.ResumableTrainer
    kind, _, number = moment.partition("-")
    if kind == "batch":
        # counted over the whole run, three of them a step
        original, seen = trainer.training_step, [0]

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            found = original(self, *args, **kwargs)
            if seen[0] == int(number):
                kill()
            return found

        trainer.training_step = step
    elif kind == "weights":
        # the second checkpoint, of which half a file is there
        real, written = checkpoints.save_file, [0]

        def save(state: Any, path: Path) -> None:
            real(state, path)
            written[0] += 1
            if written[0] == int(number):
                os.truncate(path, path.stat().st_size // 2)
                kill()

        checkpoints.save_file = save
    elif kind == "mark":
        done, marked = Work.completed, [0]

        def completed(self: Any, step: int) -> None:
            marked[0] += 1
            if marked[0] == int(number):
                kill()
            done(self, step)

        Work.completed = completed  # type: ignore[method-assign]


def run(source: str, text: str, destination: Path, options: dict[str, Any]) -> None:
    from adaconvert.train.config import FinetuneConfig
    from adaconvert.train.run import RunSettings, finetune

    config = FinetuneConfig.of([text], options)
    finetune(source, config, RunSettings(destination=destination, device="cpu"))


def main(source: str, text: str, folder: str, options: str, *moments: str) -> None:
    import torch

    torch.set_num_threads(1)
    import adaconvert.train.checkpoints
    import adaconvert.train.run  # noqa: F401

    for moment in moments:
        child = os.fork()
        if not child:
            in_the_middle_of(moment)
            run(source, text, Path(folder) / moment, json.loads(options))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(f"{moment}: was not killed")


if __name__ == "__main__":
    main(*sys.argv[1:])
