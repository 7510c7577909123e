"""Group J of the fault catalogue, run against a hub on this machine by the real client.

Rows that need no hub (names, the cache, what the client raises) are in tests/io/test_hub.py.
"""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from adaconvert import api
from adaconvert.cli.main import run
from adaconvert.errors import ResourceError, SourceError
from adaconvert.io import manifest
from adaconvert.io.hub import resolve
from adaconvert.io.source import Source
from adaconvert.testing.faults import refusal, write_sharded
from adaconvert.testing.hub_cache import COMMIT, build_hub_cache
from adaconvert.testing.hub_server import environment_of
from adaconvert.testing.hub_state import Fault, Hub, Repository
from adaconvert.testing.tiny_models import make

CANARY = "hf_CANARYCANARYCANARYCANARYCANARYCANARY"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
REPO = "org/tiny"


def upload(hub: Hub, folder: Path, repo: str = REPO) -> Repository:
    """Return a repository that holds the files of a folder."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return hub.create(repo, **files)


def on(part: str, fault: Fault, *, times: int = 1000) -> Callable[[str, str], Fault | None]:
    """Return what breaks the first `times` requests that are about `part`."""
    left = [fault] * times

    def broken(method: str, path: str) -> Fault | None:
        return left.pop() if part in path and left else None

    return broken


SAID = f"Bearer {CANARY} was not good enough"
FAILURES = [
    ("/api/models", Fault(status=401, message=SAID), 6, "the hub does not accept the token"),
    ("/create", Fault(status=403, message=SAID), 6, "the token may not write there: Bearer <token"),
    ("/preupload", Fault(status=404), 6, "the hub has no such repository, or the token may not"),
    ("/preupload", Fault(status=429), 6, "the hub takes no more requests for now (rate limit)"),
    ("/commit", Fault(status=500, message=SAID), 6, "the hub failed (status 500). Wait a little."),
    ("/commit", Fault(status=400, message=SAID), 6, "the hub refused it (status 400): Bearer <tok"),
    ("/commit", Fault(status=412, message=SAID), 4, "changed while files were being sent; nothing"),
    ("/batch", Fault(), 6, "the connection to the hub failed (RemoteProtocolError)"),
]


@pytest.mark.parametrize("verbose", [(), ("-vvv",)], ids=["plain", "vvv"])
@pytest.mark.parametrize(("part", "fault", "code", "message"), FAILURES)
@pytest.mark.usefixtures("no_waiting")
def test_j1_a_failing_request_does_not_show_the_token(
    hub: Hub,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    verbose: tuple[str, ...],
    part: str,
    fault: Fault,
    code: int,
    message: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.owners[CANARY] = {"org"}
    hub.fault = on(part, fault)
    assert run(["push", str(checkpoint), REPO, *verbose]) == code
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {REPO}: {message}")
    assert "Traceback" not in captured.err
    assert CANARY not in captured.out + captured.err + caplog.text


def test_j1_the_client_may_log_all_it_does(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    hub.owners = {CANARY: {"org"}}
    hub.fault = on("/commit", Fault(status=403, message=SAID))
    done = subprocess.run(
        [sys.executable, "-m", "adaconvert", "push", str(checkpoint), REPO, "-vvv"],
        env={**environment_of(hub, tmp_path / "home"), "HF_TOKEN": CANARY, "HF_DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 6
    assert "Request" in done.stderr, "the client did not log anything"
    assert CANARY not in done.stdout + done.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()


def test_j1_an_error_of_ours_blots_out_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(SourceError("bad", found=CANARY)) == "bad; found <token>"
    # a token of another hub looks like nothing in particular
    monkeypatch.setenv("HF_TOKEN", "s3cret-word")
    assert str(SourceError("bad", where="x-s3cret-word-y")) == "x-<token>-y: bad"


@pytest.mark.parametrize(
    "arguments",
    [
        ["push", "CKPT", f"https://x:{CANARY}@hf.co/org/tiny"],
        ["push", f"https://hf.co/{CANARY}", REPO],
        ["push", "CKPT", REPO, "--token", CANARY],
        ["push", "CKPT", REPO, f"--token={CANARY}"],
        ["push", "CKPT", REPO, "--commit-message", f"by {CANARY}"],
        ["push", "CKPT", REPO, "--revision", CANARY],
        ["push", "CKPT", CANARY],
        ["push", "CKPT", REPO, "--revison", CANARY],
        ["push", "CKPT", REPO, f"--{CANARY}"],
        ["inspect", f"https://x:{CANARY}@hf.co/org/tiny"],
        ["upcycle", f"https://x:{CANARY}@hf.co/org/tiny", "out"],
        [CANARY],
    ],
)
def test_j2_a_token_in_an_argument(
    hub: Hub, checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    filled = [str(checkpoint) if argument == "CKPT" else argument for argument in arguments]
    assert run(filled) == 2
    captured = capsys.readouterr()
    assert "error: " in captured.err
    assert CANARY not in captured.out + captured.err
    assert hub.requests == []


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny real model; read only."""
    return make("llama", tmp_path_factory.mktemp("dense") / "dense")


