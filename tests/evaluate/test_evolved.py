"""`--search evolve`: divisions of a budget among layers, on problems with a known answer and on
models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_data import Reading, read_data
from adaconvert.evaluate.calibration_search import Search
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.depth_search import DepthSearch
from adaconvert.evaluate.evolved import Allotment, Cost
from adaconvert.evaluate.exit_search import check_exit_settings
from adaconvert.evaluate.expert_search import ExpertSearch
from adaconvert.modeling.adaptive_knobs import DEPTH
from adaconvert.modeling.loading import load_model
from adaconvert.planning.evolution import Levels, Vector
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.calibrating import OPTIONS, table, teach
from adaconvert.testing.depth_by_hand import depth_by_hand
from adaconvert.testing.null_by_hand import make_nulled

#: how much each of six sites loses for what it leaves out.
WEIGHTS = (0.1, 5.0, 0.1, 1.0, 3.0, 0.1)
LEVELS = Levels(low=(1,) * 6, high=(10,) * 6)
QUICK: dict[str, Any] = {
    "per_layer": True,
    "search": "evolve",
    "generations": 6,
    "offspring": 6,
    **OPTIONS,
}


def loss_of(vector: Vector) -> float:
    """Return a loss that grows with the square of what a site leaves out."""
    return sum(w * (1 - n / 10) ** 2 for w, n in zip(WEIGHTS, vector, strict=True))


def best_of(total: int) -> float:
    """Return the least loss of any levels of a total, by giving each level where it helps most:
    the loss is convex, so that nothing is better."""
    vector = LEVELS.low
    while sum(vector) < total:
        raised = [(*vector[:n], vector[n] + 1, *vector[n + 1 :]) for n in range(6)]
        vector = min((v for v in raised if max(v) <= 10), key=loss_of)
    return loss_of(vector)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_division_is_found(seed: int) -> None:
    seen: list[Vector] = []

    def measure(vector: Vector, amount: int) -> Cost:
        seen.append(vector)
        return Cost(loss=loss_of(vector), compute=0.4 + 0.01 * sum(vector))

    search = Allotment(levels=LEVELS, measure=measure, amount=64, budget=0.7)
    every = search.find(generations=60, offspring=12, seed=seed)
    found = every[0]
    assert sum(found) == 30
    assert search.starts() == [(5,) * 6]
    assert loss_of(found) == pytest.approx(best_of(30), rel=1e-12)
    assert loss_of(found) < loss_of((5,) * 6)
    again = Allotment(levels=LEVELS, measure=measure, amount=64, budget=0.7)
    assert again.find(generations=60, offspring=12, seed=seed) == every
    # a few levels less, for other text
    assert [sum(vector) for vector in every] == [30, 29, 28]
    assert all(loss_of(vector) == pytest.approx(best_of(sum(vector))) for vector in every)


def test_what_costs_more_than_the_budget_is_never_kept() -> None:
    # each level of the site that matters most costs three times what the others' do
    def cost_of(vector: Vector) -> float:
        return (sum(vector) + 2 * vector[1]) / 80

    def measure(vector: Vector, amount: int) -> Cost:
        # little data cost a little more than all of them
        return Cost(loss=loss_of(vector), compute=cost_of(vector) * (1 + 0.1 / amount))

    search = Allotment(levels=LEVELS, measure=measure, amount=32, budget=0.5)
    (even,) = search.starts()
    found = search.find(generations=40, offspring=12, seed=0)[0]
    assert cost_of(found) * (1 + 0.1 / 32) <= 0.5
    assert sum(found) >= sum(even)
    assert loss_of(found) < loss_of(even)


def test_budgets_out_of_reach_and_above_everything() -> None:
    nothing = Allotment(levels=LEVELS, measure=lambda *_: None, amount=4, budget=0.99)
    assert nothing.find(generations=2, offspring=2, seed=0) == []

    def costly(vector: Vector, amount: int) -> Cost:
        return Cost(loss=loss_of(vector), compute=0.4 + 0.01 * sum(vector))

    for budget, expected in ((0.45, []), (1.5, [LEVELS.high]), (0.46, [LEVELS.low] * 3)):
        search = Allotment(levels=LEVELS, measure=costly, amount=4, budget=budget)
        assert search.find(generations=2, offspring=2, seed=0)[: len(expected)] == expected


def test_other_starts_are_taken_where_they_are_better() -> None:
    def measure(vector: Vector, amount: int) -> Cost:
        return Cost(loss=loss_of(vector), compute=0.4 + 0.01 * sum(vector))

    good = (1, 10, 1, 7, 10, 1)
    search = Allotment(
        levels=LEVELS,
        measure=measure,
        amount=16,
        budget=0.7,
        ways=[lambda even: LEVELS.nearest(good, even), lambda even: None],
    )
    assert search.starts() == [(5,) * 6, good]
    found = search.find(generations=1, offspring=1, seed=0)[0]
    assert sum(found) == 30
    assert loss_of(found) <= loss_of(good) < loss_of((5,) * 6)


# -- models


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of four blocks that knows the language."""
    folder = tmp_path_factory.mktemp("dense")
    made = tiny_models.make("llama", folder / "dense", layers=4, max_shard_size="1GB")
    teach(made, 600)
    return made


