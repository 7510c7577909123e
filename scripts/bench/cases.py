"""What is measured: a raw write of the same bytes, hashing them, adaconvert, and its two peers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.dense_model import Sizes
from bench.process_tree import Cost, measure

CHUNK_BYTES = 64 << 20
HASH_CHUNK_BYTES = 8 << 20
RAW_FILE_BYTES = 5_000_000_000
PEERS = {
    "mergekit": ("torch==2.13.0", "mergekit==0.1.5"),
    "mixturekit": ("torch==2.13.0", "mixturekit==1.1.1", "accelerate"),
}
# nothing here may be looked up on a hub: all inputs are folders
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """One benchmark's inputs, the same for all cases.

    Attributes:
        source: folder of the dense checkpoint.
        target: folder a case writes; absent before and removed after each case.
        sizes: of the dense model.
        experts: in the result, two of them active per token.
        adaconvert: path of the command.
        peers: folder with one virtual environment per peer, None to go without peers.
        logs: folder for the output of the commands.
    """

    source: Path
    target: Path
    sizes: Sizes
    experts: int
    adaconvert: str
    peers: Path | None
    logs: Path

    @property
    def target_bytes(self) -> int:
        """Bytes of weights a conversion writes."""
        return self.sizes.target_bytes(self.experts)


def cases(setup: Setup) -> dict[str, Callable[[], Cost]]:
    """Return what can be measured, by name, in the order in which one round runs it."""
    target = str(setup.target)
    upcycle = [setup.adaconvert, "upcycle", str(setup.source), target]
    upcycle += ["--experts", str(setup.experts), "--top-k", "2"]
    found: dict[str, Callable[[], Cost]] = {
        "raw write": lambda: raw_write(setup.target, setup.target_bytes),
        "sha256 of source": lambda: hash_bytes(setup.source, setup.sizes.source_bytes),
        "sha256 of target": lambda: hash_bytes(setup.source, setup.target_bytes),
        "adaconvert --no-verify": lambda: _convert(setup, [*upcycle, "--no-verify"], "adaconvert"),
        "adaconvert": lambda: _convert(setup, upcycle, "adaconvert-verify"),
    }
    if setup.peers is not None:
        found["mergekit-moe"] = lambda: _convert(setup, _mergekit_command(setup), "mergekit")
        found["mixturekit"] = lambda: _convert(setup, _mixturekit_command(setup), "mixturekit")
    return found


def raw_write(folder: Path, total: int) -> Cost:
    """Write `total` bytes in 64 MiB chunks to files of at most 5 GB, and fsync them."""
    # the buffer is made before the clock starts: the fastest a program could possibly be
    buffer = memoryview(os.urandom(CHUNK_BYTES))
    cpu, start = time.process_time(), time.perf_counter()
    folder.mkdir()
    for index, first in enumerate(range(0, total, RAW_FILE_BYTES)):
        with (folder / f"raw-{index}.bin").open("wb", buffering=0) as file:
            left = min(RAW_FILE_BYTES, total - first)
            while left:
                left -= file.write(buffer[: min(left, CHUNK_BYTES)])
            os.fsync(file.fileno())
    sync_tree(folder)
    wall = time.perf_counter() - start
    return Cost(wall=wall, cpu=time.process_time() - cpu, anonymous=CHUNK_BYTES, exit_code=0)


def hash_bytes(source: Path, total: int) -> Cost:
    """Read `total` bytes, the source's file over and over, and hash them in one thread."""
    cpu, start = time.process_time(), time.perf_counter()
    digest, buffer = hashlib.sha256(), memoryview(bytearray(HASH_CHUNK_BYTES))
    with (source / "model.safetensors").open("rb", buffering=0) as file:
        while total > 0:
            size = file.readinto(buffer[: min(total, HASH_CHUNK_BYTES)])
            if not size:
                file.seek(0)
            digest.update(buffer[:size])
            total -= size or 0
    wall = time.perf_counter() - start
    return Cost(wall=wall, cpu=time.process_time() - cpu, anonymous=HASH_CHUNK_BYTES, exit_code=0)


def start_up(command: list[str], log: Path) -> Cost:
    """Run a command that only prints, `--help` say."""
    return measure(command, log=log, environment=OFFLINE)


def peer_program(peers: Path, peer: str) -> str:
    """Return the path of a peer's command in its own environment."""
    name = {"mergekit": "mergekit-moe", "mixturekit": "mixturekit"}[peer]
    return str(peers / peer / "bin" / name)


def install_peers(peers: Path) -> None:
    """Make one virtual environment per peer, torch first; those that are there stay."""
    for peer, packages in PEERS.items():
        if Path(peer_program(peers, peer)).exists():
            continue
        subprocess.run([sys.executable, "-m", "venv", str(peers / peer)], check=True)
        pip = [str(peers / peer / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, packages[0]], check=True)
        subprocess.run([*pip, *packages[1:]], check=True)


def sync_tree(folder: Path) -> None:
    """Return when every file and folder below `folder`, and its entry in its parent, is on disk."""
    for directory, _, names in os.walk(folder, topdown=False):
        for path in [*(Path(directory) / name for name in names), Path(directory)]:
            _fsync(path)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _convert(setup: Setup, command: list[str], name: str) -> Cost:
    def sync() -> None:
        if setup.target.is_dir():
            sync_tree(setup.target)

    log = setup.logs / f"{name}.log"
    return measure(command, log=log, environment=OFFLINE, afterwards=sync)


def _mergekit_command(setup: Setup) -> list[str]:
    source = str(setup.source)
    recipe = {
        "base_model": source,
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts": [{"source_model": source}] * setup.experts,
    }
    path = _write_recipe(setup.logs / "mergekit.yml", recipe)
    flag = "--i-understand-this-is-not-useful-without-training"
    return [_program(setup, "mergekit"), path, str(setup.target), flag]


def _mixturekit_command(setup: Setup) -> list[str]:
    source = str(setup.source)
    recipe = {
        "moe_method": "traditional",
        "model_type": "mxbench",
        "num_experts_per_tok": 2,
        "experts": [{"expert_name": f"e{i}", "model_id": source} for i in range(setup.experts)],
        "alpha": 0.01,
    }
    path = _write_recipe(setup.logs / "mixturekit.yml", recipe)
    return [_program(setup, "mixturekit"), "build", path, "--output", str(setup.target)]


def _program(setup: Setup, peer: str) -> str:
    if setup.peers is None:
        raise ValueError(f"{peer} is measured only with a folder for the peers' environments")
    return peer_program(setup.peers, peer)


def _write_recipe(path: Path, recipe: Mapping[str, object]) -> str:
    # JSON is YAML, and needs no YAML library here
    path.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return str(path)


def clean(setup: Setup) -> None:
    """Remove what a case wrote, staging folders of a failed run included."""
    for path in setup.target.parent.iterdir():
        shutil.rmtree(path, ignore_errors=True)
