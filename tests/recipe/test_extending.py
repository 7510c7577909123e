"""`extends`, `set` and `--set`: values are replaced only where there is something to replace."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from adaconvert.errors import OptionError
from adaconvert.recipe import shipped
from adaconvert.recipe.load import load
from adaconvert.recipe.render import label, resolved

BASE = """\
schema: 1
title: Base
method: upcycle
paper: p
exactness: exact
cost: {basis: estimate, machine: m, disk: d, memory: m, time: t}
data: {train: [a.jsonl, b.jsonl], valid: []}
stages:
  - upcycle: {experts: 4}
  - {name: tune, finetune: {data: $train, tokens: 2M, train: [router, experts]}}
  - push:
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A recipe to extend."""
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def child(folder: Path, text: str, name: str = "child.yaml") -> Path:
    """Return a recipe file."""
    path = folder / name
    path.write_text(text)
    return path


def refused(recipe: Path, *settings: str) -> str:
    """Return the message of a refusal."""
    with pytest.raises(OptionError) as caught:
        load(recipe, settings)
    return str(caught.value)


def test_a_file_beside_it_is_extended(base: Path) -> None:
    text = "schema: 1\nextends: base.yaml\ntitle: Child\ndata: {valid: [v.jsonl]}\nset:\n"
    path = child(base.parent, text + "  tune.tokens: 5M\n  upcycle.top_k: 1\n")
    recipe = load(path)
    assert (recipe.name, recipe.title, recipe.paper) == ("child", "Child", "p")
    assert recipe.data == {"train": ("a.jsonl", "b.jsonl"), "valid": ("v.jsonl",)}
    assert recipe.stage("tune").options["tokens"] == "5M"
    assert recipe.stage("upcycle").options == {"experts": 4, "top_k": 1}


def test_a_shipped_recipe_is_extended_by_name(tmp_path: Path) -> None:
    path = child(tmp_path, "schema: 1\nextends: upcycle/smollm2-135m\nset: {upcycle.experts: 2}\n")
    assert load(path).stage("upcycle").options["experts"] == 2


def test_f8_a_circle(tmp_path: Path) -> None:
    child(tmp_path, "schema: 1\nextends: b.yaml\n", "a.yaml")
    path = child(tmp_path, "schema: 1\nextends: a.yaml\n", "b.yaml")
    assert refused(path) == (
        "b.yaml: recipes extend each other in a circle; found b.yaml -> a.yaml -> b.yaml"
    )


def test_f8_a_chain_that_does_not_end(tmp_path: Path) -> None:
    for number in range(12):
        child(tmp_path, f"schema: 1\nextends: r{number + 1}.yaml\n", f"r{number}.yaml")
    assert "extends more than 8 recipes" in refused(tmp_path / "r0.yaml")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("gone.yaml", "no such file; found gone.yaml"),
        ("../../etc/passwd", "leads out of the recipe's folder; found ../../etc/passwd"),
        ("../base.yaml", "leads out of the recipe's folder"),
        ("/etc/base.yaml", "leads out of the recipe's folder"),
        ("~/base.yaml", "leads out of the recipe's folder"),
        ("sub/../../base.yaml", "leads out of the recipe's folder"),
        ("https://host/base.yaml", "is a URL: recipes are not downloaded"),
        ("file:///etc/base.yaml", "is a URL"),
        ("upcycle/smolm2-135m", "unknown recipe 'upcycle/smolm2-135m'. Did you mean"),
    ],
)
def test_f8_what_cannot_be_extended(base: Path, target: str, message: str) -> None:
    folder = base.parent / "inner"
    folder.mkdir()
    found = refused(child(folder, f"schema: 1\nextends: {target}\n"))
    assert found.startswith("child.yaml line 2: extends: ")
    assert message in found


def test_f8_a_link_out_of_the_folder(base: Path) -> None:
    folder = base.parent / "inner"
    folder.mkdir()
    (folder / "base.yaml").symlink_to(base)
    assert "leads out of" in refused(child(folder, "schema: 1\nextends: base.yaml\n"))


def test_f8_set_without_extends(tmp_path: Path) -> None:
    path = child(tmp_path, BASE + "set: {tune.tokens: 1}\n")
    assert "set: only means something with 'extends'" in refused(path)


@pytest.mark.parametrize(
    ("setting", "stage", "option", "value"),
    [
        ("tune.tokens=5M", "tune", "tokens", "5M"),
        ("stages.tune.tokens=7", "tune", "tokens", 7),
        ("stages.1.finetune.lr=1e-3", "tune", "lr", 1e-3),
        ("stages.tune.finetune.lr=1e-3", "tune", "lr", 1e-3),
        ("tune.train=all", "tune", "train", ("all",)),
        ("tune.train=[router, exits]", "tune", "train", ("router", "exits")),
        ("tune.train.1=exits", "tune", "train", ("router", "exits")),
        ("push.repo=me/mine", "push", "repo", "me/mine"),
        ("tune.select=rule=top-k,k=24", "tune", "select", "rule=top-k,k=24"),
    ],
)
def test_set_replaces_a_value(
    base: Path, setting: str, stage: str, option: str, value: object
) -> None:
    assert load(base, [setting]).stage(stage).options[option] == value


def test_an_empty_value_is_the_default(base: Path) -> None:
    assert "top_k" not in load(base, ["upcycle.top_k=1", "upcycle.top_k="]).stage("upcycle").options


def test_set_replaces_texts(base: Path) -> None:
    assert load(base, ["data.train=x.jsonl,2"]).data["train"] == ("x.jsonl,2",)
    assert load(base, ["data.train=[x, y]"]).data["train"] == ("x", "y")
    assert load(base, ["data.train.1=y"]).data["train"] == ("a.jsonl", "y")
    assert load(base, ["source=org/name"]).source == "org/name"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("foo.bar=1", "--set foo.bar: unknown path 'foo'. Known: source, revision, data, stages"),
        ("dta.train=1", "--set dta.train: unknown path 'dta'. Did you mean 'data'?"),
        ("tune.token=1", "--set tune.token: unknown option 'token'. Did you mean 'tokens'?"),
        ("stages.2x.repo=1", "--set stages.2x.repo: unknown stage '2x'"),
        ("stages.9.repo=1", "leads to no entry of the list; expected 0 to 2, found 9"),
        ("stages.-1.repo=1", "unknown stage '-1'"),
        ("stages.tune=1", "--set stages.tune: names no option"),
        ("stages=1", "--set stages: cannot be set as a whole"),
        ("data=1", "--set data: cannot be set as a whole"),
        ("data.test=1", "unknown text in data 'test'"),
        ("data.train.foo=1", "leads to no entry of the list; expected 0 to 1, found foo"),
        ("data.train.0.x=1", "leads into a value"),
        ("data.valid.0=x", "expected nothing: the list is empty"),
        ("tune.tokens.0=1", "is no list with entries"),
        ("tune.lr.0=1", "is no list with entries"),
        ("title=x", "--set title: cannot be set"),
        ("method=x", "--set method: cannot be set"),
        ("tune.lr", "--set tune.lr: is no setting; expected path=value"),
        ("=1", "is no setting"),
        ("tune.lr={a: 1}", "takes one value at a time, not a mapping"),
        ("tune.lr=[1", "--set tune.lr: is no YAML"),
        ("tune.lr=08", "--set tune.lr: stages.tune.finetune.lr: starts with 0"),
        ("tune.lr=!!python/name:os.system", "is not allowed"),
        ("tune.schedule=os.system", "expected cosine or linear or constant"),
        ("upcycle.top_k=9", "more experts per token than there are experts"),
    ],
)
def test_f12_settings_that_lead_nowhere(base: Path, setting: str, message: str) -> None:
    assert message in refused(base, setting)


def test_files_beside_a_recipe_are_found_from_anywhere(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base.parent / "a.jsonl").write_text("{}")
    monkeypatch.chdir("/")
    assert load(base).data["train"] == (str(base.parent / "a.jsonl"), "b.jsonl")
    # what is typed is meant from where it is typed
    assert load(base, ["data.train=a.jsonl"]).data["train"] == ("a.jsonl",)


def test_a_resolved_recipe_reads_as_the_same_recipe(base: Path) -> None:
    recipe = load(base, ["tune.lr=1e-5", "tune.text_field='no'", "push.repo=me/mine"])
    text = resolved(recipe, "org/name", "abc")
    path = child(base.parent, text, "again.yaml")
    again = load(path)
    assert again.stages == recipe.stages
    assert (again.source, again.revision, again.data) == ("org/name", "abc", recipe.data)
    assert text.isascii()


def test_a_resolved_recipe_names_no_path(base: Path) -> None:
    (base.parent / "a.jsonl").write_text("{}")
    (base.parent / "b.jsonl").write_text("{}")
    settings = [
        f"data.valid=[{base.parent}/b.jsonl]",
        "tune.teacher=/gone/teacher",
        "tune.distill=1",
    ]
    recipe = load(base, settings)
    text = resolved(recipe, "dense", None)
    assert str(base.parent) not in text
    assert "/gone" not in text
    found = yaml.safe_load(text)
    assert found["data"] == {"train": ["a.jsonl", "b.jsonl"], "valid": ["b.jsonl"]}


def test_labels_keep_weights_and_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    assert label(f"{tmp_path}/a.jsonl,2") == "a.jsonl,2"
    assert label("org/name:config") == "org/name:config"
    assert label("$train") == "$train"
    assert label("/gone/a,b.jsonl") == "a,b.jsonl"


def test_shipped_recipes_are_found_by_name_and_by_file() -> None:
    assert "upcycle/smollm2-135m" in shipped.names()
    path = shipped.find("upcycle/smollm2-135m")
    assert path is not None
    assert shipped.find("upcycle/smollm2-135m.yaml") == path
    assert shipped.name_of(path) == "upcycle/smollm2-135m"
    assert load(path).name == load("upcycle/smollm2-135m").name == "upcycle/smollm2-135m"
