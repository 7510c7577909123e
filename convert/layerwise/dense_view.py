"""An adaptive checkpoint seen as the dense model it was made of: same tensors, permuted neurons."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from adaconvert.arch import adaptive
from adaconvert.io.source import Source

#: what names of the tensors hold that a converted FFN has besides its dense ones.
EXTRA = (f".{adaptive.NEURON_ORDER}", ".router.")


def dense_view(where: Path | Source) -> Source:
    """Return a checkpoint as a stock one: an adaptive one without what its conversion added.

    A partition only permutes neurons, so the dense FFN computes what all experts together do.

    Args:
        where: folder or opened source; a stock checkpoint is returned as it is.

    Raises:
        SourceError: config.json names no usable base model.
    """
    source = where if isinstance(where, Source) else Source.open(where, ignore_unindexed=True)
    if source.config.get("adaptive") is None:
        return source
    tensors = {n: ref for n, ref in source.tensors.items() if not any(e in n for e in EXTRA)}
    return replace(source, config=adaptive.dense_config(source.config), tensors=tensors)
