"""Measure the kernels against each other, transformers and dense networks; append rows.

    python kernels/bench/run.py [--cpu] [--ops grouped_ffn,lora] [--minutes 10] [--threads 2]
        [--out FILE | --dry]
    python kernels/bench/run.py --call 1|2|3      on a GPU, each at most ten minutes

Providers of a cell take turns in one process; a row holds the median of at least 20 rounds and the
median ratio to the baseline of the same rounds. Calls: 1 holds the kernels to their references on
the GPU, under sync-debug and compute-sanitizer, and measures ceilings, plan and router; 2 the
expert feed-forward in training; 3 decoding, adapters, cross-entropy, token rows. Nothing is written
of an operation whose tests are red. Cells stand in the order of their value; those that do not fit
into --minutes are named at the end.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import contract
import expert_cases
import gate
import other_cases
import routing_cases
import rows
import timing
import torch
from cells import CALLS, CPU, Cell
from timing import Case, Ceilings, Provider

BUILDERS: dict[str, Callable[[Cell, str], Case]] = {
    "route_plan": routing_cases.route_plan,
    "router_select": routing_cases.router_select,
    "grouped_ffn": expert_cases.grouped_ffn,
    "dynk_decode": routing_cases.dynk_decode,
    "lora": other_cases.lora,
    "cross_entropy": other_cases.cross_entropy,
    "token_rows": other_cases.token_rows,
}
#: seconds without which a cell is not begun.
LEAST_SECONDS = 10.0
DIRECTIONS = ("forward", "backward", "step")


@click.command(help=__doc__.partition("\n")[0])
@click.option("--call", type=click.IntRange(1, 3), help="one of the three runs on a GPU")
@click.option("--cpu", is_flag=True, help="measure the CPU where there is a GPU too")
@click.option("--ops", help="operations, separated by commas; all by default")
@click.option("--minutes", default=10.0, show_default=True, help="for tests and measuring")
@click.option("--threads", type=int, help="of the CPU; torch's default otherwise")
@click.option("--out", type=click.Path(path_type=Path), default=rows.RESULTS, show_default=True)
@click.option("--dry", is_flag=True, help="show rows, write none, run no tests")
def main(call: int | None, cpu: bool, ops: str | None, minutes: float, **options: Any) -> None:
    """Run the benchmark from the command line."""
    deadline = time.perf_counter() + 60 * minutes
    device = device_of(call, cpu=cpu)
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    cells = chosen(CPU if device == "cpu" else CALLS[call or 2], ops)
    failed = {} if options["dry"] else refused(cells, device, call)
    if call == 1:
        contract.under_scrutiny(click.echo)
    run = Run(device, None if options["dry"] else options["out"])
    left = [str(cell) for cell in cells if cell.op not in failed and not run.fits(cell, deadline)]
    if left:
        click.echo("not measured, no time left: " + "; ".join(left))
    if failed:
        raise SystemExit(1)


def device_of(call: int | None, *, cpu: bool) -> str:
    """Return "cpu" or "cuda".

    Raises:
        UsageError: a call needs a GPU and there is none.
    """
    if call is not None and (cpu or not torch.cuda.is_available()):
        raise click.UsageError("--call needs a GPU; without one the CPU's cells are measured")
    return "cuda" if torch.cuda.is_available() and not cpu else "cpu"


def chosen(cells: Sequence[Cell], ops: str | None) -> list[Cell]:
    """Return the cells of the operations asked for.

    Raises:
        BadParameter: an operation is not known.
    """
    wanted = list(BUILDERS) if ops is None else ops.split(",")
    unknown = [op for op in wanted if op not in BUILDERS]
    if unknown:
        known = ", ".join(BUILDERS)
        raise click.BadParameter(f"no operation {unknown[0]!r}; expected one of {known}")
    return [cell for cell in cells if cell.op in wanted]


def refused(cells: Sequence[Cell], device: str, call: int | None) -> dict[str, str]:
    """Return the operations that are not measured, and why; says so."""
    ops = list(dict.fromkeys(cell.op for cell in cells))
    failed = gate.red(ops, interpreted=device == "cpu")
    if device == "cuda":
        failed = {**contract.broken(ops), **failed}
    for op, reason in failed.items():
        click.echo(f"{op}: not measured, its tests are red: {reason}", err=True)
    return failed


class Run:
    """Rows of one run of one device."""

    def __init__(self, device: str, out: Path | None) -> None:
        self.device, self.out = device, out
        self.facts = rows.facts(device)
        self.ceilings = Ceilings(device)

    def fits(self, cell: Cell, deadline: float) -> bool:
        """Measure the cell and record its rows; returns whether there was time for it."""
        left = deadline - time.perf_counter()
        if left < min(LEAST_SECONDS, cell.seconds):
            return False
        click.echo(f"# {cell}")
        torch.manual_seed(0)
        case = BUILDERS[cell.op](cell, self.device)
        for row in self.rows_of(cell, self.runnable(case), min(left, cell.seconds)):
            self.record(row)
        # a case is large, and may hold itself in a circle
        del case
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return True

    def runnable(self, case: Case) -> Case:
        """Return the case without providers that cannot run or are wrong; says which."""
        skipped = {**case.skipped, **timing.wrong(case)}
        for name, reason in skipped.items():
            click.echo(f"#   {name}: not run: {reason}")
        providers = [p for p in case.providers if p.name not in skipped]
        return Case(**{**vars(case), "providers": providers, "skipped": skipped})

    def rows_of(self, cell: Cell, case: Case, seconds: float) -> list[rows.Row]:
        """Return the rows of the cell; none of providers with too few rounds."""
        times = timing.measure(case, self.device, seconds)
        found = []
        for provider in case.providers:
            ways = times[provider.name]
            rounds = min((len(spent) for spent in ways.values()), default=0)
            if rounds < timing.LEAST_ROUNDS:
                click.echo(f"#   {provider.name}: {rounds} rounds only; no row")
                continue
            for way in (name for name in DIRECTIONS if name in ways):
                found.append(self.row(cell, case, provider, way, times))
            # what a whole step needs stands in its row alone
            if "cpu" in ways:
                baseline = times[case.providers[0].name]
                found[-1]["ratio_cpu"] = rows.paired(ways["cpu"], baseline["cpu"])
            if provider.backward is not None:
                found[-1] |= self.memory(provider, case)
        return found

    def row(
        self, cell: Cell, case: Case, provider: Provider, way: str, times: timing.Times
    ) -> rows.Row:
        """Return the row of one direction."""
        own, baseline = times[provider.name][way], case.providers[0].name
        row = {**self.shape(cell), "provider": provider.name, "direction": way}
        row |= {**rows.spread(own), "baseline": baseline}
        median = float(row["median_us"]) / 1e6
        row["ratio"] = rows.paired(own, times[baseline][way])
        row["roofline"] = self.ceilings.fraction(case, provider, cell.dtype, way, median)
        return row

    def memory(self, provider: Provider, case: Case) -> rows.Row:
        """Return the bytes that a step keeps for its backward, and by which memory grows."""
        kept = timing.saved_bytes(lambda: provider.forward(0), case.parameters)
        return {
            "saved_bytes": str(kept),
            "peak_bytes": str(timing.peak_bytes(provider, self.device)),
        }

    def shape(self, cell: Cell) -> rows.Row:
        names = ("tokens", "hidden", "width", "experts", "slots", "detail", "op")
        found = {name: str(getattr(cell, name) or "") for name in names}
        return {**self.facts, **found, "dtype": str(cell.dtype).removeprefix("torch.")}

    def record(self, row: rows.Row) -> None:
        """Show a row and write it where there is a file."""
        names = ("op", "provider", "dtype", "direction", "median_us", "ratio", "saved_bytes")
        click.echo("\t".join(row.get(name, "") for name in (*names, "roofline")))
        if self.out is not None:
            rows.append(self.out, row)


if __name__ == "__main__":
    main()
