"""Measures a conversion against a raw write of the same bytes and against other tools.

A dense Llama with random weights (1.1 billion parameters unless sized otherwise) becomes a
Mixture of 8 experts. The cases of a round run one after the other, so that slow phases of the
disk hit all of them. Every case ends when all it wrote is on disk: the other tools do not fsync,
so this script does it for them, inside their time. Before each case all earlier output is removed
and synced. "warm" has the source in the page cache, "cold" has it dropped. Nothing is asserted:
rows are added to a CSV file, and `--table` shows those of the last run.

    python scripts/bench_convert.py --work-dir DIR --peers-venv-dir DIR --rounds 3
    python scripts/bench_convert.py --work-dir DIR --num-hidden-layers 88   # four times the model
    python scripts/bench_convert.py --table
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from bench import results
from bench.cases import Setup, cases, clean, install_peers, peer_program, start_up
from bench.dense_model import Sizes, make
from bench.process_tree import Cost

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "bench" / "convert.csv"
READ_BYTES = 8 << 20
HELP_RUNS = 20
PEER_HELP_RUNS = 3
# what a run may need beside the output itself: logs, tokenizers, the file system's own
SPARE_BYTES = 1 << 30


def main() -> int:
    """Run the benchmark or print its table; 1 when a measured command failed."""
    arguments = _parse()
    if arguments.table:
        print(results.table(results.last_run(results.read(arguments.csv))))
        return 0
    setup = _prepare(arguments)
    record = _Recorder(arguments.csv, setup, _versions(setup))
    if "help" in arguments.cases:
        _measure_help(setup, record)
    for number in range(1, arguments.rounds + 1):
        for cache in arguments.cache:
            _round(setup, arguments, cache, number, record)
    print(results.table(results.last_run(results.read(arguments.csv))))
    return 1 if record.failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--work-dir",
        type=Path,
        help="folder for the model, the outputs and the logs; needs a disk, not a tmpfs",
    )
    add(
        "--peers-venv-dir",
        type=Path,
        help="folder for the other tools' environments; without it they are left out",
    )
    add("--rounds", type=int, default=3)
    add("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    add("--cases", nargs="+", default=["all", "help"], help="names as in the table; 'all', 'help'")
    add("--experts", type=int, default=8)
    for name, value in _default_sizes().items():
        add(
            f"--{name.replace('_', '-')}",
            type=int,
            default=value,
            help=f"of the dense model ({value})",
        )
    add("--adaconvert", default=_default_command(), help="path of the adaconvert command")
    add("--csv", type=Path, default=RESULTS, help="rows are added here")
    add(
        "--drop-caches",
        action="store_true",
        help="cold drops the machine's whole page cache (needs root)",
    )
    add("--table", action="store_true", help="print the table of the last run and stop")
    arguments = parser.parse_args()
    if not arguments.table and arguments.work_dir is None:
        parser.error("--work-dir is needed")
    return arguments


def _default_sizes() -> dict[str, int]:
    sizes = Sizes()
    return {name: getattr(sizes, name) for name in Sizes.__slots__}


def _default_command() -> str:
    beside = Path(sys.executable).with_name("adaconvert")
    return str(beside) if beside.exists() else shutil.which("adaconvert") or "adaconvert"


def _prepare(arguments: argparse.Namespace) -> Setup:
    sizes = Sizes(**{name: getattr(arguments, name) for name in Sizes.__slots__})
    work = arguments.work_dir.resolve()
    logs, target = work / "logs", work / "out" / "target"
    for folder in (logs, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.peers_venv_dir is not None:
        install_peers(arguments.peers_venv_dir.resolve())
    name = f"llama-{sizes.hidden_size}-{sizes.intermediate_size}-{sizes.num_hidden_layers}"
    setup = Setup(
        source=work / name,
        target=target,
        sizes=sizes,
        experts=arguments.experts,
        adaconvert=arguments.adaconvert,
        peers=arguments.peers_venv_dir and arguments.peers_venv_dir.resolve(),
        logs=logs,
    )
    clean(setup)
    make(setup.source, sizes)
    needed, free = setup.target_bytes + SPARE_BYTES, shutil.disk_usage(work).free
    if free < needed:
        raise SystemExit(
            f"{needed / 1e9:.1f} GB are needed in the work folder, {free / 1e9:.1f} are free"
        )
    return setup


class _Recorder:
    """Adds rows that all carry the same facts to the CSV file."""

    def __init__(self, path: Path, setup: Setup, versions: str) -> None:
        billions = setup.sizes.source_bytes / 2e9
        model = f"Llama {billions:.2f} B bf16, {setup.sizes.num_hidden_layers} layers"
        self._path = path
        self._facts = results.machine() | {
            "run": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": results.commit(SCRIPTS.parent),
            "versions": versions,
            "model": f"{model}, {setup.experts} experts",
        }
        self.failed = False

    def add(self, case: str, cache: str, number: int, cost: Cost, written: int) -> None:
        """Keep one measurement and print it."""
        row = {
            "case": case,
            "cache": cache,
            "round": str(number),
            "wall_s": f"{cost.wall:.3f}",
            "cpu_s": f"{cost.cpu:.3f}",
            "anon_mib": f"{cost.anonymous / 2**20:.1f}",
            "bytes": str(written),
            "exit_code": str(cost.exit_code),
        }
        results.append(self._path, self._facts | row)
        self.failed |= cost.exit_code != 0
        print(f"{number} {cache} {case}: {row['wall_s']} s, {row['anon_mib']} MiB", flush=True)
        if cost.exit_code:
            print(f"  failed with exit code {cost.exit_code}, see the log", flush=True)


def _measure_help(setup: Setup, record: _Recorder) -> None:
    commands = {"adaconvert --help": ([setup.adaconvert, "--help"], HELP_RUNS)}
    if setup.peers is not None:
        for peer in ("mergekit", "mixturekit"):
            command = [peer_program(setup.peers, peer), "--help"]
            commands[f"{peer} --help"] = (command, PEER_HELP_RUNS)
    for name, (command, runs) in commands.items():
        for number in range(1, runs + 1):
            cost = start_up(command, setup.logs / "help.log")
            record.add(name, "-", number, cost, 0)


def _round(
    setup: Setup, arguments: argparse.Namespace, cache: str, number: int, record: _Recorder
) -> None:
    for name, run in cases(setup).items():
        if "all" not in arguments.cases and name not in arguments.cases:
            continue
        _prepare_cache(setup, cache, drop_all=arguments.drop_caches)
        cost = _run(run)
        record.add(name, cache, number, cost, _bytes_below(setup.target))
        clean(setup)


def _run(run: Callable[[], Cost]) -> Cost:
    try:
        return run()
    except FileNotFoundError as error:
        print(f"  {error}", flush=True)
        return Cost(wall=0.0, cpu=0.0, anonymous=0, exit_code=127)


def _prepare_cache(setup: Setup, cache: str, *, drop_all: bool) -> None:
    # what an earlier case left dirty would be written during the next one
    os.sync()
    for path in setup.source.iterdir():
        with path.open("rb", buffering=0) as file:
            if cache == "warm":
                while file.read(READ_BYTES):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cache == "cold" and drop_all:
        Path("/proc/sys/vm/drop_caches").write_text("3\n", encoding="ascii")


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _versions(setup: Setup) -> str:
    found = [f"adaconvert {_version(Path(setup.adaconvert).with_name('python'), 'adaconvert')}"]
    if setup.peers is not None:
        for peer in ("mergekit", "mixturekit"):
            python = setup.peers / peer / "bin" / "python"
            found += [f"{peer} {_version(python, peer)}", f"torch {_version(python, 'torch')}"]
    return ", ".join(dict.fromkeys(found))


def _version(python: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    command = [str(python), "-c", code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
