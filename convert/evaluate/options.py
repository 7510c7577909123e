"""What `evaluate` is asked to do, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaconvert.data.rows import TEXT_FIELD
from adaconvert.errors import OptionError
from adaconvert.io.names import escape

#: tokens of a block, as in `config.adaptive.reference`.
LENGTH = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What to measure, on what, and how.

    Attributes:
        data: text to measure on, see `read_documents`, or images, see `read_images`; None for tasks
            alone.
        field, label_field, split: where in the data text and label are.
        max_documents, max_tokens: where to stop, None for all of it.
        length: tokens of a block.
        seed: of the order of documents, which matters when `max_tokens` cuts.
        reference: checkpoint to compare with, usually the dense source.
        set_compute, select: settings to repeat everything at; none for as stored.
        device: torch name, None for the accelerator there is, else the CPU.
        dtype: torch name, "auto" for as stored.
        batch_size: blocks, texts or images of a batch; None for what fits.
        speed: measure tokens per second.
        tasks: of lm-evaluation-harness, by name or task file.
        task_limit: documents of each task, None for all.
        revision: of a hub id.
        out: new JSON file to write the results to as well.
        record: keep loss, perplexity and agreement in the checkpoint's manifest and card.
        progress: show progress bars on a terminal.
    """

    data: str | Path | None = None
    field: str = TEXT_FIELD
    label_field: str = "label"
    split: str | None = None
    max_documents: int | None = None
    max_tokens: int | None = None
    length: int = LENGTH
    seed: int = 0
    reference: str | Path | None = None
    set_compute: float | Sequence[float] = ()
    select: str | Sequence[str] = ()
    device: str | None = None
    dtype: str = "auto"
    batch_size: int | None = None
    speed: bool = True
    tasks: str | Sequence[str] = ()
    task_limit: int | None = None
    revision: str | None = None
    out: str | Path | None = None
    record: bool = False
    progress: bool = False

    def check(self) -> None:
        """Return only when the options make sense together.

        Raises:
            OptionError: they do not.
        """
        if self.data is None and not self.tasks:
            raise OptionError("there is nothing to measure on", hint="Give --data or --tasks.")
        if self.data is None and self.reference is not None:
            raise OptionError("compares text, and there is none: give --data", where="--reference")
        if self.data is None and self.record:
            raise OptionError("keeps what text shows: give --data", where="--record")
        least = {"max_documents": 1, "max_tokens": 2, "length": 2, "batch_size": 1, "task_limit": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise OptionError(
                    "is out of range",
                    where=f"--{name.replace('_', '-')}",
                    expected=f"{smallest} or more",
                    found=value,
                )
        if self.seed < 0:
            raise OptionError(
                "is out of range", where="--seed", expected="0 or more", found=self.seed
            )

    def chosen_device(self) -> str:
        """Return the device to run on.

        Raises:
            OptionError: torch knows none of that name, or it is not here.
        """
        import torch

        if self.device is None:
            found = torch.accelerator.current_accelerator(check_available=True)
            return "cpu" if found is None else str(found)
        try:
            return str(torch.empty(0, device=self.device).device)
        # what torch raises depends on how it was built
        except Exception as error:
            raise OptionError(
                "cannot be used", where="--device", found=f"'{escape(self.device, 40)}'"
            ) from error
