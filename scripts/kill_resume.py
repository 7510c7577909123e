"""Kills a conversion at random moments, resumes it, and compares the result byte for byte.

    python scripts/kill_resume.py --source FOLDER --work-dir DIR --runs 20

One uninterrupted run says how long a conversion takes and what its result is. Each further run is
sent SIGKILL at a random moment of that time; the moments are spread over all of it. Then the
destination must be absent (or complete, if the rename had happened), `--resume` must succeed,
and names, modes and bytes of the result must be those of the uninterrupted run. Exits with 1 when
anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HASH_CHUNK_BYTES = 1 << 20
# of a moment that came too late
EARLIER = 0.8
HEADS = ("run", "killed at s", "destination", "left in staging", "resumed in s", "result")

# relative path -> mode and sha256
Tree = dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is run, and where.

    Attributes:
        command: the conversion up to its destination.
        options: what follows the destination.
        folder: parent of every destination; holds nothing else.
    """

    command: tuple[str, ...]
    options: tuple[str, ...]
    folder: Path

    def line(self, name: str, *more: str) -> list[str]:
        """Return the command line of one run."""
        return [*self.command, str(self.folder / name), *self.options, *more]


def main() -> int:
    """Run everything and print a table; 1 when a resumed result differs."""
    arguments = _parse()
    setup = _prepare(arguments)
    duration = _uninterrupted(setup)
    wanted = tree(setup.folder / "whole")
    print(f"uninterrupted: {duration:.2f} s, {len(wanted)} files", flush=True)
    print("| " + " | ".join(HEADS) + " |\n" + "| --- " * len(HEADS) + "|", flush=True)
    good = True
    for number, moment in enumerate(moments(arguments.runs, duration, arguments.seed), start=1):
        cells, fine = _killed_and_resumed(setup, moment, arguments.kills, wanted)
        good &= fine
        print("| " + " | ".join([str(number), *cells]) + " |", flush=True)
        _clear(setup.folder, keep="whole")
    _clear(setup.folder)
    print("all identical" if good else "NOT all identical")
    return 0 if good else 1


def moments(runs: int, duration: float, seed: int) -> list[float]:
    """Return one random moment in each of `runs` equal parts of the duration, shuffled."""
    generator = random.Random(seed)
    found = [(part + generator.random()) * duration / runs for part in range(runs)]
    generator.shuffle(found)
    return found


def tree(folder: Path) -> Tree:
    """Return what a folder holds: relative path, mode and hash of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, _sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of a dense checkpoint")
    add("--work-dir", type=Path, required=True, help="needs room for two results")
    add("--runs", type=int, default=20)
    add("--kills", type=int, default=1, help="interruptions per run; the last resume is not killed")
    add("--seed", type=int, default=0)
    add("--max-shard-size", default="50MB", help="small, so that there is much to resume")
    add("--verify", action="store_true", help="with the built-in verification; takes far longer")
    add("--adaconvert", default=_default_command(), help="path of the adaconvert command")
    add("options", nargs="*", help="further options of the conversion, after --")
    return parser.parse_args()


def _default_command() -> str:
    beside = Path(sys.executable).with_name("adaconvert")
    return str(beside) if beside.exists() else shutil.which("adaconvert") or "adaconvert"


def _prepare(arguments: argparse.Namespace) -> Setup:
    folder = arguments.work_dir.resolve() / "kill-resume"
    folder.mkdir(parents=True, exist_ok=True)
    _clear(folder)
    options = ["--max-shard-size", arguments.max_shard_size, *arguments.options]
    return Setup(
        command=(arguments.adaconvert, "upcycle", str(arguments.source.resolve())),
        options=(*options, *(() if arguments.verify else ("--no-verify",))),
        folder=folder,
    )


def _uninterrupted(setup: Setup) -> float:
    # twice: the first run reads the source and the program from disk
    for _ in range(2):
        _clear(setup.folder)
        start = time.perf_counter()
        code, output = _run(setup.line("whole"))
        duration = time.perf_counter() - start
        if code:
            raise SystemExit(f"the uninterrupted run failed with {code}:\n{output}")
    return duration


def _killed_and_resumed(
    setup: Setup, moment: float, kills: int, wanted: Tree
) -> tuple[list[str], bool]:
    destination = setup.folder / "killed"
    seconds, states, left = [], [], []
    for kill in range(kills):
        more = ("--resume",) if kill else ()
        seconds.append(_kill_in_time(setup, more, moment / (kill + 1)))
        states.append(_state(destination, wanted))
        left.append(_left(setup.folder))
    start = time.perf_counter()
    code, output = _run(setup.line("killed", "--resume")) if states[-1] != "complete" else (0, "")
    resumed = time.perf_counter() - start
    result = _result(code, output, destination, setup.folder, wanted)
    fine = result == "identical" and "PARTIAL" not in states
    cells = [", ".join(f"{s:.2f}" for s in seconds), ", ".join(states), ", ".join(left)]
    return [*cells, f"{resumed:.2f}", result], fine


def _kill_in_time(setup: Setup, more: Sequence[str], moment: float) -> float:
    # the machine may be faster now than it was in the uninterrupted run: then earlier
    while True:
        seconds, killed = _kill(setup.line("killed", *more), moment)
        if killed:
            return seconds
        _clear(setup.folder, keep="whole")
        moment *= EARLIER


def _kill(command: Sequence[str], moment: float) -> tuple[float, bool]:
    """Start the command and kill all of it at the moment; return when it ended, and whether so."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return time.perf_counter() - start, process.returncode == -signal.SIGKILL


def _state(destination: Path, wanted: Tree) -> str:
    if not destination.exists():
        return "absent"
    return "complete" if tree(destination) == wanted else "PARTIAL"


def _left(folder: Path) -> str:
    files = [
        path
        for staging in folder.iterdir()
        if staging.name not in ("whole", "killed")
        for path in staging.rglob("*")
        if path.is_file()
    ]
    weights = [path for path in files if path.suffix == ".safetensors"]
    size = sum(path.stat().st_blocks * 512 for path in files)
    return f"{len(weights)} weight files, {size / 1e6:.0f} MB"


def _result(code: int, output: str, destination: Path, folder: Path, wanted: Tree) -> str:
    if code:
        lines = output.strip().splitlines()
        return f"FAILED with {code}: {lines[-1] if lines else ''}"
    found = tree(destination)
    if found != wanted:
        names = [
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        ]
        return "DIFFERS in " + ", ".join(sorted(names))
    rest = sorted(path.name for path in folder.iterdir() if path.name not in ("whole", "killed"))
    return f"LEFT BEHIND {', '.join(rest)}" if rest else "identical"


def _run(command: Sequence[str]) -> tuple[int, str]:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def _clear(folder: Path, *, keep: str = "") -> None:
    for path in folder.iterdir():
        if path.is_dir() and path.name != keep:
            shutil.rmtree(path)
        elif path.name != keep:
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
