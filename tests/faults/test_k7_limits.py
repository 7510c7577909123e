"""K7: few descriptors and little memory are enough, whatever the size of a tensor."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from adaconvert.testing.writing import TinyConversion, in_child, tiny_source

MIB = 1 << 20

#: converts one zero tensor of 128 MiB to a copy, a cut copy and a strided one, and prints the peak.
MEASURE = """
import json, os, sys, threading, time
from pathlib import Path
from adaconvert.testing.writing import TinyConversion, TinyPiece, TinyTarget

home, mib = Path(sys.argv[1]), int(sys.argv[2])
size = mib << 20
shape = [size >> 12, 1024]
header = json.dumps({"big": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}})
(home / "src").mkdir()
with (home / "src" / "model.safetensors").open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header.encode())
    file.truncate(8 + len(header) + size)
(home / "src" / "config.json").write_text('{"model_type": "llama"}')
(home / "src" / "tokenizer.json").write_text("{}")

def target(name, *pieces):
    nbytes = sum(piece.nbytes * piece.count for piece in pieces)
    return TinyTarget(name=name, dtype="F32", shape=(nbytes // 4,), group=name, pieces=pieces)

half = size // 2
targets = (
    target("cut", TinyPiece(tensor="big", start=half, nbytes=half)),
    target("column", TinyPiece(tensor="big", start=64, nbytes=512, stride=4096, count=size >> 12)),
)
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
TinyConversion(source=home / "src", destination=home / "out", targets=targets, cap=None).run()
print(max(peak, anonymous()))
"""


def test_k7_few_files_open(tmp_path: Path) -> None:
    conversion = TinyConversion(source=tiny_source(tmp_path / "src"), destination=tmp_path / "out")

    def few() -> None:
        os.closerange(3, 256)
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        conversion.run()

    assert in_child(few) == 0
    assert conversion.destination.exists()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_k7_anonymous_memory_is_flat(tmp_path: Path) -> None:
    peaks = []
    for mib in (16, 128):
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
        peaks.append(int(done.stdout))
        for file in (home / "out").iterdir():
            file.unlink()
    assert max(peaks) < 64 * MIB, peaks
    assert peaks[1] - peaks[0] < 8 * MIB, peaks
