"""Models that spend less depth, made and tuned on equal tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from adaconvert import api
from adaconvert.methods.depth.choose import count_of, share_without
from adaconvert.methods.depth.config import DepthOptions
from adaconvert.methods.depth.search import loaded
from adaconvert.methods.sources import open_source
from adaconvert.planning.estimate import reference
from adaconvert.planning.evolution import Levels, greedy
from adaconvert.progress import bar

DENSE, EVEN, SEARCHED, SKIP, MOD = "dense", "drop-even", "drop-searched", "skip", "mod"
#: skipping that starts from searched blocks that nobody runs.
MIXED = "skip-from-drop"
#: searched blocks that nobody runs, with adapters in their place; every token runs the others.
REPLACED = "skip-searched"
#: share of what is to be saved that blocks nobody runs save.
DROPPED = 0.6
CASES = (DENSE, EVEN, SEARCHED, SKIP, MIXED, REPLACED, MOD)


def searched(dense: Path, work: Path, least: float, text: Mapping[str, Any]) -> list[int]:
    """Return the blocks a greedy search drops, in its order; looked for once, down to `least`, and
    gone on with where it was stopped.

    Args:
        dense: checkpoint.
        work: where what was found is kept.
        least: FLOPs per token as a share of the dense model's.
        text: "data", "data_tokens" and "data_length" of the search, which looks at the loss.
    """
    kept = work / "searched.json"
    order: list[int] = json.loads(kept.read_text()) if kept.exists() else []
    options = DepthOptions(compute=least, search="greedy", fitness="loss", **text)
    item = open_source(str(dense))
    blocks, count = item.spec.layers, count_of(options, item.spec)
    if len(order) >= count:
        return order
    model = loaded(options, item, progress=True)
    levels = Levels(low=(0,) * blocks, high=(0, *(1,) * (blocks - 2), 0))
    with bar(count, "search", "block", enabled=True) as shown:
        while len(order) < count:
            start = tuple(int(number in order) for number in range(blocks))
            best = greedy(
                start,
                levels,
                lambda vector, rows: model.measure(
                    [n for n, one in enumerate(vector) if one], rows
                ),
                steps=1,
                amount=model.rows,
            )
            order.append(next(n for n in range(blocks) if best.vector[n] > start[n]))
            kept.write_text(json.dumps(order))
            shown.update()
    return order


def _dropped(vector: Sequence[int]) -> list[int]:
    return [number for number, level in enumerate(vector) if level]


def blocks_for(dense: Path, compute: float, order: list[int]) -> str:
    """Return the searched blocks that go at a share of the FLOPs, as the command line has them."""
    count = count_of(DepthOptions(compute=compute), open_source(str(dense)).spec)
    return ",".join(map(str, sorted(order[:count])))


def replaced_for(dense: Path, compute: float, order: list[int]) -> str:
    """Return the searched blocks that go where adapters take their place: the fewest whose FLOPs,
    adapters included, are within a share of the dense model's."""
    for count in range(1, len(order) + 1):
        gone = ",".join(map(str, sorted(order[:count])))
        if share_with(dense, gone) <= compute:
            return gone
    raise click.ClickException(f"{len(order)} searched blocks do not reach {compute}")


def share_with(dense: Path, gone: str) -> float:
    """Return FLOPs per token with adapters in the place of blocks, as a share of the dense
    model's."""
    spec = open_source(str(dense)).spec
    blocks = tuple(map(int, gone.split(",")))
    adapter = 4 * spec.hidden * DepthOptions(kind="skip").adapter_width
    whole = reference(spec, frozenset())["flops_per_token"]
    return share_without(spec, blocks) + len(blocks) * adapter / whole


def made(case: str, dense: Path, folder: Path, compute: float, order: list[int]) -> Path:
    """Return the checkpoint a case is tuned from, made where it is missing.

    Args:
        case: one of `CASES`.
        dense: checkpoint.
        folder: to write.
        compute: FLOPs per token as a share of the dense model's.
        order: of the blocks that a search drops.
    """
    if case == DENSE:
        return dense
    options: dict[str, Any] = {"kind": "layer-drop", "compute": compute}
    if case == SEARCHED:
        options = {"kind": "layer-drop", "drop": blocks_for(dense, compute, order)}
    elif case == SKIP:
        options = {"kind": "skip"}
    elif case == MIXED:
        gone = blocks_for(dense, 1 - DROPPED * (1 - compute), order)
        options = {"kind": "skip", "drop": gone}
    elif case == REPLACED:
        gone = replaced_for(dense, compute, order)
        options = {"kind": "skip", "drop": gone, "layers": gone}
    elif case == MOD:
        options = {"kind": "mod", "every": 1}
    if not folder.exists():
        api.convert(dense, destination=folder, method="depth", **options)
    return folder


def tuned(
    case: str, start: Path, folder: Path, compute: float, options: Mapping[str, Any], lr: float
) -> dict[str, Any]:
    """Return what a fine-tune says of itself, run where it is missing.

    Args:
        case: one of `CASES`.
        start: checkpoint.
        folder: to write.
        compute: as for `made`.
        options: of the fine-tune.
        lr: learning rate.
    """
    routed = case in (SKIP, MIXED, MOD)
    more: dict[str, Any] = {"depth_compute": compute} if routed else {}
    adapters = options.get("adapter_lr")
    if case in (SKIP, MIXED, REPLACED) and adapters is not None:
        more["lr_of"] = [f"adapters={adapters:g}"]
    given = {key: value for key, value in options.items() if key != "adapter_lr"}
    if not folder.exists():
        api.finetune(
            start,
            folder,
            lr=lr,
            save_every=0,
            report=_said(folder.name),
            **more,
            **{key: value for key, value in given.items() if routed or key != "router_lr"},
        )
    record = json.loads((folder / "adaconvert.json").read_text())
    return {**record["training"], "options": record["options"]}


def _said(name: str) -> Callable[[str], None]:
    return lambda line: print(f"{name}: {line}", flush=True)
