"""Publishing a checkpoint: checked here, compared with what is there, one commit, checked there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from adaconvert import __version__
from adaconvert.errors import OptionError, VerificationError
from adaconvert.export.hub_change import Change, change_of
from adaconvert.export.hub_errors import AGAIN, hub_talk
from adaconvert.export.hub_files import Contents, Part, read_contents
from adaconvert.export.hub_remote import Commit, Remote
from adaconvert.export.hub_result import PushResult
from adaconvert.export.hub_secrets import check_argument
from adaconvert.io.names import escape, listing

VERIFY: Final = ("full", "quick")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,199}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_MESSAGE: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """How a checkpoint is published.

    Attributes:
        private: who shall see the repository: True only its owner, False everybody, None what it
            is, and for a new one what its owner has set.
        revision: branch to commit to, made when it is missing; None for the main one.
        create_pr: open a pull request instead of changing the branch.
        commit_message: title of the commit; None for one that names the method.
        dry_run: check and list everything, but talk to no hub.
        verify: "full" reads all weights, "quick" only sizes and headers.
        allow_unverified: publish what was written with --no-verify.

    Raises:
        OptionError: a value is impossible, two do not fit together, or one holds a token.
    """

    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    dry_run: bool = False
    verify: str = "full"
    allow_unverified: bool = False

    def __post_init__(self) -> None:
        check_argument("--revision", self.revision)
        check_argument("--commit-message", self.commit_message)
        if self.verify not in VERIFY:
            raise OptionError(
                "is no way to verify",
                where="--verify",
                expected=" or ".join(VERIFY),
                found=escape(self.verify),
            )
        self._check_revision()
        message = self.commit_message
        if message is not None and not (
            message.strip() and message.isprintable() and len(message) <= _MAX_MESSAGE
        ):
            raise OptionError(
                "is no title",
                where="--commit-message",
                expected=f"one line of at most {_MAX_MESSAGE} characters",
            )

    def _check_revision(self) -> None:
        revision = self.revision
        if revision is None:
            return
        if not _REVISION.fullmatch(revision) or ".." in revision:
            raise OptionError(
                "is no name of a branch", where="--revision", found=f"'{escape(revision)}'"
            )
        if _COMMIT.fullmatch(revision):
            hint = "Name the branch that is to move."
            raise OptionError("is a commit, which cannot change", where="--revision", hint=hint)
        if self.create_pr and revision != "main":
            hint = "Leave out --revision; to go on with an open one, give its refs/pr/N alone."
            raise OptionError(
                "a pull request is always against the main branch", where="--create-pr", hint=hint
            )


def push(
    folder: str | Path,
    repo: str,
    options: PushOptions,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
) -> PushResult:
    """Return once the repository holds the checkpoint, file for file; see `api.push`."""
    say = report or (lambda line: None)
    where = _endpoint(endpoint)
    _check_repo(repo)
    contents = read_contents(
        _folder(folder),
        whole=options.verify == "full",
        allow_unverified=options.allow_unverified,
        progress=progress,
    )
    say(f"checked {len(contents.parts)} files ({options.verify})")
    if options.dry_run:
        return _result(contents, f"{where}/{repo}", None, private=options.private)
    with hub_talk(repo, has_token=_has_token(token)):
        remote = Remote(repo, revision=options.revision, endpoint=where, token=token)
        return _published(contents, remote, options, progress, say)


def _folder(folder: str | Path) -> Path:
    text = str(folder)
    check_argument("CKPT", text)
    # not echoed: it may hold a token
    if "://" in text:
        hint = "Give the folder adaconvert wrote."
        raise OptionError("a URL is no folder", where="CKPT", hint=hint)
    return Path(text).expanduser()


def _check_repo(repo: str) -> None:
    check_argument("ORG/NAME", repo)
    if "://" in repo:
        hint = "Give its name alone, such as org/name; HF_ENDPOINT names another hub."
        raise OptionError("a URL is no repository", where="ORG/NAME", hint=hint)
    odd = any(part in repo for part in ("..", "--")) or repo.endswith((".git", ".ipynb"))
    if odd or not _REPO.fullmatch(repo):
        raise OptionError(
            "is no repository of a hub",
            where="ORG/NAME",
            expected="a name such as org/name",
            found=f"'{escape(repo)}'",
        )


def _endpoint(endpoint: str | None) -> str:
    from huggingface_hub import constants

    where = str(endpoint or constants.ENDPOINT).rstrip("/")
    check_argument("HF_ENDPOINT" if endpoint is None else "endpoint", where)
    return where


def _has_token(token: str | None) -> bool:
    from huggingface_hub import get_token

    return bool(token or get_token())


def _published(
    contents: Contents,
    remote: Remote,
    options: PushOptions,
    progress: bool,
    say: Callable[[str], None],
) -> PushResult:
    private = remote.ensure(options.private, create=not options.create_pr)
    parent = remote.head()
    change = change_of(contents, remote, parent, proposal=options.create_pr, progress=progress)

    def result(url: str, commit: str, same: Sequence[Part]) -> PushResult:
        return _result(contents, url, commit, same=same, change=change, private=private)

    if not change.todo and not change.deleted:
        return result(remote.url(), parent, change.parts)
    message = options.commit_message or _message(contents)
    if options.create_pr:
        found = _proposed(remote, change, message)
        if found is not None:
            return result(found[1], remote.commit_of(found[0]), change.parts)
    say(f"sending {len(change.todo)} files to {remote.url()}")
    _check_unchanged(change.parts)
    done, hashes = remote.commit(
        change.todo,
        change.deleted,
        message=message,
        parent=parent,
        create_pr=options.create_pr,
        progress=progress,
    )
    change.hashes.update(hashes)
    _check_arrived(remote, done, change)
    return result(done.pull_request or remote.url(), done.oid, change.same)


def _message(contents: Contents) -> str:
    return f"{escape(contents.manifest['method'], 60)} by adaconvert {__version__}"


def _proposed(remote: Remote, change: Change, title: str) -> tuple[str, str] | None:
    """Return revision and URL of an open pull request that does the same already."""
    for revision, url in remote.open_pull_requests(title):
        if not change.missing(remote.tree(revision)):
            return revision, url
    return None


def _check_unchanged(parts: Sequence[Part]) -> None:
    changed = [part.name for part in parts if part.changed()]
    if changed:
        raise VerificationError(
            "changed while it was being pushed",
            where=listing(changed, 3),
            hint="Stop whatever writes to the folder and run the command again.",
        )


def _check_arrived(remote: Remote, done: Commit, change: Change) -> None:
    """Return only when the commit holds every file as it was checked here, and nothing stale."""
    _check_unchanged(change.parts)
    wrong = change.missing(remote.tree(done.revision))
    if wrong:
        raise VerificationError(
            f"commit {escape(done.oid)} does not hold what was sent: {listing(wrong, 5)}",
            where=remote.repo,
            hint=f"See whether a .gitignore there leaves files out. {AGAIN}",
        )


def _result(
    contents: Contents,
    url: str,
    commit: str | None,
    *,
    same: Sequence[Part] = (),
    change: Change | None = None,
    private: bool | None = None,
) -> PushResult:
    parts = contents.parts if change is None else change.parts
    return PushResult(
        url=url,
        commit=commit,
        files=tuple((part.name, part.nbytes) for part in parts),
        skipped=tuple(part.name for part in same),
        left_out={**contents.left_out, **(change.kept if change else {})},
        deleted=change.deleted if change else (),
        private=private,
        dry_run=change is None,
        notes=contents.notes,
    )
