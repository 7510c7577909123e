"""Where one tensor lies on disk: the smallest thing every layer above `io` talks about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRef:
    """One stored tensor.

    Attributes:
        name: key in the safetensors header.
        dtype: safetensors dtype name, such as "BF16".
        shape: sizes, outermost first; row-major and contiguous.
        file: path of the shard inside the checkpoint folder, with "/" between parts.
        start: absolute offset in bytes of the first element in the shard file.
        nbytes: size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
