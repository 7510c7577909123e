"""Write kernels/README.md from the rows of kernels/bench/results.csv.

    python kernels/bench/readme.py [--check]

A shape's table shows the rows of the run that measured it last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click
import rows
from rows import Row

README = rows.ROOT / "kernels" / "README.md"
#: operation, what it computes, its reference, what runs on a CPU and on a GPU.
OPERATIONS = (
    (
        *("plan.route_plan", "(token, expert) pairs in the order of experts"),
        *("by its definition, in tests", "torch", "torch, Triton"),
    ),
    (
        *("routing.router_select", "top-k, shares, null experts, tau, sums of a balance loss"),
        *("`reference_routing`", "torch", "torch, Triton"),
    ),
    (
        *("grouped.grouped_ffn", "experts, forward and backward", "`reference_grouped`"),
        *("expert loop, `grouped_mm`", "expert loop, `grouped_mm`, Triton around it"),
    ),
    (
        *("decode.dynk_decode", "few tokens through the experts they select"),
        *("`reference_decode`", "the adaptive runtime's compiled paths", "torch, Triton"),
    ),
    ("lora.grouped_lora", "routed low-rank adapters", "in tests", "torch", "torch"),
    (
        *("cross_entropy.multi_head_cross_entropy", "losses of heads, in chunks"),
        *("in tests", "torch", "torch"),
    ),
    (
        *("token_rows.gather_rows, scatter_add_rows", "token rows taken out and added back"),
        *("in tests", "torch", "torch"),
    ),
)
TITLES = {
    "train_step": "A training step of a whole model",
    "grouped_ffn": "`grouped_ffn`: experts, forward and backward",
    "route_plan": "`route_plan`: sorting (token, expert) pairs",
    "router_select": "`router_select`: softmax, top-k, shares, balance sums",
    "dynk_decode": "Decoding by selected experts",
    "lora": "`grouped_lora`: routed adapters over a frozen linear",
    "cross_entropy": "`multi_head_cross_entropy`: losses of heads that share a matrix",
    "token_rows": "`gather_rows`, `scatter_add_rows`: a block on half of the tokens",
}
NOTES = {
    "dynk_decode": "Slots are the experts that are selected; the CPU runs the adaptive runtime's "
    "compiled paths.",
    "lora": "The baseline is the linear without adapters: what is above 1 is their price.",
    "token_rows": "The baseline is the block on rows that are there already.",
}
LETTERS = dict(zip(rows.SHAPE, ("T", "d", "i", "E", "K", ""), strict=True))
#: directions shown, the first one a provider has.
SHOWN = ("step", "forward")

HEAD = """\
# Kernels

Written by `kernels/bench/readme.py` from `kernels/bench/results.csv`; do not edit.

`kernels/ops/` is the import package `adaconvert.kernels`. Each operation has a reference in plain
torch, a fast form in torch, and some have kernels in Triton (tested with 3.6.0 and 3.9.0).
Importing the package imports no Triton, and where there is no Triton or no GPU torch runs.

{operations}

`import adaconvert.auto` makes `grouped_ffn` known to transformers as
`experts_implementation="adaconvert"`.

## What runs

`ADACONVERT_KERNELS` chooses: `torch` never runs a Triton kernel, `triton` insists on one and fails
with the reason where none can run, `auto` (the default) runs one where `kernels/ops/measured.py`
has a row that says it is faster on that GPU. `dispatch.why` says what is chosen, and the reason:

```python
from adaconvert.kernels import dispatch

print(dispatch.why("route_plan", device="cpu"))
```

## Measuring

```sh
python kernels/bench/run.py --cpu --minutes 10 --threads 2       # rows of the CPU
python kernels/bench/run.py --call 1                             # on a GPU: 1, then 2, then 3
python kernels/bench/train_step.py MODEL --make DENSE            # a training step of a whole model
python kernels/bench/readme.py                                   # this file
```

