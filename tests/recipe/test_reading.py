"""Group F of the fault catalogue: what is wrong in a recipe file is refused by line and path."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adaconvert.errors import AdaconvertError, OptionError
from adaconvert.recipe.load import load
from adaconvert.recipe.text import MAX_ALIASES, MAX_BYTES

HEAD = """\
schema: 1
title: T
method: upcycle
paper: "2212.05055"
exactness: approximate
cost: {basis: estimate, machine: m, disk: d, memory: m, time: t}
data: {train: [a.jsonl]}
"""
STAGES = """\
stages:
  - upcycle: {experts: 4, top_k: 2}
  - name: tune
    finetune:
      data: $train
      tokens: 2M
"""


def written(folder: Path, text: str | bytes, name: str = "r.yaml") -> Path:
    """Return a file with a text."""
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(folder: Path, text: str | bytes) -> str:
    """Return the message that refuses a recipe, within a second."""
    started = time.monotonic()
    with pytest.raises(OptionError) as caught:
        load(written(folder, text))
    assert caught.value.exit_code == 2
    assert time.monotonic() - started < 5
    return str(caught.value)


def option(line: str) -> str:
    """Return a recipe whose line 14 is one more option of the fine-tune."""
    return f"{HEAD}{STAGES}      {line}\n"


def test_a_good_recipe_is_read(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, HEAD + STAGES))
    assert recipe.name == "r"
    assert [stage.name for stage in recipe.stages] == ["upcycle", "tune"]
    assert [stage.inputs for stage in recipe.stages] == [("source",), ("upcycle",)]
    assert recipe.stage("upcycle").options == {"experts": 4, "top_k": 2}


# F1: tags


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!mine 3",
        "!!binary aGVsbG8=",
        "!!str 3",
    ],
)
def test_f1_tags_are_refused(tmp_path: Path, value: str) -> None:
    assert "r.yaml line 14: tag '" in refusal(tmp_path, option(f"lr: {value}"))


# F2: too much


def test_f2_alias_bomb(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "holds more than 5000 values" in refusal(tmp_path, "\n".join(rows))


def test_f2_many_aliases(tmp_path: Path) -> None:
    rows = ["a: &a x", f"b: [{', '.join(['*a'] * (MAX_ALIASES + 1))}]"]
    assert f"r.yaml line 2: uses more than {MAX_ALIASES} aliases" in refusal(
        tmp_path, "\n".join(rows)
    )


def test_f2_an_alias_of_itself(tmp_path: Path) -> None:
    assert "alias 'a' names no anchor before it" in refusal(tmp_path, "a: &a [*a]")


@pytest.mark.parametrize("bracket", ["[", "{a: "])
def test_f2_nested_brackets(tmp_path: Path, bracket: str) -> None:
    assert "is nested deeper than 16 levels" in refusal(tmp_path, bracket * 3000)


def test_f2_a_large_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with path.open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(OptionError, match=f"too large.*at most {MAX_BYTES} bytes, found 104857600"):
        load(path)


# F3: duplicates


def test_f3_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    text = option("lr: 1e-4\n      tokens: 3M")
    assert refusal(tmp_path, text) == (
        "r.yaml line 15: key 'tokens' is given twice; found the first one at r.yaml line 13"
    )


# F4: unknown names


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("experts: 4", "expert: 4", "line 9: stages.upcycle.upcycle: unknown option 'expert'. Did "
         "you mean 'experts'?"),
        ("tokens: 2M", "token: 2M", "line 13: stages.tune.finetune: unknown option 'token'. Did "
         "you mean 'tokens'?"),
        ("finetune:", "fintune:", "line 11: stages.1: unknown verb or key 'fintune'. Did you mean "
         "'finetune'?"),
        ("title:", "titel:", "line 2: unknown key 'titel'. Did you mean 'title'?"),
        ("machine: m,", "machin: m,", "line 6: cost: unknown key 'machin'. Did you mean "
         "'machine'?"),
        ("$train", "$trian", "tune.finetune.data: unknown text in data 'trian'. Did you mean "
         "'train'?"),
    ],
)  # fmt: skip
def test_f4_unknown_names_say_what_was_meant(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert message in refusal(tmp_path, (HEAD + STAGES).replace(old, new))


def test_f4_num_expert(tmp_path: Path) -> None:
    text = HEAD + "stages:\n  - moefy: {num_expert: 4}\n"
    assert "unknown option 'num_expert'. Did you mean 'num_experts'?" in refusal(tmp_path, text)


# F5: traps of YAML 1.1


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E+2", 100.0), ("5", 5.0), (".5", 0.5), ("1.e-3", 1e-3), ("1_0.5", 10.5)],
)
def test_f5_numbers_are_read_in_number_fields(tmp_path: Path, text: str, value: float) -> None:
    found = load(written(tmp_path, option(f"lr: {text}"))).stage("tune").options["lr"]
    assert found == value
    assert isinstance(found, float)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: 08", "starts with 0, which some YAML readers take for octal; expected a number"),
        ("batch_size: 010", "starts with 0, which some YAML readers take for octal"),
        ("lr: 12:30", "is read as a number of base 60 by YAML 1.1; expected a number, found 12:30"),
        ("lr: no", "is read as true or false by YAML 1.1; expected a number, found no"),
        ("batch_size: 0x10", "is not a decimal number; expected a whole number, found 0x10"),
        ("schedule: no", "is read as true or false by YAML 1.1; expected text, found no. Put it "
         "in quotes if it is meant as text: 'no'."),
        ("text_field: 12:30", "is read as a number of base 60 by YAML 1.1; expected text"),
        ("text_field: 08", "starts with 0, which some YAML readers take for octal; expected text"),
        ("text_field: 1e-4", "is text to YAML 1.1 and a number to YAML 1.2; expected text"),
        ("text_field: 2024-01-01", "is read as a date by YAML 1.1; expected text"),
        ("text_field: 7", "is a number to YAML; expected text, found 7. Put it in quotes"),
        ("train: [router, off]", "tune.finetune.train.1: is read as true or false by YAML 1.1"),
        ("no: 3", "key 'no' is no word: YAML reads it as bool"),
        ("1: 3", "key '1' is no word: YAML reads it as int"),
        ("<<: {}", "merge keys ('<<') are not allowed. Use 'extends' instead."),
    ],
)  # fmt: skip
def test_f5_traps_are_named(tmp_path: Path, line: str, message: str) -> None:
    found = refusal(tmp_path, option(line))
    assert message in found
    assert found.startswith("r.yaml line 14: ")


def test_f5_quoted_text_is_text(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, option("text_field: 'no'")))
    assert recipe.stage("tune").options["text_field"] == "no"


# F6: wrong type, out of range, not a number


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lr: fast", "has the wrong type; expected a number, found fast"),
        ("lr: '1e-4'", "expected a number, found '1e-4' (text, because it is quoted)"),
        ("lr: [1]", "has the wrong type; expected a number, found a list"),
        ("lr: {a: 1}", "has the wrong type; expected a number, found a mapping"),
        ("batch_size: 1.5", "is a number to YAML; expected a whole number, found 1.5"),
        ("batch_size:", "has the wrong type; expected a whole number, found nothing"),
        ("batch_size: 0", "is out of range; expected 1 or more, found 0"),
        ("checkpointing: 1", "is a number to YAML; expected true or false, found 1"),
        ("lr: .nan", "is not a finite number; expected a number, found .nan"),
        ("lr: .inf", "is not a finite number"),
        ("lr: 1e999", "is too large for a number; found 1e999"),
        ("lr: -1", "is out of range; expected above 0, found -1.0"),
        ("schedule: slow", "is unknown; expected cosine or linear or constant"),
        ("data_format: [a]", "stages.tune.finetune"),
        ('text_field: "a\\u0007"', "holds control characters"),
    ],
)
def test_f6_the_field_is_named(tmp_path: Path, line: str, message: str) -> None:
    found = refusal(tmp_path, option(line))
    assert message in found
    assert found.startswith("r.yaml line 14: stages.tune.finetune.")


@pytest.mark.parametrize("key", ["title", "paper", "cost", "exactness", "stages", "method"])
def test_f6_required_keys(tmp_path: Path, key: str) -> None:
    text = "".join(
        f"{block}\n"
        for block in (HEAD + STAGES).replace("\n ", "\x00 ").splitlines()
        if not block.startswith(f"{key}:")
    ).replace("\x00", "\n")
    assert f"{key}: is missing; expected " in refusal(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("basis: estimate", "basis: guess", "cost.basis: is unknown; expected measured or"),
        (", time: t", "", "cost.time: is missing"),
        ("exactness: approximate", "exactness: exactly", "unknown class 'exactly'. Did you mean"),
        ("data: {train: [a.jsonl]}", "data: [a]", "data: has the wrong type; expected a mapping"),
        ("{train:", "{a.b:", "data.a.b: is no name; expected a letter, then"),
        ("name: tune", "name: 1st", "is text"),
        ("name: tune", "name: upcycle", "two stages are called 'upcycle'; found the first one at "
         "r.yaml line 9. Give one of them a 'name'."),
        ("name: tune", "name: data", "a stage cannot be called 'data'"),
        ("name: tune", "from: later", "unknown earlier stage 'later'. Known: source, upcycle."),
        ("name: tune", "from: [source, upcycle]", "finetune goes on from one checkpoint; found 2"),
        ("finetune:", "evaluate: {}\n    finetune:", "must have exactly one verb"),
        ("  - upcycle: {experts: 4, top_k: 2}\n", "  - {}\n", "must have exactly one verb"),
        ("data: $train\n", "seq_len: 16\n", "stages.tune.finetune.data: is missing"),
        ("upcycle: {experts: 4, top_k: 2}", "upcycle: 4", "upcycle: has the wrong type; expected a"
         " mapping, found '4'"),
        ("tokens: 2M", "tokens: lots", "tune.finetune.tokens: is no count; expected a number"),
    ],
)  # fmt: skip
def test_f6_structure(tmp_path: Path, old: str, new: str, message: str) -> None:
    if message == "is text":
        load(written(tmp_path, (HEAD + STAGES).replace("name: tune", "name: first")))
        message = "stages.1.name: is no name"
    assert message in refusal(tmp_path, (HEAD + STAGES).replace(old, new, 1))


# F7: no recipe at all


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty; expected a recipe"),
        (b"# only words\n", "is empty; expected a recipe"),
        (b"null\n", "is empty"),
        (b"a: 1\n---\nb: 2\n", "line 2: holds more than one document"),
        (b"- a\n", "is no recipe; expected a mapping, found a list"),
        (b"a\n", "is no recipe; expected a mapping, found one value"),
        (b"\x00\x01\x02", "is a binary file, not a recipe"),
        (b"\x89PNG\r\n", "is not UTF-8 text; found byte 0x89 at offset 0"),
        (b"\xef\xbb\xbfschema: 1\n", "starts with a byte order mark. Save it as UTF-8 without"),
        ("schema: 1\n".encode("utf-16"), "starts with a byte order mark"),
        (b"a: [1\n", "is no YAML"),
        (b"a: \x07\n", "is no YAML"),
        (b"a: 1\n  b: 2\n", "line 2: is no YAML: mapping values are not allowed here"),
        (b"\ta: 1\n", "line 1: is no YAML: found character"),
    ],
)
def test_f7_no_recipe(tmp_path: Path, text: bytes, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_f7_a_folder_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is not a regular file; found a folder"):
        load(tmp_path)
    with pytest.raises(OptionError, match=r"gone\.yaml: no such file"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(OptionError, match=r"unknown recipe 'upcycle/smollm2'. Did you mean"):
        load("upcycle/smollm2")


# F9: values that cannot be


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("upcycle: {experts: 2, top_k: 3}", "top_k: more experts per token than there are experts"),
        ("upcycle: {experts: 0}", "upcycle.experts: must be at least 1; found 0"),
        ("upcycle: {max_shard_size: soon}", "upcycle.max_shard_size: is no size in bytes"),
        ("moefy: {keep: 1.5, rule: threshold}", "moefy.keep: out of range"),
        ("d2dmoe: {tau: 2}", "d2dmoe.tau: out of range"),
        ("adamoe: {null_experts: 0}", "adamoe.null_experts: is 0"),
        ("adamoe: {null_kind: none}", "adamoe.null_kind: unknown choice"),
        ("evaluate: {}", "stages.evaluate.evaluate: there is nothing to measure on"),
        ("calibrate: {data: $train, budget: 2}", "calibrate.budget: is out of range"),
        ("push: {repo: a/b/c}", "push.repo: is no repository; expected org/name, found a/b/c"),
        ("push: {token: hf_x}", "stages.push.push: unknown option 'token'"),
        ("push: {verify: maybe}", "push.verify: is no way to verify"),
    ],
)
def test_f9_values_of_every_verb(tmp_path: Path, stage: str, message: str) -> None:
    text = f"{HEAD}stages:\n  - {stage}\n"
    found = refusal(tmp_path, text)
    assert message in found
    assert "r.yaml line 9: " in found


# F11: a newer schema


def test_f11_a_newer_schema_names_the_version(tmp_path: Path) -> None:
    found = refusal(tmp_path, HEAD.replace("schema: 1", "schema: 2") + STAGES)
    assert found.startswith("r.yaml line 1: schema: needs adaconvert >= ")
    assert found.endswith("Upgrade adaconvert.")


def test_f11_no_schema(tmp_path: Path) -> None:
    assert "r.yaml: schema: is missing. Write 'schema: 1'" in refusal(tmp_path, "title: T\n")


# F14: a value is only a value


def test_f14_a_dotted_path_imports_nothing(tmp_path: Path) -> None:
    load(written(tmp_path, HEAD + STAGES))
    before = set(sys.modules)
    assert "expected cosine" in refusal(tmp_path, option("schedule: xml.dom.minidom.parse"))
    load(written(tmp_path, option("text_field: xml.dom.minidom")))
    assert not {name for name in set(sys.modules) - before if name.startswith("xml")}


# whatever is in the file, it is read or refused


@given(st.text(alphabet="abc:-[]{}&*!|>'\"#%@`\n \t0,<=$?e.", max_size=60))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, HEAD + STAGES + text)
    said: AdaconvertError | None = None
    try:
        load(path)
    except AdaconvertError as error:
        said = error
    assert said is None or (said.exit_code == 2 and "\n" not in str(said))
