"""The destination: the last checkpoint, its recipe, its card, and what was recorded of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import OutputConflictError
from adaconvert.io import manifest

pytestmark = pytest.mark.usefixtures("uncounted")
FIRST = ["convert", "finetune", "evaluate"]


def test_a_taken_destination_is_refused_before_anything_runs(bench: Any) -> None:
    (bench.folder / "out").mkdir()
    (bench.folder / "out" / "mine").touch()
    with pytest.raises(OutputConflictError, match="exists and is not empty"):
        bench.run()
    assert bench.verbs == []
    with pytest.raises(OutputConflictError, match="adaconvert did not write it"):
        bench.run(overwrite=True)


def test_an_output_of_another_run_is_replaced_only_when_asked(bench: Any) -> None:
    shutil.copytree(bench.folder / "dense", bench.folder / "other")
    bench.run(source=str(bench.folder / "other"), work=bench.folder / "elsewhere")
    bench.verbs  # noqa: B018
    with pytest.raises(OutputConflictError, match="exists and is not empty"):
        bench.run()
    assert bench.verbs == []
    bench.run(overwrite=True)
    assert bench.verbs == FIRST


def test_a_lost_destination_is_put_back(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    shutil.rmtree(bench.folder / "out")
    bench.run()
    assert bench.verbs == []
    assert manifest.read(bench.folder / "out")


def test_an_edited_card_is_not_replaced(bench: Any) -> None:
    bench.run()
    with (bench.folder / "out" / "README.md").open("a") as file:
        file.write("mine\n")
    bench.run()
    with pytest.raises(OutputConflictError, match=r"README\.md that was edited"):
        bench.run(settings=("tune.lr=1e-3",))


def test_a_push_sends_the_destination(bench: Any) -> None:
    result = bench.run(settings=("push.repo=me/mine", "push.private=true"))
    verb, args, given = bench.called[-1]
    assert (verb, args) == ("push", (bench.folder / "out", "me/mine"))
    assert given.pop("report") == bench.heard.append
    assert given == {"private": True, "progress": False}
    assert result.stages[-1].facts == "https://hub/me/mine"


def test_a_recorded_evaluation_is_kept_in_the_destination(bench: Any) -> None:
    settings = ("evaluate.record=true", "push.repo=me/mine")
    bench.run(settings=settings)
    called = {verb: args for verb, args, _ in bench.called}
    assert called["evaluate"] == (str(bench.folder / "out"),)
    bench.verbs  # noqa: B018
    bench.run(settings=settings)
    assert bench.verbs == []
    shutil.rmtree(bench.folder / "out")
    bench.run(settings=settings)
    # what was kept there is gone, so it is measured and sent again
    assert bench.verbs == ["evaluate", "push"]


def test_another_recipe_beside_the_same_result_redoes_no_evaluation(bench: Any) -> None:
    """Who looks first and publishes then does not measure twice."""
    settings = ("evaluate.record=true",)
    _record_at(bench)
    bench.run(settings=settings)
    bench.verbs  # noqa: B018
    bench.run(settings=(*settings, "push.repo=me/mine"))
    assert bench.verbs == ["push"]
    record = manifest.read(bench.folder / "out")
    assert record["quality"] == [{"data": "x"}]
    assert "me/mine" in (bench.folder / "out" / "adaconvert_recipe.yaml").read_text()
    assert "me/mine" in (bench.folder / "out" / "README.md").read_text()
    bench.run(settings=(*settings, "push.repo=me/mine"))
    assert bench.verbs == []


def _record_at(bench: Any) -> None:
    """The evaluation keeps something in the destination, as the real one does."""

    def act(verb: str, given: dict[str, Any]) -> None:
        if verb == "evaluate":
            out = bench.folder / "out"
            new = {**manifest.read(out), "quality": [{"data": "x"}]}
            (out / manifest.MANIFEST_FILE).write_bytes(manifest.dump(new))

    bench.act = act


def test_an_edited_card_stays_beside_another_recipe(bench: Any) -> None:
    bench.run()
    card = bench.folder / "out" / "README.md"
    card.write_text(card.read_text() + "mine\n")
    bench.run(settings=("push.repo=me/mine",))
    assert bench.verbs[-1] == "push"
    assert card.read_text().endswith("mine\n")


def test_what_was_recorded_by_hand_stays(bench: Any) -> None:
    bench.run(settings=("push.repo=me/mine",))
    out = bench.folder / "out"
    record = {**manifest.read(out), "quality": [{"data": "by hand"}]}
    (out / manifest.MANIFEST_FILE).write_bytes(manifest.dump(record))
    bench.verbs  # noqa: B018
    bench.run(settings=("push.repo=me/mine",))
    assert manifest.read(out)["quality"] == [{"data": "by hand"}]
    # which belongs at the hub, too
    assert bench.verbs == ["push"]


def test_an_edited_card_is_seen_before_a_stage_is_done_again(bench: Any) -> None:
    bench.run()
    bench.verbs  # noqa: B018
    card = bench.folder / "out" / "README.md"
    card.write_text(card.read_text() + "mine\n")
    with pytest.raises(OutputConflictError, match=r"README\.md that was edited"):
        bench.run(from_stage="tune")
    assert bench.verbs == []


def test_a_result_with_the_same_weights_and_another_config_is_placed(
    bench: Any, moe_made: Path
) -> None:
    """As a calibration on another text leaves it."""
    bench.run()
    other = bench.folder / "made"
    shutil.copytree(moe_made, other)
    raw = json.dumps({**json.loads((other / "config.json").read_bytes()), "calibrated": 1}).encode()
    (other / "config.json").write_bytes(raw)
    record = manifest.read(other)
    files = {**record["files"], "config.json": hashlib.sha256(raw).hexdigest()}  # type: ignore[dict-item]
    (other / manifest.MANIFEST_FILE).write_bytes(manifest.dump({**record, "files": files}))
    bench.made = other
    bench.run(from_stage="tune")
    assert (bench.folder / "out" / "config.json").read_bytes() == raw
