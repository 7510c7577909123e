#!/usr/bin/env python3
"""Measure the CPU execution of experts: feed-forward networks alone, and whole models at batch 1.

    scripts/bench_decode.py ffn     [--threads 1 2] [--seconds 4] [--fractions 0.5 0.25]
    scripts/bench_decode.py prefill [--threads 1 2] [--seconds 4]
    scripts/bench_decode.py decode  [--model FOLDER] [--threads 1 2] [--rounds 40]
    scripts/bench_decode.py prompt  [--model FOLDER] [--threads 1 2] [--rounds 40]

"prefill" is of networks alone, "prompt" of whole models, without a cache.
All variants of a case take turns in one process, so they share whatever disturbs the machine; a row
holds the median time and the median ratios to the baselines of the same turn, for wall clock and
for CPU time (which other processes disturb less). Baselines: "stock" is
transformers' own module, "own dense" our kernel path with every expert on. Experts are selected by
a parameter-center router where a router runs (`decode`, "fused"), else at random. FOLDER is a dense
Llama-like checkpoint; without it `decode` makes a random one of Llama-3.2-1B's dimensions.
Rows go to scripts/bench/decode.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.modeling.adaptive_execution import (
    Decoder,
    ExpertWeights,
    decode_step,
    run_experts,
)
from adaconvert.modeling.adaptive_gather import by_copies
from adaconvert.modeling.adaptive_layout import keep_rows
from adaconvert.modeling.adaptive_routers import LinearRouter

SCRIPTS = Path(__file__).resolve().parent
sys.path.insert(0, str(SCRIPTS / "bench"))
import results  # noqa: E402
from decode_models import WIDTH, adaptive_twin, centers, dense_model  # noqa: E402

SIZES = {"SmolLM2-135M": (576, 1536), "Llama-3.2-1B": (2048, 8192)}
FRACTIONS = (0.5, 0.25)
#: tokens of a prompt.
PROMPTS = (4, 16, 64, 256)
#: bytes of weights that the layers of a case have together; several times the last-level cache.
ROTATED = 150_000_000
FIELDS = (
    *("run", "commit", "versions", "cpu", "cores", "kernel", "load", "part", "model", "dtype"),
    *("threads", "tokens", "width", "variant", "fraction", "median_us", "over_stock", "over_own"),
    *("median_us_cpu", "over_stock_cpu", "over_own_cpu"),
)
Call = Callable[[int], object]
Row = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("ffn", "prefill", "decode", "prompt"))
    parser.add_argument("--model", type=Path, help="dense checkpoint of whole models")
    parser.add_argument("--name", help="what to call it in the rows; its folder's name otherwise")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument(
        "--sizes", nargs="+", default=list(SIZES), choices=SIZES, help="of networks"
    )
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="of ffn")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case of ffn and prefill")
    parser.add_argument("--rounds", type=int, default=40, help="of whole models")
    parser.add_argument("--csv", type=Path, default=SCRIPTS / "bench" / "decode.csv")
    arguments = parser.parse_args()
    parts = {
        "ffn": ffn_cases,
        "prefill": prefill_cases,
        "decode": decode_cases,
        "prompt": prompt_cases,
    }
    for row in parts[arguments.part](arguments):
        record(arguments.csv, {"part": arguments.part, **row})


def record(path: Path, row: Row) -> None:
    """Append a row to the file, with what is true of the machine now, and show it."""
    machine = results.machine()
    common = {
        "run": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": results.commit(SCRIPTS.parent),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "load": f"{os.getloadavg()[0]:.1f}",
        **{name: machine[name] for name in ("cpu", "cores", "kernel")},
    }
    results.append(path, {**common, **row}, FIELDS)
    shown = ("part", "model", "dtype", "threads", "tokens", "variant", "fraction", "median_us")
    ratios = ("over_stock", "over_own", "over_stock_cpu", "over_own_cpu")
    print(*(row.get(name, "") for name in (*shown, *ratios)), sep="\t", flush=True)


def measured(
    calls: dict[str, Call], seconds: float, layers: int, least: int = 10
) -> dict[str, Row]:
    """Return per variant the medians and ratios; the variants take turns."""
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for warm in range(2):
            call(warm % layers)
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < least:
        for place, (name, call) in enumerate(calls.items()):
            # layers apart, so that no variant finds weights that the one before it has just read
            layer = (turn + place * layers // len(calls)) % layers
            start, used = time.perf_counter(), time.process_time()
            call(layer)
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
        turn += 1
    return {name: {**summary(wall, name, ""), **summary(cpu, name, "_cpu")} for name in calls}


def summary(times: dict[str, list[float]], name: str, suffix: str) -> Row:
    """Return the median of a variant and of its paired ratios to the two baselines."""
    own = times[name]
    row: Row = {f"median_us{suffix}": f"{statistics.median(own) * 1e6:.0f}"}
    for column, baseline in (("over_stock", "stock"), ("over_own", "own dense")):
        if baseline in times:
            pairs = zip(times[baseline], own, strict=True)
            row[column + suffix] = f"{statistics.median(a / b for a, b in pairs):.2f}"
    return row


# -- feed-forward networks alone


class Layers:
    """Random networks that together exceed the caches, with the down matrix in every layout."""

    def __init__(self, hidden: int, neurons: int, dtype: torch.dtype) -> None:
        count = max(2, round(ROTATED / (3 * hidden * neurons * dtype.itemsize)))
        self.hidden, self.count, self.experts = hidden, count, neurons // WIDTH
        self.stock: list[tuple[Tensor, Tensor, Tensor]] = []
        self.weights: list[ExpertWeights] = []
        self.re_laid: list[ExpertWeights] = []
        self.decoders: list[Decoder] = []
        for _ in range(count):
            gate, up, rows = (torch.randn(neurons, hidden).mul_(0.02).to(dtype) for _ in "gud")
            down = nn.Parameter(rows.t().contiguous(), requires_grad=False)
            keep_rows(down)
            self.stock.append((gate, up, down))
            none = (None, None, None)
            self.weights.append(ExpertWeights(gate, up, down, *none, functional.silu, WIDTH, 0))
            self.re_laid.append(dataclasses.replace(self.weights[-1], down=rows.t()))
            router = LinearRouter(hidden, self.experts, normalised=False)
            router.weight.data.copy_(centers(gate, self.experts))
            self.decoders.append(Decoder(self.weights[-1], router))

    def run_stock(self, x: Tensor, layer: int) -> Tensor:
        gate, up, down = self.stock[layer]
        hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        return functional.linear(hidden, down)

    def masks(self, tokens: int, fraction: float, *, alike: bool = False) -> list[Tensor]:
        """Return a random mask [T, E] per layer; `alike` gives all tokens the same experts."""
        chosen = max(1, round(self.experts * fraction))
        found = []
        for _ in range(self.count):
            order = torch.rand(1 if alike else tokens, self.experts).argsort(dim=1)[:, :chosen]
            mask = torch.zeros(tokens, self.experts, dtype=torch.bool)
            found.append(mask.scatter_(1, order.expand(tokens, -1), True))
        return found


def ffn_cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for threads, name, dtype, layers in networks(arguments):
        with torch.inference_mode():
            x = torch.randn(1, layers.hidden).to(dtype)
            calls = ffn_calls(layers, x, arguments.fractions)
            found = measured(calls, arguments.seconds, layers.count)
        yield from rows(found, name, dtype, threads, 1)


def ffn_calls(layers: Layers, x: Tensor, fractions: Iterable[float]) -> dict[str, Call]:
    whole = torch.ones(1, layers.experts, dtype=torch.bool)
    calls: dict[str, Call] = {
        "stock": lambda i: layers.run_stock(x, i),
        "own dense": lambda i: run_experts(x, layers.weights[i], whole, path="gather"),
        "dense, re-laid": lambda i: run_experts(x, layers.re_laid[i], None),
    }
    for fraction in fractions:
        masks, k = layers.masks(1, fraction), max(1, round(layers.experts * fraction))
        calls[f"gather {fraction}"] = lambda i, m=masks: run_experts(x, layers.weights[i], m[i])
        calls[f"uncompiled {fraction}"] = lambda i, m=masks: by_copies(
            x, layers.weights[i], m[i][0], None
        )
        if decode_step(x, layers.decoders[0], "top-k", k) is not None:
            calls[f"fused {fraction}"] = lambda i, k=k: decode_step(
                x, layers.decoders[i], "top-k", k
            )
    return calls


def prefill_cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for threads, name, dtype, layers in networks(arguments):
        for tokens in (2, 4, 16, 64, 256):
            with torch.inference_mode():
                calls = prefill_calls(layers, torch.randn(tokens, layers.hidden).to(dtype))
                found = measured(calls, arguments.seconds, layers.count, least=5)
            yield from rows(found, name, dtype, threads, tokens)


def prefill_calls(layers: Layers, x: Tensor) -> dict[str, Call]:
    calls: dict[str, Call] = {
        "stock": lambda i: layers.run_stock(x, i),
        "dense, re-laid": lambda i: run_experts(x, layers.re_laid[i], None),
    }
    for fraction in FRACTIONS:
        for kind, alike in (("independent", False), ("alike", True)):
            masks = layers.masks(len(x), fraction, alike=alike)
            calls[f"{kind} {fraction}"] = lambda i, m=masks: run_experts(x, layers.weights[i], m[i])
    return calls


def networks(
    arguments: argparse.Namespace,
) -> Iterator[tuple[int, str, torch.dtype, Layers]]:
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name in arguments.sizes:
            hidden, neurons = SIZES[name]
            for label in arguments.dtypes:
                dtype = getattr(torch, label)
                yield threads, name, dtype, Layers(hidden, neurons, dtype)


def rows(
    found: dict[str, Row], name: str, dtype: torch.dtype, threads: int, tokens: int
) -> Iterator[Row]:
    for variant, values in found.items():
        label, _, fraction = variant.rpartition(" ") if variant[-1].isdigit() else (variant, "", 1)
        yield {
            "model": name,
            "dtype": str(dtype).removeprefix("torch."),
            "threads": threads,
            "tokens": tokens,
            "width": WIDTH,
            "variant": label,
            "fraction": fraction,
            **values,
        }


# -- whole models


def decode_cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for stock, adaptive, *labels in whole_models(arguments):
        with torch.inference_mode():
            found = measured_models(stock, adaptive, arguments.rounds)
        yield from rows(found, *labels, 1)


def prompt_cases(arguments: argparse.Namespace) -> Iterator[Row]:
    for stock, adaptive, *labels in whole_models(arguments):
        for tokens in PROMPTS:
            with torch.inference_mode():
                found = measured_prompts(stock, adaptive, tokens, arguments.rounds)
            yield from rows(found, *labels, tokens)


def whole_models(
    arguments: argparse.Namespace,
) -> Iterator[tuple[Any, Any, str, torch.dtype, int]]:
    """Yield the stock model, its adaptive twin, their name, dtype and how many threads run."""
    for label in arguments.dtypes:
        dtype = getattr(torch, label)
        stock = dense_model(arguments.model, dtype)
        adaptive = adaptive_twin(stock)
        name = arguments.model.name if arguments.model else "random, Llama-3.2-1B dimensions"
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            yield stock, adaptive, arguments.name or name, dtype, threads


def measured_prompts(stock: Any, adaptive: Any, tokens: int, rounds: int) -> dict[str, Row]:
    """Return the figures of one prompt per variant."""
    experts = next(iter(adaptive.adaptive_sites().values())).adaptive_spec["experts"]["count"]
    prompts = torch.randint(0, stock.config.vocab_size, (rounds, 1, tokens))

    def step(model: Any, turn: int) -> Tensor:
        return model(prompts[turn % rounds], use_cache=False, logits_to_keep=1).logits

    def selected(k: int, turn: int) -> Tensor:
        with adaptive.set_select("top-k", k=k):
            return step(adaptive, turn)

    calls: dict[str, Call] = {
        "stock": lambda turn: step(stock, turn),
        "adaptive, all on": lambda turn: step(adaptive, turn),
    }
    for fraction in FRACTIONS:
        k = round(experts * fraction)
        calls[f"adaptive {fraction}"] = lambda turn, k=k: selected(k, turn)
    return measured(calls, 0.0, rounds, least=rounds)


class OwnDense(nn.Module):
    """A site through our kernel path with every expert on; no router, no runtime around it."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.weights = site._weights()
        self.mask = torch.ones(1, self.weights.count, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = run_experts(x.view(1, -1), self.weights, self.mask, path="gather")
        return out.view(x.shape)


def measured_models(stock: Any, adaptive: Any, rounds: int) -> dict[str, Row]:
    """Return the figures of one decoded token per variant; all see the same context length."""
    sites = adaptive.adaptive_sites()
    experts = next(iter(sites.values())).adaptive_spec["experts"]["count"]
    dense = {path: OwnDense(site) for path, site in sites.items()}
    prompt = torch.randint(0, stock.config.vocab_size, (1, 32))
    caches = {}
    for name, model in (("stock", stock), ("adaptive", adaptive)):
        caches[name] = transformers.DynamicCache(config=stock.config)
        model(prompt, past_key_values=caches[name], use_cache=True)
    tokens = torch.randint(0, stock.config.vocab_size, (rounds, 1, 1))

    def step(name: str, model: Any, turn: int) -> Tensor:
        cache = caches[name]
        logits = model(tokens[turn % rounds], past_key_values=cache, use_cache=True).logits
        cache.crop(-1)
        return logits

    def own(turn: int) -> Tensor:
        for path, site in sites.items():
            site.forward = dense[path].forward
        try:
            return step("adaptive", adaptive, turn)
        finally:
            for site in sites.values():
                del site.forward

    def selected(k: int, turn: int) -> Tensor:
        with adaptive.set_select("top-k", k=k):
            return step("adaptive", adaptive, turn)

    calls: dict[str, Call] = {
        "stock": lambda turn: step("stock", stock, turn),
        "own dense": own,
        "adaptive, all on": lambda turn: step("adaptive", adaptive, turn),
    }
    for fraction in (0.75, *FRACTIONS):
        k = round(experts * fraction)
        calls[f"adaptive {fraction}"] = lambda turn, k=k: selected(k, turn)
    return measured(calls, 0.0, rounds, least=rounds)


if __name__ == "__main__":
    main()
