"""What the models of the table of null experts do on held-out text, and how they compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.d2dmoe_points import Losses, Point, difference, mean
from bench.null_models import speed_log

ALL = "all"
#: column -> model the others are compared with, document by document.
RIVALS = {"top2": "top-2", "top1": "top-1", "dense": "dense", "base": "base"}
FIELDS = (
    *("run", "commit", "cpu", "cores", "model", "seed", "case", "target", "set_on"),
    *("tokens", "lr", "trained", "tokens_per_s", "text", "documents", "eval_tokens", "loss"),
    *(f"over_{rival}{part}" for rival in RIVALS for part in ("", "_se")),
    *("share", "least_share", "most_share", "idle", "flops_per_token", "ffn_flops_per_token"),
    "share_by_layer",
)
Row = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model on one text, or on all of them.

    Attributes:
        losses: document -> tokens and summed loss.
        shares: by layer, mean real experts per token over those of the source.
        idle: share of tokens, over all layers, that ran no real expert.
        flops: per token.
        ffn: of these, of experts and routers.
    """

    losses: Losses
    shares: tuple[float, ...]
    idle: float
    flops: float
    ffn: float

    @property
    def tokens(self) -> int:
        """Return the predicted tokens."""
        return sum(count for count, _ in self.losses.values())

    @property
    def share(self) -> float:
        """Return the real experts' FLOPs as a share of the source's; layers are alike."""
        return sum(self.shares) / len(self.shares)

    @property
    def point(self) -> Point:
        """Return what comparisons look at."""
        return Point(label="", ffn=self.share, losses=self.losses)

    @staticmethod
    def of(folder: Path, found: Mapping[str, Any], domain: str, top_k: int) -> Measured:
        """Return what an evaluation says.

        Args:
            folder: of the checkpoint.
            found: its one setting as JSON data.
            domain: of the text.
            top_k: experts a token of the source runs.
        """
        compute, usage = found["compute"], found["experts"]
        router = compute["router_flops_per_token"] or 0.0
        shares = [site["mean_active"] / top_k for site in usage] or [_experts(folder) / top_k]
        idle = [site.get("idle_share") or 0.0 for site in usage] or [0.0]
        return Measured(
            losses={f"{domain}/{d['name']}": (d["tokens"], d["loss"]) for d in found["documents"]},
            shares=tuple(shares),
            idle=sum(idle) / len(idle),
            flops=compute["flops_per_token"],
            ffn=compute["ffn_flops_per_token"] + router,
        )

    @staticmethod
    def pooled(parts: Sequence[Measured]) -> Measured:
        """Return all texts as one."""
        weights = [part.tokens / sum(p.tokens for p in parts) for part in parts]

        def average(values: Sequence[float]) -> float:
            return sum(w * value for w, value in zip(weights, values, strict=True))

        return Measured(
            losses={name: entry for part in parts for name, entry in part.losses.items()},
            shares=tuple(map(average, zip(*(part.shares for part in parts), strict=True))),
            idle=average([part.idle for part in parts]),
            flops=average([part.flops for part in parts]),
            ffn=average([part.ffn for part in parts]),
        )


def _experts(folder: Path) -> int:
    """Return the experts, or networks, every token of a stock checkpoint runs in a layer."""
    return int(json.loads((folder / "config.json").read_text()).get("num_experts_per_tok", 1))


Models = Mapping[str, Mapping[str, Measured]]


def rows(found: Models, work: Path) -> Iterator[Row]:
    """Yield a row for every model and text.

    Args:
        found: model -> text -> what was measured; "all" is every text.
        work: folder the models lie in.
    """
    for case, texts in found.items():
        shared = {"case": case, **named(case), **trained(work / case)}
        for text, measured in texts.items():
            rivals = {
                column: found[rival][text] for column, rival in RIVALS.items() if rival in found
            }
            yield {**shared, "text": text, **_cells(measured), **_compared(measured, rivals)}


def named(case: str) -> Row:
    """Return the target a model's name tells, and the domain its bias was set on."""
    kind, _, rest = case.partition("-")
    target, _, domain = rest.partition("-")
    if kind == "free":
        return {"target": target, "set_on": domain}
    return {"target": target} if kind == "nulls" and target else {}


def trained(folder: Path) -> Row:
    """Return what the manifest of a fine-tune and the log beside it say; nothing of others."""
    log, manifest = speed_log(folder), folder / "adaconvert.json"
    content = json.loads(manifest.read_text()) if manifest.exists() else {}
    if content.get("method") != "finetune":
        return {}
    done, options = content["training"], content["options"]
    speed: Row = json.loads(log.read_text()) if log.exists() else {}
    return {"tokens": done["tokens"], "trained": done["trained"], "lr": options["lr"], **speed}


def _cells(measured: Measured) -> Row:
    shares = measured.shares
    return {
        "documents": len(measured.losses),
        "eval_tokens": measured.tokens,
        "loss": f"{mean(measured.point):.5f}",
        "share": f"{measured.share:.4f}",
        "least_share": f"{min(shares):.4f}",
        "most_share": f"{max(shares):.4f}",
        "share_by_layer": " ".join(f"{share:.3f}" for share in shares),
        "idle": f"{measured.idle:.4f}",
        "flops_per_token": f"{measured.flops:.0f}",
        "ffn_flops_per_token": f"{measured.ffn:.0f}",
    }


def _compared(measured: Measured, rivals: Mapping[str, Measured]) -> Row:
    cells: Row = {}
    for column, rival in rivals.items():
        rise, error = difference(measured.point, rival.point)
        cells |= {f"over_{column}": f"{rise:.5f}", f"over_{column}_se": f"{error:.5f}"}
    return cells


def table(found: Sequence[Row]) -> Iterator[str]:
    """Yield the rows as a Markdown table, one line a model: shares of each text, the rest over
    all."""
    texts = [text for text in dict.fromkeys(str(row["text"]) for row in found) if text != ALL]
    heads = ("model", *(f"share, {text}" for text in texts), "layers", "idle", "loss")
    heads = (*heads, *(f"over {rival}" for rival in RIVALS.values()))
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for case in dict.fromkeys(row["case"] for row in found):
        own = {row["text"]: row for row in found if row["case"] == case}
        last = own[ALL]
        cells = [str(case), *(str(own[text]["share"]) for text in texts)]
        cells += [f"{last['least_share']} to {last['most_share']}", str(last["idle"])]
        cells += [str(last["loss"])]
        cells += [
            f"{last[f'over_{rival}']} +- {last[f'over_{rival}_se']}"
            if f"over_{rival}" in last
            else ""
            for rival in RIVALS
        ]
        yield f"| {' | '.join(cells)} |"


def misses(found: Sequence[Row]) -> Iterator[str]:
    """Yield by how much each model misses its target, by text; of one whose bias was set on a text
    without training, the others are unseen domains."""
    aimed = [row for row in found if "target" in row]
    for case in dict.fromkeys(row["case"] for row in aimed):
        parts = [
            f"{float(str(row['share'])) - float(str(row['target'])):+.4f} on {row['text']}"
            for row in aimed
            if row["case"] == case
        ]
        yield f"- {case}: {', '.join(parts)}"
