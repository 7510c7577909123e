"""A signal ends the run as an error does: staging is closed, and the message says how to resume."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from adaconvert.errors import InterruptedRunError

_HANDLED = (signal.SIGTERM, signal.SIGHUP)


def interrupted(signum: int) -> InterruptedRunError:
    """Return the error of a run stopped by `signum`; its exit code is the shell's 128 + signum."""
    error = InterruptedRunError(f"stopped by {signal.Signals(signum).name}")
    error.exit_code = 128 + signum
    return error


def _stop(signum: int, frame: FrameType | None) -> None:
    # a second signal ends the process at once: clean-up may hang, and staging survives a kill
    for number in (*_HANDLED, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise interrupted(signum)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Within, the first SIGINT, SIGTERM or SIGHUP raises; earlier handlers are put back after."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*_HANDLED, signal.SIGINT)}
    for number, handler in before.items():
        # what the parent ignores (nohup, a shell's background job) stays ignored
        if handler is not signal.SIG_IGN:
            signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
