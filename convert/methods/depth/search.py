"""Which blocks a model can do without, found on text: one after the other, or by evolution.

Source: EvoPress, Sieberling et al. 2024, 2410.14649: level-switch mutations of the dropped blocks,
selection in stages on more and more tokens, and the divergence from the whole model as fitness.
Their stages are larger; ours are shares of the text that is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import OptionError
from adaconvert.methods.d2dmoe.fit import device_of
from adaconvert.methods.depth.choose import check_stock, count_of, evenly
from adaconvert.methods.depth.config import DepthOptions
from adaconvert.methods.depth.skipping import Measure, Skipping
from adaconvert.methods.sources import Described
from adaconvert.planning.evolution import Best, Levels, Vector, evolve, greedy, stages_of
from adaconvert.progress import bar


def decide(options: DepthOptions, item: Described, progress: bool) -> Mapping[str, object]:
    """Return the options that a search adds: the blocks it found; none where nothing is searched.

    Raises:
        SourceError: the model is adaptive.
        OptionError: the model is no language model, or the options do not fit it.
        DataError: the text cannot be read.
    """
    if not options.searches or options.found is not None:
        return {}
    check_stock(item)
    _check(item)
    count = count_of(options, item.spec)
    model = loaded(options, item, progress)
    found = search(options, item.spec.layers, count, model.measure, model.rows, progress)
    return {"found": ",".join(map(str, _blocks(found.vector)))}


def _check(item: Described) -> None:
    if item.spec.kind != "decoder":
        raise OptionError(
            f"a {item.spec.architecture} predicts no next token to compare",
            where="--search",
            expected="even, or --drop",
        )


def loaded(options: DepthOptions, item: Described, progress: bool) -> Skipping:
    """Return the model with the text of the options, ready to be measured."""
    assert options.data is not None
    documents = read_documents(options.data, field=options.data_field, split=options.data_split)
    blocks = token_blocks(
        documents,
        Path(item.source.root),
        length=options.data_length,
        max_tokens=options.data_tokens,
        seed=options.seed,
        spread=True,
        progress=progress,
    )
    return Skipping(item.source, blocks, fitness=options.fitness, device=device_of(options.device))


def search(
    options: DepthOptions,
    blocks: int,
    count: int,
    measure: Measure,
    rows: int,
    progress: bool = False,
) -> Best:
    """Return the best vector found: 1 for each block that goes; first and last stay.

    Args:
        options: how to search.
        blocks: L.
        count: how many go.
        measure: what leaving blocks out costs on so many sequences.
        rows: sequences there are.
        progress: show a bar on a terminal.
    """
    levels = Levels(low=(0,) * blocks, high=(0, *(1,) * (blocks - 2), 0))

    def fitness(vector: Vector, amount: int) -> float:
        return measure(_blocks(vector), amount)

    if options.search == "greedy":
        with bar(count, "search", "block", enabled=progress) as shown:
            return greedy(levels.low, levels, fitness, steps=count, amount=rows, step=shown.update)
    start = tuple(int(number in evenly(blocks, count)) for number in range(blocks))
    with bar(options.generations, "search", "generation", enabled=progress) as shown:
        return evolve(
            start,
            levels,
            fitness,
            generations=options.generations,
            offspring=options.offspring,
            stages=stages_of(options.offspring, rows),
            seed=options.seed,
            step=shown.update,
        )


def _blocks(vector: Vector) -> tuple[int, ...]:
    return tuple(number for number, level in enumerate(vector) if level)
