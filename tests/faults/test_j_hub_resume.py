"""Group J of the fault catalogue, row 9: a push that broke is taken up, against a hub on this
machine."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adaconvert import api
from adaconvert.errors import ResourceError
from adaconvert.testing.hub_server import environment_of
from adaconvert.testing.hub_state import Fault, Hub

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
REPO = "org/tiny"


def on(part: str, fault: Fault, *, times: int = 1000) -> Callable[[str, str], Fault | None]:
    """Return what breaks the first `times` requests that are about `part`."""
    left = [fault] * times

    def broken(method: str, path: str) -> Fault | None:
        return left.pop() if part in path and left else None

    return broken


def last_sent(folder: Path) -> str:
    """Return the sha256 of the weights that are to arrive last."""
    hashes = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SHARDS]
    return max(hashes)


def sent(hub: Hub) -> int:
    """Return how many large files were sent, and forget all requests."""
    found = len(hub.asked("PUT"))
    hub.requests.clear()
    return found


@pytest.mark.usefixtures("no_waiting")
def test_j9_a_connection_that_breaks_once_is_taken_up(hub: Hub, checkpoint: Path) -> None:
    hub.fault = on("/large/", Fault(), times=1)
    api.push(checkpoint, REPO)
    assert sent(hub) == 4
    assert len(hub.repositories[REPO].titles()) == 2


@pytest.mark.usefixtures("no_waiting")
def test_j9_a_push_that_broke_goes_on(hub: Hub, checkpoint: Path) -> None:
    last = last_sent(checkpoint)
    hub.fault = on(f"/large/{last}", Fault())
    with pytest.raises(ResourceError) as caught:
        api.push(checkpoint, REPO)
    assert str(caught.value).endswith(
        "Run the same command again: what has arrived is not sent twice."
    )
    assert hub.repositories[REPO].titles() == ["initial commit"]
    assert len(hub.large) == 2
    hub.fault = lambda method, path: None
    sent(hub)
    api.push(checkpoint, REPO)
    assert sent(hub) == 1
    assert len(hub.repositories[REPO].titles()) == 2


@pytest.mark.parametrize("create_pr", [False, True])
def test_j9_an_answer_that_is_lost_makes_no_second_commit(
    hub: Hub, checkpoint: Path, create_pr: bool
) -> None:
    repository = hub.create(REPO)
    hub.fault = on("/commit/", Fault(after=True), times=1)
    with pytest.raises(ResourceError, match="the connection to the hub failed"):
        api.push(checkpoint, REPO, create_pr=create_pr)
    again = api.push(checkpoint, REPO, create_pr=create_pr)
    assert again.sent == ()
    assert len(repository.commits) == 2
    assert len(repository.pull_requests) == int(create_pr)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_j9_a_killed_push_goes_on(
    hub: Hub, checkpoint: Path, tmp_path: Path, number: signal.Signals
) -> None:
    stuck, go_on = threading.Event(), threading.Event()
    last = last_sent(checkpoint)

    def wait(method: str, path: str) -> None:
        if path.endswith(last) and not go_on.is_set():
            while len(hub.large) < 2:
                time.sleep(0.01)
            stuck.set()
            go_on.wait(60)

    hub.fault = wait
    process = subprocess.Popen(
        [sys.executable, "-m", "adaconvert", "push", str(checkpoint), REPO],
        env=environment_of(hub, tmp_path / "home"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert stuck.wait(60)
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.communicate(timeout=60)
        go_on.set()
    else:
        # the client waits for its threads, as long as the hub answers
        go_on.set()
        _, err = process.communicate(timeout=60)
        code = 130 if number == signal.SIGINT else 143
        assert process.returncode == code, err
        assert err.splitlines()[-1] == (
            f"error: {REPO}: interrupted while it was being pushed. Run the same command again: "
            "what has arrived is not sent twice."
        )
    assert hub.repositories[REPO].titles() == ["initial commit"]
    sent(hub)
    api.push(checkpoint, REPO)
    assert sent(hub) <= 1
    assert len(hub.repositories[REPO].titles()) == 2
