"""The verification as a whole: what fails, what is only measured, and what the report says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from adaconvert.errors import OptionError, SourceError, VerificationError
from adaconvert.io import manifest
from adaconvert.io.source import Source
from adaconvert.planning.ops import Exactness
from adaconvert.testing.by_hand import upcycle_by_hand, write_manifest
from adaconvert.testing.tiny_models import make
from adaconvert.verification.render import power_above, rounded
from adaconvert.verification.report import VerificationReport, verify_checkpoint
from adaconvert.verification.tokens import Probe
from adaconvert.verification.verdict import bound_of, promised, run_dtype

if TYPE_CHECKING:
    from adaconvert.testing.by_hand import Tensors


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("dense") / "m")


def verified(dense: Path, target: Path, **options: object) -> VerificationReport:
    probe = Probe.from_text("a few words to compare on", dense, sequences=2, length=12)
    return verify_checkpoint([dense], target, probe=probe, **options)  # type: ignore[arg-type]


def scale_layer_1(factor: float) -> object:
    def edit(tensors: Tensors) -> None:
        for expert in range(4):
            tensors[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"] *= factor

    return edit


@pytest.mark.smoke
def test_a_good_conversion_is_ok(dense: Path, tmp_path: Path) -> None:
    report = verify_checkpoint([dense], upcycle_by_hand(dense, tmp_path / "t"))
    assert report.ok, report.lines()
    assert report.problem() == ""
    values = report.to_json()
    assert values["promise"] == "exact"
    assert values["bound"] == 1e-5
    equivalence = values["equivalence"]
    assert isinstance(equivalence, dict)
    assert equivalence["tokens"] == 512
    assert equivalence["argmax_agreement"] == 1.0
    assert equivalence["first_bad_layer"] is None
    assert len(equivalence["routing"]) == 2
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    lines = "\n".join(report.lines())
    for part in (
        "every byte as written",
        "the same tokens",
        "100 % of 512 tokens",
        "verdict      ok",
    ):
        assert part in lines


def test_the_report_names_no_path_and_is_the_same_every_time(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t")
    first, second = verified(dense, target), verified(dense, target)
    assert first.to_json() == second.to_json()
    assert first.record() == second.record()
    for text in (json.dumps(first.to_json()), *first.lines()):
        assert str(tmp_path) not in text
        assert all(ord(character) < 127 for character in text)


def test_the_record_does_not_depend_on_mode_or_last_digits(dense: Path, tmp_path: Path) -> None:
    from adaconvert.verification.memory import layerwise_need

    target = upcycle_by_hand(dense, tmp_path / "t")
    need = layerwise_need([Source.open(dense), Source.open(target)], tokens=24)
    whole, layerwise = verified(dense, target), verified(dense, target, memory=need)
    assert whole.equivalence is not None
    assert layerwise.equivalence is not None
    assert layerwise.equivalence.mode == "layerwise"
    assert whole.record() == layerwise.record()
    assert whole.record() == {
        "ok": True,
        "notes": [],
        "promise": "exact",
        "bound": 1e-5,
        "probe": "text",
        "tokens": whole.equivalence.logits.tokens,
        "relative_difference_below": 1e-6,
        "argmax_agreement": 1.0,
        "kl_nats_below": 1e-12,
    }


@pytest.mark.parametrize(
    ("value", "power"), [(0.0, 1e-12), (1e-13, 1e-12), (2e-7, 1e-6), (0.05, 0.1), (7.0, 10.0)]
)
def test_powers_of_ten(value: float, power: float) -> None:
    assert power_above(value) == power


def test_numbers_json_cannot_hold_are_null() -> None:
    assert rounded(float("nan")) is rounded(float("inf")) is rounded(None) is None
    assert rounded(1.23456e-7) == 1.23e-7


def test_a_broken_promise_fails_and_names_the_layer(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", edit=scale_layer_1(1.01))  # type: ignore[arg-type]
    report = verified(dense, target)
    assert not report.ok
    assert report.integrity.ok
    assert "of the largest logit; expected at most 1e-05" in report.problem()
    assert "layer 1 is the first that differs" in report.problem()
    assert report.lines()[-1] == "verdict      FAILED"


@pytest.mark.parametrize("kind", ["approximate", "needs-training"])
def test_what_promises_nothing_is_only_measured(kind: str, dense: Path, tmp_path: Path) -> None:
    edit = scale_layer_1(3.0)
    target = upcycle_by_hand(dense, tmp_path / "t", edit=edit, kind=kind)  # type: ignore[arg-type]
    report = verified(dense, target)
    assert report.ok
    assert report.verdict is not None
    assert (report.verdict.kind, report.verdict.bound) == (kind, None)
    assert report.equivalence is not None
    assert report.equivalence.relative > 0.01
    assert report.equivalence.logits.kl > 1e-6
    assert "measured" in "\n".join(report.lines())


@pytest.mark.parametrize("kind", ["exact", "exact-fp32", "approximate", "needs-training"])
def test_logits_that_are_no_numbers_fail_every_promise(
    kind: str, dense: Path, tmp_path: Path
) -> None:
    def edit(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.x"] = tensors.pop("model.layers.1.input_layernorm.weight")
        tensors["model.layers.1.input_layernorm.weight"] = tensors.pop("model.layers.1.mlp.x")
        tensors["model.layers.1.input_layernorm.weight"][:] = 3e38

    report = verified(dense, upcycle_by_hand(dense, tmp_path / "t", edit=edit, kind=kind))
    assert not report.ok
    assert report.integrity.ok
    what = "other logits are no numbers in the target than in the source; layer 1"
    assert what in report.problem()
    json.dumps(report.to_json(), allow_nan=False)
    assert report.record()["relative_difference_below"] is None


def test_rounding_of_the_stored_dtype_is_allowed_where_it_was_announced(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "d", dtype="bfloat16")

    def one_ulp(tensors: Tensors) -> None:
        name = "model.layers.0.self_attn.o_proj.weight"
        tensors[name] = (tensors[name].float() * (1 + 2**-8)).to(tensors[name].dtype)

    target = upcycle_by_hand(source, tmp_path / "t", edit=one_ulp, kind="exact-fp32")
    report = verified(source, target)
    assert report.ok, report.lines()
    assert report.verdict is not None
    assert report.verdict.bound == 0.03
    assert report.equivalence is not None
    assert 1e-5 < report.equivalence.relative < 0.03
    assert f"{report.equivalence.relative:.3g}" in "\n".join(report.lines())
    write_manifest(target, source, kind="exact", options={})
    assert not verified(source, target).ok


@pytest.mark.parametrize(
    ("dtype", "kind", "bound"),
    [
        ("float32", "exact-fp32", 1e-5),
        ("bfloat16", "exact-fp32", 0.03),
        ("float16", "exact-fp32", 0.004),
        ("bfloat16", "exact", 1e-5),
        ("bfloat16", "approximate", None),
    ],
)
def test_the_bound_follows_promise_and_stored_dtype(
    dtype: str, kind: str, bound: float | None, tmp_path: Path
) -> None:
    stored = Source.open(make("llama", tmp_path / "m", dtype=dtype))
    assert bound_of(Exactness(kind=kind, why=""), stored) == bound
    assert bound_of(None, stored) is None
    assert run_dtype(stored) == dtype


def test_an_unknown_promise_is_refused(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", kind="perfect")
    with pytest.raises(VerificationError, match=r"no known kind: perfect; expected exact or"):
        verified(dense, target)


def test_a_manifest_without_a_promise_promises_nothing() -> None:
    assert promised({}) is None
    assert promised({"exactness": {"kind": "exact", "why": "x"}}) == Exactness(
        kind="exact", why="x"
    )


@pytest.mark.parametrize("change", ["template", "tokens"])
def test_a_tokenizer_that_changed_fails(change: str, dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t")
    if change == "template":
        (target / "chat_template.jinja").write_text("other")
    else:
        path = target / "tokenizer.json"
        values = json.loads(path.read_text())
        values["pre_tokenizer"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
        path.write_text(json.dumps(values))
    write_manifest(target, dense, options={})
    report = verified(dense, target)
    assert not report.ok
    expected = {"template": "the chat templates differ", "tokens": "token "}[change]
    assert f"tokenizer: {expected}" in report.problem()


def test_damage_on_disk_is_named_together_with_the_layer(dense: Path, tmp_path: Path) -> None:
    """I2: the manifest names the tensor, the comparison the layer."""
    target = upcycle_by_hand(dense, tmp_path / "t")
    stored = Source.open(target).tensors["model.layers.1.block_sparse_moe.experts.0.w2.weight"]
    data = bytearray((target / stored.file).read_bytes())
    for offset in range(stored.start + 3, stored.start + stored.nbytes, 4):
        data[offset] ^= 0x80  # the sign of each value
    (target / stored.file).write_bytes(data)
    report = verified(dense, target)
    assert f"tensor '{stored.name}' differs from its hash" in report.problem()
    assert "layer 1 is the first that differs" in report.problem()


def test_a_target_that_cannot_be_opened_is_reported_without_a_comparison(
    dense: Path, tmp_path: Path
) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t")
    (target / "config.json").write_text("{")
    report = verified(dense, target)
    assert not report.ok
    assert report.equivalence is None
    assert "config.json" in report.problem()
    assert report.record() == {"ok": False, "notes": []}


def test_a_target_transformers_refuses_is_reported(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", config={"hidden_act": "no-such-function"})
    report = verified(dense, target)
    assert not report.ok
    assert "transformers cannot load it" in report.problem()


def test_many_problems_are_cut_to_a_readable_line(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t")
    for path in target.glob("*.json"):
        if path.name.startswith(("tokenizer", "generation", "special")):
            path.unlink()
    for shard in target.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-4])
    report = verified(dense, target)
    assert "more problems of files or tensors" in report.problem()
    assert len(report.problems()) > 3


def test_groups_of_a_granular_conversion_are_reported(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", options={"granularity": 2})
    report = verified(dense, target)
    assert report.equivalence is not None
    assert all(layer.split_groups is not None for layer in report.equivalence.routing)
    assert "tokens that get a part of an FFN" in "\n".join(report.lines())


def test_several_sources_are_compared_with_the_first(dense: Path, tmp_path: Path) -> None:
    other = make("llama", tmp_path / "other", seed=5)
    target = upcycle_by_hand(dense, tmp_path / "t", kind="approximate")
    report = verify_checkpoint([dense, other], target)
    assert report.ok
    assert "compared with the first source only" in report.notes
    assert report.equivalence is not None
    assert report.equivalence.close


def test_the_promise_and_manifest_of_a_run_in_progress_are_used(
    dense: Path, tmp_path: Path
) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", kind="approximate")
    record = manifest.read(target)
    (target / manifest.MANIFEST_FILE).unlink()
    report = verified(dense, target, manifest=record, exactness=Exactness(kind="exact", why="plan"))
    assert report.ok
    assert report.verdict is not None
    assert report.verdict.kind == "exact"
    with pytest.raises(VerificationError, match=r"adaconvert\.json: is missing"):
        verified(dense, target)


def test_a_source_is_needed_and_must_be_readable(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t")
    with pytest.raises(OptionError, match="needs a source"):
        verify_checkpoint([], target)
    broken = Path(shutil.copytree(dense, tmp_path / "broken"))
    (broken / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json"):
        verify_checkpoint([broken], target)


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, adaconvert.verification.report, adaconvert.layerwise.runner; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
