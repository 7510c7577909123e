"""From a checkpoint to the hub: its card, the upload, and recipes that do all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.api.converting import convert, unmoefy
from adaconvert.api.measuring import calibrate, evaluate
from adaconvert.api.paths import PathLike
from adaconvert.api.training import d2dmoe, finetune

if TYPE_CHECKING:
    from adaconvert.export.hub_result import PushResult
    from adaconvert.export.recard import CardResult
    from adaconvert.running.result import RunResult


def card(folder: PathLike, *, overwrite: bool = False) -> CardResult:
    """Return once a checkpoint has the card that its manifest and config.json tell.

    Args:
        folder: a checkpoint adaconvert wrote; updated as a whole or not at all.
        overwrite: also write a card anew that was edited; otherwise it stays as it is.

    Raises:
        OptionError: it is no folder (exit code 2).
        SourceError: its config.json is damaged (3).
        OutputConflictError: it holds files adaconvert did not write (4).
        VerificationError: its manifest is missing, damaged or was edited (5).
        ResourceError: disk or permissions do not suffice (6).
    """
    from adaconvert.export.recard import renew_card

    return renew_card(Path(folder), overwrite=overwrite)


def push(
    folder: PathLike,
    repo: str,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> PushResult:
    """Return once a hub's repository holds the checkpoint, file for file, in one commit.

    Args:
        folder: a checkpoint adaconvert wrote, complete and unchanged; the card may be edited.
        repo: "org/name"; made when it does not exist.
        token: access token; the one of HF_TOKEN or of the login when None.
        endpoint: URL of the hub; the one of HF_ENDPOINT when None.
        progress: show progress bars on a terminal.
        report: takes a line before each step.
        options: fields of `export.hub.PushOptions`: `private`, `revision`, `create_pr`,
            `commit_message`, `dry_run`, `verify`, `allow_unverified`.

    Raises:
        OptionError: an option is wrong, holds a token, or the branch cannot be (exit code 2).
        SourceError: adaconvert did not write the folder (3).
        OutputConflictError: the repository is public where private was asked for or the other way
            round, holds somebody else's checkpoint, or changed meanwhile (4).
        VerificationError: the folder is unverified, incomplete, altered, or holds a token or a path
            of this machine; or the hub does not hold what was sent (5).
        ResourceError: the token, the network or the hub does not suffice (6).
        InterruptedRunError: a signal stopped it, nothing was committed; a second run goes on (130).
    """
    from adaconvert.export.hub import PushOptions
    from adaconvert.export.hub import push as run

    return run(
        folder,
        repo,
        PushOptions(**options),
        token=token,
        endpoint=endpoint,
        progress=progress,
        report=report,
    )


def run(
    recipe: PathLike,
    source: PathLike | None = None,
    destination: PathLike | None = None,
    *,
    settings: Sequence[str] = (),
    work: PathLike | None = None,
    from_stage: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> RunResult:
    """Return once every stage of a recipe is done; stages that nothing has changed are not redone.

    Args:
        recipe: file, or name of a shipped recipe such as "upcycle/smollm2-135m".
        source: checkpoint to start from; the recipe's own when None.
        destination: folder of the last checkpoint; named after source and method when None.
        settings: values to change, each "path=value" such as "tune.tokens=5M".
        work: folder of the stages; one beside the destination when None.
        from_stage: do this stage and those after it again.
        overwrite: replace a destination that adaconvert wrote in another run.
        dry_run: only plan.
        progress: show progress bars on a terminal.
        report: takes the plan, then what the stages say, line by line.

    Raises:
        OptionError: the recipe is wrong, or a stage cannot be done (exit code 2).
        InterruptedRunError: a signal stopped it; the same call goes on from there (130).
        AdaconvertError: as the functions its stages are.
    """
    from adaconvert.running.job import Request
    from adaconvert.running.run import run as run_recipe

    request = Request(
        recipe=str(recipe),
        source=None if source is None else str(source),
        destination=None if destination is None else Path(destination),
        settings=tuple(settings),
        work=None if work is None else Path(work),
        from_stage=from_stage,
        overwrite=overwrite,
        dry_run=dry_run,
        progress=progress,
        report=report or (lambda line: None),
    )
    calls = (convert, unmoefy, d2dmoe, finetune, calibrate, evaluate, card, push)
    return run_recipe(request, {call.__name__: call for call in calls})
