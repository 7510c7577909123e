"""The model card (README.md) of a converted checkpoint: what it is, what was proven, what to do
next."""

from __future__ import annotations

import re
from collections.abc import Sequence

from adaconvert.errors import AdaconvertError
from adaconvert.export.words import Words, partition_words
from adaconvert.io.regular import read_text
from adaconvert.io.source import Source
from adaconvert.reports import PlanReport, cost_lines

#: marks a card adaconvert wrote, so that a card edited by its owner is never mistaken for one.
MARKER = "<!-- written by adaconvert -->"
_LICENSE_KEYS = ("license", "license_name", "license_link")
_MAX_CARD = 1 << 20


def _license_lines(source: Source) -> list[str]:
    """Return the license lines of the source's card, if it has any that are plain values."""
    if "README.md" not in source.side_files:
        return []
    try:
        text = read_text(source.path("README.md"), "README.md", _MAX_CARD)
    except AdaconvertError:
        return []
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if front is None:
        return []
    lines = []
    for key in _LICENSE_KEYS:
        found = re.search(
            rf"^{key}:[ \t]*([\w .:/+-]{{1,200}})$", front[1], re.MULTILINE | re.ASCII
        )
        if found is not None:
            lines.append(f"{key}: {found[1].strip()}")
    return lines


def _front_matter(sources: Sequence[Source], words: Words) -> list[str]:
    bases = [s.label for s in sources if re.fullmatch(r"[\w.-]+/[\w.-]+", s.label, re.ASCII)]
    lines = ["---", "library_name: transformers"]
    if words.pipeline:
        lines.append(f"pipeline_tag: {words.pipeline}")
    lines += _license_lines(sources[0])
    if len(bases) == len(sources):
        lines += ["base_model:", *(f"- {base}" for base in dict.fromkeys(bases))]
        relation = "merge" if len(sources) > 1 else "finetune"
        lines.append(f"base_model_relation: {relation}")
    return [*lines, "tags:", "- adaconvert", *(f"- {tag}" for tag in words.tags), "---"]


def _upcycle_words(report: PlanReport, name: str, names: str, version: str) -> Words:
    """Return what the card of an upcycled model says."""
    options = report.options
    return Words(
        title=f"{name}, upcycled to {options['experts']} experts",
        intro=f"A `{report.target}` mixture of experts made from {names} by adaconvert {version}: "
        f"{options['experts']} experts, {options['top_k']} per token. "
        "It loads with stock `transformers`; no custom code.",
        tags=("sparse-upcycling", "moe"),
        sections=tuple(_training(report)),
    )


def _training(report: PlanReport) -> list[str]:
    coefficient = report.options["aux_loss_coef"]
    return [
        "## Training it",
        "",
        "The routers are **not trained yet**, and copies of one expert only become different "
        "experts by training. The load-balancing loss is switched off for serving "
        "(`output_router_logits: false`). When you train with `transformers`, TRL or another "
        "trainer, switch it on, or experts will starve:",
        "",
        "```python",
        'model = AutoModelForCausalLM.from_pretrained("path", output_router_logits=True)',
        f"# config.router_aux_loss_coef is {coefficient}",
        "```",
    ]


def render_card(
    report: PlanReport, sources: Sequence[Source], verification: Sequence[str] | None, version: str
) -> str:
    """Return the card's text.

    Args:
        report: the plan that was followed.
        sources: the opened sources, first one first.
        verification: lines of the verification, None when it was skipped.
        version: of adaconvert.
    """
    names = " and ".join(f"`{s.label}`" for s in sources)
    write = _upcycle_words if report.method == "upcycle" else partition_words
    words = write(report, sources[0].label.split("/")[-1], names, version)
    body = [
        *_front_matter(sources, words),
        "",
        MARKER,
        f"# {words.title}",
        "",
        words.intro,
        "",
        f"**Class: {report.exactness.kind}.** {_sentence(report.exactness.why)}",
        "",
        "## Verification",
        "",
        *_verification(verification),
        "",
        "## Cost",
        "",
        "```text",
        *cost_lines(report.before, report.after),
        "```",
        "",
        *words.sections,
        "",
        *_runtimes(report),
    ]
    body += [f"- {_sentence(note)}" for note in report.notes]
    return "\n".join(body).rstrip() + "\n"


def _runtimes(report: PlanReport) -> list[str]:
    if not report.runtimes:
        return []
    return [
        "## Where it runs",
        "",
        "| runtime | result | why |",
        "| --- | --- | --- |",
        *(f"| {v.runtime} | {v.verdict} | {v.why} |" for v in report.runtimes),
        "",
    ]


def _verification(lines: Sequence[str] | None) -> list[str]:
    if lines is None:
        return [
            "**Not verified**: the conversion ran with `--no-verify`. "
            "Run `adaconvert verify SOURCE THIS`."
        ]
    return ["```text", *lines, "```"]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
