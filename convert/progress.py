"""One progress bar, silent unless a person is watching."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Protocol, Self, cast

#: seconds before a bar appears, so that short work shows none.
DELAY = 2.0
_BYTES = (
    "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}B of {total_fmt}B [{elapsed}<{remaining}, {rate_fmt}]"
)


class Bar(Protocol):
    """What a bar can do; a context manager."""

    def update(self, count: int = 1) -> object:
        """Show `count` more units as done."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> object: ...


class Silent:
    """A bar nobody sees."""

    def update(self, count: int = 1) -> object:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def bar(total: int, desc: str, unit: str = "B", *, enabled: bool = True) -> Bar:
    """Return a bar on stderr, silent when that is no terminal.

    Args:
        total: number of units; bytes when `unit` is "B", shown as kB, MB, GB.
        desc: what is being done.
        unit: name of a unit.
        enabled: the user wants bars.
    """
    if not enabled or not _is_terminal():
        return Silent()
    from tqdm import tqdm

    scale = unit == "B"
    shown = tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=scale,
        bar_format=_BYTES if scale else None,
        delay=DELAY,
        leave=False,
        ascii=True,
    )
    return cast("Bar", shown)


def _is_terminal() -> bool:
    # stderr may be None (no console) or closed.
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:
        return False
