#!/usr/bin/env python3
"""Measure generation with a model that has exits: drafts that change nothing, and early leaving.

    python scripts/bench_exits.py EXITS --prompts FILE.jsonl [--exits 10,15,20] [--count 50]
        [--tokens 128] [--tune 5] [--vocab full,reduced] [--draft-text FILE] [--threads 1]
        [--lossy T1,T2,...] [--csv FILE | --dry]

EXITS is an adaptive checkpoint with (trained) exits. Prompts are the first tokens of the texts of
FILE, or of each --piece of them, of several files in turn: --tune to choose settings by, then
--count to measure. One sequence at a time, greedy;
nothing ends a sequence early. For every exit these take turns, prompt by prompt:

    plain                        `generate` without drafts; no token leaves early
    stock assistant_early_exit   transformers' own, with the same exit's head
    draft_exit                   this project's, with every vocabulary of --vocab: "full", "reduced"
                                 (the exit's `draft_tokens`), or a number, so many of the most
                                 frequent tokens of --draft-text

Length, threshold and schedule of the drafts are chosen for the least CPU time on the tuning
prompts, of stock drafts as well; settings are dropped by halves. Tokens must be plain's: "wrong" is
the number of prompts where they are not. "over_plain" is plain's CPU time by the variant's, the
median over prompts of the ratio within a turn, with the range; above 1 is faster. "accepted" is a
share of drafts.

"predicted" is the same ratio by a cost model: the parts of a round (scripts/bench/exit_costs.py)
are timed alone on tuning prompts and multiplied by how often rounds of each shape occurred;
"by_weights" takes weights for costs, as the adaptive schedule does, with the fitted share of a
position in place of its constant. "best_gain" is the best ratio of the long run at the acceptance
of single drafts seen, "break_even" the acceptance at which drafts begin to pay.

With --lossy tokens leave at all exits at a threshold, by the measure configured; "rival" is the
model cut off at the exit with as many blocks as a token costs on average ("equal_depth", with what
heads cost), or the next more. "forced" is how often the whole model's token is chosen, given its
tokens before; "agreement" the same, each going on from its own tokens.
Rows go to scripts/bench/drafts.csv.
"""

from __future__ import annotations

import datetime
import itertools
import os
import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from bench import exit_costs, exit_lossy
from bench.exit_variants import (
    OURS,
    PLAIN,
    STOCK,
    Outcome,
    Settings,
    Variant,
    blocks_of,
    generated,
    grid,
    in_turn,
    only_greedy,
    tuned,
)
from bench.results import Row, append, commit, machine
from torch import Tensor

from adaconvert.data.text import read_documents
from adaconvert.data.tokens import encode, load_tokenizer
from adaconvert.modeling import adaptive_drafting
from adaconvert.modeling.adaptive_speculate import Draft
from adaconvert.modeling.loading import load_model

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "bench" / "drafts.csv"
FIELDS = (
    *("run", "commit", "versions", "cpu", "cores", "memory_gib", "kernel", "python", "load"),
    *("threads", "part", "model", "dtype", "blocks", "prompts", "tokens", "exit", "variant"),
    *("vocab", "draft_tokens", "threshold", "schedule", "tokens_per_s", "over_plain"),
    *("over_plain_low", "over_plain_high", "over_plain_wall", "over_stock", "wrong", "accepted"),
    *("drafts_per_round", "tokens_per_round", "predicted", "predicted_over_measured"),
    *("by_weights", "best_gain", "break_even", "share_shallow", "share_head", "share_deep"),
    *("step_ms", "loop_ms", "draft_ms", "fill_ms", "deep_ms", "per_position"),
    *("depth", "equal_depth", "forced", "agreement", "rival", "over_rival", "rival_forced"),
    "skipped",
)
#: texts of a file in which tokens are counted.
COUNTED = 60
SHOWN = (
    *("part", "exit", "variant", "vocab", "draft_tokens", "threshold", "schedule", "tokens_per_s"),
    *("over_plain", "over_stock", "wrong", "accepted", "tokens_per_round", "predicted"),
    *("depth", "forced", "rival", "skipped"),
)