def test_j3_j4_what_is_written_names_the_commit_and_not_this_machine(
    hub: Hub, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.owners[CANARY] = set()
    for name in ("USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(name, f"canary-{name.lower()}")
    commit = upload(hub, dense, "org/dense").refs["main"]
    out = tmp_path / "out"
    done = api.convert("org/dense", destination=out, experts=2, top_k=1)
    source = manifest.read(out)["sources"]
    assert isinstance(source, list)
    assert (source[0]["label"], source[0]["revision"]) == ("org/dense", commit)
    assert f"no revision given, commit {commit} is used" in " ".join(done.lines())
    hidden = [CANARY, str(tmp_path), str(Path.cwd()), "canary-", getpass.getuser() + "@"]
    for path in out.iterdir():
        for word in [*hidden, f"/{socket.gethostname()}/"]:
            assert word.encode() not in path.read_bytes(), f"{path.name} holds {word}"
    assert [name for name, _ in api.push(out, REPO, dry_run=True).files] == sorted(
        path.name for path in out.iterdir()
    )


@pytest.mark.usefixtures("no_waiting")
def test_j5_a_download_that_broke_lists_what_is_missing(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, write_sharded(tmp_path / "plain", 3))
    hub.fault = on(SHARDS[1], Fault())
    with pytest.raises(ResourceError, match=f"^{REPO}: "):
        resolve(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    text = refusal(REPO)
    assert f"missing {SHARDS[1]}" in text or f"1 shard is missing: {SHARDS[1]}" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.fault = lambda method, path: None
    assert Source.open(REPO).files == tuple(SHARDS)


def test_j6_a_repository_that_is_not_given_out(hub: Hub, tmp_path: Path) -> None:
    upload(hub, write_sharded(tmp_path / "plain", 3)).gated = True
    assert refusal(REPO).startswith(f"{REPO}: the hub repository is gated. Accept its terms")
    expected = "no such folder, and no such hub repository. Check the spelling; for a private"
    assert refusal("org/none").startswith(f"org/none: {expected}")
    hub.create("org/secret", private=True)
    hub.owners.clear()
    hub.owners[os.environ["HF_TOKEN"]] = set()
    assert refusal("org/secret").startswith(f"org/secret: {expected}")


@pytest.mark.usefixtures("no_waiting")
def test_j6_a_hub_that_cannot_be_reached(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", nowhere)
        assert refusal(REPO, ResourceError) == (
            f"{REPO}: not in the hub cache, and the hub cannot be reached. Check the network, or "
            "give a folder."
        )
        with pytest.raises(ResourceError) as caught:
            api.push(checkpoint, REPO)
    assert str(caught.value) == (
        f"{REPO}: the connection to the hub failed (ConnectError). Check the network and "
        "HF_ENDPOINT. Run the same command again: what has arrived is not sent twice."
    )
    assert hub.requests == []


def test_j6_offline_is_offline(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError) as caught:
        api.push(checkpoint, REPO)
    assert str(caught.value) == f"{REPO}: offline mode is on. Unset HF_HUB_OFFLINE to push."
    assert hub.requests == []


def test_j6_without_a_token(
    hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ResourceError) as caught:
        api.push(checkpoint, REPO)
    assert str(caught.value) == (
        f"{REPO}: there is no token. Run `hf auth login`, or set HF_TOKEN to a token with write "
        "access."
    )


def test_j6_a_repository_of_somebody_else(hub: Hub, checkpoint: Path) -> None:
    with pytest.raises(ResourceError, match=r"other/tiny: the token may not write there: Forbid"):
        api.push(checkpoint, "other/tiny")


@pytest.mark.skipif(
    os.name != "posix" or not hasattr(constants, "HF_HUB_DISABLE_XET"), reason="needs a new client"
)
@pytest.mark.parametrize(
    "name", ["../../evil.json", "a/../../../evil.json", "..\\evil.json", "/evil.json", "C:\\x.json"]
)
def test_j7_a_listing_with_hostile_names(hub: Hub, tmp_path: Path, name: str) -> None:
    upload(hub, write_sharded(tmp_path / "plain", 3)).listed[name] = b"{}"
    before = {path for path in tmp_path.rglob("*") if "hub-cache" not in path.parts}
    text = refusal(REPO)
    assert text.startswith(
        f"{REPO}: the repository lists a file whose name leads out of its folder; found '"
    )
    assert {path for path in tmp_path.rglob("*") if "hub-cache" not in path.parts} == before
    assert not list(tmp_path.rglob("*evil*"))


def test_j8_a_cache_of_another_user(tmp_path: Path) -> None:
    # mode bits do not stop root, so a child gives its rights up after the imports;
    # tmp_path will not do, because only its owner may enter it
    code = """
import os, sys
from adaconvert.io.source import Source
Source.open(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
source = Source.open(sys.argv[1])
print(source.revision, len(source.tensors), os.access(sys.argv[2], os.W_OK))
"""
    plain = write_sharded(tmp_path / "plain", 3)
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) / "hub"
        build_hub_cache(cache, REPO, plain)
        folders = [Path(name), *(path for path in Path(name).rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", code, REPO, str(cache)],
            env={**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "HF_HOME": "/no"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        for folder in folders:
            folder.chmod(0o755)
    tensors = len(Source.open(plain).tensors)
    assert done.stdout.split() == [COMMIT, str(tensors), "False"], done.stderr
