"""Seeds that depend on names only, so that results do not depend on shard order or thread count."""

from __future__ import annotations

import hashlib


def seed_for(run_seed: int, name: str) -> int:
    """Return the 63-bit seed of one random choice, derived from the run's seed and a name.

    Args:
        run_seed: the seed the user gave.
        name: target tensor name, or another stable name of what is drawn.
    """
    digest = hashlib.sha256(f"{run_seed}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
