"""A signal that comes inside a held block is delivered after it, once, in the main thread."""

from __future__ import annotations

import signal
import threading

import pytest

from adaconvert.io.deferral import signals_deferred


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
