"""Runs the shipped recipes that train on a real model, and what they must be compared with.

    python scripts/training_table.py upcycle DENSE --work FOLDER --tokens 49152 \\
        --train a.train.jsonl --train b.train.jsonl --valid a.valid.jsonl --valid b.valid.jsonl
    python scripts/training_table.py btx DENSE ...

"upcycle" runs recipes/upcycle/smollm2-135m.yaml and tunes the dense model on the same tokens in the
same order on the same schedule. "btx" runs recipes/btx/smollm2-135m.yaml: the first --train is the
first specialist's text, the second the other's. --set changes the recipe, and the dense model's
fine-tune follows it. Losses are measured on the first --characters of every document of --valid and
paired by document. What --work holds is not made again; every model adds a row to --csv.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from bench.results import append, commit, machine

from adaconvert import api
from adaconvert.recipe.load import load

SCRIPTS = Path(__file__).resolve().parent
RESULTS = SCRIPTS / "bench" / "training.csv"
FIELDS = (
    *("run", "commit", "cpu", "cores", "table", "model", "tokens", "seed", "lr", "trained"),
    *("tokens_per_s", "text", "documents", "eval_tokens", "loss", "over_dense", "over_dense_se"),
    *("rival", "over_rival", "over_rival_se"),
    *("load_max_mean", "dead_experts", "router_entropy"),
)
#: models of which the better one, by text, is what a mixture must beat.
RIVALS = {"upcycle": ("dense, tuned",), "btx": ("first specialist", "second specialist")}
#: options of a recipe's fine-tune that a dense model has no use for.
ROUTERS_ONLY = ("router_lr", "balance", "balance_kind", "balance_rate", "z_loss", "collapse")
Row = dict[str, Any]
#: tokens and summed loss (nats) by document.
Losses = Mapping[str, tuple[int, float]]


class Table:
    """What is measured, with the folders it is made in."""

    def __init__(self, dense: Path, work: Path, valid: Sequence[str], characters: int) -> None:
        """Cut the texts.

        Args:
            dense: checkpoint everything starts from.
            work: folder of everything made.
            valid: JSONL files to measure on.
            characters: what is left of each document.
        """
        work.mkdir(parents=True, exist_ok=True)
        self.dense = dense
        self.work = work
        self.valid = [cut(work, Path(where), characters) for where in valid]

    def recipe(self, name: str, settings: Sequence[str], data: Mapping[str, Any]) -> Path:
        """Return the folder of the result of a recipe, after the run; stages stay beside it."""
        texts = [f"data.{key}={json.dumps(value)}" for key, value in data.items()]
        done = api.run(
            recipe_file(name),
            self.dense,
            self.result(name),
            settings=(*texts, f"data.valid={json.dumps(list(map(str, self.valid)))}", *settings),
            work=self.stages(name),
            report=say,
        )
        for stage in done.stages:
            if stage.verb == "finetune":
                keep_speed(self.stage(name, stage.name), stage.result)
        return self.result(name)

    def result(self, name: str) -> Path:
        """Return where the result of a recipe goes."""
        return self.work / name.replace("/", "-")

    def stages(self, name: str) -> Path:
        """Return where the stages of a recipe are kept."""
        return self.work / (name.replace("/", "-") + ".stages")

    def stage(self, name: str, stage: str) -> Path:
        """Return the folder of one stage."""
        return next(self.stages(name).glob(f"*-{stage}"))

    def rows(self, folders: Mapping[str, Path], **shared: Any) -> list[Row]:
        """Return a row per model and text; the first model is what the others are compared with."""
        found: list[Row] = []
        for text in self.valid:
            losses = {model: self.losses(folder, text) for model, folder in folders.items()}
            rival = min(RIVALS[shared["table"]], key=lambda model: mean(losses[model]))
            for model, folder in folders.items():
                row = {**shared, **training(folder), "model": model}
                row |= {"text": text.name.partition(".")[0], "loss": f"{mean(losses[model]):.5f}"}
                row |= compared(losses[model], losses[next(iter(folders))], "dense")
                if model.startswith("mixture"):
                    row |= {"rival": rival, **compared(losses[model], losses[rival], "rival")}
                found.append(row)
        return found

    def losses(self, folder: Path, text: Path) -> Losses:
        """Return tokens and loss by document, kept beside the folder once measured."""
        inside = folder.relative_to(self.work) if folder != self.dense else Path("dense")
        cache = self.work / f"{str(inside).replace('/', '_')}.{text.stem}.json"
        if not cache.exists():
            click.echo(f"measuring {inside} on {text.stem}", err=True)
            found = api.evaluate(folder, data=text, speed=False).to_json()["settings"]
            cache.write_text(json.dumps(found))
        (only,) = json.loads(cache.read_text())
        return {d["name"]: (d["tokens"], d["loss"]) for d in only["documents"]}


def cut(work: Path, where: Path, characters: int) -> Path:
    """Return a file with the beginning of every document of a text."""
    path = work / f"{where.stem}.{characters}.jsonl"
    texts = [json.loads(line)["text"] for line in where.read_text().splitlines()]
    lines = [json.dumps({"text": text[:characters]}) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    return path


def mean(losses: Losses) -> float:
    """Return the loss per token."""
    return sum(loss for _, loss in losses.values()) / sum(count for count, _ in losses.values())


def compared(losses: Losses, other: Losses, name: str) -> Row:
    """Return the rise of the mean loss per token over another model's, paired by document."""
    tokens = sum(count for count, _ in losses.values())
    rises = [(count, loss - other[key][1]) for key, (count, loss) in losses.items()]
    over = sum(rise for _, rise in rises) / tokens
    # of a ratio of sums over documents
    square = sum((rise - over * count) ** 2 for count, rise in rises)
    error = math.sqrt(square * len(rises) / max(1, len(rises) - 1)) / tokens
    return {
        "documents": len(rises),
        "eval_tokens": tokens,
        f"over_{name}": f"{over:.5f}",
        f"over_{name}_se": f"{error:.5f}",
    }


