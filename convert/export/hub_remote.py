"""One repository of a hub: what it holds, and one commit that makes it hold a checkpoint.

Every request goes through `huggingface_hub`. Nothing here reads a folder or decides what is fit to
be published.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from adaconvert import __version__
from adaconvert.errors import OptionError, OutputConflictError, ResourceError
from adaconvert.export.hub_errors import status_of
from adaconvert.export.hub_files import Part
from adaconvert.io.names import escape

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

_MAIN = "main"
#: pull requests looked at to find one that holds the same files already.
_PULL_REQUESTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """One file of a repository: its size, and its sha256 or the hash git knows it by."""

    nbytes: int
    sha256: str | None
    git: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Where a commit is: its hash, the revision that shows it, and the pull request it opened."""

    oid: str
    revision: str
    pull_request: str | None


class Remote:
    """A model repository, and the token it is reached with.

    Args:
        repo: "org/name".
        revision: branch to commit to; None for the main one.
        endpoint: URL of the hub; None for the one of the environment.
        token: access token; None for the one of the environment or the login.
    """

    def __init__(
        self, repo: str, *, revision: str | None, endpoint: str | None, token: str | None
    ) -> None:
        from huggingface_hub import HfApi

        self.repo = repo
        self.revision = revision
        self.api: HfApi = HfApi(
            endpoint=endpoint,
            token=token,
            library_name="adaconvert",
            library_version=__version__,
        )

    def ensure(self, private: bool | None, *, create: bool) -> bool:
        """Return whether the repository is private; it exists, with the visibility asked for.

        Raises:
            OptionError: there is none, and `create` is False.
            OutputConflictError: it exists with the other visibility.
            ResourceError: it exists, but the token may not see it.
        """
        info = self._info()
        if info is None:
            if not create:
                hint = "Push without --create-pr first, or check the spelling."
                raise OptionError("there is no such repository", where=self.repo, hint=hint)
            self.api.create_repo(self.repo, private=private, exist_ok=True)
            info = self._info()
        if info is None:
            hint = "Use a token of its owner, or another name."
            raise ResourceError("exists, but the token may not see it", where=self.repo, hint=hint)
        found = bool(info.private)
        if private is not None and private != found:
            raise OutputConflictError(
                f"exists and is {'private' if found else 'public'}",
                where=self.repo,
                hint=f"Leave out {'--private' if private else '--public'}, or change who sees it "
                "in the settings of the repository.",
            )
        return found

    def _info(self) -> ModelInfo | None:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return self.api.model_info(self.repo)
        except RepositoryNotFoundError:
            # a hub says so, too, when the token is wrong; creating it tells the two apart
            return None

    def head(self) -> str:
        """Return the commit of the revision; a branch that is missing is made from the main one.

        Raises:
            OptionError: the revision is missing and no branch can have its name.
        """
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            return self.commit_of(self.revision)
        except RevisionNotFoundError:
            if str(self.revision).startswith("refs/"):
                raise OptionError(
                    "the repository has no such pull request or reference",
                    where="--revision",
                    found=escape(self.revision),
                ) from None
        self.api.create_branch(self.repo, branch=str(self.revision), exist_ok=True)
        return self.commit_of(self.revision)

    def commit_of(self, revision: str | None) -> str:
        """Return the commit a revision is at; None is the main branch."""
        info = self.api.model_info(self.repo, revision=revision)
        if info.sha is None:
            raise ResourceError("the hub does not tell the commit", where=self.repo)
        return info.sha

    def tree(self, revision: str) -> dict[str, Blob]:
        """Return the files of a revision by their path."""
        from huggingface_hub.hf_api import RepoFile

        found = {}
        for entry in self.api.list_repo_tree(self.repo, revision=revision, recursive=True):
            if isinstance(entry, RepoFile):
                large = entry.lfs
                found[entry.path] = Blob(
                    nbytes=entry.size,
                    sha256=None if large is None else large.sha256,
                    git=entry.blob_id if large is None else None,
                )
        return found

    def read(self, name: str, commit: str) -> bytes:
        """Return one small file of a commit."""
        with tempfile.TemporaryDirectory(prefix="adaconvert-") as folder, _no_bars():
            path = self.api.hf_hub_download(
                self.repo, name, revision=commit, local_dir=folder, force_download=True
            )
            return Path(path).read_bytes()

    def commit(
        self,
        parts: Sequence[Part],
        deleted: Sequence[str],
        *,
        message: str,
        parent: str,
        create_pr: bool,
        progress: bool,
    ) -> tuple[Commit, dict[str, str]]:
        """Return the one commit that adds `parts` and removes `deleted`, and what was sent.

        Args:
            parts: files to send; what has arrived in an earlier attempt is not sent again.
            deleted: files to remove.
            message: of the commit.
            parent: commit it follows; the hub refuses it when the branch is elsewhere by then.
            create_pr: open a pull request instead of changing the branch.
            progress: show the client's progress bars on a terminal.

        Returns:
            The commit, and the sha256 of each file as it was sent.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        added = [
            CommitOperationAdd(
                path_in_repo=part.name,
                path_or_fileobj=part.path if part.content is None else part.content,
            )
            for part in parts
        ]
        removed = [CommitOperationDelete(path_in_repo=name) for name in deleted]
        with _no_bars(progress):
            done = self.api.create_commit(
                self.repo,
                operations=[*removed, *added],
                commit_message=message,
                revision=None if create_pr else self.revision,
                create_pr=create_pr,
                parent_commit=parent,
            )
        sent = {addition.path_in_repo: addition.upload_info.sha256.hex() for addition in added}
        return Commit(
            oid=done.oid, revision=done.pr_revision or done.oid, pull_request=done.pr_url
        ), sent

    def open_pull_requests(self, title: str) -> Iterator[tuple[str, str]]:
        """Yield revision and URL of the open pull requests of that title, the newest first."""
        try:
            found = list(
                islice(
                    (
                        item
                        for item in self.api.get_repo_discussions(
                            self.repo, discussion_type="pull_request", discussion_status="open"
                        )
                        if item.title == title
                    ),
                    _PULL_REQUESTS,
                )
            )
        except OSError as error:
            # discussions may be switched off; then there is none to find
            if status_of(error) not in (403, 404):
                raise
            found = []
        for item in found:
            yield f"refs/pr/{item.num}", f"{self.url()}/discussions/{item.num}"

    def url(self) -> str:
        """Return the page of the repository, or of its branch."""
        page = f"{self.api.endpoint}/{self.repo}"
        return page if self.revision in (None, _MAIN) else f"{page}/tree/{self.revision}"


@contextmanager
def _no_bars(progress: bool = False) -> Iterator[None]:
    """Within, the client shows no progress bars, unless `progress` and somebody can see them."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if (progress and sys.stderr.isatty()) or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


class Hashes(dict[str, str]):
    """The sha256 of files by name; a file is read at most once, and only when it is asked for."""

    def of(self, part: Part) -> str:
        """Return the sha256 of a file."""
        if part.name not in self:
            self[part.name] = _sha256(part)
        return self[part.name]


def is_same(part: Part, blob: Blob | None, hashes: Hashes) -> bool:
    """Return whether a repository holds exactly a file.

    Args:
        part: the file here.
        blob: the file there, None when it is not there.
        hashes: of files here; weights are read only when nothing else tells.
    """
    if blob is None or blob.nbytes != part.nbytes:
        return False
    if blob.sha256 is not None:
        return hashes.of(part) == blob.sha256
    content = part.path.read_bytes() if part.content is None else part.content
    # the hash git gives a file
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return git.hexdigest() == blob.git


def _sha256(part: Part) -> str:
    if part.content is not None:
        return hashlib.sha256(part.content).hexdigest()
    with part.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
