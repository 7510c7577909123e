"""Every shipped recipe (F15): it loads, explains every key, plans on a stand-in, and its header
command parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from adaconvert import api
from adaconvert.cli.main import VERBS, cli
from adaconvert.recipe import shipped
from adaconvert.recipe.load import load
from adaconvert.recipe.model import Recipe
from adaconvert.running.estimate import MACHINES
from adaconvert.testing import stand_ins, tiny_models

NAMES = shipped.names()
#: sizes of the shipped models' little relatives; what the recipes say divides them.
TINY = {"qwen3-0.6b": "qwen3", "mistral-7b": "mistral"}
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 192, "vocab_size": 320}


def lines_of(name: str) -> list[str]:
    """Return the lines of a shipped recipe."""
    path = shipped.find(name)
    assert path is not None
    return path.read_text(encoding="utf-8").splitlines()


def test_there_is_one_for_every_method_and_model() -> None:
    models = ("smollm2-135m", "qwen3-0.6b", "llama-3.2-1b", "mistral-7b")
    expected = {f"{m}/{model}" for m in ("upcycle", "moefy", "d2dmoe") for model in models}
    expected |= {"adamoe/smollm2-135m", "adamoe/olmoe-1b-7b", "molora/smollm2-135m"}
    expected |= {"early-exit/smollm2-135m", "depth/smollm2-135m"}
    assert set(NAMES) == expected | {"btx/smollm2-135m", "moefy/smollm2-135m-tuned"}


@pytest.mark.parametrize("name", NAMES)
def test_it_loads_strictly_and_as_plain_yaml(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.method == name.split("/")[0]
    assert recipe.source
    assert recipe.stages[-1].verb == "push"
    # other YAML readers see the same values
    plain = yaml.safe_load("\n".join(lines_of(name)))
    for stage, written in zip(recipe.stages, plain["stages"], strict=True):
        for option, value in stage.options.items():
            same = value if not isinstance(value, tuple) else list(value)
            other = written[stage.verb][option]
            assert same == (other if isinstance(other, list) or same == other else [other])


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_comment(name: str) -> None:
    lines = lines_of(name)
    for number, line in enumerate(lines):
        key = re.match(r"\s*(?:- )?([a-z_0-9]+):", line)
        # a verb is explained by its options, a name by its verb
        if not key or key[1] == "name" or key[1] in VERBS:
            continue
        assert lines[number - 1].strip().startswith("# "), f"line {number + 1}: {line}"


@pytest.mark.parametrize("name", NAMES)
def test_the_header_command_parses(name: str) -> None:
    first = lines_of(name)[0]
    assert first.startswith("# adaconvert run ")
    words = shlex.split(first.removeprefix("# "))
    with cli.make_context("adaconvert", words[1:]) as context:
        command = cli.get_command(context, words[1])
        assert command is not None
        with command.make_context("run", words[2:], parent=context) as inner:
            settings = inner.params["settings"]
    assert words[2] == name
    recipe = load(name, settings)
    assert all(recipe.data.values())


@pytest.mark.parametrize("name", NAMES)
def test_it_plans_on_a_stand_in(name: str, tmp_path: Path) -> None:
    full = stand_ins.CONFIGS[stand_ins.model_of(name)]
    config = {**full, **SMALL, "num_attention_heads": 4}
    if load(name).method == "depth":
        # it names blocks of the real model
        config["num_hidden_layers"] = full["num_hidden_layers"]
    config |= {"num_key_value_heads": 2, "head_dim": 16}
    source = stand_ins.make_of(config, tmp_path / "model")
    settings = [f"{stage}.{option}={value}" for stage, option, value in _smaller(load(name))]
    planned = api.run(name, source, tmp_path / "out", settings=settings, dry_run=True).outline
    made = [stage for stage in planned.stages if stage.verb not in ("evaluate", "push")]
    assert all(stage.disk and stage.memory for stage in made)
    assert planned.stages[-1].status == "left out"
    # every text is left to the user
    assert set(planned.missing) == set(load(name).data)


def _smaller(recipe: Recipe) -> list[tuple[str, str, object]]:
    """Return settings with which a recipe suits a tiny model: nothing but sizes of the run."""
    found: list[tuple[str, str, object]] = []
    for stage in recipe.stages:
        if stage.verb == "finetune":
            found += [(stage.name, "seq_len", 16), (stage.name, "batch_size", 1)]
        if stage.verb == "finetune" and "select" in stage.options:
            found.append((stage.name, "select", "rule=top-k,k=48"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_estimates_are_labelled_as_such(name: str) -> None:
    cost = load(name).cost
    assert cost["basis"] in ("estimate", "measured")
    if cost["basis"] == "estimate":
        assert cost["machine"] in MACHINES
        assert re.fullmatch(r"about \d+ \w+ at .*; measuring not counted", cost["time"])
        assert all(re.fullmatch(r"[\d.]+ [kMGT]B", cost[key]) for key in ("disk", "memory"))


@pytest.mark.parametrize(
    "name", ["moefy/smollm2-135m", "moefy/mistral-7b", "moefy/smollm2-135m-tuned"]
)
def test_estimates_are_what_the_code_computes(name: str, tmp_path: Path) -> None:
    from adaconvert.running.estimate import cost_of

    cost = load(name).cost
    source = stand_ins.make(stand_ins.model_of(name), tmp_path / "model")
    planned = api.run(name, source, tmp_path / "out", dry_run=True).outline
    assert cost_of(planned, cost["machine"]) == dict(cost)


def test_the_budget_of_the_tuned_recipe_admits_what_it_trains_with(tmp_path: Path) -> None:
    from adaconvert.conversion import prepare_run
    from adaconvert.modeling.adaptive_knobs import knobs_for

    stages = {stage.verb: stage.options for stage in load("moefy/smollm2-135m-tuned").stages}
    source = stand_ins.make("smollm2-135m", tmp_path / "model")
    prepared = prepare_run([str(source)], "moefy", dict(stages["moefy"]), None, (), False)
    adaptive: Any = prepared.planned.plan.config["adaptive"]
    most = {select["k"] for select in knobs_for(adaptive, stages["calibrate"]["budget"]).values()}
    trained = int(stages["finetune"]["select"].removeprefix("rule=top-k,k="))
    values = stages["calibrate"]["values"]
    # no more neurons than those of the values that fit are within it
    assert {max(value for value in values if value <= k) for k in most} == {trained}


@pytest.mark.parametrize("model", [*TINY, "llama-3.2-1b"])
def test_stand_ins_have_the_tensors_transformers_writes(model: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    family = TINY.get(model, "llama-llama3-rope")
    real = tiny_models.make(family, tmp_path / "real", max_shard_size="1GB")
    config = {**stand_ins.CONFIGS[model], **SMALL, "num_attention_heads": 4}
    hole = stand_ins.make_of({**config, "num_key_value_heads": 2}, tmp_path / "hole")
    names = []
    for folder in (real, hole):
        with safe_open(next(folder.glob("*.safetensors")), framework="np") as file:
            names.append(set(file.keys()) - {"lm_head.weight"})
    assert names[0] == names[1]


def test_ls_show_and_cp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaconvert.errors import OutputConflictError
    from adaconvert.recipe import report

    monkeypatch.chdir(tmp_path)
    assert [row.split()[0] for row in report.listing().lines()] == NAMES
    assert report.show("upcycle/smollm2-135m").lines() == lines_of("upcycle/smollm2-135m")
    copied = report.copy("upcycle/smollm2-135m", None)
    assert copied.path == Path("upcycle-smollm2-135m.yaml")
    assert copied.path.read_text().splitlines() == lines_of("upcycle/smollm2-135m")
    assert load(copied.path).stages == load("upcycle/smollm2-135m").stages
    with pytest.raises(OutputConflictError, match=r"exists. Name a new file"):
        report.copy("upcycle/smollm2-135m", None)
    with pytest.raises(OutputConflictError, match="lies in a folder that does not exist"):
        report.copy("upcycle/smollm2-135m", "gone/r.yaml")
    assert report.copy("btx/smollm2-135m", "mine.yaml").path == Path("mine.yaml")


def test_the_schema_knows_every_verb_and_option() -> None:
    from adaconvert.recipe import report
    from adaconvert.recipe.verbs import VERBS as STAGE_VERBS

    whole = report.schema(None)
    found = whole.to_json()
    stage = found["properties"]["stages"]["items"]["properties"]  # type: ignore[index]
    assert set(stage) == {"name", "from", *STAGE_VERBS}
    assert stage["upcycle"]["properties"]["experts"] == {"type": "integer", "default": 8}
    assert any("finetune" in line for line in whole.lines())
    for verb, entry in STAGE_VERBS.items():
        text = "\n".join(report.schema(verb).lines())
        assert all(f"  {name}" in text for name in entry.table())


def test_options_of_the_command_line_are_options_of_stages() -> None:
    """Whoever knows a verb's options can write its stage."""
    from adaconvert import stage_one
    from adaconvert.recipe.verbs import VERBS as STAGE_VERBS

    #: where a run goes, how it is told, and what is spelt otherwise.
    own = {"source", "sources", "destination", "checkpoint", "folder", "as_json", "overwrite"}
    own |= {
        "resume",
        "revision",
        "out",
        "work",
        "dry_run",
        "help",
        "quiet",
        "verbose",
        "token",
        "log_dir",
    }
    for name, verb in STAGE_VERBS.items():
        with cli.make_context("adaconvert", [name, "--help"], resilient_parsing=True) as context:
            command = cli.get_command(context, name)
        assert isinstance(command, click.Command)
        options = {param.name for param in command.params} - own
        # in a recipe, training the model to be sparse is a `finetune` stage of its own
        first = set(stage_one.OPTIONS) if name == "d2dmoe" else set()
        missing = options - first - set(verb.table())
        assert not missing, f"{name}: {missing}"
