#!/usr/bin/env python3
"""Measure training steps of adapters on a frozen base on the CPU.

    python scripts/bench_adapters.py MODEL [--name NAME] [--parts linear,blocks,model]
        [--mixlora FOLDER] [--dtypes float32,bfloat16] [--batch 2] [--length 256] [--threads 1]
        [--rounds 7] [--blocks 10] [--sizes 576x1536,...] [--only NAME ...] [--csv FILE | --dry]
    python scripts/bench_adapters.py --table

"model" is the dense checkpoint MODEL with adapters on all linears of its blocks, or on those of its
networks ("ffn"), with some of the variants; "blocks" is its first blocks alone, without logits and
loss, with all of them; "linear" is a single linear with as many tokens. The variants of one model
take turns in one process, so they share whatever disturbs the machine, and every round has other
tokens, so that routing is new each time, as in training:

    frozen        no adapters; as all others it passes gradients on to its input
    LoRA          PEFT's, of the rank that all adapters have together
    soft, top-2   this project's routed adapters (PEFT method MOLORA)
    loop          the same adapters one after the other: all on all tokens ("all tokens"), or each
                  on the tokens that selected it; this project's results must agree with them
    MixLoRA       layers of the package mixlora 0.2.3, unpacked in FOLDER (it needs torch 2.2 and
                  transformers 4.43 at least): networks only, top-2. It is another function: an
                  expert is a whole network, so the base's down matrix runs for every expert

moe-peft 2.0.2 is not run: it asks for torch < 2.6 and transformers < 4.47.
bfloat16 is autocast on a base of that type with adapters in float32. Every variant is in evaluation
mode, as mixlora refuses a dropout of 0. "kept" are the bytes of what autograd keeps of one forward,
without weights; "peak" is by how much forward and backward let memory grow at most, gradients
included, in what operations return. Ratios are of forward and backward, medians over the rounds of
the ratio within a round, with the range, and of CPU time; "added" is of the CPU time above the
frozen base's. Rows go to scripts/bench/adapters.csv.
"""

from __future__ import annotations

import datetime
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import peft
import torch
import transformers
from bench.adapter_models import FROZEN, LORA, MIXLORA, Linears, Models
from bench.adapter_steps import Size, Variant
from bench.results import Row, append, commit, last_run, machine, read

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS.parent / "kernels" / "bench"))
from timing import Provider, peak_bytes, saved_bytes  # noqa: E402

RESULTS = SCRIPTS / "bench" / "adapters.csv"
SIZES = "576x1536,1536x576,2048x2048,2048x8192"
#: what is measured in whole models besides the baselines.
IN_MODEL = ("top-2, router per linear", "top-2, router per layer", "loop, selected tokens", MIXLORA)
#: a result further than this from its loop's, by the size of what adapters add, is wrong.
FAR = 1e-2
WAYS = ("forward", "backward", "optimizer", "both", "step", "both_cpu")
ENDS = ("", "_low", "_high", "_cpu")
RATIOS = ("over_frozen", "over_lora", "rival_over")
FIELDS = (
    *("run", "commit", "versions", "cpu", "cores", "memory_gib", "kernel", "python", "load"),
    *("threads", "part", "model", "tokens", "dtype", "experts", "rank"),
    *("case", "linears", "skipped", "trained", "rounds", "forward_ms", "backward_ms"),
    *("both_ms", "both_low", "both_high", "optimizer_ms", "step_ms", "step_over_lora", "rival"),
    *(name + end for name in RATIOS for end in ENDS),
    *("rival_added_over", "distance", "kept_mib", "peak_mib"),
)
HEADS = (
    *("linears", "trained M", "forward ms", "forward + backward ms", "x frozen", "x LoRA"),
    *("AdamW ms", "kept MiB", "peak MiB", "rival's time by own (added time)"),
)
Times = dict[str, list[float]]


