"""The documented API: what each call returns, leaves behind and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import adaconvert
from adaconvert.errors import OptionError, OutputConflictError, VerificationError
from adaconvert.testing.tiny_models import make


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("models") / "dense")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, adaconvert; print({'torch','numpy','transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_conversion_without_verification_imports_no_torch(dense: Path, tmp_path: Path) -> None:
    code = (
        "import sys, adaconvert\n"
        f"adaconvert.convert({str(dense)!r}, destination={str(tmp_path / 'out')!r}, verify=False)\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'covert'"):
        adaconvert.covert  # noqa: B018


def test_inspect_describes_dense_and_converted(dense: Path, tmp_path: Path) -> None:
    before = adaconvert.inspect(dense)
    assert before.spec is not None
    assert before.spec.model_type == "llama"
    adaconvert.convert(dense, destination=tmp_path / "out", verify=False)
    after = adaconvert.inspect(tmp_path / "out")
    assert after.spec is not None
    assert (after.spec.num_experts, after.spec.top_k) == (8, 2)
    assert "8 experts top-2" in after.lines()[0]
    assert json.dumps(after.to_json())
    assert after.problems == ()


def test_inspect_lists_what_a_conversion_would_refuse(dense: Path, tmp_path: Path) -> None:
    broken = make("llama", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (broken / "config.json").write_text(json.dumps(config))
    found = adaconvert.inspect(broken)
    assert any("model.layers.2" in problem for problem in found.problems)


def test_plan_and_result_are_json(dense: Path, tmp_path: Path) -> None:
    report = adaconvert.plan(dense, max_shard_size="30KB")
    assert json.loads(json.dumps(report.to_json()))["shards"] == report.shards > 1
    result = adaconvert.convert(dense, destination=tmp_path / "out", max_shard_size="30KB")
    text = json.dumps(result.to_json())
    assert str(tmp_path) not in text
    assert json.loads(text)["verification"]["ok"] is True


def test_the_promised_bytes_are_the_written_bytes(dense: Path, tmp_path: Path) -> None:
    result = adaconvert.convert(dense, destination=tmp_path / "out", verify=False)
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert 0 <= result.report.disk - written <= 4096


def test_a_destination_that_exists_is_kept(dense: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(OutputConflictError, match="taken"):
        adaconvert.convert(dense, destination=taken, verify=False)
    with pytest.raises(OutputConflictError, match="taken"):
        adaconvert.convert(dense, destination=taken, verify=False, overwrite=True)
    assert [p.name for p in taken.iterdir()] == ["mine.txt"]


def test_a_result_that_breaks_its_promise_is_not_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaconvert.planning import evaluate

    def wrong(args: list[object], params: object, seed: int) -> object:
        return args[0] * 1.01  # type: ignore[operator]

    monkeypatch.setitem(evaluate.FUNCTIONS, "scale", wrong)
    with pytest.raises(
        VerificationError, match=r"out: .*layer 0 is the first that differs"
    ) as caught:
        adaconvert.convert(dense, destination=tmp_path / "out", granularity=2)
    assert caught.value.report is not None
    assert list(tmp_path.iterdir()) == []


def test_kept_config_keys(dense: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    config["my_note"] = {"a": 1}
    (source / "config.json").write_text(json.dumps(config))
    adaconvert.convert(source, destination=tmp_path / "plain", verify=False)
    assert "my_note" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    adaconvert.convert(
        source, destination=tmp_path / "kept", verify=False, keep_config=("my_note",)
    )
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["my_note"] == {"a": 1}
    for key, match in [("nothing", "is not in the source"), ("hidden_size", "cannot be kept")]:
        with pytest.raises(OptionError, match=match):
            adaconvert.plan(source, keep_config=(key,))


def test_tokenizer_and_generation_config_survive_byte_for_byte(dense: Path, tmp_path: Path) -> None:
    adaconvert.convert(dense, destination=tmp_path / "out", verify=False)
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (dense / name).read_bytes()


def test_resuming_a_finished_run_does_nothing(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adaconvert.convert(dense, destination=out, verify=False)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    again = adaconvert.convert(dense, destination=out, verify=False, resume=True)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    assert "an earlier run completed it" in again.verification_lines[0]
    with pytest.raises(OutputConflictError):
        adaconvert.convert(dense, destination=out, verify=False, resume=True, experts=4)


def test_verify_needs_a_manifest(dense: Path) -> None:
    with pytest.raises(VerificationError, match=r"adaconvert\.json"):
        adaconvert.verify(dense, dense)
    with pytest.raises(OptionError, match="needs a source and a converted checkpoint"):
        adaconvert.verify(dense)


def test_resuming_a_finished_run_checks_it(tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense"), tmp_path / "out"
    adaconvert.convert(source, destination=out, verify=False)
    with pytest.raises(OutputConflictError, match="was not verified when it was written"):
        adaconvert.convert(source, destination=out, resume=True)
    (out / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config\.json"):
        adaconvert.convert(source, destination=out, verify=False, resume=True)
    make("llama", source, seed=1)
    with pytest.raises(OutputConflictError, match="made from other weights"):
        adaconvert.convert(source, destination=out, verify=False, resume=True)
