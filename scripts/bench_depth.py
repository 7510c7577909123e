#!/usr/bin/env python3
"""Measure prompts and generation of models that spend less depth, against the dense one.

    python scripts/bench_depth.py DENSE MODEL... --text FILE [--prompt 2048] [--new 64]
        [--rounds 7] [--threads 2] [--dtype float32] [--csv FILE | --dry]

All models take turns in every round, on the same text of FILE: a prompt of --prompt tokens, of
which the last one's logits are asked for, then --new greedy tokens one at a time behind it. One
sequence. "over_dense" is the dense model's time by the model's, the median over rounds of the
ratio within a round, with the range; above 1 is faster. "compute" is FLOPs per token as a fraction
of the dense model's, of tokens of these texts (a stock model has none). Rows go to
scripts/bench/depth_speed.csv.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from bench.results import Row, append, commit, machine
from torch import Tensor

from adaconvert.data.text import read_documents
from adaconvert.data.tokens import encode, load_tokenizer
from adaconvert.modeling.loading import load_model

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "bench" / "depth_speed.csv"
FIELDS = (
    *("run", "commit", "versions", "cpu", "cores", "memory_gib", "kernel", "python", "load"),
    *("threads", "dtype", "model", "phase", "tokens", "rounds", "compute", "tokens_per_s"),
    *("over_dense", "over_dense_low", "over_dense_high"),
)
PREFILL, DECODE = "prefill", "decode"


@click.command(help=__doc__.partition("\n")[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument(
    "models", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--text", required=True, metavar="FILE")
@click.option("--prompt", default=2048, show_default=True, help="tokens")
@click.option("--new", default=64, show_default=True, help="tokens behind it")
@click.option("--rounds", default=7, show_default=True, help="each on another text")
@click.option("--threads", default=2, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--dry", is_flag=True, help="add no rows")
def main(
    dense: Path,
    models: tuple[Path, ...],
    text: str,
    prompt: int,
    new: int,
    rounds: int,
    threads: int,
    dtype: str,
    csv: Path,
    dry: bool,
) -> None:
    """Take turns, then say and keep what came out."""
    torch.set_num_threads(threads)
    loaded = {str(path): load_model(path, dtype=dtype).eval() for path in (dense, *models)}
    texts = _texts(text, dense, prompt, rounds + 1)
    times = _turns(loaded, texts, new)
    shared = _shared() | {"threads": str(threads), "dtype": dtype, "rounds": str(rounds)}
    computes = {path: _compute(model, texts[1:], new) for path, model in loaded.items()}
    for path in loaded:
        for phase, tokens in ((PREFILL, prompt), (DECODE, new)):
            row = {
                **shared,
                "model": Path(path).name,
                "phase": phase,
                "tokens": str(tokens),
                "compute": computes[path][phase],
                **_summary(times[phase], path, str(dense), tokens),
            }
            click.echo("  ".join(f"{row[name]}" for name in FIELDS[11:]))
            if not dry:
                append(csv, row, FIELDS)


def _texts(file: str, dense: Path, size: int, count: int) -> list[Tensor]:
    """Return texts of so many tokens, [1, P] each, documents of the file one after another."""
    tokenizer, ids = load_tokenizer(dense), list[int]()
    for document in read_documents(file).texts:
        ids += encode(tokenizer, document)
        if len(ids) >= size * count:
            break
    if len(ids) < size * count:
        raise click.ClickException(f"{file} has {len(ids)} tokens, {size * count} are needed")
    return [torch.tensor(ids[at * size : (at + 1) * size])[None] for at in range(count)]


def _turns(
    loaded: Mapping[str, Any], texts: Sequence[Tensor], new: int
) -> dict[str, dict[str, list[float]]]:
    """Return phase -> model -> seconds of each round; the first text warms up."""
    times: dict[str, dict[str, list[float]]] = {
        phase: {path: [] for path in loaded} for phase in (PREFILL, DECODE)
    }
    for turn, ids in enumerate(texts):
        for path, model in loaded.items():
            prefill, decode = _timed(model, ids, new)
            if turn:
                times[PREFILL][path].append(prefill)
                times[DECODE][path].append(decode)
    return times


@torch.inference_mode()
def _timed(model: Any, ids: Tensor, new: int) -> tuple[float, float]:
    """Return the seconds of a prompt and of the tokens behind it."""
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    after = time.perf_counter()
    for _ in range(new):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return after - start, time.perf_counter() - after


@torch.inference_mode()
def _compute(model: Any, texts: Sequence[Tensor], new: int) -> dict[str, str]:
    """Return phase -> FLOPs as a fraction of the dense model's; empty of a stock model."""
    if not hasattr(model, "account"):
        return {PREFILL: "", DECODE: ""}
    found = {PREFILL: list[float](), DECODE: list[float]()}
    for ids in texts[:3]:
        with model.account() as account:
            out = model(input_ids=ids, use_cache=True)
        found[PREFILL].append(account.compute())
        with model.account() as account:
            for _ in range(min(new, 32)):
                token = out.logits[:, -1:].argmax(-1)
                out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        found[DECODE].append(account.compute())
    return {phase: f"{statistics.mean(values):.4f}" for phase, values in found.items()}


def _summary(times: Mapping[str, list[float]], path: str, dense: str, tokens: int) -> Row:
    ratios = [a / b for a, b in zip(times[dense], times[path], strict=True)]
    return {
        "tokens_per_s": f"{tokens / statistics.median(times[path]):.1f}",
        "over_dense": f"{statistics.median(ratios):.3f}",
        "over_dense_low": f"{min(ratios):.3f}",
        "over_dense_high": f"{max(ratios):.3f}",
    }


def _shared() -> Row:
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return {
        "run": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(SCRIPTS.parent),
        "versions": versions,
        **machine(),
        "load": f"{os.getloadavg()[0]:.2f}",
    }


if __name__ == "__main__":
    main()
