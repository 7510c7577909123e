"""What the card of a split model says, and of one that was put together again."""

from __future__ import annotations

from dataclasses import dataclass

from adaconvert.reports import PlanReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """The parts of a card that depend on the method.

    Attributes:
        title: of the card.
        intro: what the checkpoint is.
        tags: besides "adaconvert".
        pipeline: the hub's name of what the model does; empty for none.
        sections: lines after the costs.
    """

    title: str
    intro: str
    tags: tuple[str, ...]
    pipeline: str = "text-generation"
    sections: tuple[str, ...] = ()


def partition_words(report: PlanReport, name: str, names: str, version: str) -> Words:
    """Return what the card says of a split model, by whatever method it was split."""
    if report.method == "unmoefy":
        return Words(
            title=f"{name}, dense again",
            intro=f"A dense `{report.target}` made from the split model {names} by adaconvert "
            f"{version}: every neuron is back in its place. It loads with stock `transformers`; no "
            "custom code.",
            tags=(),
            pipeline="",
        )
    is_adaptive = report.target.startswith("adaptive_")
    what = "an adaptive" if is_adaptive else "a stock"
    return Words(
        title=f"{name}, split into {report.options['num_experts']} experts",
        intro=f"{names} with its feed-forward networks split into experts by adaconvert {version}: "
        f"{what} `{report.target}`. {_split_line(report)}",
        tags=("moefication", "moe", "adaptive-compute") if is_adaptive else ("moefication", "moe"),
        pipeline="" if report.target in _NO_TEXT else "text-generation",
        sections=tuple([*_loading(), *_running()] if is_adaptive else _native()),
    )


_NO_TEXT = ("adaptive_bert", "adaptive_vit")


def _split_line(report: PlanReport) -> str:
    options = report.options
    shared = options.get("shared_neurons")
    always = f" after {shared} neurons that always run" if shared else ""
    line = f"{options['num_experts']} experts of {options['expert_width']} neurons{always}"
    if "split" in options:
        line += f", grouped by {options['split']}"
    if options.get("native"):
        return f"{line}; every expert runs, behind a router of zeros."
    known = [f"{name} `{options[name]}`" for name in ("router", "rule") if name in options]
    return f"{line}; {', '.join(known)}." if known else f"{line}."


def _loading() -> list[str]:
    return [
        "## Loading it",
        "",
        "The folder carries the code it needs, for `torch` and `transformers` alone:",
        "",
        "```python",
        'model = AutoModelForCausalLM.from_pretrained("path", trust_remote_code=True)',
        "```",
        "",
        "With adaconvert installed, no code of the folder runs:",
        "",
        "```python",
        "import adaconvert.auto",
        'model = AutoModelForCausalLM.from_pretrained("path")',
        "```",
        "",
        "For models that are no language models, use the auto class `auto_map` in config.json "
        "names.",
        "",
    ]


def _running() -> list[str]:
    return [
        "## Running fewer experts",
        "",
        "```python",
        'with model.set_select("top-k", k=8):   # experts per token, from here to the end',
        "    model.generate(...)",
        "model.set_compute(0.6)                 # a fraction of the dense model's FLOPs per token",
        "```",
        "",
        "How much quality that costs depends on the model and must be measured: "
        "`adaconvert evaluate`, then `adaconvert calibrate`. "
        "`adaconvert unmoefy THIS DST` gives the dense model back, bit for bit.",
    ]


def _native() -> list[str]:
    return [
        "## Training it",
        "",
        "Every expert runs until `num_experts_per_tok` is lowered, and the routers are zero: this "
        "is a start for training, and saves nothing by itself. "
        "Lower `num_experts_per_tok` and train routers and experts "
        "(`output_router_logits=True` adds the load-balancing loss).",
    ]