@pytest.fixture(scope="module")
def skipping(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return it with routers beside three blocks."""
    made = depth_by_hand(dense, tmp_path_factory.mktemp("skipping") / "skip", (1, 2, 3))
    config = json.loads((made / "config.json").read_text())
    model = load_model(made)
    ids = torch.arange(5, 5 + config["adaptive"]["reference"]["length"])[None]
    with model.set_depth("all"), model.account() as account, torch.no_grad():
        model(input_ids=ids)
    config["adaptive"]["reference"]["flops_per_token"] = round(account.flops_per_token()["total"])
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def routed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return it with experts that predicted contributions choose, which dynamic-k is for."""
    folder = tmp_path_factory.mktemp("routed") / "routed"
    return make_adaptive(dense, folder, router="contribution", experts=16)


def found_by(kind: type[Any], folder: Path, text: Path, **options: Any) -> tuple[Search, Any]:
    """Return a finished search and what it found."""
    settings = CalibrationSettings.of([str(text)], {**QUICK, **options})
    settings.check()
    data = read_data(settings.reading, folder, settings.shares)
    search = kind(load_model(folder), data, settings, None)
    return search, search.run()


def evolved_of(search: Search) -> list[int]:
    """Return which settings an evolution found, the first as it was found."""
    return [n for n, setting in enumerate(search.tried) if "by evolution" in setting.name]


@pytest.mark.parametrize(
    ("kind", "source", "options"),
    [
        (DepthSearch, "skipping", {"budget": 0.75}),
        (ExpertSearch, "routed", {"budget": 0.7}),
        (ExpertSearch, "routed", {"budget": 0.7, "rules": ("top-k",)}),
        (ExpertSearch, "routed", {"budget": 0.7, "rules": ("threshold",)}),
    ],
)
def test_a_budget_is_kept_and_nothing_alike_is_better(
    kind: type[Any],
    source: str,
    options: dict[str, Any],
    text: Path,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(source)
    search, found = found_by(kind, folder, text, **options)
    computes, risks = search._computes(), search._ordering_risks()
    budget, evolved = options["budget"], evolved_of(search)
    # one of the three may have been tried before
    assert len(evolved) >= 2
    assert all(computes[at] <= budget for at in evolved)
    # the even start, and others, are what the evolution never falls behind
    evolving = search._evolving()  # type: ignore[attr-defined]

    def measure(vector: Vector, amount: int) -> Cost:
        setting = evolving.setting(vector)
        one = search._measurer.measure(setting, search.data.ordering.blocks[:amount])
        return Cost(loss=search._rise(one, amount), compute=one.compute)

    blocks = len(search.data.ordering.blocks)
    plain = Allotment(
        levels=evolving.levels, measure=measure, amount=blocks, budget=budget, ways=evolving.ways
    )
    starts = [measure(vector, blocks) for vector in plain.starts()]
    assert len(starts) == 1 + len(evolving.ways)
    assert all(one.compute <= budget for one in starts)
    best = min(risk for risk, cost in zip(risks, computes, strict=True) if cost <= budget)
    assert best <= min(one.loss for one in starts) + 1e-12
    # and what is chosen is within the budget on the other text as well
    assert found.chosen is not None
    assert found.rows[found.chosen].compute <= budget


def test_one_seed_gives_one_table(routed: Path, text: Path) -> None:
    options = {"budget": 0.7, "max_tokens": 1500, "generations": 3}
    tables = [
        [setting.select for setting in found_by(ExpertSearch, routed, text, **options)[0].tried]
        for _ in range(2)
    ]
    assert tables[0] == tables[1]


def test_the_command_stores_what_was_found(skipping: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = api.calibrate(
        skipping,
        text,
        destination=out,
        budget=0.75,
        max_tokens=1500,
        **{name: value for name, value in QUICK.items() if name != "max_tokens"},
    )
    assert said.chosen is not None
    chosen = said.rows[said.chosen]
    assert chosen.compute <= 0.75
    made = load_model(out)
    blocks = token_blocks(read_documents(str(text), max_documents=4), out, length=32, seed=0)
    ids = torch.from_numpy(blocks.ids)
    with torch.no_grad():
        default = made(input_ids=ids).logits
        with made.set_compute(chosen.compute):
            assert torch.equal(made(input_ids=ids).logits, default)
    rule = table(out)["calibration"]["rows"][said.chosen]["depth"]
    assert set(rule["threshold"]) == set(chosen.select[DEPTH]["threshold"])


def test_null_biases_are_levels_too(text: Path, tmp_path: Path) -> None:
    stock = tiny_models.make("mixtral", tmp_path / "stock")
    nulled = make_nulled(stock, tmp_path / "nulled")
    for rules in ((), ("top-k",)):
        search, found = found_by(ExpertSearch, nulled, text, budget=0.9, rules=rules)
        assert found.chosen is not None
        evolved = evolved_of(search)
        # of one or two experts in each of two blocks everything was tried before
        assert bool(evolved) != bool(rules)
        assert all(search._computes()[at] <= 0.9 for at in evolved)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "best"}, "--search: unknown search; expected greedy or evolve"),
        ({"per_layer": False}, "give that as well"),
        ({"budget": None}, "needs --budget"),
        ({"budget": None, "max_loss_increase": 0.1}, "needs --budget"),
        ({"rules": ("top-k",), "values": (2,)}, "--values are one for all layers"),
        ({"search": "greedy"}, "--generations: is about --search evolve; found 6"),
        ({"search": "greedy", "generations": 40}, "--offspring: is about --search evolve"),
        ({"generations": 0}, "--generations: is out of range"),
        ({"offspring": 0}, "--offspring: is out of range"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    settings = CalibrationSettings.of(["a"], {"budget": 0.5, **QUICK, **options})
    with pytest.raises(OptionError, match=message):
        settings.check()


def test_exits_are_not_evolved() -> None:
    settings = CalibrationSettings(reading=Reading(data=()), search="evolve", per_layer=True)
    with pytest.raises(OptionError, match=r"--search: .* expected greedy, found evolve"):
        check_exit_settings(settings)
