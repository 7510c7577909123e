"""K7: few descriptors and little memory are enough, whatever the size of a tensor."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from adaconvert.testing.writing import Recorded, TinyRun, in_child, tree_digest

MIB = 1 << 20

#: splits an FFN of three tensors of some MiB each into a shared and two routed experts, of rows
#: of two tensors and columns of the third; prints the anonymous memory seen and foretold.
MEASURE = """
import sys, threading, time
from pathlib import Path
from adaconvert.testing.writing import TinyRun, sparse_source

home, mib = Path(sys.argv[1]), int(sys.argv[2])
source = sparse_source(home / "src", hidden=256, inner=mib << 10)
peak = 0

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
run = TinyRun(
    source=source, destination=home / "out", shared_experts="split", max_shard_size="5GB"
)
foretold = run.run().report.memory
print(max(peak, anonymous()), foretold)
"""


def test_k7_few_files_open(quick: TinyRun, recorded: Recorded) -> None:
    def few() -> None:
        # garbage of earlier tests must not close a number that is in use again by then
        gc.collect()
        gc.freeze()
        os.closerange(3, 256)
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        quick.run()

    assert in_child(few) == 0
    assert tree_digest(quick.destination.parent) == recorded.tree


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_k7_anonymous_memory_is_flat(tmp_path: Path) -> None:
    peaks = []
    for mib in (8, 64):
        home = tmp_path / str(mib)
        home.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(home), str(mib)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        seen, foretold = map(int, done.stdout.split())
        assert seen < foretold
        peaks.append(seen)
        (shard,) = (home / "out").glob("*.safetensors")
        assert shard.stat().st_size > 3 * mib * MIB
        shard.unlink()
    assert peaks[1] - peaks[0] < 8 * MIB, peaks
