"""A Hugging Face hub on the loopback interface, in this process: what the real client asks of one.

Repositories, branches, pull requests, commits, large files (basic LFS, no Xet), downloads, tokens,
and faults on demand. Tests of pushing and of loading run the real client against it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

from adaconvert.testing.hub_state import TOKEN, Commit, File, Hub, Repository

_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@contextmanager
def serving() -> Iterator[Hub]:
    """Yield a hub that listens on a free port of 127.0.0.1 until the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def client_of(hub: Hub, cache: Path) -> Iterator[Hub]:
    """Within, `huggingface_hub` in this process talks to `hub`, with its token and a cache of its
    own."""
    # takes over at import what is changed below
    import datasets  # noqa: F401
    from huggingface_hub import close_session, constants

    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    with ExitStack() as stack:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            # this server has no Xet storage
            "HF_HUB_DISABLE_XET": True,
        }.items():
            stack.enter_context(patch.object(constants, name, value))
        stack.enter_context(patch.dict(os.environ, {"HF_TOKEN": TOKEN}))
        # a session remembers whether it may go online
        close_session()
        stack.callback(close_session)
        yield hub


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    """Return the variables with which another process talks to `hub`, and has no other cache."""
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }


class _RefusedError(Exception):
    def __init__(
        self, status: int, message: str, code: str | None = None, body: bytes | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    #: without it every second answer waits for an acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _handle(self) -> None:
        split = urlsplit(self.path)
        path = unquote(split.path)
        self.hub.requests.append((self.command, self.path))
        fault = self.hub.fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.status is None and not fault.after:
            # in the middle of what the client sends
            self.rfile.read(length // 2)
            self._drop()
            return
        body = self.rfile.read(length)
        try:
            if fault is not None and not fault.after:
                raise _RefusedError(fault.status or 500, fault.message)
            headers, answer = self._answer(path, parse_qs(split.query), body)
            if fault is not None:
                self._drop()
                return
            self._send(200, headers, answer)
        except _RefusedError as refused:
            extra = {"X-Error-Message": refused.message} if refused.message else {}
            if refused.code is not None:
                extra["X-Error-Code"] = refused.code
            answer = refused.body or json.dumps({"error": refused.message}).encode()
            self._send(refused.status, extra, answer)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, headers: dict[str, str], answer: bytes) -> None:
        self.send_response(status)
        named = {"Content-Type": "application/json", "Content-Length": str(len(answer)), **headers}
        for name, value in named.items():
            self.send_header(name, value.encode("latin-1", "replace").decode("latin-1"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _answer(
        self, path: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[dict[str, str], bytes]:
        method = "GET" if self.command == "HEAD" else self.command
        for how, pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and how == method:
                given = {key: value for key, value in match.groupdict().items() if value}
                result = getattr(self, name)(query=query, body=body, **given)
                if isinstance(result, tuple):
                    return result
                if result.get("errors") if isinstance(result, dict) else None:
                    raise _RefusedError(400, "", None, json.dumps(result).encode())
                return {}, json.dumps(result).encode()
        raise _RefusedError(404, "Not Found")

    # who asks

    def _owners(self) -> set[str] | None:
        """Return the owners the token may write for; None without a token."""
        sent = self.headers.get("Authorization")
        if sent is None:
            return None
        owners = self.hub.owners.get(sent.removeprefix("Bearer "))
        if owners is None:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return owners

    def _repository(self, repo: str, *, write: bool = False) -> Repository:
        owners = self._owners()
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not owners):
            status = 401 if owners is None else 404
            raise _RefusedError(status, "Repository not found", "RepoNotFound")
        if write:
            self._check_owner(repo, owners)
        return found

    def _check_owner(self, repo: str, owners: set[str] | None) -> None:
        if owners is None:
            raise _RefusedError(401, "Invalid username or password.")
        if repo.partition("/")[0] not in owners:
            message = "Forbidden: you don't have the right to write there"
            raise _RefusedError(403, message)

    def _commit(self, repo: str, revision: str) -> Commit:
        commit = self._repository(repo).at(revision)
        if commit is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # what is asked

    def create(self, *, query: object, body: bytes) -> object:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        self._check_owner(repo, self._owners())
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repositories:
            answer = json.dumps({"url": url, "error": "You already created this model repo"})
            raise _RefusedError(409, "", None, answer.encode())
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.create(repo, private=bool(private))
        return {"url": url, "name": repo}

    def info(self, *, query: object, body: bytes, repo: str, revision: str = "main") -> object:
        commit = self._commit(repo, revision)
        names = [{"rfilename": name} for name in commit.files]
        private = self.hub.repositories[repo].private
        return {"id": repo, "sha": commit.oid, "private": private, "siblings": names, "tags": []}

    def branch(self, *, query: object, body: bytes, repo: str, revision: str) -> object:
        found = self._repository(repo, write=True)
        found.refs[revision] = found.refs["main"]
        return {}

    def tree(self, *, query: object, body: bytes, repo: str, revision: str) -> object:
        files = dict(self._commit(repo, revision).files)
        for name, content in self.hub.repositories[repo].listed.items():
            files[name] = File(content=content, large=False)
        return [_entry(name, file) for name, file in files.items()]

    def validate(self, *, query: object, body: bytes) -> object:
        errors = []
        if "license: nonsense" in json.loads(body)["content"]:
            errors.append({"message": '"license" must be one of [apache-2.0]'})
        return {"errors": errors, "warnings": []}

    def preupload(self, *, query: object, body: bytes, repo: str, revision: str) -> object:
        files = self._commit(repo, revision).files
        ignored = self.hub.repositories[repo].ignored
        return {
            "files": [
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if asked["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": asked["path"] in ignored,
                    "oid": _oid(files.get(asked["path"])),
                }
                for asked in json.loads(body)["files"]
            ]
        }

    def batch(self, *, query: object, body: bytes, repo: str) -> object:
        sent = json.loads(body)
        # without a branch it is for a pull request, which everybody may open
        self._repository(repo, write="ref" in sent)
        objects = []
        for asked in sent["objects"]:
            found = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                found["actions"] = {"upload": {"href": f"{self.hub.url}/large/{asked['oid']}"}}
            objects.append(found)
        return {"transfer": "basic", "objects": objects}

    def upload(self, *, query: object, body: bytes, oid: str) -> object:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(400, "the content has another sha256")
        self.hub.large[oid] = body
        return {}

    def commit(
        self, *, query: dict[str, list[str]], body: bytes, repo: str, revision: str
    ) -> object:
        proposal = "create_pr" in query
        found = self._repository(repo, write=not proposal)
        if self._owners() is None:
            raise _RefusedError(401, "Invalid username or password.")
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        parent = self._commit(repo, revision)
        if not proposal and header.get("parentCommit", parent.oid) != parent.oid:
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = _applied(dict(parent.files), lines[1:], self.hub.large)
        if proposal:
            found.pull_requests.append(header["summary"])
            revision = f"refs/pr/{len(found.pull_requests)}"
        made = found.add(revision, header["summary"], files, parent.oid)
        url = f"{self.hub.url}/{repo}"
        return {
            "commitUrl": f"{url}/commit/{made.oid}",
            "commitOid": made.oid,
            "pullRequestUrl": f"{url}/discussions/{len(found.pull_requests)}",
        }

    def discussions(self, *, query: object, body: bytes, repo: str) -> object:
        found = self._repository(repo).pull_requests
        listed = [
            {
                "title": title,
                "num": number,
                "author": {"name": "somebody"},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo, "type": "model"},
                "isPullRequest": True,
            }
            for number, title in enumerate(found, 1)
        ]
        return {"discussions": listed, "count": len(listed), "start": 0}

    def resolve(
        self, *, query: object, body: bytes, repo: str, revision: str, name: str
    ) -> tuple[dict[str, str], bytes]:
        commit = self._commit(repo, revision)
        found = self.hub.repositories[repo]
        if found.gated:
            raise _RefusedError(403, "Access to model is restricted", "GatedRepo")
        listed = found.listed.get(name)
        file = commit.files.get(name) or (listed and File(content=listed, large=False))
        if not file:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {
            "Content-Type": "application/octet-stream",
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{_oid(file)}"',
            "Accept-Ranges": "bytes",
        }
        return headers, file.content


def _entry(name: str, file: File) -> dict[str, object]:
    entry: dict[str, object] = {
        "type": "file",
        "path": name,
        "size": len(file.content),
        "oid": file.git,
    }
    if file.large:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 135}
    return entry


def _oid(file: File | None) -> str | None:
    if file is None:
        return None
    return file.sha256 if file.large else file.git


def _applied(
    files: dict[str, File], lines: list[dict[str, dict[str, str]]], large: dict[str, bytes]
) -> dict[str, File]:
    for line in lines:
        key, value = str(line["key"]), line["value"]
        if key == "file":
            files[value["path"]] = File(content=base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            if value["oid"] not in large:
                raise _RefusedError(400, f"the content of {value['path']} never arrived")
            files[value["path"]] = File(content=large[value["oid"]], large=True)
        elif key == "deletedFile":
            files.pop(value["path"])
    return files


_API = rf"/api/models/{_REPO}"
_ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", _API, "info"),
    ("GET", rf"{_API}/revision/(?P<revision>.+)", "info"),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", "branch"),
    ("GET", rf"{_API}/tree/(?P<revision>refs/pr/\d+|[^/]+)", "tree"),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", "commit"),
    ("GET", rf"{_API}/discussions", "discussions"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<name>.+)", "resolve"),
)
