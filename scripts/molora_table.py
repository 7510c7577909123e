"""Compares compositions of LoRA adapters with what they must beat.

    python scripts/molora_table.py DENSE --work FOLDER \\
        --adapter old --adapter new --adapter library --adapter howto --rival all \\
        --train old.train.jsonl ... --valid old.valid.jsonl ...

Each --adapter is a LoRA folder in --work, called lora_NAME (scripts/train_lora.py makes them), that
was trained on the text of the same name. --rival is one LoRA of as many parameters as they have
together, trained on all of their tokens. They are composed by `adaconvert molora --from`: uniform
gates, Arrow, PHATGOOSE, and routers trained for --router-tokens of all texts with the adapters
frozen ("trained") or trained on ("trained-all"). Everything is measured with PEFT on the first
--characters of every held-out document; "all" is the mean over the texts, so that each domain
counts alike. Standard errors are by document, paired.

Folders and measurements that --work holds are not made again. --only makes and measures some.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from bench.adapter_losses import cut, losses_of
from bench.adapter_rows import FIELDS, rows, table
from bench.results import keep, run_of

from adaconvert import api

RESULTS = Path(__file__).resolve().parent / "bench" / "molora.csv"


@click.command(help=__doc__.split("\n\n", maxsplit=1)[0])
@click.argument("dense", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--adapter", "adapters", multiple=True, required=True, help="one for each domain")
@click.option("--rival", required=True, help="one adapter of all domains")
@click.option("--train", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--valid", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--top-k", default=2, show_default=True, help="of Arrow and PHATGOOSE")
@click.option("--gate-steps", default=100, show_default=True, help="of PHATGOOSE")
@click.option("--router-tokens", default=32768, show_default=True)
@click.option("--router-lr", default=1e-3, show_default=True)
@click.option("--lr", default=1e-4, show_default=True, help="of adapters trained on")
@click.option("--seq-len", default=256, show_default=True)
@click.option("--batch-size", default=4, show_default=True)
@click.option("--characters", default=2400, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, metavar="NAME")
@click.option("--name", help="of the model in the rows  [default: its folder's]")
@click.option("--csv", type=click.Path(path_type=Path), default=RESULTS)
def main(
    dense: Path,
    work: Path,
    valid: tuple[Path, ...],
    characters: int,
    only: tuple[str, ...],
    name: str | None,
    csv: Path,
    **options: Any,
) -> None:
    """Make what is missing, measure it, and add the rows."""
    texts = {domain(where): cut(where, characters) for where in valid}
    models = Models(dense, work, options)
    found = {}
    for case in only or models.names:
        kept = work / f"{case}.losses.json"
        if not kept.exists():
            folder = models.folder(case)
            click.echo(f"measuring {case}", err=True)
            kept.write_text(json.dumps(losses_of(dense, folder, texts)))
        found[case] = json.loads(kept.read_text())
    if only:
        return
    shared = {**run_of(name or dense.name), "seed": options["seed"]}
    lines = rows(found, options["adapters"], models.told)
    for line in table(keep(csv, lines, shared, FIELDS)):
        click.echo(line)


def domain(where: Path) -> str:
    """Return the domain of a text: what its name begins with."""
    return where.name.partition(".")[0]


class Models:
    """Makes the adapter folders that are compared."""

    def __init__(self, dense: Path, work: Path, options: dict[str, Any]) -> None:
        self.dense, self.work, self.options = dense, work, options
        self.sources = [str(work / f"lora_{name}") for name in options["adapters"]]
        self._makers: dict[str, Callable[[Path], None]] = {
            "uniform": lambda path: self._compose(path, routing="uniform"),
            "arrow": lambda path: self._compose(path, routing="arrow", k=options["top_k"]),
            "phatgoose": self._phatgoose,
            "fresh": lambda path: self._compose(path, routing="soft", seed=options["seed"]),
            "trained": lambda path: self._tune("fresh", path, ("router",)),
            "trained-arrow": lambda path: self._tune("arrow", path, ("router",)),
            "trained-all": lambda path: self._tune("arrow", path, ("router", "adapters")),
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Return what is measured."""
        own = tuple(f"lora_{name}" for name in self.options["adapters"])
        made = ("uniform", "arrow", "phatgoose", "trained", "trained-arrow", "trained-all")
        return ("dense", *own, f"lora_{self.options['rival']}", *made)

    def folder(self, name: str) -> Path | None:
        """Return the folder of a model, made where it is missing; None for the dense model."""
        if name == "dense":
            return None
        path = self.work / name
        if not path.exists():
            if name not in self._makers:
                raise click.UsageError(f"{path} is not there: scripts/train_lora.py makes it")
            click.echo(f"making {name}", err=True)
            self._makers[name](path)
        return path

    def told(self, name: str) -> dict[str, Any]:
        """Return what a folder says of how it was trained."""
        said = self.work / name / "training.json"
        if said.exists():
            content = json.loads(said.read_text())
            return {"tokens": content["tokens"], "lr": content["lr"]}
        manifest = self.work / name / "adaconvert.json"
        content = json.loads(manifest.read_text()) if manifest.exists() else {}
        if content.get("method") != "finetune":
            return {}
        trained = content["training"]
        return {"tokens": trained["tokens"], "lr": content["options"]["router_lr"]}

    def _compose(self, path: Path, **options: Any) -> None:
        api.convert(
            self.dense, destination=path, method="molora", adapters=tuple(self.sources), **options
        )

    def _phatgoose(self, path: Path) -> None:
        data = tuple(str(where) for where in self.options["train"])
        steps, k = self.options["gate_steps"], self.options["top_k"]
        self._compose(path, routing="phatgoose", data=data, gate_steps=steps, k=k)

    def _tune(self, start: str, path: Path, parts: tuple[str, ...]) -> None:
        options = self.options
        first = self.folder(start)
        assert first is not None
        api.finetune(
            first,
            path,
            data=tuple(str(where) for where in options["train"]),
            tokens=options["router_tokens"],
            train=parts,
            lr=options["lr"],
            router_lr=options["router_lr"],
            seq_len=options["seq_len"],
            batch_size=options["batch_size"],
            precision="bf16",
            seed=options["seed"],
            device="cpu",
            report=lambda line: click.echo(f"{path.name}: {line}", err=True),
        )


if __name__ == "__main__":
    main()
