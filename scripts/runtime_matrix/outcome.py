"""What one runtime made of one model: the record all runners write, standard library only.

A runner is `python run_<runtime>.py PROMPTS OUT MODEL...`. It loads each folder MODEL in float32,
continues the prompts greedily, and writes OUT/<name of the folder>.json. A model that the runtime
refuses is an outcome too, not an error.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

NEW_TOKENS = 32
TOP_TOKENS = 20
LOADED, REFUSED = "loaded", "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A text, and the token ids every runtime is given for it."""

    text: str
    ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What is asked of a model.

    Attributes:
        prompts: the prompts.
        end: ids that end a continuation (the last one of it, when it comes up).
        texts: what the runtime's own tokenizer is to cut, with what should come out.
    """

    prompts: list[Prompt]
    end: list[int]
    texts: list[Prompt]


# logarithms of probabilities of the likeliest tokens at one position, by token id
Position = dict[int, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a runtime answered.

    Attributes:
        version: of the runtime.
        status: LOADED or REFUSED.
        detail: why it was refused, or what the runtime reported on loading (missing tensors).
        continuations: per prompt, the ids it went on with.
        likeliest: per prompt and new position, the likeliest tokens.
        texts_cut: the ids the runtime's own tokenizer cuts each text into, None without one.
        tokenizer_detail: why there is none.
    """

    version: str
    status: str
    detail: str = ""
    continuations: list[list[int]] = field(default_factory=list)
    likeliest: list[list[Position]] = field(default_factory=list)
    texts_cut: list[list[int]] | None = None
    tokenizer_detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One model to ask.

    Attributes:
        model: its folder.
        prompts: what to ask.
        out: path of the outcome; files beside it with the same stem are the runner's to use.
    """

    model: Path
    prompts: Prompts
    out: Path


def run(name: str, version: str, answer: Callable[[Job], Outcome]) -> None:
    """Write what `answer` returns for each model, or the refusal that it raised."""
    parser = argparse.ArgumentParser(description=f"Lets {name} continue prompts with models.")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    arguments = parser.parse_args()
    prompts = read_prompts(arguments.prompts)
    for model in arguments.models:
        print(f"== {model.name}", flush=True)
        job = Job(model=model, prompts=prompts, out=arguments.out / f"{model.name}.json")
        write(job.out, _answer_or_refusal(job, version, answer))


def _answer_or_refusal(job: Job, version: str, answer: Callable[[Job], Outcome]) -> Outcome:
    try:
        return answer(job)
    # whatever a runtime raises is its way to refuse; the traceback goes to the log
    except Exception as error:
        traceback.print_exc()
        return Outcome(version=version, status=REFUSED, detail=one_line(error))


def one_line(error: BaseException | str) -> str:
    """Return the first line of an error, cut to what fits a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (kind + (lines[0] if lines else ""))[:200]


def until_end(ids: list[int], end: list[int]) -> list[int]:
    """Return the ids up to and including the first that ends a continuation."""
    for index, token in enumerate(ids):
        if token in end:
            return ids[: index + 1]
    return ids


def read_prompts(path: Path) -> Prompts:
    """Return the prompts in a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    prompts, texts = ([Prompt(**entry) for entry in content[key]] for key in ("prompts", "texts"))
    return Prompts(prompts=prompts, end=content["end"], texts=texts)


def write_prompts(path: Path, prompts: Prompts) -> None:
    """Write the prompts to a file."""
    path.write_text(json.dumps(asdict(prompts)), encoding="utf-8")


def write(path: Path, outcome: Outcome) -> None:
    """Write one outcome to a file."""
    path.write_text(json.dumps(asdict(outcome)), encoding="utf-8")


def read(path: Path) -> Outcome:
    """Return the outcome in a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["likeliest"] = [[_position(p) for p in prompt] for prompt in content["likeliest"]]
    return Outcome(**content)


def _position(entries: Mapping[str, float]) -> Position:
    return {int(token): value for token, value in entries.items()}
