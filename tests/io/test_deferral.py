"""A signal that comes inside a held block is delivered after it, once, in the main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from adaconvert.io.deferral import awaited, in_order, signals_deferred, submitted


def test_a_signal_waits_for_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        with signals_deferred():
            signal.raise_signal(signal.SIGTERM)
            assert came == []
        assert came == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_is_raised_after_the_block() -> None:
    done: list[bool] = []

    def block() -> None:
        with signals_deferred():
            signal.raise_signal(signal.SIGINT)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done


def test_other_threads_hold_nothing() -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with signals_deferred():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failed == []


@contextmanager
def interrupting() -> Iterator[None]:
    """Within, an interrupt follows every condition the main thread takes: as bad as it can come."""
    take = threading.Condition.__enter__

    def taken(condition: threading.Condition) -> bool:
        found = take(condition)
        if threading.get_ident() == threading.main_thread().ident:
            signal.raise_signal(signal.SIGINT)
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(threading.Condition, "__enter__", taken)
        yield


@pytest.mark.timeout(60)
def test_an_interrupt_leaves_no_worker_waiting_for_ever() -> None:
    gate, finished = threading.Lock(), []

    def work(number: int) -> None:
        with gate:
            finished.append(number)

    with ThreadPoolExecutor(1) as pool:
        with gate, pytest.raises(KeyboardInterrupt), interrupting():
            submitted(pool, work, 0)
        later = submitted(pool, work, 1)
        with pytest.raises(KeyboardInterrupt), interrupting():
            awaited(later)
        with pytest.raises(KeyboardInterrupt), interrupting():
            list(in_order(pool, work, [2]))
    assert finished[:2] == [0, 1]


def test_work_is_done_in_order_and_dropped_after_an_error() -> None:
    gate, begun = threading.Lock(), []

    def work(number: int) -> int:
        begun.append(number)
        found = 6 // number
        with gate:
            return found

    with ThreadPoolExecutor(1) as pool:
        assert list(in_order(pool, work, [1, 2, 3])) == [6, 3, 2]
        begun.clear()
        with gate, pytest.raises(ZeroDivisionError):
            list(in_order(pool, work, [0, 3, 3, 3]))
    assert begun in ([0], [0, 3])