@click.command(help=__doc__.partition("\n")[0])
@click.argument("model", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--name", help="of the model in the rows; else that of its folder")
@click.option("--parts", default="linear,blocks,model", show_default=True)
@click.option("--mixlora", type=click.Path(exists=True, path_type=Path), help="package's folder")
@click.option("--dtypes", default="float32,bfloat16", show_default=True)
@click.option("--sizes", default=SIZES, show_default=True)
@click.option("--batch", default=2, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--blocks", default=10, show_default=True)
@click.option("--only", multiple=True, metavar="NAME", help="besides frozen and LoRA")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--dry", is_flag=True, help="write no rows")
@click.option("--table", "shown", is_flag=True, help="of the last runs, as Markdown")
def main(csv: Path, shown: bool, dry: bool, **options: Any) -> None:
    if shown:
        click.echo(table(read(csv)))
        return
    torch.set_num_threads(options["threads"])
    common = facts(options)
    for part in options["parts"].split(","):
        for row in PARTS[part](options):
            found = {**common, "part": part, "load": f"{os.getloadavg()[0]:.1f}", **row}
            names = ("model", "dtype", "case", "linears", "both_ms", *RATIOS, "skipped")
            click.echo("\t".join(found.get(name, "") for name in names))
            if not dry:
                append(csv, found, FIELDS)


def facts(options: dict[str, Any]) -> Row:
    """Return what is true of every row of a run."""
    packages = {"torch": torch, "transformers": transformers, "peft": peft}
    return {
        "run": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(SCRIPTS.parent),
        "versions": ", ".join(f"{name} {each.__version__}" for name, each in packages.items()),
        **machine(),
        "threads": str(options["threads"]),
        "tokens": str(options["batch"] * options["length"]),
        "experts": str(Size().experts),
        "rank": str(Size().rank),
    }


def linear_rows(options: dict[str, Any]) -> Iterator[Row]:
    """Yield a row for every way to train adapters of a linear, for every size."""
    for dtype in options["dtypes"].split(","):
        for text in options["sizes"].split(","):
            inputs, outputs = map(int, text.split("x"))
            made = Linears(inputs, outputs, dtype, options)
            for row in rows_of(made, options["only"], 2 * options["rounds"] + 1):
                yield {"model": f"{inputs} -> {outputs}", "dtype": dtype, **row}


def block_rows(options: dict[str, Any]) -> Iterator[Row]:
    """Yield a row for every way to train some blocks of the model."""
    yield from _rows_of_models(options, options["blocks"], options["only"])
    yield from _not_run(options)


def model_rows(options: dict[str, Any]) -> Iterator[Row]:
    """Yield a row for every way to train the model."""
    yield from _rows_of_models(options, None, options["only"] or IN_MODEL)
    yield from _not_run(options)


def _not_run(options: dict[str, Any]) -> Iterator[Row]:
    """Yield what is not measured, and why."""
    yield {"case": "moe-peft 2.0.2", "skipped": "asks for torch < 2.6 and transformers < 4.47"}
    if options["mixlora"] is None:
        yield {"case": MIXLORA, "skipped": "no folder of the package was given"}


def _rows_of_models(
    options: dict[str, Any], blocks: int | None, only: Sequence[str]
) -> Iterator[Row]:
    if options["model"] is None:
        raise click.UsageError("name the dense checkpoint to measure, or ask for --parts linear")
    for dtype in options["dtypes"].split(","):
        made = Models(options, dtype, blocks)
        for row in rows_of(made, only, options["rounds"]):
            yield {"model": made.label, "dtype": dtype, **row}
        del made
        # layers of mixlora are in cycles
        gc.collect()


PARTS: dict[str, Callable[[dict[str, Any]], Iterator[Row]]] = {
    "linear": linear_rows,
    "blocks": block_rows,
    "model": model_rows,
}


def rows_of(made: Models | Linears, only: Sequence[str], rounds: int) -> Iterator[Row]:
    """Yield a row for every variant, or for those asked for and the baselines.

    Raises:
        click.ClickException: this project's result is not the loop's.
    """
    wanted = (*only, FROZEN, LORA)
    variants = [each for each in made.variants() if not only or each.name in wanted]
    # also what runs them for the first time
    more = [{"distance": distance(each, variants), **kept(each)} for each in variants]
    times = measured(variants, made.fresh, rounds)
    for number in range(len(variants)):
        yield {**timed(number, variants, times), **more[number]}


def measured(variants: Sequence[Variant], fresh: Callable[[int], None], rounds: int) -> list[Times]:
    """Return seconds of every round by way."""
    times: list[Times] = [{way: [] for way in WAYS} for _ in variants]
    for turn in range(rounds):
        fresh(turn + 1)
        # another one begins each time, so that nobody always follows the same
        start = turn % len(variants)
        for number in (*range(start, len(variants)), *range(start)):
            for way, seconds in one_turn(variants[number]).items():
                times[number][way].append(seconds)
    return times


def one_turn(variant: Variant) -> dict[str, float]:
    """Return the seconds of one step."""
    used, start = time.process_time(), time.perf_counter()
    out = variant.forward()
    middle = time.perf_counter()
    variant.backward(out)
    both, spent = time.perf_counter(), time.process_time()
    if variant.optimizer is not None:
        variant.optimizer.step()
    end = time.perf_counter()
    variant.clear()
    return {
        **{"forward": middle - start, "backward": both - middle, "optimizer": end - both},
        **{"both": both - start, "step": end - start, "both_cpu": spent - used},
    }


@torch.no_grad()
def distance(variant: Variant, variants: Sequence[Variant]) -> str:
    """Return how far a variant's result is from its rival's, by the size of what adapters add.

    Empty where they are not the same function, and in bfloat16, where adapters as small as these
    drown in rounding.
    """
    place = find(variants, variant.rival, variant.linears)
    if not variant.exact or place < 0 or variant.low:
        return ""
    frozen, own, other = (v.output().double() for v in (variants[0], variant, variants[place]))
    found = float((own - other).norm() / (own - frozen).norm())
    if not found < FAR:
        raise click.ClickException(f"{variant.name} is {found:.1e} from {variant.rival}")
    return f"{found:.1e}"


def kept(variant: Variant) -> Row:
    """Return the bytes kept for the backward, and the most that forward and backward need."""
    saved = saved_bytes(variant.forward, variant.weights())
    provider = Provider(
        name=variant.name, forward=lambda _: variant.forward(), backward=variant.backward
    )
    peak = peak_bytes(provider, "cpu")
    if variant.optimizer is not None:
        # its state is made now
        variant.optimizer.step()
    variant.clear()
    return {"kept_mib": f"{saved / 2**20:.1f}", "peak_mib": f"{peak / 2**20:.1f}"}


def timed(number: int, variants: Sequence[Variant], times: Sequence[Times]) -> Row:
    """Return what a row says of times."""
    own, variant = times[number], variants[number]
    row = {"case": variant.name, "linears": variant.linears, "rounds": str(len(own["both"]))}
    row["trained"] = str(sum(each.numel() for each in variant.trained))
    for way in WAYS[:-1]:
        row[f"{way}_ms"] = f"{statistics.median(own[way]) * 1e3:.1f}"
    row["both_low"], row["both_high"] = (f"{f(own['both']) * 1e3:.1f}" for f in (min, max))
    frozen = times[find(variants, FROZEN, "")]
    row |= ratios("over_frozen", own, frozen)
    if variant.linears:
        lora = times[find(variants, LORA, variant.linears)]
        row |= ratios("over_lora", own, lora)
        row["step_over_lora"] = f"{paired(own['step'], lora['step']):.3f}"
    place = find(variants, variant.rival, variant.linears)
    if place >= 0:
        rival = times[place]
        row |= {"rival": variant.rival, **ratios("rival_over", rival, own)}
        row["rival_added_over"] = f"{paired(above(rival, frozen), above(own, frozen)):.2f}"
    return row


def find(variants: Sequence[Variant], name: str, linears: str) -> int:
    """Return the place of a variant, below 0 where it is not measured."""
    places = (i for i, v in enumerate(variants) if (v.name, v.linears) == (name, linears))
    return next(places, -1)


def ratios(name: str, own: Times, other: Times) -> Row:
    """Return the median and the range of the ratios within rounds, and the median of CPU time."""
    each = [a / b for a, b in zip(own["both"], other["both"], strict=True)]
    cpu = paired(own["both_cpu"], other["both_cpu"])
    values = (statistics.median(each), min(each), max(each), cpu)
    return {name + end: f"{value:.3f}" for end, value in zip(ENDS, values, strict=True)}


def paired(own: Sequence[float], other: Sequence[float]) -> float:
    """Return the median ratio within rounds."""
    return statistics.median(a / b for a, b in zip(own, other, strict=True))


def above(own: Times, frozen: Times) -> list[float]:
    """Return by how much CPU time is above the frozen base's in each round."""
    return [a - b for a, b in zip(own["both_cpu"], frozen["both_cpu"], strict=True)]


def table(rows: Sequence[Row]) -> str:
    """Return the last run of every part as Markdown tables, one for each model and type."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += _part_of_table(last_run([row for row in rows if row["part"] == part]))
    return "\n".join(lines)


def _part_of_table(rows: Sequence[Row]) -> Iterator[str]:
    first = rows[0]
    loads = [float(row["load"]) for row in rows]
    yield (
        f"{first['tokens']} tokens, {first['experts']} adapters of rank {first['rank']}; "
        f"{first['cpu']}, {first['threads']} threads of {first['cores']} cores, load "
        f"{min(loads)}-{max(loads)}; Python {first['python']}, {first['versions']}; commit "
        f"{first['commit']}, {first['run']}"
    )
    good = [row for row in rows if not row["skipped"]]
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in good):
        heads = (f"{model}, {dtype}", *HEADS)
        yield from ("", f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |")
        yield from (line(row) for row in good if (row["model"], row["dtype"]) == (model, dtype))
    missing = [row for row in rows if row["skipped"]]
    yield from ("", *(f"{row['case']} is not run: {row['skipped']}." for row in missing))


def line(row: Row) -> str:
    """Return a row of the table."""
    rival = ""
    if row["rival"]:
        rival = f"{spread(row, 'rival_over')} ({row['rival_added_over']}), {row['rival']}"
    cells = (
        *(row["case"], row["linears"], f"{int(row['trained']) / 1e6:.2f}", row["forward_ms"]),
        f"{row['both_ms']} ({row['both_low']}-{row['both_high']})",
        *(spread(row, "over_frozen"), spread(row, "over_lora"), row["optimizer_ms"]),
        *(row["kept_mib"], row["peak_mib"], rival),
    )
    return f"| {' | '.join(cells)} |"


def spread(row: Row, name: str) -> str:
    """Return a ratio with its range, and that of CPU time."""
    if not row[name]:
        return ""
    middle, low, high, cpu = (f"{float(row[name + end]):.2f}" for end in ENDS)
    return f"{middle} ({low}-{high}; CPU {cpu})"


if __name__ == "__main__":
    main()
