"""Measure a training step of a mixture of experts under every experts implementation.

    python kernels/bench/train_step.py MODEL [--make DENSE] [--tokens 512] [--dtype float32]
        [--implementations eager,grouped_mm,adaconvert] [--optimizer none|sgd|adamw]
        [--device cpu|cuda] [--threads 2] [--rounds 11] [--peak] [--out FILE | --dry]

MODEL is a checkpoint of a stock mixture; --make first upcycles DENSE into it (8 experts, top-2).
One model in one process; the implementations take turns, so they share whatever disturbs the
machine. A step is forward, loss, backward and, where asked for, the optimizer. Saved bytes are
those of all tensors that autograd keeps for the backward of the whole model, each storage once,
without parameters. --peak measures the growth of resident memory during one step without an
optimizer, in a process of its own, on the CPU.
Rows go to kernels/bench/results.csv as operation "train_step", compared with grouped_mm.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import rows
import torch
import transformers
from timing import saved_bytes

import adaconvert.auto  # noqa: F401
from adaconvert import api

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "adaconvert")
BASELINE = "grouped_mm"
#: bytes of gathered weights from which batched_mm, which copies matrices per token, is left out.
GATHERED_LIMIT = 2e9
DIRECTIONS = ("forward", "backward", "step")
Times = dict[str, dict[str, list[float]]]


@click.command(help=__doc__.partition("\n")[0])
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--make", type=click.Path(path_type=Path, exists=True), help="dense checkpoint")
@click.option("--tokens", default=512, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--implementations", default=",".join(IMPLEMENTATIONS), show_default=True)
@click.option("--optimizer", type=click.Choice(["none", "sgd", "adamw"]), default="none")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=11, show_default=True)
@click.option("--peak", is_flag=True, help="also the growth of resident memory, one process each")
@click.option("--out", type=click.Path(path_type=Path), default=rows.RESULTS)
@click.option("--dry", is_flag=True, help="write no rows")
def main(model: Path, make: Path | None, out: Path, **options: Any) -> None:
    torch.set_num_threads(options["threads"])
    if make is not None and not model.exists():
        api.convert(make, destination=model, experts=8, top_k=2, verify=False)
    names = runnable(model, options["implementations"].split(","), options)
    peaks = {}
    if options["peak"]:
        peaks = {name: str(alone(peak_growth, model, name, options)) for name in names}
    step = Step(model, options)
    saved = {name: str(step.saved(name)) for name in names}
    times = measured(step, names, options["rounds"])
    for row in made_rows(times, saved, peaks, shape_of(step, model, options)):
        show(row)
        if not options["dry"]:
            rows.append(out, row)


class Step:
    """A model and what one training step of it takes."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        dtype = getattr(torch, options["dtype"])
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.device = options["device"]
        self.model: Any = load(folder, dtype=dtype).to(self.device).train()
        draw = torch.Generator().manual_seed(0)
        size = (1, options["tokens"])
        ids = torch.randint(0, self.model.config.vocab_size, size, generator=draw)
        self.ids = ids.to(self.device)
        kinds: dict[str, Callable[..., Any]] = {
            "none": lambda parameters: None,
            "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-12),
            # a rate of nothing, so that every turn routes alike; the work is the same
            "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.0),
        }
        self.optimizer = kinds[options["optimizer"]](self.model.parameters())

    def forward(self, name: str) -> Any:
        self.model.set_experts_implementation(name)
        self.model.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        self.wait()
        return loss

    def backward(self, loss: Any) -> None:
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.wait()

    def wait(self) -> None:
        """Return once the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def saved(self, name: str) -> int:
        """Return the bytes that the forward keeps for the backward, without parameters."""
        return saved_bytes(lambda: self.forward(name), self.model.parameters())


def measured(step: Step, names: list[str], rounds: int) -> Times:
    """Return seconds by implementation and direction; the implementations take turns."""
    times: Times = {name: {way: [] for way in (*DIRECTIONS, "cpu")} for name in names}
    for turn in range(rounds + 1):
        for name in names:
            used, start = time.process_time(), time.perf_counter()
            loss = step.forward(name)
            middle = time.perf_counter()
            step.backward(loss)
            end = time.perf_counter()
            if turn:
                found = (middle - start, end - middle, end - start)
                for way, seconds in zip(DIRECTIONS, found, strict=True):
                    times[name][way].append(seconds)
                times[name]["cpu"].append(time.process_time() - used)
    return times


def made_rows(
    times: Times, saved: dict[str, str], peaks: dict[str, str], common: rows.Row
) -> list[rows.Row]:
    """Return a row for every implementation and direction."""
    baseline = BASELINE if BASELINE in times else next(iter(times))
    found = []
    for name, ways in times.items():
        for way in DIRECTIONS:
            row = {**common, "provider": name, "direction": way, **rows.spread(ways[way])}
            row |= {"baseline": baseline, "ratio": rows.paired(ways[way], times[baseline][way])}
            if way == "step":
                row |= {"ratio_cpu": rows.paired(ways["cpu"], times[baseline]["cpu"])}
                row |= {"saved_bytes": saved[name], "peak_bytes": peaks.get(name, "")}
            found.append(row)
    return found


def shape_of(step: Step, model: Path, options: dict[str, Any]) -> rows.Row:
    config = step.model.config
    return {
        **rows.facts(step.device),
        "op": "train_step",
        "model": model.name,
        "tokens": str(options["tokens"]),
        "hidden": str(config.hidden_size),
        "width": str(config.intermediate_size),
        "experts": str(config.num_local_experts),
        "slots": str(config.num_experts_per_tok),
        "detail": f"{config.num_hidden_layers} layers, optimizer {options['optimizer']}",
        "dtype": options["dtype"],
    }


def runnable(model: Path, names: list[str], options: dict[str, Any]) -> list[str]:
    """Return the implementations without one whose copies of weights would fill the memory."""
    config: Any = transformers.AutoConfig.from_pretrained(model)
    matrices = 3 * config.hidden_size * config.intermediate_size
    size = options["tokens"] * config.num_experts_per_tok * matrices
    size *= getattr(torch, options["dtype"]).itemsize
    if "batched_mm" in names and size > GATHERED_LIMIT:
        click.echo(f"batched_mm: not run, it copies {size / 1e9:.0f} GB of weights per layer")
        names = [name for name in names if name != "batched_mm"]
    return names


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_growth(folder: Path, name: str, options: dict[str, Any]) -> int:
    """Return by how many bytes the resident memory grew at most during a second step."""
    torch.set_num_threads(options["threads"])
    step = Step(folder, {**options, "optimizer": "none"})
    # a short step first, so that what is made once for all steps is not counted
    whole, step.ids = step.ids, step.ids[:, :8]
    step.backward(step.forward(name))
    step.ids = whole
    step.model.zero_grad(set_to_none=True)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step.backward(step.forward(name))
    return _status("VmHWM") - before


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def show(row: rows.Row) -> None:
    names = ("provider", "direction", "dtype", "median_us", "ratio", "ratio_cpu", "saved_bytes")
    click.echo("\t".join(row.get(name, "") for name in (*names, "peak_bytes")))


if __name__ == "__main__":
    main()