The tests of an operation (`kernels/bench/gate.py` lists them) run before it is measured; nothing is
written while one fails.
"""
READING = """\
Medians of at least 20 rounds (a training step: as many as the row says) in which all providers take
turns. Times are ratios to the baseline of the same rounds, the one with ratio 1: below 1 is faster.
Kept bytes are what autograd holds for the backward without parameters; peak bytes are what a step
adds at most (CPU: of what operations return). The fraction is the least time that this device's
measured product and copy allow, over the measured time.
"""
NO_GPU = """\
There are no rows of a GPU: none was at hand. The Triton kernels have run in Triton's interpreter
and been compiled for compute capability 8.0 and 9.0 (tests/kernels), never on a GPU. Nothing is
claimed of their speed, and `auto` does not choose them.
"""


@click.command(help=__doc__.partition("\n")[0])
@click.option("--check", is_flag=True, help="only say whether the file is what the rows give")
def main(check: bool) -> None:
    """Write the file, or look at it."""
    text = written(rows.read(rows.RESULTS))
    if check and README.read_text(encoding="utf-8") != text:
        raise click.ClickException("kernels/README.md is not what kernels/bench/readme.py writes")
    if not check:
        README.write_text(text, encoding="utf-8")


def written(found: Sequence[Row]) -> str:
    """Return the text of kernels/README.md for these rows."""
    heads = ("operation", "what it computes", "reference", "CPU", "GPU")
    table = [_line(heads), _line(["---"] * len(heads))]
    table += [_line([f"`{name}`", *rest]) for name, *rest in OPERATIONS]
    gpu = [row for row in found if row["capability"]]
    cpu = [row for row in found if not row["capability"]]
    parts = [HEAD.format(operations="\n".join(table)), READING]
    parts += ["## GPU\n", "\n".join(_device(gpu)) if gpu else NO_GPU, "## CPU\n"]
    parts.append("\n".join(_device(cpu)) if cpu else "There are no rows of a CPU yet.\n")
    return "\n".join(parts)


def last(found: Iterable[Row]) -> list[Row]:
    """Return of each cell, device and number of threads the rows of the run that was last."""
    runs: dict[tuple[str, ...], str] = {}
    names = ("device", "threads", "op", "model", *rows.SHAPE, "dtype")
    found = list(found)
    for row in found:
        key = tuple(row[name] for name in names)
        runs[key] = max(runs.get(key, ""), row["run"])
    return [row for row in found if row["run"] == runs[tuple(row[name] for name in names)]]


def _device(found: Sequence[Row]) -> list[str]:
    lines = []
    newest = last(found)
    for op, title in TITLES.items():
        chosen = [row for row in newest if row["op"] == op]
        if chosen:
            lines += [f"### {title}", "", *([NOTES[op], ""] if op in NOTES else [])]
            lines += _table(chosen)
            lines += ["", *_sources(chosen), ""]
    return lines


def _table(chosen: Sequence[Row]) -> list[str]:
    heads = ("shape", "provider", "median ms", "ratio", "20-80 %", "kept", "peak", "fraction")
    lines = [_line(heads), _line(["---"] * len(heads))]
    before = ""
    for row in chosen:
        if row["direction"] != _shown(row, chosen):
            continue
        shape = _shape(row)
        spread = f"{_ms(row['low_us'])}-{_ms(row['high_us'])}"
        memory = (_size(row["saved_bytes"]), _size(row["peak_bytes"]))
        cells = (row["provider"], _ms(row["median_us"]), _ratio(row, chosen), spread, *memory)
        named = "" if shape == before else shape
        lines.append(_line([named, *cells, row["roofline"]]))
        before = shape
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(row: Row, chosen: Sequence[Row]) -> str:
    ways = {other["direction"] for other in chosen if _same(row, other)}
    return next(way for way in SHOWN if way in ways)


def _ratio(row: Row, chosen: Sequence[Row]) -> str:
    """Return the ratio of the step, with those of its directions where there are several."""
    others = [
        f"{other['direction']} {float(other['ratio']):.2f}"
        for other in chosen
        if _same(row, other) and other["direction"] != row["direction"]
    ]
    return f"{float(row['ratio']):.2f}" + (f" ({', '.join(others)})" if others else "")


def _same(row: Row, other: Row) -> bool:
    names = ("run", "op", "provider", "model", "device", "threads", "dtype", *rows.SHAPE)
    return all(row[name] == other[name] for name in names)


def _shape(row: Row) -> str:
    sizes = [f"{LETTERS[name]}={row[name]}" for name in rows.SHAPE[:-1] if row[name]]
    words = [row["model"], " ".join(sizes), row["detail"], row["dtype"]]
    return ", ".join(word for word in words if word)


def _sources(chosen: Sequence[Row]) -> list[str]:
    """Return one line per run: device, versions, commit."""
    found = []
    for row in chosen:
        threads = "" if row["capability"] else f", {row['threads']} threads"
        driver = f", driver {row['driver']}" if row["driver"] else ""
        names = ("torch", "triton", "transformers")
        versions = ", ".join(f"{name} {row[name]}" for name in names if row[name])
        where = f"{row['device']}{threads}{driver}"
        found.append(f"{where}; {versions}; commit {row['commit']}, {row['run']}.")
    return list(dict.fromkeys(found))


def _ms(microseconds: str) -> str:
    return f"{float(microseconds) / 1000:.3g}"


def _size(number: str) -> str:
    return f"{int(number) / 1e6:.1f} MB" if number else ""


if __name__ == "__main__":
    main()
