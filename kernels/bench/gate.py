"""No row without green tests: what must pass before an operation is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rows import ROOT

TESTS = ROOT / "tests" / "kernels"
#: operation -> files of tests/kernels; of those under interpreted/ Triton's interpreter runs.
FILES: dict[str, tuple[str, ...]] = {
    "route_plan": ("test_plan.py", "test_routing_ops.py", "interpreted/test_plan.py"),
    "router_select": (
        *("test_select.py", "test_select_rules.py", "test_routing_ops.py"),
        "interpreted/test_routing.py",
    ),
    "grouped_ffn": (
        *("test_grouped_ffn.py", "test_grouped_ffn_use.py", "test_grouped_ops.py"),
        *("test_experts.py", "interpreted/test_grouped.py"),
    ),
    "dynk_decode": (
        *("test_decode.py", "test_reference.py", "interpreted/test_decode.py"),
        # on a CPU the adaptive runtime decodes
        *("../modeling/test_execution.py", "../modeling/test_execution_compiled.py"),
    ),
    "lora": ("test_lora.py", "test_lora_use.py"),
    "cross_entropy": ("test_cross_entropy.py", "test_cross_entropy_use.py"),
    "token_rows": ("test_token_rows.py",),
}
#: seconds after which tests count as red.
LIMIT = 300


def red(ops: Iterable[str], *, interpreted: bool = True, folder: Path = TESTS) -> dict[str, str]:
    """Return the operations whose tests fail or are missing, and what failed.

    Args:
        ops: operations, keys of `FILES`.
        interpreted: also those of Triton's interpreter; where the kernels themselves can run they
            are held to the reference instead (`contract`).
        folder: of the test files.
    """
    wanted = {
        op: [name for name in FILES[op] if interpreted or not _by_interpreter(name)] for op in ops
    }
    names = list(dict.fromkeys(name for files in wanted.values() for name in files))
    with ThreadPoolExecutor((os.cpu_count() or 2) // 2 + 1) as pool:
        reasons = dict(
            zip(names, pool.map(lambda name: _failure(folder, name), names), strict=True)
        )
    found = {}
    for op, files in wanted.items():
        failed = [reason for name in files if (reason := reasons[name]) is not None]
        if failed:
            found[op] = "; ".join(failed)
    return found


def _by_interpreter(name: str) -> bool:
    return name.startswith("interpreted/")


def _failure(folder: Path, name: str) -> str | None:
    """Return what is wrong with the tests of a file, None when all pass."""
    if not (folder / name).exists():
        return f"there is no {name}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    if _by_interpreter(name):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", str(folder / name)]
    settings = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, timeout=LIMIT, check=False, **settings)
    except subprocess.TimeoutExpired:
        return f"{name} took more than {LIMIT} s"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0] if lines else f"{name}: pytest ended with {done.returncode}"
