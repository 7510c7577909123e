"""Which block a stored tensor belongs to, told from its name alone."""

from __future__ import annotations

import re

# the first path component that is a number: "model.layers.3.mlp.experts.0.w1.weight" is of block 3
_BLOCK = re.compile(r"^((?:[A-Za-z_]\w*\.)*)(\d+)\.(.+)$")


def block_of(name: str) -> int | None:
    """Return the block a tensor belongs to, None for embeddings, final norm and head."""
    match = _BLOCK.match(name)
    return int(match[2]) if match else None


def as_block(name: str, index: int) -> str:
    """Return the name the tensor would have in block `index`."""
    return _BLOCK.sub(rf"\g<1>{index}.\g<3>", name)
