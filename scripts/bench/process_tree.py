"""What a command and all its descendants cost: wall time, CPU time, peak anonymous memory."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one run took.

    Attributes:
        wall: seconds from start to the return of `afterwards`.
        cpu: seconds of user and system time of the command and the descendants it waited for.
        anonymous: bytes, peak over time of the sum of RssAnon over the process tree; mapped files
            are not in it.
        exit_code: of the command.
    """

    wall: float
    cpu: float
    anonymous: int
    exit_code: int


def measure(
    command: Sequence[str],
    *,
    log: Path,
    environment: dict[str, str] | None = None,
    afterwards: Callable[[], None] | None = None,
) -> Cost:
    """Run the command to its end and return what it cost; its output is in `log`.

    Args:
        command: program and arguments.
        log: file that receives stdout and stderr.
        environment: variables to set on top of this process's own.
        afterwards: done after the command and inside the measured wall and CPU time, say fsync of
            what it wrote.
    """
    with log.open("wb") as output:
        own_cpu, start = _own_cpu(), time.perf_counter()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
        )
        poller = _AnonymousPeak(process.pid)
        poller.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        # stopped first: polling is ours, its CPU time is not counted
        poller.stop()
        polled = _own_cpu() - own_cpu
        if afterwards is not None:
            afterwards()
        wall = time.perf_counter() - start
    cpu = usage.ru_utime + usage.ru_stime + _own_cpu() - own_cpu - polled
    return Cost(wall=wall, cpu=cpu, anonymous=poller.peak, exit_code=process.returncode)


def _own_cpu() -> float:
    times = os.times()
    return times.user + times.system


class _AnonymousPeak(threading.Thread):
    """Polls a process tree until stopped; `peak` is the largest sum of RssAnon seen, in bytes."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._root = root
        self._done = threading.Event()

    def run(self) -> None:
        """Poll until `stop`."""
        while not self._done.is_set():
            self.peak = max(self.peak, sum(_anonymous(pid) for pid in _tree(self._root)))
            self._done.wait(POLL_SECONDS)

    def stop(self) -> None:
        """Return when polling has ended."""
        self._done.set()
        self.join()


def _tree(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting.extend(_children(pid))
    return found


def _children(pid: int) -> list[int]:
    # a process may end while it is looked at: then it has no children and no memory
    children: list[int] = []
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            children.extend(int(child) for child in (task / "children").read_text().split())
    except OSError:
        pass
    return children


def _anonymous(pid: int) -> int:
    try:
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
