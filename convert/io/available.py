"""How much memory this process may still take; bytes throughout."""

from __future__ import annotations

import os
from pathlib import Path


def available_memory() -> int:
    """Return the memory this process may still take: the system's or its control group's."""
    limits = [_system_memory()]
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        # page cache counts as used although it is given back on demand
        limits.append(max(limit - used + _cache_of(group), 0))
    return min(limits)


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text("ascii"))
    except (OSError, ValueError):
        return None


def _cache_of(group: Path) -> int:
    try:
        rows = dict(
            line.split() for line in (group / "memory.stat").read_text("ascii").splitlines()
        )
        return int(rows.get("inactive_file", 0)) + int(rows.get("active_file", 0))
    except (OSError, ValueError):
        return 0
