"""The probe, and the comparison of tokenizers, where an unchanged tokenizer.json proves nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from adaconvert.errors import OptionError
from adaconvert.testing.tiny_models import VOCAB, make
from adaconvert.verification.tokens import (
    Probe,
    compare_tokenizers,
    load_tokenizer,
    shipped_text,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("dense") / "m")


@pytest.fixture
def copied(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "copy"))


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    for path in folder.glob("chat_template*"):
        path.unlink()


def test_the_shipped_text_is_varied() -> None:
    text = shipped_text()
    assert 600 <= len(text.split()) <= 1000
    scripts = (
        "def running_mean",
        "SELECT",
        "утром",
        "καφενείο",
        "في الصباح",
        "今朝",
        "오늘",
        "सुबह",
        "🙂",
    )
    assert all(part in text for part in scripts)


@pytest.mark.smoke
def test_the_shipped_probe_has_512_tokens(dense: Path) -> None:
    probe = Probe.shipped(dense)
    assert probe.origin == "shipped text"
    assert [len(sequence) for sequence in probe.ids] == [128] * 4
    assert probe.tokens == 512
    assert tuple(probe.tensor().shape) == (4, 128)
    assert probe == Probe.shipped(dense)


def test_sequences_fit_the_positions_of_the_model(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m", max_position_embeddings=48)
    assert {len(sequence) for sequence in Probe.shipped(folder).ids} == {48}


def test_a_short_text_gives_a_short_probe(dense: Path) -> None:
    probe = Probe.from_text("a few words", dense)
    assert len(probe.ids) == 1
    assert 1 <= probe.tokens < 128


def test_without_a_tokenizer_ids_are_random_but_always_the_same(copied: Path) -> None:
    drop_tokenizer(copied)
    probe = Probe.shipped(copied)
    assert probe.origin == "random ids (there is no tokenizer)"
    assert probe.tokens == 512
    assert 0 <= min(map(min, probe.ids)) <= max(map(max, probe.ids)) < VOCAB
    assert len({i for sequence in probe.ids for i in sequence}) > 200
    assert probe.ids == Probe.shipped(copied).ids


def test_a_tokenizer_larger_than_the_embedding_is_not_used(tmp_path: Path) -> None:
    folder = make("llama", tmp_path / "m", vocab_size=40)
    probe = Probe.shipped(folder)
    assert "the model has 40" in probe.origin
    assert max(map(max, probe.ids)) < 40


def test_text_and_json_lines_are_read(dense: Path, tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("good morning\n\nsun and rain", encoding="utf-8")
    rows = ("good morning", "sun and rain")
    lines.write_text("".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows))
    assert Probe.from_file(text, dense).ids == Probe.from_file(lines, dense).ids
    assert Probe.from_file(text, dense).origin == "text of p.txt"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.txt", b" \n", r"--probe p\.txt: holds no text"),
        ("p.txt", b"\xff\xfe\x00", r"--probe p\.txt: is not UTF-8 text"),
        ("p.jsonl", b'{"text": "a"}\n[1]\n', 'line 2 is no JSON object with a "text"'),
        ("p.jsonl", b"{", 'line 1 is no JSON object with a "text"'),
        ("p.jsonl", b"[" * 100_000, 'line 1 is no JSON object with a "text"'),
    ],
)
def test_a_file_that_is_no_probe_is_refused(
    name: str, data: bytes, message: str, dense: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(OptionError, match=message):
        Probe.from_file(path, dense)


def test_a_missing_probe_file_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--probe no\.txt: file is missing"):
        Probe.from_file(tmp_path / "no.txt", dense)


@pytest.mark.smoke
def test_the_same_tokenizer_agrees(dense: Path, copied: Path) -> None:
    assert compare_tokenizers(dense, copied, shipped_text()) is None


def test_a_model_type_that_replaces_the_pre_tokenizer_is_noticed(tmp_path: Path) -> None:
    # tokenizer.json cuts at every "o", which the pre-tokenizer of Qwen2Tokenizer does not
    source = make("llama", tmp_path / "source")
    path = source / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"String": "o"},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
        ],
    }
    path.write_text(json.dumps(values))
    target = Path(shutil.copytree(source, tmp_path / "target"))
    config = json.loads((target / "config.json").read_text())
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (target / "config.json").write_text(json.dumps(config))
    assert (source / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    found = compare_tokenizers(source, target, "more good words too")
    assert found is not None
    assert re.search(
        r"token \d+ differs, after .*: the source has \d+ \(.*\), the target \d+", found
    )


def test_a_missing_tokenizer_is_noticed(dense: Path, copied: Path) -> None:
    drop_tokenizer(copied)
    assert compare_tokenizers(dense, copied, "x") == "only the source has one"
    assert compare_tokenizers(copied, dense, "x") == "only the target has one"
    assert compare_tokenizers(copied, copied, "x") is None


def test_another_chat_template_is_noticed(dense: Path, copied: Path) -> None:
    template = copied / "chat_template.jinja"
    assert template.is_file()
    template.write_text(template.read_text() + "!")
    assert compare_tokenizers(dense, copied, "x") == "the chat templates differ"


def test_a_tokenizer_that_cannot_be_read_counts_as_none(copied: Path) -> None:
    (copied / "tokenizer.json").write_bytes(b"{")
    assert load_tokenizer(copied) is None


def test_code_of_a_tokenizer_is_not_run(copied: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (copied / "tokenization_x.py").write_text(f"open({str(mark)!r}, 'w')")
    path = copied / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values |= {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    path.write_text(json.dumps(values))
    load_tokenizer(copied)
    assert not mark.exists()
