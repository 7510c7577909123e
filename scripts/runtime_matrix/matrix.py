"""Asks every runtime for the same continuations of the same models, and tabulates who is right.

Called by scripts/runtime_matrix.sh, which makes the environments. This one holds adaconvert and the
newest transformers. Exits with 1 when a runtime contradicts what `adaconvert plan` says of it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import models
import outcome
import report
from judge import judge
from models import CASES, REAL, STAND_IN, Case
from outcome import Outcome, Prompt, Prompts
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
TRANSFORMERS = "transformers 5"
SAME, DISTINCT, DENSE = "same", "distinct", "dense"
TEXTS = (
    "Once upon a time there was a small lighthouse at the end of the world, and in it",
    "The three most important rivers of Europe are",
    'def mean(values):\n    """Return the mean."""\n',
    "To bake bread at home you need flour, water, salt and",
    "In mathematics, a prime number is a natural number that",
)
# where tokenizers of different families part ways: digits, capitals, blanks, other scripts
HARD_TO_CUT = (
    "I'LL bring 12345 of them, they'll cost 1,024.50 EUR",
    "one\n\n\n  two\t\tthree   \n four",
    "Stra\u00dfe, \u65e5\u672c\u8a9e, \u041c\u043e\u0441\u043a\u0432\u0430, cafe\u0301",
    "<|im_start|>user\nhello<|im_end|>\n",
)
RUNNERS = {
    "transformers 4.57": "run_transformers.py",
    TRANSFORMERS: "run_transformers.py",
    "vllm": "run_vllm.py",
    "llama.cpp": "run_llamacpp.py",
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Where things are.

    Attributes:
        folder: everything made here.
        pythons: interpreter per runtime, by the names that `adaconvert plan` uses.
        adaconvert: path of the command.
        real: folder of the real model, None when it cannot be had.
    """

    folder: Path
    pythons: dict[str, Path]
    adaconvert: str
    real: Path | None

    def model(self, case: Case, kind: str) -> Path:
        """Return the folder of a case's model."""
        return self.folder / "models" / _stem(case, kind)

    def outcome(self, runtime: str, case: Case, kind: str) -> Path:
        """Return the path of what a runtime made of a case's model."""
        return self.folder / "outcomes" / runtime.replace(" ", "-") / f"{_stem(case, kind)}.json"


def _stem(case: Case, kind: str) -> str:
    # the cases with one source share its dense model
    return f"{case.source if kind == DENSE else case.name}.{kind}"


def main() -> int:
    """Make the models, ask the runtimes, print the table; 1 when `plan` is contradicted."""
    arguments = _parse()
    work = Work(
        folder=arguments.work_dir.resolve(),
        pythons={name: Path(path) for name, path in (p.split("=", 1) for p in arguments.python)},
        adaconvert=str(Path(sys.executable).with_name("adaconvert")),
        real=arguments.real and arguments.real.resolve(),
    )
    cases = _chosen(arguments.cases, work.real)
    planned = {case.name: _make(work, case, again=arguments.ask is None) for case in cases}
    prompts = _make_prompts(work, cases[0])
    for runtime in work.pythons if arguments.ask is None else arguments.ask:
        _ask(work, runtime, cases)
    rows = _judge(work, cases, prompts, planned)
    if arguments.csv is not None:
        report.write(arguments.csv, rows)
    print(report.table(rows))
    problems = report.contradictions(rows) + _without_power(work, cases)
    print("\n".join(["", *problems]) if problems else "\nall as `adaconvert plan` says")
    return 1 if problems else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--python", action="append", required=True, metavar="RUNTIME=PATH")
    parser.add_argument("--real", type=Path, help=f"folder of {REAL}")
    parser.add_argument("--cases", nargs="*", help="names of conversions; all when not given")
    parser.add_argument(
        "--ask",
        nargs="*",
        help="ask these runtimes only, and use what is there of the others and the models",
    )
    parser.add_argument("--csv", type=Path, help="file for the rows")
    return parser.parse_args()


def _chosen(names: Sequence[str] | None, real: Path | None) -> list[Case]:
    known = [case for case in CASES if real is not None or case.source != REAL]
    if real is None:
        known.insert(0, STAND_IN)
    chosen = [case for case in known if not names or case.name in names]
    if not chosen:
        raise SystemExit(f"no such case; there are {', '.join(case.name for case in known)}")
    return chosen


def _make(work: Work, case: Case, *, again: bool) -> dict[str, str]:
    source = models.make_source(case, work.folder / "sources", work.real)
    if not again and work.model(case, DISTINCT).exists():
        return models.planned(work.adaconvert, case, source)
    print(f"making {case.name}", flush=True)
    models.make_dense(source, work.model(case, DENSE))
    for kind in (SAME, DISTINCT):
        folder = work.model(case, kind)
        models.convert(work.adaconvert, case, source, folder, distinct=kind == DISTINCT)
    return models.planned(work.adaconvert, case, source)


