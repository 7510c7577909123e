"""`early-exit` as a run: interrupted, taken up again, with a draft's tokens, and its costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import load_file

from adaconvert import api
from adaconvert.conversion import RunSettings, run
from adaconvert.errors import InterruptedRunError
from adaconvert.io.fs import FileSystem
from adaconvert.methods.early_exit.drafting import Drafting, drafting_of, most_frequent
from adaconvert.methods.sources import open_source
from adaconvert.testing.tiny_models import make


class _Stops(FileSystem):
    """Ends the run when the second shard is about to be created."""

    def create(self, path: Path) -> int:
        if "00002-of" in str(path):
            raise InterruptedRunError("stopped by a test")
        return super().create(path)


def _settings(destination: Path, **changes: Any) -> RunSettings:
    return RunSettings(destination=destination, max_shard_size="40KB", verify=False, **changes)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = [str(make("llama", tmp_path / "dense"))]
    options = {"exits": "1", "head": "full", "draft_vocab": 40}
    run(source, "early-exit", options, _settings(tmp_path / "whole"))
    stopped = _settings(tmp_path / "resumed", fs=_Stops())
    with pytest.raises(InterruptedRunError, match="stopped by a test"):
        run(source, "early-exit", options, stopped)
    run(source, "early-exit", options, _settings(tmp_path / "resumed", resume=True))
    files = [
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
        for name in ("whole", "resumed")
    ]
    assert files[0] == files[1]
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2


def test_a_draft_chooses_among_the_most_frequent_tokens(tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense"), tmp_path / "out"
    (tmp_path / "text.txt").write_text("one two two three three three\n")
    given: dict[str, Any] = {"method": "early-exit", "exits": "1", "verify": False}
    given["draft_data"] = str(tmp_path / "text.txt")
    api.convert(source, destination=out, draft_vocab="0.006k", **given)
    held = load_file(out / "model.safetensors")["exits.1.draft_tokens"]
    assert (held.dtype, held.shape) == (numpy.int64, (6,))
    assert list(held) == sorted(set(held))
    # the tiny model begins with 0 and ends with 2
    assert {0, 2} <= set(held)
    record = json.loads((out / "adaconvert.json").read_text())
    assert (record["options"]["draft_vocab"], len(record["options"]["draft_data"])) == (6, 64)
    assert str(tmp_path) not in (out / "adaconvert.json").read_text()


def test_without_a_text_they_are_the_first_of_the_vocabulary(tmp_path: Path) -> None:
    item = open_source(str(make("llama", tmp_path / "dense")))
    assert list(most_frequent(None, item, 5, [7, 400])) == [0, 1, 2, 3, 7]
    assert list(most_frequent(None, item, 1, [])) == [0]


def test_thresholds_count_the_checks(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    plain = api.plan(source, method="early-exit", exits="1", head="norm")
    checked = api.plan(source, method="early-exit", exits="1", head="norm", threshold=0.9)
    assert plain.exactness.kind == "exact"
    assert checked.exactness.kind == "approximate"
    assert plain.after.flops == plain.before.flops
    # a head of 320 x 32
    assert checked.after.flops - plain.after.flops == 2 * 320 * 32
    assert checked.after.total_params == plain.after.total_params
    assert plain.after.active_params == plain.before.active_params
    assert any("set by hand" in note for note in checked.notes)


def test_a_draft_pays_where_enough_is_accepted() -> None:
    found = Drafting(token=0.5, check=1.0, tokens=2)
    assert found.round == 2.0
    # 1 + a + a^2 = 2
    least = found.break_even()
    assert least is not None
    assert abs(least - (5**0.5 - 1) / 2) < 1e-9
    assert Drafting(token=1.0, check=1.0, tokens=3).break_even() is None


def test_what_a_draft_reads(tmp_path: Path) -> None:
    item = open_source(str(make("llama", tmp_path / "dense", layers=4)))
    whole, small = drafting_of(item, 2, 4, None), drafting_of(item, 2, 4, 32)
    assert whole.check == small.check == 1.0
    # a tenth of the rows of the head, and as many blocks
    saved = item.source.tensors["lm_head.weight"].nbytes * 0.9
    blocks = sum(ref.nbytes for name, ref in item.source.tensors.items() if ".layers." in name)
    total = blocks + item.source.tensors["lm_head.weight"].nbytes
    assert abs((whole.token - small.token) - saved / total) < 1e-9
    # three matrices of 32 x 64 beside it, or a whole block
    tensors = item.source.tensors
    branch = sum(ref.nbytes for name, ref in tensors.items() if ".layers.1.mlp" in name)
    block = sum(ref.nbytes for name, ref in tensors.items() if ".layers.3." in name)
    for head, more in (("mlp", branch), ("layer", block), ("full", branch + block)):
        found = drafting_of(item, 2, 4, 32, head)
        assert abs((found.token - small.token) - more / total) < 1e-9


def test_a_family_stock_drafting_fails_with_is_named_in_the_plan(tmp_path: Path) -> None:
    source = make("gpt2", tmp_path / "dense")
    notes = api.plan(source, method="early-exit", exits="1").notes
    assert any("assistant_early_exit=k)` fails with gpt2" in note for note in notes)
    notes = api.plan(make("llama", source), method="early-exit", exits="1").notes
    assert not any("assistant_early_exit" in note for note in notes)


def test_thresholds_are_verified_with_no_exit_taken(tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense"), tmp_path / "out"
    done = api.convert(source, destination=out, method="early-exit", exits="1", threshold=0.1)
    found: Any = done.manifest["verification"]
    assert (found["ok"], found["promise"], found["bound"]) == (True, "approximate", 1e-5)
    assert found["relative_difference_below"] == 1e-12


def test_a_vocabulary_for_drafts_loads(tmp_path: Path) -> None:
    from adaconvert.modeling.loading import load_model

    source, out = make("llama", tmp_path / "dense"), tmp_path / "out"
    done = api.convert(source, destination=out, method="early-exit", exits="1", draft_vocab=40)
    assert done.manifest["verification"]["ok"]  # type: ignore[index]
    model: Any = load_model(out)
    kept = model.adaptive_exits()[1].draft_tokens
    assert kept.tolist() == load_file(out / "model.safetensors")["exits.1.draft_tokens"].tolist()


@pytest.mark.parametrize(
    "given",
    [
        {"every": "L/2", "head": "full", "draft_vocab": 40, "draft_exit": 2, "confidence": True},
        {"exits": "1,3", "head": "shared", "draft_tokens": 3},
        {"exits": "2", "measure": "patience", "patience": 1, "kv": "propagate"},
    ],
)
def test_the_plan_can_be_made_again_from_the_manifest(
    given: dict[str, Any], tmp_path: Path
) -> None:
    from adaconvert.methods.registry import make_config, method_of, prepare

    item = open_source(str(make("llama", tmp_path / "dense", layers=4)))
    plan = prepare(make_config("early-exit", given), [item]).planned.plan
    kept = json.loads(json.dumps(plan.options))
    assert method_of("early-exit").replan(kept, [item]) == plan
