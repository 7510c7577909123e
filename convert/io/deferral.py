"""Steps that must not be torn apart by a signal: it is delivered when they are done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec, TypeVar

Given = ParamSpec("Given")
Item = TypeVar("Item")
Found = TypeVar("Found")

_HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block is left, then deliver them.

    Only the main thread runs Python's signal handlers, so elsewhere there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.getsignal(number) for number in _HELD}
    for number, handler in before.items():
        # a handler that was not set from Python cannot be put back
        if handler is not None:
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def submitted(
    pool: Executor, work: Callable[Given, Found], *args: Given.args, **kwargs: Given.kwargs
) -> Future[Found]:
    """Return the future of work handed to a pool.

    The standard library's conditions are taken and given back in Python code: an exception that a
    signal raises in between leaves one taken for ever, and a worker waits for it.
    """
    with signals_deferred():
        return pool.submit(work, *args, **kwargs)


def awaited(future: Future[Found]) -> Found:
    """Return what a future holds, waiting for it; a signal is delivered when it is there."""
    with signals_deferred():
        return future.result()


def in_order(
    pool: Executor, work: Callable[[Item], Found], items: Iterable[Item]
) -> Iterator[Found]:
    """Yield what a pool makes of each item; what has not been started is dropped at an error."""
    queued = [submitted(pool, work, item) for item in items]
    try:
        for future in queued:
            yield awaited(future)
    finally:
        with signals_deferred():
            for future in queued:
                future.cancel()
