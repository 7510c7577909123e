"""What checkpoints to resume from hold, and what happens when they cannot be written.

A checkpoint holds what training changes, by its name in memory, and nothing else: frozen weights
come from the source again. So adapters are resumed as adapters, experts of stock mixtures as the
stacks they are in memory (Trainer's own resume leaves those as they were loaded: transformers
issue 48805), and sharded models as whole tensors.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from adaconvert.errors import ResourceError
from adaconvert.io.fs import free_bytes, resource_error
from adaconvert.train.ranks import Group
from adaconvert.train.shards import gathered, is_sharded, load_local_state, local_state, restore
from adaconvert.train.trainer import FinetuneTrainer
from adaconvert.train.work import Work
from adaconvert.units import human_bytes

WEIGHTS = "model.safetensors"
#: how writers that hide the system's reason say that a file could not be written.
_UNWRITTEN = (
    *("No space left", "File too large", "quota exceeded"),
    *("PytorchStreamWriter failed", "inline_container", "iostream error"),
)


class ResumableTrainer(FinetuneTrainer):
    """A `FinetuneTrainer` whose checkpoints are as the module says.

    Args:
        work: the folder they are in.
        group: the processes that train together.
        given: what `FinetuneTrainer` takes.
    """

    def __init__(self, *, work: Work, group: Group, **given: Any) -> None:
        self._work = work
        self._group = group
        super().__init__(**given)

    # -- writing

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write and mark the checkpoint of this step; every process waits for all of it."""
        step = self.state.global_step

        def write() -> None:
            name = f"checkpoint-{step}"
            with refusing(self._work, name):
                super(ResumableTrainer, self)._save_checkpoint(model, trial)
                if self.args.save_only_model:
                    self._save_optimizer_and_scheduler(str(self._work.path / name))
                    self._save_rng_state(str(self._work.path / name))

        self._group.together(write)
        self._group.on_main(lambda: self._work.completed(step))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what training changes."""
        state = gathered(self.model, keep=self.args.should_save)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if self._is_sharded:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(local_state(self.optimizer), folder / self._part)
        elif self.args.should_save:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        if self.args.should_save:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    # -- reading

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        restore(self.model, load_file(folder / WEIGHTS))
        self._restore_routing(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if self._is_sharded:
            state = torch.load(folder / self._part, map_location="cpu", weights_only=True)
            load_local_state(self.optimizer, state)
        else:
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))

    @property
    def _is_sharded(self) -> bool:
        return any(is_sharded(parameter) for parameter in self.model.parameters())

    @property
    def _part(self) -> str:
        return f"optimizer-{self._group.rank}.pt"


@contextmanager
def refusing(work: Work, name: str) -> Iterator[None]:
    """Turn what writers raise when a disk is full into an error that says how to go on.

    Args:
        work: the folder that is written into.
        name: of the folder in it.

    Raises:
        ResourceError: a file could not be written; that folder is gone, earlier ones are kept.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            message = resource_error(error, name).message
        elif any(text in str(error) for text in _UNWRITTEN):
            message = "cannot be written: the disk is full or a limit for files is reached"
        else:
            raise
        with suppress(OSError):
            shutil.rmtree(work.path / name)
        free = free_bytes(work.path)
        raise ResourceError(
            message,
            where=f"{work.path.name}/{name}",
            found=None if free is None else f"{human_bytes(free)} free",
            hint=f"Free some space. {work.hint()}",
        ) from error
