"""Statistics, use of experts, settings and costs: each against an independent calculation."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert.errors import OptionError
from adaconvert.evaluate.compute import Tally, estimated, relative_to
from adaconvert.evaluate.options import EvaluateOptions
from adaconvert.evaluate.settings import STORED, Setting, check_settings, parse_select, settings_of
from adaconvert.evaluate.statistics import Mean, finite, perplexity
from adaconvert.evaluate.usage import SiteUsage
from adaconvert.io.source import Source
from adaconvert.modeling.loading import load_model
from adaconvert.planning.estimate import costs
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

#: sums of float64 in another order.
ROUNDING = 1e-12


def test_mean_of_equal_documents_is_the_textbook_one() -> None:
    values = [1.0, 2.5, 0.5, 4.0]
    mean = Mean.of(numpy.array(values) * 10, numpy.full(4, 10))
    assert mean.value == pytest.approx(statistics.mean(values), rel=ROUNDING)
    assert mean.error == pytest.approx(statistics.stdev(values) / 2, rel=ROUNDING)


def test_error_of_unequal_documents_agrees_with_the_jackknife() -> None:
    generator = numpy.random.default_rng(0)
    counts = generator.integers(50, 150, 400)
    sums = counts * generator.normal(3.0, 0.3, 400)
    mean = Mean.of(sums, counts)
    without = (sums.sum() - sums) / (counts.sum() - counts)
    jackknife = math.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum())
    # both estimate the same variance, to first order in 1/D
    assert mean.error == pytest.approx(jackknife, rel=0.01)


def test_documents_without_tokens_do_not_count() -> None:
    with_empty = Mean.of(numpy.array([4.0, 0.0, 9.0]), numpy.array([2, 0, 3]))
    assert with_empty == Mean.of(numpy.array([4.0, 9.0]), numpy.array([2, 3]))
    assert with_empty.value == pytest.approx(13 / 5, rel=ROUNDING)


def test_one_document_has_no_error() -> None:
    mean = Mean.of(numpy.array([6.0]), numpy.array([4]))
    assert (mean.value, mean.error, mean.text()) == (1.5, None, "1.5000")
    assert Mean(value=1.5, error=0.25).text(2) == "1.50 +- 0.25"


def test_numbers_that_json_cannot_hold() -> None:
    assert [finite(x) for x in (1.0, math.inf, math.nan, None)] == [1.0, None, None, None]
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf
    assert Mean(value=math.inf, error=None).to_json() == {"mean": None, "standard_error": None}


def test_use_of_experts() -> None:
    usage = SiteUsage.of("a", numpy.array([6, 2, 0, 0]), 8)
    assert (usage.active, usage.least, usage.most, usage.dead) == (1.0, 0.0, 0.75, 2)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert usage.entropy == pytest.approx(expected, rel=ROUNDING)
    assert usage.line() == (
        f"a: 1 of 4 active, used by 0.00 to 75.00 % of tokens, entropy {expected:.3f}, 2 dead"
    )
    assert usage.to_json()["shares"] == [0.75, 0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("counts", "entropy"), [([3, 3, 3], 1.0), ([5, 0], 0.0), ([7], 1.0), ([0, 0], 0.0)]
)
def test_entropy_at_its_ends(counts: list[int], entropy: float) -> None:
    usage = SiteUsage.of("a", numpy.array(counts), 7)
    assert usage.entropy == pytest.approx(entropy, abs=ROUNDING)
    assert math.copysign(1, usage.entropy) == 1


def test_settings() -> None:
    assert settings_of((), ()) == (STORED,)
    assert [s.label for s in settings_of((1.0, 0.5), ("rule=top-k,k=8",))] == [
        "compute 1",
        "compute 0.5",
        "top-k,k=8",
    ]
    assert settings_of(0.5, "rule=all")[1].select == {"rule": "all"}
    with pytest.raises(OptionError, match=r"setting 'compute 0\.5': is given twice"):
        settings_of((0.5, 0.50), ())


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("rule=top-k,k=8", {"rule": "top-k", "k": 8}),
        (" tau = 0.1 , rule = dynamic-k ", {"rule": "dynamic-k", "tau": 0.1}),
        ("rule=threshold,threshold=-1e-3", {"rule": "threshold", "threshold": -0.001}),
        ("rule=top-p,p=1", {"rule": "top-p", "p": 1.0}),
        ("rule=all", {"rule": "all"}),
    ],
)
def test_select_texts(text: str, found: dict[str, object]) -> None:
    assert parse_select(text) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"--select '': is malformed; expected rule=NAME,VALUE=NUMBER"),
        ("top-k", r"--select 'top-k': is malformed"),
        ("rule=best", r"has no known rule; expected rule=all\|top-k\|dynamic-k"),
        ("k=8", "has no known rule"),
        ("rule=top-k", r"does not fit its rule; expected rule=top-k,k=NUMBER"),
        ("rule=top-k,tau=1", "does not fit its rule"),
        ("rule=top-k,k=1,k=2", "does not fit its rule"),
        ("rule=all,k=1", r"does not fit its rule; expected rule=all alone"),
        ("rule=top-k,k=1.5", r"is malformed; expected a whole number, found '1\.5'"),
        ("rule=top-p,p=x\x1b", r"is malformed; expected a number, found 'x\\x1b'"),
    ],
)
def test_bad_select_texts(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_select(text)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama", tmp_path_factory.mktemp("parts") / "dense")


@pytest.fixture(scope="module")
def adaptive(dense: Path) -> Any:
    return load_model(make_adaptive(dense, dense.parent / "adaptive"))


def test_settings_hold_inside_their_block_only(adaptive: Any) -> None:
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        before = adaptive(input_ids=ids).logits
        with Setting(label="one", select={"rule": "top-k", "k": 1}).applied(adaptive):
            inside = adaptive(input_ids=ids).logits
        assert torch.equal(adaptive(input_ids=ids).logits, before)
    assert not torch.equal(inside, before)


def test_settings_a_model_cannot_take(adaptive: Any, dense: Path) -> None:
    check_settings(settings_of((1.0, 0.7), ("rule=top-k,k=8",)), adaptive)
    with pytest.raises(
        OptionError, match=r"--set-compute: compute 0\.01 is out of reach: .* run 0"
    ):
        check_settings(settings_of((0.01,), ()), adaptive)
    with pytest.raises(OptionError, match=r"--select: .* is 9, expected 1 to 8"):
        check_settings(settings_of((), ("rule=top-k,k=9",)), adaptive)
    with pytest.raises(OptionError, match="has no compute knob; expected an adaptive checkpoint"):
        check_settings(settings_of((0.5,), ()), load_model(dense))
    check_settings((STORED,), load_model(dense))


def test_tally_of_several_passes_is_the_account_of_all(adaptive: Any) -> None:
    ids = torch.arange(3, 43).reshape(2, 20)
    setting = Setting(label="some", select={"rule": "dynamic-k", "tau": 0.8})
    tally = Tally()
    with torch.no_grad(), setting.applied(adaptive):
        with adaptive.account() as account:
            adaptive(input_ids=ids[:1])
            adaptive(input_ids=ids[1:, :7])
        for given in (ids[:1], ids[1:, :7]):
            with tally.counting(adaptive):
                adaptive(input_ids=given)
    found = tally.compute()
    assert found is not None
    assert tally.tokens == account.tokens == 27
    flops, size = account.flops_per_token(), account.weight_bytes_per_token()
    close = {"rel": ROUNDING}
    assert found.flops == pytest.approx(flops["total"], **close)
    assert found.ffn_flops == pytest.approx(flops["ffn"], **close)
    assert found.router_flops == pytest.approx(flops["router"], **close)
    assert found.weight_bytes == pytest.approx(size["total"], **close)
    assert found.fraction == pytest.approx(account.compute(), **close)
    masked = sum(s.executed_flops - s.routed_flops for s in account.sites.values())
    assert found.executed_flops == pytest.approx(flops["total"] + masked / 27, **close)
    for usage, (path, site) in zip(tally.usage(), account.sites.items(), strict=True):
        assert (usage.path, usage.tokens) == (path, site.tokens)
        assert [round(share * 27) for share in usage.shares] == site.experts.tolist()


def test_stock_models_do_not_count(dense: Path) -> None:
    tally = Tally()
    with tally.counting(load_model(dense)):
        pass
    assert tally.compute() is None
    assert tally.usage() == ()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_costs_of_stock_models_are_those_of_their_shapes(family: str, tmp_path: Path) -> None:
    from adaconvert.arch.registry import describe

    source = Source.open(tiny_models.make(family, tmp_path / "model", dtype="bfloat16"))
    spec = describe(source.config, source.tensors)
    for dtype, code in ((None, "BF16"), ("torch.float32", "F32")):
        expected = costs(spec, dict.fromkeys(source.tensors, code), 9)
        # the mean context of a text of 17 tokens is 9
        found = estimated(source, {17: 1}, dtype)
        assert found is not None
        assert (found.flops, found.ffn_flops) == (expected.flops, expected.ffn_flops)
        assert found.weight_bytes == expected.weight_bytes
        assert not found.counted
        doubled = estimated(source, {17: 1})
        assert relative_to(found, doubled).fraction == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"there is nothing to measure on\. Give --data or --tasks\."),
        ({"tasks": ("a",), "reference": "x"}, "--reference: compares text, and there is none"),
        ({"data": "x", "max_tokens": 1}, r"--max-tokens: is out of range; expected 2 or more"),
        ({"data": "x", "length": 0}, r"--length: is out of range; expected 2 or more, found 0"),
        ({"data": "x", "batch_size": 0}, r"--batch-size: is out of range; expected 1 or more"),
        ({"data": "x", "max_documents": -1}, r"--max-documents: is out of range"),
        ({"data": "x", "task_limit": 0}, r"--task-limit: is out of range"),
        ({"data": "x", "seed": -1}, r"--seed: is out of range; expected 0 or more, found -1"),
    ],
)
def test_options_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EvaluateOptions(**values).check()


def test_devices() -> None:
    assert EvaluateOptions(device="cpu").chosen_device() == "cpu"
    for name in ("nonsense", "cuda:99", "cpu\x1b:0"):
        with pytest.raises(OptionError, match="--device: cannot be used; found '"):
            EvaluateOptions(device=name).chosen_device()
