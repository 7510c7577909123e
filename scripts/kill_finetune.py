#!/usr/bin/env python3
"""Kills a fine-tune at random moments of random steps, resumes it, and compares the two results.

    python scripts/kill_finetune.py SOURCE --data text.jsonl --work FOLDER --kills 5

One run is left alone. The other is sent SIGKILL within each of --kills random steps, goes on with
--resume each time, and must leave no destination behind until it is done. Then the losses of every
step that both logged and all weights are compared. Rows go to --csv; exits with 1 when a loss
differs by more than 1e-6.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from bench.results import append, commit, machine
from safetensors.torch import load_file

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "bench" / "kill_finetune.csv"
#: of losses, nats.
ALLOWED = 1e-6
STEP = re.compile(r"step (\d+)/\d+:")
FIELDS = (
    *("run", "commit", "cpu", "model", "precision", "steps", "killed_in_step", "final_loss"),
    *("final_loss_resumed", "loss_difference", "largest_loss_difference", "weight_difference"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Killed:
    """One interruption.

    Attributes:
        step: the last step that was logged before.
        destination: whether the destination was there afterwards.
    """

    step: int
    destination: bool


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("source", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--kills", default=5, show_default=True)
@click.option("--steps", default=16, show_default=True)
@click.option("--save-every", default=2, show_default=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--seq-len", default=128, show_default=True)
@click.option("--batch-size", default=2, show_default=True)
@click.option("--seed", default=0, show_default=True, help="of the moments")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
def main(
    source: Path, data: str, work: Path, kills: int, seed: int, csv: Path, **options: Any
) -> None:
    """Run both, compare, and add a row."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    shared = [*flags, "--log-every=1", "--device=cpu", f"--data={data}"]
    command = [sys.executable, "-m", "adaconvert", "finetune", str(source)]
    whole = finished([*command, str(work / "whole"), *shared, "--json"])
    line = [*command, str(work / "killed"), *shared]
    moments = random.Random(seed)
    steps = sorted(moments.sample(range(1, options["steps"]), kills))
    done = [killed(line, step, moments.random(), work, first=step == steps[0]) for step in steps]
    for kill in done:
        click.echo(f"killed after step {kill.step}; destination there: {kill.destination}")
    resumed = finished([*line, "--resume", "--json"])
    found = compared(whole, resumed) | {"weight_difference": apart(work)}
    row = {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(SCRIPTS.parent),
        "cpu": machine()["cpu"],
        "model": source.name,
        "precision": options["precision"],
        "steps": options["steps"],
        "killed_in_step": " ".join(str(kill.step + 1) for kill in done),
        **found,
    }
    append(csv, row, FIELDS)
    click.echo(json.dumps(row, indent=1))
    early = any(kill.destination for kill in done)
    sys.exit(1 if early or found["largest_loss_difference"] > ALLOWED else 0)


def finished(command: Sequence[str]) -> dict[str, Any]:
    """Return the result of a run that nobody disturbs, as JSON data."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"a run failed with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def killed(line: Sequence[str], step: int, share: float, work: Path, *, first: bool) -> Killed:
    """Return what a kill left, sent within the step that follows a given one.

    Args:
        line: the command line.
        step: the kill comes when it has been logged.
        share: of the time of a step that passes until then.
        work: folder of the results.
        first: nothing is there to resume yet.
    """
    command = list(line) if first else [*line, "--resume"]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert process.stderr is not None
    before, seconds, reached = time.monotonic(), 0.0, 0
    for text in process.stderr:
        found = STEP.search(text)
        if found is None:
            continue
        now = time.monotonic()
        seconds, before, reached = now - before, now, int(found[1])
        if reached >= step:
            time.sleep(share * min(seconds, 30))
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run ended by itself with {process.returncode}")
    return Killed(step=reached, destination=(work / "killed").exists())


def compared(whole: Mapping[str, Any], resumed: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far the losses of the same steps are apart, nats."""
    left, right = ({e["step"]: e["lm"] for e in run["curve"]} for run in (whole, resumed))
    apart = {step: abs(left[step] - right[step]) for step in left.keys() & right.keys()}
    last = max(left)
    return {
        "final_loss": left[last],
        "final_loss_resumed": right[last],
        "loss_difference": apart[last],
        "largest_loss_difference": max(apart.values()),
    }


def apart(work: Path) -> float:
    """Return the largest difference of any weight of both results."""
    left, right = (load_file(work / name / "model.safetensors") for name in ("whole", "killed"))
    return max(float((left[name] - right[name]).abs().max()) for name in left)


if __name__ == "__main__":
    main()
