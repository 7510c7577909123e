"""Experiment trackers: which there are, what they need, and where TensorBoard's logs go."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.io.names import escape

#: name -> packages of which one must be installed, as transformers' integrations ask for them.
TRACKERS: Final = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
_SUFFIX = ".logs"


def check_trackers(names: Sequence[str]) -> None:
    """Return only when every tracker is known and its package installed.

    Raises:
        OptionError: one is not.
    """
    for name in names:
        where = f"--report-to {escape(name)}"
        if name not in TRACKERS:
            raise OptionError("is unknown", where=where, expected=", ".join(TRACKERS))
        if not any(util.find_spec(package) for package in TRACKERS[name]):
            package = TRACKERS[name][0]
            raise OptionError(
                f"the package {package} is not installed",
                where=where,
                hint=f"Run: pip install {package}",
            )


def log_folder(destination: Path, given: Path | None) -> Path:
    """Return where logs that are files go: the folder given, or one beside the destination."""
    return destination.with_name(f"{destination.name}{_SUFFIX}") if given is None else given


def log_into(trainer: Any, folder: Path) -> None:
    """Make the trainer's TensorBoard write into `folder`, not into what goes when it ends."""
    for callback in trainer.callback_handler.callbacks:
        if hasattr(callback, "logging_dir"):
            callback.logging_dir = str(folder)
