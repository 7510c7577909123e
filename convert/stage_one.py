"""Stage 1 of `d2dmoe`: the dense model trained to be sparse, before it is split.

It is a fine-tune like any other, so it leaves a checkpoint folder of its own, which the other
stages take as their source.

Source: Szatkowski et al. 2024, 2310.04361, section 3.1 and its published scripts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.errors import InterruptedRunError, OptionError
from adaconvert.io.destination import Destination

#: options of stage 1, as `finetune` has them.
OPTIONS = (
    *("tokens", "steps", "activation", "activation_ramp", "sparsity", "sparsity_loss"),
    *("sparsity_norm", "sparsity_ramp", "distill", "lr", "seq_len", "batch_size", "accumulate"),
    *("precision", "checkpointing"),
)
#: what the published Gemma-2B scripts use; they do not distil.
DEFAULTS = {"activation": "relu", "sparsity": 1e-4}
#: how a run goes; a plan does not depend on it.
_UNPLANNED = ("overwrite", "resume", "progress", "verify", "memory", "probe", "allow_nonfinite")
_RUN = ("overwrite", "resume", "progress", "revision", "max_shard_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """The options of `d2dmoe`, stage 1 apart.

    Attributes:
        first: options of the fine-tune; None when stage 1 does not run.
        rest: options of the other stages, "stages" among them; no stage is an empty text there.
    """

    first: Mapping[str, Any] | None
    rest: Mapping[str, Any]

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Stages:
        """Return the options in two parts.

        Raises:
            OptionError: an option of stage 1 is given and stage 1 is not, or its budget or its text
                is missing.
        """
        given = {name: settings[name] for name in OPTIONS if settings.get(name) is not None}
        rest = {name: value for name, value in settings.items() if name not in OPTIONS}
        asked = str(settings.get("stages", "2,3,4")).split(",")
        if asked[0].strip() != "1":
            if given:
                name = next(iter(given))
                where = "--" + name.replace("_", "-")
                raise OptionError("only means something with stage 1", where=where)
            return cls(first=None, rest=rest)
        if not {"tokens", "steps"} & set(given):
            raise OptionError(
                "is missing: stage 1 trains the model", where="--tokens", expected="such as 20M"
            )
        if settings.get("data") is None:
            raise OptionError("is missing: stage 1 trains the model on text", where="--data")
        if not {"3", "5"} & {part.strip() for part in asked}:
            rest.pop("data")
        if rest.get("data_split") not in (None, "train"):
            raise OptionError("stage 1 trains on the split 'train'", where="--data-split")
        given["text_field"] = settings.get("data_field", "text")
        return cls(first={**DEFAULTS, **given}, rest={**rest, "stages": ",".join(asked[1:])})


def planned(stages: Stages) -> dict[str, Any]:
    """Return what a plan of the stages after the first takes."""
    return {name: value for name, value in stages.rest.items() if name not in _UNPLANNED}


def run(
    source: str,
    destination: Path,
    stages: Stages,
    text: str,
    *,
    tune: Callable[..., Any],
    convert: Callable[..., Any],
    seed: int,
    device: str,
    report: Callable[[str], None] | None,
) -> Any:
    """Return the result of the last stage.

    Args:
        source: dense or split checkpoint.
        destination: of the last stage.
        stages: with stage 1.
        text: what stage 1 trains on.
        tune, convert: `api.finetune` and the other stages of `api.d2dmoe`.
        seed, device: of every stage.
        report: takes one line per log step.

    Raises:
        InterruptedRunError: a signal stopped it; finished stages and checkpoints are kept.
    """
    assert stages.first is not None
    shared = {"data": [text], "seed": seed, "device": device, "report": report, **stages.first}
    running = {name: stages.rest[name] for name in _RUN if name in stages.rest}
    if not stages.rest["stages"]:
        return tune(source, destination, **shared, **running)
    target = Destination.resolve(destination)
    target.check_free(overwrite=bool(running.get("overwrite")))
    folder = target.path.with_name(f".{target.path.name[:200]}.stage1")
    running |= {"overwrite": False, "resume": True}
    try:
        tune(source, folder, **shared, **running)
        later = {**stages.rest, "revision": None, "resume": bool(stages.rest.get("resume"))}
        found = convert(folder, destination, **later)
    except InterruptedRunError as error:
        error.hint = "Run the same command again; what was finished is not done anew."
        raise
    shutil.rmtree(folder, ignore_errors=True)
    return found