@click.command(help=__doc__.partition("\n")[0])
@click.argument("exits", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--prompts", multiple=True, required=True, metavar="FILE")
@click.option("--piece", type=int, help="characters that texts are cut into  [default: whole]")
@click.option("--exits", "places", help="blocks before each  [default: all of them]")
@click.option("--count", default=50, show_default=True, help="prompts to measure")
@click.option("--tokens", default=128, show_default=True, help="new ones of each")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--tune", default=5, show_default=True, help="prompts to choose settings by")
@click.option("--tune-tokens", type=int, help="new ones of each  [default: as --tokens]")
@click.option("--lengths", default="1,2,4,8", show_default=True, help="drafts to choose among")
@click.option("--thresholds", default="0,0.4,0.7", show_default=True, help="to choose among")
@click.option("--vocab", default="full,reduced", show_default=True)
@click.option("--draft-text", multiple=True, metavar="FILE", help="to count tokens in")
@click.option("--lossy", default="", metavar="T1,T2,...", help="thresholds of early leaving")
@click.option("--only-lossy", is_flag=True, help="no drafts")
@click.option("--turns", default=5, show_default=True, help="of parts, for each tuning prompt")
@click.option("--threads", default=1, show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--name", help="of the model in the rows; else that of its folder")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--dry", is_flag=True, help="write no rows")
def main(exits: Path, csv: Path, dry: bool, **options: Any) -> None:
    torch.set_num_threads(options["threads"])
    # what is generated is warned about once for every generation
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    model: Any = load_model(exits, dtype=options["dtype"])
    if not model.adaptive_exits():
        raise click.UsageError(f"{exits.name} has no exits")
    only_greedy(model)
    tune, prompts = prompts_of(exits, options)
    options["ranked"] = by_frequency(exits, options["draft_text"])
    common = facts(model, options) | {"model": options["name"] or exits.name}
    common["prompts"] = str(len(prompts))
    parts = [] if options["only_lossy"] else [draft_rows(model, tune, prompts, options)]
    if options["lossy"]:
        parts.append(lossy_rows(model, prompts, options))
    for part in parts:
        for row in part:
            found = {**common, "load": f"{os.getloadavg()[0]:.1f}", **row}
            shown = (f"{name} {found[name]}" for name in SHOWN if found.get(name))
            click.echo(", ".join(shown))
            if not dry:
                append(csv, found, FIELDS)


def facts(model: Any, options: dict[str, Any]) -> Row:
    """Return what is true of every row of a run."""
    return {
        "run": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(SCRIPTS.parent),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        **machine(),
        "threads": str(options["threads"]),
        "dtype": str(model.dtype).removeprefix("torch."),
        "blocks": str(blocks_of(model)),
        "tokens": str(options["tokens"]),
    }


def prompts_of(folder: Path, options: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return prompts to tune with and to measure with, [1, P] each; texts too short are left out.

    Raises:
        click.UsageError: there are too few.
    """
    length, tune, wanted = options["prompt_tokens"], options["tune"], options["count"]
    tokenizer, found = load_tokenizer(folder), []
    for text in texts_of(options["prompts"], options["piece"]):
        # a token has seldom more than 16 characters
        ids = encode(tokenizer, text[: 16 * length])[:length]
        if len(ids) == length:
            found.append(torch.tensor([ids]))
        if len(found) == tune + wanted:
            break
    if tune < 1 or len(found) < tune + 1:
        raise click.UsageError(f"{len(found)} texts have {length} tokens; --tune asks for {tune}")
    if len(found) < tune + wanted:
        click.echo(f"{len(found) - tune} prompts instead of {wanted}", err=True)
    return found[:tune], found[tune:]


def texts_of(files: Sequence[str], piece: int | None) -> Iterator[str]:
    """Yield texts, or pieces of so many characters, of each file in turn."""
    every: list[list[str]] = []
    for file in files:
        texts = read_documents(file).texts
        cuts = [(text, piece or max(len(text), 1)) for text in texts]
        every.append([t[at : at + size] for t, size in cuts for at in range(0, len(t), size)])
    for group in itertools.zip_longest(*every):
        yield from (text for text in group if text is not None)


def by_frequency(folder: Path, files: Sequence[str]) -> Tensor:
    """Return the tokens of texts, the most frequent first."""
    tokenizer, seen = load_tokenizer(folder), Counter[int]()
    for file in files:
        for text in read_documents(file, max_documents=COUNTED).texts:
            seen.update(encode(tokenizer, text))
    return torch.tensor([token for token, _ in seen.most_common()])


# -- drafts


def draft_rows(
    model: Any, tune: Sequence[Tensor], prompts: Sequence[Tensor], options: dict[str, Any]
) -> Iterator[Row]:
    """Yield a row for every variant at every exit."""
    places = [int(at) for at in (options["places"] or "").split(",") if at]
    for at in places or sorted(model.adaptive_exits()):
        if at not in model.adaptive_exits() or at >= blocks_of(model):
            raise click.UsageError(f"no exit to draft from after {at} blocks")
        yield from _rows_of_exit(model, at, tune, prompts, options)


def _rows_of_exit(
    model: Any, at: int, tune: Sequence[Tensor], prompts: Sequence[Tensor], options: dict[str, Any]
) -> Iterator[Row]:
    variants, costs = [Variant(PLAIN)], [None]
    found: list[exit_costs.Parts | None] = [*costs]
    for variant, reason in candidates(model, at, options):
        if reason:
            row = {"part": "drafts", "exit": str(at), "variant": variant.kind}
            yield {**row, "vocab": variant.label, "skipped": reason}
            continue
        settings = _tuned(model, variant, tune, options)
        click.echo(f"exit {at}, {variant.kind}, {variant.label}: {settings}", err=True)
        variants.append(variant.with_settings(settings))
        ours = variant.kind == OURS
        found.append(_parts(model, variants[-1], tune, options) if ours else None)
    outcomes = in_turn(model, variants, prompts, options["tokens"])
    rival = next((o for v, o in zip(variants, outcomes, strict=True) if v.kind == STOCK), None)
    for variant, mine, parts in zip(variants, outcomes, found, strict=True):
        row = {"part": "drafts", "exit": str(at), **row_of(variant, mine, outcomes[0])}
        if rival is not None and variant.kind != STOCK:
            row["over_stock"] = f"{statistics.median(_ratios(mine, rival)):.3f}"
        if parts is not None:
            row |= predictions(model, variant, mine, parts, float(row["over_plain"]))
        yield row


def candidates(model: Any, at: int, options: dict[str, Any]) -> Iterator[tuple[Variant, str]]:
    """Yield what is to be compared with plain generation, with why it is not run, or ""."""
    head = model.adaptive_exits()[at]
    own = "" if head.part("block") is None else "stock caches have no place for the exit's block"
    yield Variant(STOCK, at), own
    kept = getattr(head, "draft_tokens", None)
    for label in options["vocab"].split(","):
        if label == "full":
            yield Variant(OURS, at), ""
        elif label == "reduced":
            reason = "the exit has no draft_tokens" if kept is None else ""
            yield Variant(OURS, at, kept, "reduced" if kept is None else str(len(kept))), reason
        elif not options["draft_text"]:
            raise click.UsageError(f"--vocab {label} needs --draft-text")
        else:
            yield Variant(OURS, at, options["ranked"][: int(label)], label), ""


def _tuned(
    model: Any, variant: Variant, tune: Sequence[Tensor], options: dict[str, Any]
) -> Settings:
    lengths = [int(n) for n in options["lengths"].split(",")]
    thresholds = [float(t) for t in options["thresholds"].split(",")]
    choices = grid(variant.kind, lengths, thresholds)
    count = options["tune_tokens"] or options["tokens"]
    # what runs for the first time is slower
    generated(model, variant.with_settings(choices[0]), tune[0], min(count, 8))
    return tuned(model, variant, choices, tune, count)


def _parts(
    model: Any, variant: Variant, tune: Sequence[Tensor], options: dict[str, Any]
) -> exit_costs.Parts:
    return exit_costs.measured(model, variant, tune[:3], options["tokens"], options["turns"])


def row_of(variant: Variant, mine: Sequence[Outcome], plain: Sequence[Outcome]) -> Row:
    """Return what a row says of a variant."""
    ratios = _ratios(mine, plain)
    wall = [b.wall / a.wall for a, b in zip(mine, plain, strict=True)]
    wrong = sum(a.tokens != b.tokens for a, b in zip(mine, plain, strict=True))
    row = {"variant": variant.kind, "wrong": str(wrong)}
    row["tokens_per_s"] = f"{sum(len(o.tokens) for o in mine) / sum(o.wall for o in mine):.2f}"
    row |= {"over_plain": f"{statistics.median(ratios):.3f}"}
    row |= {"over_plain_low": f"{min(ratios):.3f}", "over_plain_high": f"{max(ratios):.3f}"}
    row["over_plain_wall"] = f"{statistics.median(wall):.3f}"
    given = variant.settings
    if given is None:
        return row
    rounds, drafted = sum(o.rounds for o in mine), sum(o.drafted for o in mine)
    new = sum(len(o.tokens) for o in mine) - (len(mine) if variant.kind == OURS else 0)
    return {
        **row,
        "vocab": variant.label,
        "draft_tokens": str(given.tokens),
        "threshold": f"{given.threshold:g}",
        "schedule": given.schedule,
        "accepted": f"{sum(o.accepted for o in mine) / max(drafted, 1):.4f}",
        "drafts_per_round": f"{drafted / max(rounds, 1):.3f}",
        "tokens_per_round": f"{new / max(rounds, 1):.3f}",
    }


def _ratios(mine: Sequence[Outcome], others: Sequence[Outcome]) -> list[float]:
    """Return by prompt the CPU time of others by one's own."""
    return [b.cpu / a.cpu for a, b in zip(mine, others, strict=True)]


def predictions(
    model: Any, variant: Variant, mine: Sequence[Outcome], parts: exit_costs.Parts, over: float
) -> Row:
    """Return what the cost model says of a variant, and show what it has to do with sizes."""
    given = variant.settings
    assert given is not None
    added = exit_costs.per_position(parts)
    draft = Draft(variant.at, given.tokens, given.threshold, variant.vocab)
    costs = adaptive_drafting.costs_of(model, draft)
    weights = exit_costs.of_weights(costs, added)
    predicted = statistics.median(parts.ratio(o) for o in mine)
    chance = chance_of(mine)
    gain, best = parts.gain(chance)
    click.echo(
        f"exit {variant.at}, {variant.label}: measured {over:.3f}, predicted {predicted:.3f}; a "
        f"single draft is right with {chance:.3f}: at best x {gain:.3f} with {best} drafts, break "
        f"even at {parts.break_even():.3f}; _PER_POSITION {added:.3f} (now "
        f"{adaptive_drafting._PER_POSITION})"
    )
    share = variant.at / blocks_of(model)
    for name, ratio, even in exit_costs.of_sizes(share, chance, added):
        click.echo(f"  by weights, {name}: x {ratio:.3f}, break even at {even:.3f}")
    return {
        "predicted": f"{predicted:.3f}",
        "predicted_over_measured": f"{predicted / over:.3f}",
        "by_weights": f"{statistics.median(weights.ratio(o) for o in mine):.3f}",
        "best_gain": f"{gain:.3f}",
        "break_even": f"{parts.break_even():.3f}",
        "share_shallow": f"{costs.shallow:.4f}",
        "share_head": f"{costs.head:.4f}",
        "share_deep": f"{costs.deep:.4f}",
        "step_ms": f"{parts.step * 1e3:.2f}",
        "loop_ms": f"{parts.loop * 1e3:.2f}",
        "draft_ms": f"{parts.draft * 1e3:.2f}",
        "fill_ms": f"{parts.fill * 1e3:.2f}",
        "deep_ms": " ".join(f"{n}:{s * 1e3:.2f}" for n, s in parts.deep.items()),
        "per_position": f"{added:.4f}",
    }


def chance_of(mine: Sequence[Outcome]) -> float:
    """Return how often a draft is right whose predecessors are; those behind a wrong one do not
    count, so it is at least the share accepted."""
    accepted = sum(o.accepted for o in mine)
    missed = sum(o.missed for o in mine)
    return accepted / max(accepted + missed, 1)


# -- early leaving


def lossy_rows(model: Any, prompts: Sequence[Tensor], options: dict[str, Any]) -> Iterator[Row]:
    """Yield a row for the whole model, for every threshold, and for every model cut off."""
    thresholds = [float(t) for t in options["lossy"].split(",")]
    ways = exit_lossy.ways(model, thresholds)
    for way in ways:
        exit_lossy.generated(model, way, prompts[0], min(options["tokens"], 8))
    found = exit_lossy.in_turn(model, ways, prompts, options["tokens"])
    shares = [statistics.mean(left.forced for left in mine) for mine in found]
    for way, mine, share in zip(ways, found, shares, strict=True):
        ratios = [b.cpu / a.cpu for a, b in zip(mine, found[0], strict=True)]
        wall = [b.wall / a.wall for a, b in zip(mine, found[0], strict=True)]
        equal = exit_lossy.equal_depth(model, way, mine)
        row = {
            "part": "lossy",
            "variant": way.name,
            "exit": "" if way.cut is None else str(way.cut),
            "threshold": "" if way.threshold is None else f"{way.threshold:g}",
            "tokens_per_s": f"{sum(len(x.tokens) for x in mine) / sum(x.wall for x in mine):.2f}",
            "over_plain": f"{statistics.median(ratios):.3f}",
            "over_plain_low": f"{min(ratios):.3f}",
            "over_plain_high": f"{max(ratios):.3f}",
            "over_plain_wall": f"{statistics.median(wall):.3f}",
            "depth": f"{exit_lossy.depth(mine):.3f}",
            "equal_depth": f"{equal:.3f}",
            "forced": f"{share:.4f}",
            "agreement": f"{exit_lossy.agreement(mine, found[0]):.4f}",
        }
        place = exit_lossy.rival(way, equal, ways)
        if place >= 0:
            pairs = zip(mine, found[place], strict=True)
            row["rival"] = ways[place].name
            row["over_rival"] = f"{statistics.median(b.cpu / a.cpu for a, b in pairs):.3f}"
            row["rival_forced"] = f"{shares[place]:.4f}"
        yield row


if __name__ == "__main__":
    main()
