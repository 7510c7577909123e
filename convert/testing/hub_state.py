"""What a hub on this machine holds: repositories, their commits and files, and who may write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field

#: the token of a hub's owner "org", as long as nobody changes `Hub.owners`.
TOKEN = "hf_TESTtestTESTtestTESTtestTESTtest00"


@dataclass(frozen=True, kw_only=True)
class File:
    """Content of one file, and whether it is stored beside git."""

    content: bytes
    large: bool

    @property
    def git(self) -> str:
        """Return the hash git gives it, or would give its pointer."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        """Return the sha256 of the content."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What a repository held at one time."""

    oid: str
    title: str
    parent: str | None
    files: dict[str, File]


@dataclass(kw_only=True)
class Repository:
    """A model repository.

    Attributes:
        private: only tokens of the hub see it.
        refs: commit of each branch and pull request.
        commits: all of them, by hash.
        pull_requests: titles, number 1 first.
        ignored: names its .gitignore leaves out.
        gated: its files are not given out.
        listed: names the listing shows beside the files.
    """

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    gated: bool = False
    listed: dict[str, bytes] = field(default_factory=dict)

    def add(self, ref: str, title: str, files: dict[str, File], parent: str | None) -> Commit:
        """Return a new commit, which `ref` is at from now on."""
        text = json.dumps([title, parent, len(self.commits), sorted(files)])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid=oid, title=title, parent=parent, files=files)
        self.refs[ref] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a pull request or a hash."""
        return self.commits.get(self.refs.get(revision, revision))

    def titles(self, ref: str = "main") -> list[str]:
        """Return the titles of the commits of a branch, the first one first."""
        found = []
        commit = self.at(ref)
        while commit is not None:
            found.append(commit.title)
            commit = self.commits.get(commit.parent or "")
        return found[::-1]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a request instead of an answer.

    Attributes:
        status: HTTP status to answer with; None drops the connection.
        message: what the answer says.
        after: the work is done first.
    """

    status: int | None = None
    message: str = ""
    after: bool = False


@dataclass(kw_only=True)
class Hub:
    """The state of a hub, and the log of what was asked.

    Attributes:
        url: where it listens.
        owners: the owners each token may write for.
        repositories: by "org/name".
        large: content of large files by sha256.
        requests: method and path of each request, in order.
        fault: decides for method and path whether a request fails.
    """

    url: str = ""
    owners: dict[str, set[str]] = field(default_factory=lambda: {TOKEN: {"org"}})
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    fault: Callable[[str, str], Fault | None] = lambda method, path: None

    def create(self, repo: str, *, private: bool = False, **files: bytes) -> Repository:
        """Return a new repository, whose first commit holds what a hub puts there and `files`."""
        found = self.repositories[repo] = Repository(private=private)
        first = {".gitattributes": File(content=b"*.safetensors filter=lfs\n", large=False)}
        first |= {name: File(content=content, large=False) for name, content in files.items()}
        found.add("main", "initial commit", first, None)
        return found

    def asked(self, method: str, part: str = "") -> list[str]:
        """Return the paths of the requests with that method that hold `part`."""
        return [path for how, path in self.requests if how == method and part in path]
