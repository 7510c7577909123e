"""Compiles Triton kernels for GPUs that are not here, and checks what comes out.

    python tests/kernels/compiled/run.py [--json FILE] [--keep FOLDER] [CASES_FILE ...]

Each file defines `CASES` (see case.py). A case is compiled for sm_80 and sm_90, or the GPUs it
names, as a launch with its arguments would: nothing may be spilled, shared memory must fit, the
instructions it wants must occur and no float may be added by an atomic. Exit 1 when a case fails.
Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("run.py: TRITON_INTERPRET is set; nothing would be compiled")

import triton
from addresses import complaints
from binary import Binary, read
from case import Case
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

#: capability -> shared memory that one block may ask for, in bytes
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SHOWN = ("HGMMA", "HMMA", "LDGSTS", "UTMALDG", "LDG.E.128", "LDG")


class Absent:
    """The driver of a GPU that is not here: Triton asks it what to compile for, and nothing more.

    Triton keeps what it compiled per device number, so the capability serves as that.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """Return the GPU to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        """Return the default stream."""
        return 0


def load(path: Path) -> list[Case]:
    """Return the cases of one file."""
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    cases: list[Case] = module.CASES
    names = [case.name for case in cases]
    assert names, f"{path.name}: CASES is empty"
    assert len(set(names)) == len(names), f"{path.name}: two cases have one name"
    assert all(case.targets for case in cases), f"{path.name}: a case is for no GPU"
    return cases


def compile_for(case: Case, capability: int) -> Any:
    """Return the kernel compiled for one GPU, as a launch would compile it."""
    driver.set_active(Absent(capability))  # type: ignore[arg-type]
    options = {"num_warps": case.warps, "num_stages": case.stages}
    return case.kernel.warmup(*case.arguments, grid=(1,), **options, **case.constants)


def faults(case: Case, capability: int, compiled: Any, binary: Binary) -> Iterator[str]:
    """Yield what is wrong with one compiled kernel."""
    if binary.spills or binary.stack:
        yield f"spills: {binary.spills} loads and stores, {binary.stack} bytes of stack"
    if compiled.metadata.shared > SHARED[capability]:
        yield f"shared memory: {compiled.metadata.shared} bytes, {SHARED[capability]} are there"
    for wanted in case.wants.get(capability, ()):
        if not binary.count(wanted):
            yield f"no {wanted} among its instructions"
    if binary.float_atomics:
        yield f"adds floats in the order of arrival: {' '.join(binary.float_atomics)}"
    yield from complaints(compiled.asm["ttir"], case.wide, case.constants)


def measure(cases: list[Case], capability: int, keep: Path | None) -> dict[str, dict[str, Any]]:
    """Compile cases for one GPU; return their rows of the report."""
    rows: dict[str, dict[str, Any]] = {}
    made: list[tuple[Case, Any]] = []
    for case in cases:
        began = time.perf_counter()
        try:
            made.append((case, compile_for(case, capability)))
            rows[case.name] = {"seconds": round(time.perf_counter() - began, 2)}
        except Exception as error:  # whatever the compiler raises is a finding about this case
            rows[case.name] = {"faults": [f"{type(error).__name__}: {error}"]}
    name = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    binaries = read([compiled.asm["cubin"] for _, compiled in made], name)
    for (case, compiled), binary in zip(made, binaries, strict=True):
        rows[case.name] |= {
            "registers": binary.registers,
            "shared": compiled.metadata.shared,
            "spills": binary.spills,
            "stack": binary.stack,
            "instructions": {name: n for name in SHOWN if (n := binary.count(name))},
            "faults": list(faults(case, capability, compiled, binary)),
        }
        if keep:
            write(compiled.asm, keep, f"{case.name}.sm{capability}")
    return rows


def write(parts: dict[str, Any], folder: Path, name: str) -> None:
    """Write the stages of one compiled kernel into a folder."""
    for kind in ("ttir", "ptx"):
        (folder / f"{name}.{kind}").write_text(parts[kind])
    (folder / f"{name}.cubin").write_bytes(parts["cubin"])


def report_on(cases: list[Case], keep: Path | None) -> dict[str, dict[str, dict[str, Any]]]:
    """Return what each case needs on each of its GPUs."""
    report: dict[str, dict[str, Any]] = {case.name: {} for case in cases}
    for capability in SHARED:
        rows = measure([case for case in cases if capability in case.targets], capability, keep)
        for name, row in rows.items():
            report[name][f"sm{capability}"] = row
    return report


def table(report: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Yield the report as lines."""
    yield f"{'case':40} {'gpu':5} {'regs':>4} {'spill':>5} {'shared':>7} {'s':>5}  instructions"
    for name, rows in report.items():
        for gpu, row in rows.items():
            if "registers" in row:
                found = " ".join(f"{key} {n}" for key, n in row["instructions"].items())
                yield (
                    f"{name:40} {gpu:5} {row['registers']:4} {row['spills']:5} {row['shared']:7} "
                    f"{row['seconds']:5.1f}  {found}"
                )
            yield from (f"{name} {gpu}: FAILED: {fault}" for fault in row["faults"])


def main(arguments: list[str]) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the report to this file as well")
    parser.add_argument("--keep", type=Path, help="write IR, PTX and cubin into this folder")
    parser.add_argument("files", type=Path, nargs="*", help="default: every *_cases.py here")
    asked = parser.parse_args(arguments)
    if asked.keep:
        asked.keep.mkdir(parents=True, exist_ok=True)
    files = asked.files or sorted(Path(__file__).parent.glob("*_cases.py"))
    report = report_on([case for path in files for case in load(path)], asked.keep)
    sys.stdout.write("\n".join((f"triton {triton.__version__}", *table(report), "")))
    if asked.json:
        asked.json.write_text(json.dumps({"triton": triton.__version__, "cases": report}))
    return int(any(row["faults"] for rows in report.values() for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
