"""Which trunk the heads of exits were made for: `config.adaptive.model.exits.trunk`.

It is the digest `io.fingerprint` takes of every linear of the blocks that is stored as such, and
the one of the same model cast to float16 (a cast to bfloat16 or float32 changes no digest). It is
written where exits are made and where a fine-tune trains them. Heads that were copied into another
model, or a trunk that was trained without them, give another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaconvert.arch.adapters import linears
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.exits import exits_of
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.io.source import Source

KEY = "trunk"


def trunk_of(
    source: Source, spec: ModelSpec, dtypes: Mapping[str, str] | None = None
) -> list[str] | None:
    """Return the digests of a model's blocks; a few bytes of each linear are read.

    Args:
        source: its weights.
        spec: what it is.
        dtypes: name of a weight -> dtype it is rounded to before, where it is not that of `source`.

    Returns:
        hex digests, as it is and as float16; None where no linear of floats is stored.
    """
    from adaconvert.dtypes import BY_NAME
    from adaconvert.io.fingerprint import of_source

    names = {path: linear.weight for path, linear in linears(spec).items()}
    stored = {
        path: name
        for path, name in names.items()
        if name in source.tensors and BY_NAME[source.tensors[name].dtype].is_float
    }
    found = [of_source(source, stored, dtypes=dtypes, half=half) for half in (False, True)]
    return [digest for digest in found if digest is not None] or None


def foreign(source: Source, spec: ModelSpec) -> str | None:
    """Return what is wrong where heads lie in a trunk they were not made for; None where they do
    not, or where config.json does not say what they were made for."""
    said = (exits_of(spec.adaptive) or {}).get(KEY)
    if not isinstance(said, list):
        # what is neither a list nor null is refused at loading
        return None
    found = trunk_of(source, spec)
    if found is not None and found[0] in said:
        return None
    return (
        "the heads of the exits were made for other weights than the blocks in front of them "
        "have: they were copied from another checkpoint, or the blocks were trained without them"
    )


def check_trunk(source: Source, spec: ModelSpec) -> None:
    """Refuse heads that lie in a trunk they were not made for.

    Raises:
        SourceError: they do.
    """
    wrong = foreign(source, spec)
    if wrong is not None:
        raise SourceError(
            wrong,
            where=f"{escape(source.label)}/config.json: adaptive.model.exits.{KEY}",
            expected=_short(trunk_of(source, spec)),
            found=_short((exits_of(spec.adaptive) or {})[KEY]),
            hint="`adaconvert finetune --train exits` trains them for these blocks and writes the "
            "new value. If both were trained together elsewhere, set it to null.",
        )


def _short(trunk: object) -> str:
    """Return the beginning of the first digest; what is no digest, as it is."""
    first = trunk[0] if isinstance(trunk, list) and trunk else trunk
    return f"{first[:16]}..." if isinstance(first, str) and first else escape(repr(trunk), 80)


def with_trunk(config: Mapping[str, Any], trunk: list[str] | None) -> dict[str, Any]:
    """Return config.json of a model with exits whose trunk has these digests."""
    adaptive = config["adaptive"]
    exits = {**adaptive["model"]["exits"], KEY: trunk}
    return {**config, "adaptive": {**adaptive, "model": {**adaptive["model"], "exits": exits}}}