def training(folder: Path) -> Row:
    """Return what the manifest of a fine-tune and the log beside it say; nothing of others."""
    log = speed_log(folder)
    found: Row = json.loads(log.read_text()) if log.exists() else {}
    manifest = folder / "adaconvert.json"
    content = json.loads(manifest.read_text()) if manifest.exists() else {}
    done = content.get("training")
    if content.get("method") != "finetune" or done is None:
        return found
    options = content["options"]
    found |= {"tokens": done["tokens"], "trained": done["trained"]}
    found |= {"lr": options["lr"], "seed": options["seed"]}
    layers = done.get("routing", {}).get("layers", ())
    if layers:
        found["load_max_mean"] = f"{max(layer['load'] for layer in layers):.3f}"
        found["dead_experts"] = sum(len(layer["dead"]) for layer in layers)
        entropy = sum(layer["entropy"] for layer in layers) / len(layers)
        found["router_entropy"] = f"{entropy:.3f}"
    return found


def speed_log(folder: Path) -> Path:
    """Return the file that keeps how fast a model was trained."""
    return folder.parent / f"{folder.name}.speed.json"


def keep_speed(folder: Path, result: Mapping[str, Any]) -> None:
    """Keep tokens per second of a fine-tune, from its result as JSON data."""
    if result.get("tokens_per_second"):
        kept = {"tokens_per_s": f"{result['tokens_per_second']:.1f}"}
        speed_log(folder).write_text(json.dumps(kept))


def upcycled(table: Table, train: Sequence[str], settings: Sequence[str]) -> dict[str, Path]:
    """Return the dense model, the dense model tuned, and the mixture tuned as long."""
    name = "upcycle/smollm2-135m"
    table.recipe(name, settings, {"train": list(train)})
    mixture = table.stage(name, "tune")
    tuned = table.work / "dense-tuned"
    if not tuned.exists():
        options = dict(load(str(recipe_file(name)), settings).stage("tune").options)
        for option in (*ROUTERS_ONLY, "data"):
            options.pop(option, None)
        done = api.finetune(table.dense, tuned, data=train, resume=True, report=say, **options)
        keep_speed(tuned, done.to_json())
    return {"dense": table.dense, "dense, tuned": tuned, "mixture, tuned": mixture}


def branched(table: Table, train: Sequence[str], settings: Sequence[str]) -> dict[str, Path]:
    """Return the dense model, both specialists, and their mixture before and after tuning."""
    name = "btx/smollm2-135m"
    first, second = train
    table.recipe(name, settings, {"first": [first], "second": [second], "both": list(train)})
    stages = {
        "first specialist": "first",
        "second specialist": "second",
        "mixture, routers untrained": "mix",
        "mixture": "route",
    }
    found = {model: table.stage(name, stage) for model, stage in stages.items()}
    return {"dense": table.dense, **found}


def recipe_file(name: str) -> Path:
    """Return the file of a shipped recipe."""
    return SCRIPTS.parent / "recipes" / f"{name}.yaml"


def say(line: str) -> None:
    """Print a line of progress."""
    click.echo(line, err=True)


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("what", type=click.Choice(["upcycle", "btx"]))
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--train", multiple=True, required=True)
@click.option("--valid", multiple=True, required=True)
@click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="of the recipe")
@click.option("--characters", default=1200, show_default=True, help="of each document measured")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
def main(
    what: str,
    dense: Path,
    work: Path,
    train: tuple[str, ...],
    valid: tuple[str, ...],
    settings: tuple[str, ...],
    characters: int,
    csv: Path,
) -> None:
    """Make what is missing, measure it, and add the rows."""
    table = Table(dense, work, valid, characters)
    folders = {"upcycle": upcycled, "btx": branched}[what](table, train, settings)
    facts = machine()
    shared = {
        "run": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(SCRIPTS.parent),
        "cpu": facts["cpu"],
        "cores": facts["cores"],
        "table": what,
    }
    rows = table.rows(folders, **shared)
    for row in rows:
        append(csv, row, FIELDS)
        rival = f"{row['over_rival']} +- {row['over_rival_se']}" if "rival" in row else ""
        say(f"{row['text']:<8} {row['model']:<28} {row['loss']} {row['over_dense']} {rival}")


if __name__ == "__main__":
    main()
