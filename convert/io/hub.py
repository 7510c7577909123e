"""From what the user typed to a folder: an existing one, a hub cache snapshot, or a download."""

from __future__ import annotations

import os
import re
import stat
from fnmatch import fnmatch
from pathlib import Path

from adaconvert.errors import AdaconvertError, OptionError, ResourceError, SourceError
from adaconvert.io.names import escape, listing

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
_EITHER = "Give an existing folder, or a hub id of the form org/name."
_UNSAFE_NAME = re.compile(r"Invalid (?:filename|pointer path)[^']*'(?P<name>.*?)'", re.DOTALL)
_CACHE_FOLDER = re.compile(r"models--(?P<id>.+)")

#: what a dense checkpoint consists of, and the card that states its licence; never pickles, never
#: code
ALLOW_PATTERNS = (
    "README.md",
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
#: second copies of the weights that the index never names
IGNORE_PATTERNS = ("*.bin", "*.py", "original/*", "onnx/*", "consolidated*", "*.fp16.safetensors")


def resolve(where: str | Path, revision: str | None = None) -> tuple[Path, str, str | None]:
    """Return the folder `where` means, the label outputs may carry, and the revision if known.

    The label is a hub id or the name of a folder, never a path.

    Args:
        where: a folder, or a hub id such as "org/name".
        revision: branch, tag or commit; for hub ids only.

    Raises:
        OptionError: `where` is a URL or no name at all, or a revision was given for a folder.
        SourceError: no such folder, a file, or the hub has no such checkpoint or does not give it.
        ResourceError: the hub cannot be reached, or huggingface_hub is not installed.
    """
    text = str(where)
    # not echoed: it may hold a token
    if "://" in text:
        raise OptionError(
            "a URL is not a source", hint="Give a folder, or a hub id such as org/name."
        )
    path, status = _stat(text)
    if status and stat.S_ISDIR(status.st_mode):
        return _folder(path, revision)
    if status:
        raise SourceError(
            "is a file", where=escape(path.name), expected="a checkpoint folder or a hub id"
        )
    if not _HUB_ID.fullmatch(text):
        raise SourceError("no such folder", where=escape(text) or "''", hint=_EITHER)
    return _download(text, revision)


def _stat(text: str) -> tuple[Path, os.stat_result | None]:
    """Return the path `text` means and what lies there, None for nothing."""
    if not text:
        return Path(), None
    try:
        path = Path(text).expanduser()
        return path, path.stat()
    except PermissionError as error:
        raise ResourceError("no permission to reach it", where=escape(text)) from error
    # RuntimeError: "~nobody"; ValueError: a NUL; OSError also covers a name that is too long
    except (OSError, RuntimeError, ValueError):
        return Path(text), None


def _folder(path: Path, revision: str | None) -> tuple[Path, str, str | None]:
    absolute = path.absolute()
    real = path.resolve()
    match = _CACHE_FOLDER.fullmatch(real.parent.parent.name)
    if match and real.parent.name == "snapshots":
        if revision not in (None, real.name):
            raise _revision_for_folder(revision)
        return absolute, match["id"].replace("--", "/", 1), real.name
    if revision is not None:
        raise _revision_for_folder(revision)
    return absolute, absolute.name or real.name, None


def _revision_for_folder(revision: str | None) -> OptionError:
    return OptionError(
        "a revision selects a version of a hub id, the source is a folder",
        where="--revision",
        found=escape(revision),
    )


def _download(name: str, revision: str | None) -> tuple[Path, str, str | None]:
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise OptionError(
            "is not a branch, tag or commit", where="--revision", found=f"'{escape(revision)}'"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        hint = "Install huggingface_hub, or give a folder."
        raise ResourceError("huggingface_hub is not installed", where=name, hint=hint) from error
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(ALLOW_PATTERNS),
            ignore_patterns=list(IGNORE_PATTERNS),
        )
    # what the client raises differs between its versions, and all of it is about this one source
    except Exception as error:
        raise _hub_error(error, name, revision) from error
    path = Path(folder)
    return path, name, path.name


def _hub_error(error: Exception, name: str, revision: str | None) -> AdaconvertError:
    """Return one line for what huggingface_hub raised.

    Its own text is dropped: it can hold URLs and headers.
    """
    kinds = {cls.__name__ for cls in type(error).__mro__}
    at = f"{name}@{escape(revision)}" if revision else name
    if "GatedRepoError" in kinds:
        hint = "Accept its terms on the hub and log in with `hf auth login`."
        return SourceError("the hub repository is gated", where=at, hint=hint)
    if "RevisionNotFoundError" in kinds:
        return SourceError("the hub repository has no such revision", where=at)
    if kinds & {"RepositoryNotFoundError", "DisabledRepoError"}:
        hint = "Check the spelling; for a private repository log in with `hf auth login`."
        return SourceError("no such folder, and no such hub repository", where=at, hint=hint)
    if "IncompleteSnapshotError" in kinds:
        return _incomplete(error, name, revision, at)
    return _unreachable(error, kinds, at)


def _incomplete(error: Exception, name: str, revision: str | None, at: str) -> SourceError:
    """Return the error for a partly downloaded snapshot, with the files it lacks."""
    from huggingface_hub import get_cached_repo_tree

    root = Path(str(getattr(error, "snapshot_path", "")))
    paths = [entry.path for entry in get_cached_repo_tree(name, revision=revision)]
    missing = [path for path in paths if _wanted(path) and not (root / path).exists()]
    hint = "Run again with network access to fetch the rest."
    return SourceError(
        f"the cached snapshot is incomplete, missing {listing(missing)}", where=at, hint=hint
    )


def _wanted(path: str) -> bool:
    allowed = any(fnmatch(path, pattern) for pattern in ALLOW_PATTERNS)
    return allowed and not any(fnmatch(path, pattern) for pattern in IGNORE_PATTERNS)


def _unreachable(error: Exception, kinds: set[str], at: str) -> AdaconvertError:
    if "HFValidationError" in kinds:
        return SourceError("no such folder, and not a valid hub id", where=at)
    if kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "RevisionResolutionError"}:
        if _offline():
            hint = "Unset HF_HUB_OFFLINE to download it, or give a folder."
            return SourceError(
                "no such folder, and not in the hub cache (offline)", where=at, hint=hint
            )
        hint = "Check the network, or give a folder."
        return ResourceError(
            "not in the hub cache, and the hub cannot be reached", where=at, hint=hint
        )
    unsafe = _UNSAFE_NAME.match(str(error)) if isinstance(error, ValueError) else None
    if unsafe:
        return SourceError(
            "the repository lists a file whose name leads out of its folder",
            where=at,
            found=f"'{escape(unsafe['name'])}'",
            hint="Ask its owner to rename the file, or take another revision.",
        )
    if isinstance(error, PermissionError):
        return ResourceError(
            "the hub cache may not be written", where=at, hint="Set HF_HOME to another folder."
        )
    hint = "Check the network and the free space in the hub cache, then run again."
    return ResourceError(f"download failed ({type(error).__name__})", where=at, hint=hint)


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