def _make_prompts(work: Work, case: Case) -> Prompts:
    # one tokenizer for all: the tiny models carry the real one's where there is a real one
    tokenizer = Tokenizer.from_file(str(work.model(case, DENSE) / "tokenizer.json"))

    def cut(text: str) -> Prompt:
        return Prompt(text=text, ids=tokenizer.encode(text, add_special_tokens=False).ids)

    # llama.cpp stops at other special tokens than the end token, too
    added = tokenizer.get_added_tokens_decoder().items()
    prompts = Prompts(
        prompts=[cut(text) for text in TEXTS],
        end=[token for token, entry in added if entry.special],
        texts=[cut(text) for text in (*TEXTS, *HARD_TO_CUT)],
    )
    outcome.write_prompts(work.folder / "prompts.json", prompts)
    return prompts


def _ask(work: Work, runtime: str, cases: Sequence[Case]) -> None:
    """Return when there is an outcome of every model, a crash of the runtime being one."""
    pairs = [(case, kind) for case in cases for kind in (DENSE, SAME, DISTINCT)]
    waiting = {work.outcome(runtime, *pair): work.model(*pair) for pair in pairs}
    for path in waiting:
        for old in (path, path.with_suffix(".npz")):
            old.unlink(missing_ok=True)
    while waiting:
        code = _call(work, runtime, list(waiting.values()))
        waiting = {path: model for path, model in waiting.items() if not path.exists()}
        if waiting:
            # the models are asked in order: the first without an outcome is the one it died of
            path = next(iter(waiting))
            detail = f"the process ended with {code}"
            outcome.write(path, Outcome(version="", status=outcome.REFUSED, detail=detail))
            del waiting[path]


def _call(work: Work, runtime: str, folders: Sequence[Path]) -> int:
    out = work.folder / "outcomes" / runtime.replace(" ", "-")
    out.mkdir(parents=True, exist_ok=True)
    command = [work.pythons[runtime], HERE / RUNNERS[runtime], work.folder / "prompts.json", out]
    print(f"asking {runtime} about {len(folders)} models", flush=True)
    with (out / "log.txt").open("ab") as log:
        done = subprocess.run(
            [*command, *folders],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            check=False,
        )
    return done.returncode


def _judge(
    work: Work, cases: Sequence[Case], prompts: Prompts, planned: dict[str, dict[str, str]]
) -> list[report.Row]:
    run = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    facts = {"run": run, "commit": _commit()}
    rows = []
    for case in cases:
        for runtime in work.pythons:
            # transformers 5 is what distinct experts are compared with elsewhere
            kinds = (SAME,) if runtime == TRANSFORMERS else (SAME, DISTINCT)
            for kind in kinds:
                found = _judge_one(work, case, runtime, kind, prompts)
                rows.append(facts | found | {"planned": planned[case.name][runtime]})
    return rows


def _judge_one(work: Work, case: Case, runtime: str, kind: str, prompts: Prompts) -> report.Row:
    own = outcome.read(work.outcome(runtime, case, kind))
    other = (runtime, DENSE) if kind == SAME else (TRANSFORMERS, DISTINCT)
    reference = outcome.read(work.outcome(other[0], case, other[1]))
    if reference.status != outcome.LOADED:
        # the runtime has no dense class of this family: the dense model in transformers it is
        other = (TRANSFORMERS, DENSE)
        reference = outcome.read(work.outcome(other[0], case, other[1]))
    files = [work.outcome(r, case, k).with_suffix(".npz") for r, k in ((runtime, kind), other)]
    exposed = all(path.exists() for path in files)
    judgement = judge(
        own,
        reference,
        logits=(files[0], files[1]) if exposed else None,
        cut=[one.ids for one in prompts.texts],
    )
    experts = "identical" if kind == SAME else "distinct"
    named = {"version": own.version, "reference": f"{other[1]} in {other[0]}"}
    # results are kept in the repository: no path of this machine in them
    named["detail"] = judgement.detail.replace(f"{work.folder}/", "")
    return report.row(case, experts, runtime, judgement) | named


def _without_power(work: Work, cases: Sequence[Case]) -> list[str]:
    """Return one line for each case whose distinct experts compute the dense model's function."""
    lines = []
    for case in cases:
        kinds = (DENSE, DISTINCT)
        dense, distinct = (outcome.read(work.outcome(TRANSFORMERS, case, kind)) for kind in kinds)
        if dense.continuations == distinct.continuations:
            lines.append(f"{case.name}: its distinct experts cannot show a routing mistake")
    return lines


def _commit() -> str:
    command = ["git", "-C", str(HERE), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
