"""The closed list of verbs a stage may have; a new one is an entry here and a call in `api.run`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.recipe import options
from adaconvert.recipe.options import CHECKPOINT, FILE, TEXT_SOURCE, TEXT_SOURCES, Option

_REPO: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
MAKES_CHECKPOINT: Final = "checkpoint"
MAKES_REPORT: Final = "report"
MAKES_REPOSITORY: Final = "repository"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """What a stage can do.

    Attributes:
        summary: one line about it.
        makes: a checkpoint that later stages go on from, a report, or a repository.
        table: its options by name; imports what it needs when it is called.
        check: holds options, every text and checkpoint named, to what the API accepts.
        several: it takes several checkpoints.
        needs: options it cannot do without.
    """

    summary: str
    makes: str
    table: Callable[[], dict[str, Option]]
    check: Callable[[Mapping[str, Any]], object]
    several: bool = False
    needs: tuple[str, ...] = ()


def _upcycle() -> dict[str, Option]:
    from adaconvert.methods.upcycle.config import UpcycleConfig

    roles = {"router_prompts": FILE, "base": CHECKPOINT}
    return options.options_of(UpcycleConfig, roles=roles, more=options.CONVERT)


def _moefy() -> dict[str, Option]:
    from adaconvert.methods.moefy.config import MoefyConfig

    return options.options_of(MoefyConfig, roles={"data": TEXT_SOURCE}, more=options.CONVERT)


def _unmoefy() -> dict[str, Option]:
    return dict(options.CONVERT)


def _d2dmoe() -> dict[str, Option]:
    from adaconvert.methods.d2dmoe.config import D2dmoeConfig

    roles = {"data": TEXT_SOURCE}
    return options.options_of(D2dmoeConfig, without=("work",), roles=roles, more=options.CONVERT)


def _adamoe() -> dict[str, Option]:
    from adaconvert.methods.adamoe.config import AdamoeConfig

    roles = {"data": TEXT_SOURCE, "router_prompts": FILE, "base": CHECKPOINT}
    return options.options_of(AdamoeConfig, roles=roles, more=options.CONVERT)


def _molora() -> dict[str, Option]:
    from adaconvert.methods.molora.config import MoloraOptions

    roles = {"data": TEXT_SOURCES, "base": CHECKPOINT}
    return options.options_of(MoloraOptions, without=("work",), roles=roles, more=options.CONVERT)


def _early_exit() -> dict[str, Option]:
    from adaconvert.methods.early_exit.config import EarlyExitOptions

    return options.options_of(
        EarlyExitOptions,
        roles={"draft_data": TEXT_SOURCE},
        counts=("draft_vocab",),
        more=options.CONVERT,
    )


def _depth() -> dict[str, Option]:
    from adaconvert.methods.depth.config import DepthOptions

    return options.options_of(
        DepthOptions, without=("found",), roles={"data": TEXT_SOURCE}, more=options.CONVERT
    )


def _finetune() -> dict[str, Option]:
    from adaconvert.train.config import FinetuneConfig

    return options.options_of(
        FinetuneConfig,
        without=("processes",),
        roles={"data": TEXT_SOURCES, "valid": TEXT_SOURCES, "teacher": CHECKPOINT},
        counts=("tokens", "steps"),
        more=options.FINETUNE,
    )


def _evaluate() -> dict[str, Option]:
    from adaconvert.evaluate.options import EvaluateOptions

    return options.options_of(
        EvaluateOptions,
        without=("out", "progress", "revision"),
        roles={"data": TEXT_SOURCES, "reference": CHECKPOINT},
        more=options.EVALUATE,
    )


def _calibrate() -> dict[str, Option]:
    from adaconvert.evaluate.calibration_data import Reading
    from adaconvert.evaluate.calibration_settings import CalibrationSettings

    own = options.options_of(CalibrationSettings, without=("reading", "progress"))
    reading = options.options_of(Reading, without=("progress",), roles={"data": TEXT_SOURCES})
    return {**reading, **own}


def _push() -> dict[str, Option]:
    from adaconvert.export.hub import PushOptions

    return {**options.PUSH, **options.options_of(PushOptions, without=("dry_run",))}


def _check_sizes(given: Mapping[str, Any]) -> None:
    from adaconvert.io.layout import parse_size

    parse_size(given.get("max_shard_size", "5GB"))
    if given.get("memory") is not None:
        parse_size(given["memory"], "--memory")


def _check_convert(method: str) -> Callable[[Mapping[str, Any]], object]:
    def check(given: Mapping[str, Any]) -> object:
        from adaconvert.methods.registry import make_config

        _check_sizes(given)
        own = {name: value for name, value in given.items() if name not in options.CONVERT}
        return make_config(method, own)

    return check


def _check_finetune(given: Mapping[str, Any]) -> object:
    from adaconvert.train.config import FinetuneConfig

    _check_sizes(given)
    own = {name: value for name, value in given.items() if name not in options.FINETUNE}
    return FinetuneConfig.of(own.pop("data", ()), own)


def _check_evaluate(given: Mapping[str, Any]) -> object:
    from adaconvert.evaluate.options import EvaluateOptions

    # one evaluation is made of each text
    own = {name: value for name, value in given.items() if name not in options.EVALUATE}
    own["data"] = next(iter(given.get("data", ())), None)
    made = EvaluateOptions(**own)
    made.check()
    return made


def _check_calibrate(given: Mapping[str, Any]) -> object:
    from adaconvert.evaluate.calibration_settings import CalibrationSettings

    own = dict(given)
    made = CalibrationSettings.of(own.pop("data", ()), own)
    made.check()
    return made


def _check_push(given: Mapping[str, Any]) -> object:
    from adaconvert.export.hub import PushOptions

    repo = str(given.get("repo", "org/name"))
    if not _REPO.fullmatch(repo):
        raise OptionError("is no repository", where="--repo", expected="org/name", found=repo[:80])
    return PushOptions(**{name: value for name, value in given.items() if name != "repo"})


VERBS: Final[dict[str, Verb]] = {
    "upcycle": Verb(
        summary="Turn dense checkpoints into a Mixture-of-Experts checkpoint.",
        makes=MAKES_CHECKPOINT,
        table=_upcycle,
        check=_check_convert("upcycle"),
        several=True,
    ),
    "moefy": Verb(
        summary="Split feed-forward networks into experts.",
        makes=MAKES_CHECKPOINT,
        table=_moefy,
        check=_check_convert("moefy"),
    ),
    "unmoefy": Verb(
        summary="Put a split checkpoint together again.",
        makes=MAKES_CHECKPOINT,
        table=_unmoefy,
        check=_check_convert("unmoefy"),
    ),
    "d2dmoe": Verb(
        summary="Split feed-forward networks and train routers that choose among the experts.",
        makes=MAKES_CHECKPOINT,
        table=_d2dmoe,
        check=_check_convert("d2dmoe"),
    ),
    "adamoe": Verb(
        summary="Let tokens that need less run fewer experts, by experts that compute nothing.",
        makes=MAKES_CHECKPOINT,
        table=_adamoe,
        check=_check_convert("adamoe"),
    ),
    "molora": Verb(
        summary="Put a mixture of low-rank adapters beside the linears of a model.",
        makes=MAKES_CHECKPOINT,
        table=_molora,
        check=_check_convert("molora"),
    ),
    "early-exit": Verb(
        summary="Give a model exits after some of its blocks.",
        makes=MAKES_CHECKPOINT,
        table=_early_exit,
        check=_check_convert("early-exit"),
    ),
    "depth": Verb(
        summary="Let tokens skip blocks, leave blocks out, or let blocks share matrices.",
        makes=MAKES_CHECKPOINT,
        table=_depth,
        check=_check_convert("depth"),
    ),
    "finetune": Verb(
        summary="Tune a checkpoint briefly on text.",
        makes=MAKES_CHECKPOINT,
        table=_finetune,
        check=_check_finetune,
        needs=("data",),
    ),
    "calibrate": Verb(
        summary="Measure compute and loss of an adaptive checkpoint, and set its default.",
        makes=MAKES_CHECKPOINT,
        table=_calibrate,
        check=_check_calibrate,
        needs=("data",),
    ),
    "evaluate": Verb(
        summary="Say how good a checkpoint is, and what it costs.",
        makes=MAKES_REPORT,
        table=_evaluate,
        check=_check_evaluate,
    ),
    "push": Verb(
        summary="Upload the checkpoint to a repository; without `repo` the stage is left out.",
        makes=MAKES_REPOSITORY,
        table=_push,
        check=_check_push,
    ),
}
