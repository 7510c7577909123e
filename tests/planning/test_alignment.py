"""Headers are padded so that copied bytes keep their place within a page."""

from __future__ import annotations

from pathlib import Path

import adaconvert
from adaconvert.io.layout import PAGE, layout_shards
from adaconvert.io.source import Source
from adaconvert.methods.registry import make_config, prepare
from adaconvert.methods.sources import open_source
from adaconvert.planning.alignment import aligned
from adaconvert.testing.tiny_models import make


def test_most_copied_bytes_keep_their_place_in_a_page(tmp_path: Path) -> None:
    # every matrix is a whole number of pages, as in real models
    folder = make(
        "llama",
        tmp_path / "dense",
        hidden_size=64,
        intermediate_size=128,
        vocab_size=1024,
        max_shard_size="1GB",
    )
    described = open_source(str(folder))
    plan = prepare(make_config("upcycle", {}), [described]).planned.plan
    stored = [described.source.tensors]
    before = layout_shards(plan.targets, 400_000)
    after = aligned(before, plan, stored)
    matching = total = 0
    for plain, padded in zip(before, after, strict=True):
        assert 0 <= len(padded.header) - len(plain.header) < PAGE
        assert padded.header[8:].rstrip() == plain.header[8:].rstrip()
        assert int.from_bytes(padded.header[:8], "little") == len(padded.header) - 8
        shift = padded.nbytes - plain.nbytes
        pairs = zip(plain.tensors, padded.tensors, strict=True)
        assert {b.start - a.start for a, b in pairs} == {shift}
        for tensor in padded.tensors:
            expr = next(t.expr for t in plan.targets if t.name == tensor.name)
            if not hasattr(expr, "pieces"):
                continue
            piece = expr.pieces[0]
            begin = stored[0][piece.tensor].start + piece.start
            total += tensor.nbytes
            matching += tensor.nbytes * ((tensor.start - begin) % PAGE == 0)
    assert matching > 0.9 * total


def test_padded_files_are_read_back(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    adaconvert.convert(source, destination=tmp_path / "out", max_shard_size="60KB")
    assert len(Source.open(tmp_path / "out").files) > 3
