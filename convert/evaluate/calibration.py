"""`calibrate`: which setting of a model's knobs gives which compute and loss, and which to use.

1. On the ordering split every setting is measured, coarsely, then finely where the limit or the
   budget is crossed; thresholds are read off scores of this split too.
2. With a limit on the loss, settings are tested one by one on the testing split, from the most
   careful to the cheapest, until one fails; see `testing_sequence`. With a budget, the setting of
   least loss within it is taken and nothing is promised.
3. What is reported is measured on the evaluation split, which has chosen nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from adaconvert.arch.calibration import config_digest
from adaconvert.arch.registry import describe
from adaconvert.arch.trunk import check_trunk
from adaconvert.data.images import Images, read_images, takes_images
from adaconvert.errors import OptionError
from adaconvert.evaluate import calibration_output
from adaconvert.evaluate.calibration_data import Reading, check_enough, read_data
from adaconvert.evaluate.calibration_output import Checkpoint, open_checkpoint
from adaconvert.evaluate.calibration_result import CalibrationResult
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.depth_search import DepthSearch, check_depth_settings
from adaconvert.evaluate.exit_search import ExitSearch, check_exit_settings
from adaconvert.evaluate.expert_search import ExpertSearch
from adaconvert.evaluate.knob_groups import check_knob, moves_blocks
from adaconvert.evaluate.loaded import is_classifier
from adaconvert.evaluate.masking import is_masked
from adaconvert.evaluate.risk import Floats
from adaconvert.io.fs import FileSystem
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.configs import load_config
from adaconvert.modeling.adaptive_knobs import has_exits

_HIDDEN: Final = "loss and predictions are those of 15 % of the tokens, hidden from the model"
_LABEL_LOSS: Final = "loss is that of the label"
_CLASS_LOSS: Final = "loss is that of the class the model chooses with every expert on"


def calibrate(
    folder: str | Path,
    settings: CalibrationSettings,
    *,
    destination: str | Path | None = None,
    overwrite: bool = False,
    fs: FileSystem | None = None,
) -> CalibrationResult:
    """Return the calibration of a checkpoint, once it is written; see `api.calibrate`."""
    settings.check()
    checkpoint = open_checkpoint(folder)
    calibration_output.check_destination(checkpoint, destination, overwrite=overwrite)
    calibration_output.check_whole(checkpoint)
    check_knob(checkpoint.adaptive, settings.knob)
    search = _search(checkpoint, settings)
    if search is DepthSearch:
        check_depth_settings(settings)
    elif search is ExitSearch:
        check_exit_settings(settings)
        source = Source.open(checkpoint.folder)
        check_trunk(source, describe(source.config, source.tensors))
    single, masked = _kind(checkpoint, settings)
    config = load_config(Source.open(checkpoint.folder)) if single else None
    data = read_data(
        settings.reading,
        checkpoint.folder,
        settings.shares,
        whole=single,
        masked=masked,
        images=_images(checkpoint, settings.reading, config),
        config=config,
    )
    risk = settings.risk(single=single)
    if risk is not None:
        check_enough(data, risk, settings.shares, settings.promise)
    found = search(_loaded(checkpoint, settings), data, settings, risk).run()
    result = CalibrationResult(
        checkpoint=checkpoint.name,
        rows=found.rows,
        chosen=found.chosen,
        risk=None if risk is None else risk.to_json(),
        budget=settings.budget,
        split=data.split_json(settings.reading.seed),
        digests={
            "weights": checkpoint.weights_digest(),
            "config": config_digest(checkpoint.config),
            "data": data.digest,
        },
        configured=calibration_output.configured(checkpoint.adaptive),
        notes=(
            *found.notes,
            *calibration_output.reset_notes(checkpoint.adaptive, found.chosen),
            *([_CLASS_LOSS if data.labels is None else _LABEL_LOSS] if single else []),
            *([_HIDDEN] if masked else []),
        ),
    )
    # the default is what it is from now on
    config = calibration_output.calibrated_config(checkpoint.config, result)
    result = replace(result, digests={**result.digests, "config": config_digest(config)})
    calibration_output.write(checkpoint, result, destination, overwrite=overwrite, fs=fs)
    return result if destination is None else replace(result, checkpoint=Path(destination).name)


def _search(
    checkpoint: Checkpoint, settings: CalibrationSettings
) -> type[DepthSearch | ExitSearch | ExpertSearch]:
    """Return what tries the settings of a model."""
    if moves_blocks(checkpoint.adaptive, settings.knob):
        return DepthSearch
    return ExitSearch if has_exits(checkpoint.adaptive) else ExpertSearch


def measure_matrix(
    folder: str | Path, reading: Reading, shares: Sequence[float], *, batch: int | None = None
) -> tuple[Floats, Floats, list[str]]:
    """Return what `scripts/calibration_check.py` resamples; nothing is written.

    Args:
        folder: the checkpoint.
        reading: the data.
        shares: of the experts, each by the model's best rule.
        batch: blocks at a time.

    Returns:
        computes [S], rises in loss of every unit [S, units], and names [S]; row 0 is the reference.
    """
    settings = CalibrationSettings(reading=reading, batch_size=batch, progress=reading.progress)
    settings.check()
    checkpoint = open_checkpoint(folder)
    masked = _kind(checkpoint, settings)[1]
    data = read_data(reading, checkpoint.folder, settings.shares, masked=masked)
    return ExpertSearch(_loaded(checkpoint, settings), data, settings, None).matrix(shares)


def _kind(checkpoint: Checkpoint, settings: CalibrationSettings) -> tuple[bool, bool]:
    """Return whether the model classifies texts or images, and whether it predicts hidden tokens;
    otherwise it is a causal language model.

    Raises:
        OptionError: it is none of these, or is asked for what it cannot promise.
    """
    name = str((checkpoint.config.get("architectures") or [""])[0])
    if is_classifier(name):
        if settings.max_loss_increase is not None:
            raise OptionError(
                "is for language models, and this model chooses a class",
                where="--max-loss-increase",
                hint="Use --max-disagreement, the share of texts or images whose class changes, or "
                "with labelled data --max-label-error-increase.",
            )
        return True, False
    if settings.of_labels is not None:
        raise OptionError(
            "is for classifiers: a language model chooses tokens, which have no labels",
            where=settings.of_labels,
            hint="Use --max-loss-increase or --max-disagreement.",
        )
    masked = is_masked(name)
    if not masked and not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise OptionError(
            "only language models and classifiers can be calibrated",
            where=escape(name, 80),
            expected="...ForCausalLM, ...LMHeadModel, ...ForMaskedLM, "
            "...ForSequenceClassification or ...ForImageClassification",
            hint="Measure settings of `model.set_select(...)` and `model.set_compute(...)` on data "
            "of your own.",
        )
    return False, masked


def _images(checkpoint: Checkpoint, reading: Reading, config: Any) -> Images | None:
    """Return the images a classifier of images is calibrated on, None for a model of text."""
    if not takes_images(str((checkpoint.config.get("architectures") or [""])[0])):
        return None
    return read_images(
        reading.data,
        checkpoint.folder,
        config,
        field=reading.field,
        label_field=reading.label_field,
        split=reading.split,
        max_documents=reading.max_documents,
    )


def _loaded(checkpoint: Checkpoint, settings: CalibrationSettings) -> Any:
    """Return the model.

    Raises:
        OptionError: the device cannot be used.
        SourceError: it cannot be loaded.
    """
    from adaconvert.layerwise.quiet import quiet
    from adaconvert.modeling.loading import load_model

    device = settings.chosen_device()
    with quiet():
        return load_model(checkpoint.folder, dtype=settings.dtype, device=device)
