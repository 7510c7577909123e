"""Group I of the fault catalogue: whatever happens to an output on disk is noticed and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert.errors import OptionError, VerificationError
from adaconvert.io import manifest
from adaconvert.io.header import read_header
from adaconvert.io.source import Source
from adaconvert.planning.ops import Bytes, Drop, Exactness, Piece, Plan, TargetTensor
from adaconvert.testing.by_hand import upcycle_by_hand, write_manifest
from adaconvert.testing.tiny_models import make
from adaconvert.verification.integrity import Integrity, check

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FIRST = SHARDS[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("made")
    source = make("llama", root / "dense")
    return source, upcycle_by_hand(source, root / "moe")


@pytest.fixture
def target(made: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "moe"))


def checked(folder: Path) -> Integrity:
    return check(folder, manifest.read(folder))


def text(found: Integrity) -> str:
    return "\n".join(problem.line() for problem in found.problems)


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_good_checkpoint_has_no_problem(made: tuple[Path, Path]) -> None:
    found = check(made[1], manifest.read(made[1]), sources=[Source.open(made[0])])
    assert found.ok, text(found)
    assert found.loadable
    stored = Source.open(made[1])
    assert (found.shards, found.tensors) == (2, len(stored.tensors))
    assert found.nbytes == sum((made[1] / file).stat().st_size for file in SHARDS)
    assert found.notes == ()


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_one_flipped_bit_in_each_file_in_turn_is_named(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    """I1, for every file of the output, at its start, middle and end."""
    for number, path in enumerate(sorted(made[1].iterdir())):
        for place in ("start", "middle", "end"):
            copy = Path(shutil.copytree(made[1], tmp_path / f"{number}-{place}"))
            size = path.stat().st_size
            flip(copy / path.name, {"start": 0, "middle": size // 2, "end": size - 1}[place])
            if path.name == manifest.MANIFEST_FILE:
                with pytest.raises(VerificationError, match=r"adaconvert\.json"):
                    manifest.read(copy)
                continue
            found = checked(copy)
            assert not found.ok, (path.name, place)
            assert path.name in text(found), (path.name, place)


def test_every_tensor_that_changed_is_named(target: Path) -> None:
    refs = read_header(target / FIRST, FIRST)[0]
    for name, ref in sorted(refs.items()):
        data = (target / FIRST).read_bytes()
        flip(target / FIRST, ref.start + ref.nbytes // 2, bit=3)
        found = checked(target)
        assert f"{FIRST}: tensor '{name}' differs from its hash in adaconvert.json" in text(found)
        assert len(found.problems) == 1
        (target / FIRST).write_bytes(data)


def test_swapped_experts_are_named(target: Path) -> None:
    """I2: identical experts would load and compute the same, their hashes still change place."""

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        a, b = (f"model.layers.0.block_sparse_moe.experts.{e}.w1.weight" for e in (0, 1))
        tensors[b] = tensors[b] + 1
        tensors[a], tensors[b] = tensors[b], tensors[a]

    rewrite(target / FIRST, swap)
    found = checked(target)
    assert "experts.0.w1.weight' differs" in text(found)


def test_permuted_router_rows_are_named(target: Path) -> None:
    name = "model.layers.0.block_sparse_moe.gate.weight"
    rewrite(target / FIRST, lambda t: t.update({name: t[name].flip(0).contiguous()}))
    found = checked(target)
    assert [problem.tensor for problem in found.problems] == [name]


NAME = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
I3: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], list[str]]] = {
    "renamed": (
        lambda t: t.update({NAME + "x": t.pop(NAME)}),
        [f"'{NAME}' is missing", f"'{NAME}x' is not listed", "implied, but no file holds it"],
    ),
    "missing": (
        lambda t: t.__delitem__(NAME),
        [f"'{NAME}' is missing", f"config.json: tensor '{NAME}' is implied, but no file holds it"],
    ),
    "extra": (
        lambda t: t.update({"model.extra": torch.zeros(2)}),
        ["'model.extra' is not listed", "'model.extra' is no part of what config.json implies"],
    ),
    "dtype": (
        lambda t: t.update({NAME: t[NAME].half()}),
        [f"{FIRST}: tensor '{NAME}' differs from its hash"],
    ),
    "integers": (
        lambda t: t.update({NAME: t[NAME].to(torch.int8)}),
        [f"tensor '{NAME}' has dtype I8, expected one of F64, F32, F16, BF16"],
    ),
    "shape": (
        lambda t: t.update({NAME: t[NAME].reshape(64, 32).contiguous()}),
        [f"tensor '{NAME}' has shape [64, 32], config.json implies [32, 64]"],
    ),
}


@pytest.mark.parametrize("fault", I3)
@pytest.mark.parametrize("indexed", [True, False], ids=["index-follows", "index-stays"])
def test_a_tensor_that_is_not_as_written_is_named(fault: str, indexed: bool, target: Path) -> None:
    """I3, with the index repaired to match and with the one that was written."""
    edit, expected = I3[fault]
    rewrite(target / FIRST, edit)
    if indexed:
        follow(target)
    found = checked(target)
    assert not found.ok
    assert FIRST in text(found)
    if indexed:
        for part in expected:
            assert part in text(found)


def follow(target: Path) -> None:
    """Write the index that belongs to the shards as they are."""
    path = target / "model.safetensors.index.json"
    names = {n: file for file in SHARDS for n in read_header(target / file, file)[0]}
    path.write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_a_reshape_that_keeps_all_bytes_is_noticed_in_the_header(target: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    for file in SHARDS:
        if name in read_header(target / file, file)[0]:
            rewrite(target / file, lambda t: t.update({name: t[name].reshape(32, 16)}))
            found = checked(target)
            assert f"{file}: has another header than was written" in text(found)
            assert f"tensor '{name}' has shape [32, 16], config.json implies [16, 32]" in text(
                found
            )
            return
    pytest.fail("the tensor is in no shard")


def test_missing_and_unlisted_files_are_named(target: Path) -> None:
    (target / SHARDS[1]).unlink()
    (target / "tokenizer.json").unlink()
    shutil.copyfile(target / FIRST, target / "left-over.safetensors")
    found = checked(target)
    assert f"{SHARDS[1]}: is missing" in text(found)
    assert "tokenizer.json: is missing" in text(found)
    assert "left-over.safetensors: is not listed in adaconvert.json" in text(found)
    assert not found.loadable


def test_a_shard_the_index_leaves_out_is_named(target: Path) -> None:
    index = target / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"] = {n: f for n, f in values["weight_map"].items() if f == FIRST}
    index.write_text(json.dumps(values))
    found = checked(target)
    assert f"{SHARDS[1]}: is no part of the checkpoint" in text(found)


def test_a_side_file_that_changed_is_named(target: Path) -> None:
    (target / "generation_config.json").write_text("{}")
    assert text(checked(target)) == (
        "generation_config.json: differs from its hash in adaconvert.json"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_counted(
    value: float, made: tuple[Path, Path], target: Path
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    file = Source.open(target).tensors[name].file

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][0, 5] = value
        tensors[name][2, 0] = value

    rewrite(target / file, edit)
    write_manifest(target, made[0], options={})
    found = checked(target)
    assert text(found) == (
        f"{file}: tensor '{name}' holds 2 non-finite values, first at flat index 5"
    )
    values = manifest.read(target)
    values["notes"] = [f"non-finite values accepted in {name}"]
    assert check(target, values).ok


def test_code_in_the_config_is_a_problem_and_keeps_the_target_from_being_loaded(
    made: tuple[Path, Path], target: Path
) -> None:
    path = target / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "x.Y"}}))
    write_manifest(target, made[0], options={})
    found = checked(target)
    assert text(found) == "config.json: holds 'auto_map', which could load code"
    assert not found.loadable


def test_paths_out_of_the_folder_are_refused(target: Path) -> None:
    values = manifest.read(target)
    files = values["files"]
    assert isinstance(files, dict)
    values["files"] = files | {"../secret": "0" * 64}
    found = check(target, values)
    assert "adaconvert.json" in text(found)
    assert "../secret" in text(found)


def test_hostile_names_are_escaped(target: Path) -> None:
    values = manifest.read(target)
    files = values["files"]
    assert isinstance(files, dict)
    values["files"] = files | {"a\x1b[31mb": "0" * 64}
    assert "\x1b" not in text(check(target, values))


def test_another_source_is_a_note(made: tuple[Path, Path], tmp_path: Path) -> None:
    other = Source.open(make("llama", tmp_path / "other", layers=3))
    found = check(made[1], manifest.read(made[1]), sources=[other])
    assert found.ok
    assert found.notes == ("other is not, file for file, the source it was made from (dense)",)


def test_a_missing_manifest_is_refused(target: Path) -> None:
    """I6."""
    (target / manifest.MANIFEST_FILE).unlink()
    with pytest.raises(VerificationError, match=r"adaconvert\.json: is missing"):
        manifest.read(target)


def test_an_edited_manifest_is_refused(target: Path) -> None:
    path = target / manifest.MANIFEST_FILE
    path.write_text(path.read_text().replace("by hand", "by hans"))
    with pytest.raises(VerificationError, match="was edited after it was written"):
        manifest.read(target)


def test_a_newer_manifest_is_a_usage_error(target: Path) -> None:
    values = manifest.read(target)
    values["format"] = manifest.FORMAT + 1
    path = target / manifest.MANIFEST_FILE
    path.write_bytes(manifest.dump(manifest.seal(values)))
    with pytest.raises(OptionError, match="was written by a newer adaconvert"):
        manifest.read(target)


# ---- with the plan


def plan_of(source: Source, target: Source) -> Plan:
    """Return the plan that would have made `target`: whole copies, and constants for routers."""
    targets = []
    for ref in target.tensors.values():
        name = ref.name
        if "block_sparse_moe" in name:
            dense = name.split(".block_sparse_moe")[0] + ".mlp.gate_proj.weight"
            part = {"w2": "down_proj", "w3": "up_proj"}.get(name.split(".")[-2], "gate_proj")
            name = dense.replace("gate_proj", part)
        nbytes = source.tensors[name].nbytes
        piece = Piece(source=0, tensor=name, start=0, nbytes=min(nbytes, ref.nbytes))
        expr = Bytes(dtype=ref.dtype, shape=ref.shape, pieces=(piece,))
        targets.append(
            TargetTensor(name=ref.name, dtype=ref.dtype, shape=ref.shape, expr=expr, group="")
        )
    return Plan(
        method="upcycle",
        options={},
        sources=(source.fingerprint,),
        targets=tuple(targets),
        drops=(),
        config={},
        exactness=Exactness(kind="exact", why=""),
    )


def test_a_plan_accounts_for_every_tensor(made: tuple[Path, Path]) -> None:
    source, stored = Source.open(made[0]), Source.open(made[1])
    plan = plan_of(source, stored)
    values = manifest.read(made[1])
    assert check(made[1], values, sources=[source], plan=plan).ok
    shorter = replace(plan, targets=plan.targets[1:])
    name = plan.targets[0].name
    assert f"tensor '{name}' is not in the plan" in text(check(made[1], values, plan=shorter))
    dropped = replace(plan, drops=(Drop(source=0, tensor="lm_head.weight", reason="test"),))
    found = check(made[1], values, sources=[source], plan=dropped)
    assert "lm_head.weight: both used and dropped" in text(found)
    wider = replace(plan.targets[0], dtype="F16")
    changed = replace(plan, targets=(wider, *plan.targets[1:]))
    assert "planned F16" in text(check(made[1], values, plan=changed))
    more = replace(plan, targets=(*plan.targets, replace(plan.targets[0], name="one.more")))
    assert "'one.more' was to be written, no file holds it" in text(
        check(made[1], values, plan=more)
    )


def test_digests_are_those_of_the_manifest(made: tuple[Path, Path]) -> None:
    # the hashes of single tensors are plain sha256 sums, so anybody can check them
    values = manifest.read(made[1])
    records = manifest.records(values)
    ref = Source.open(made[1]).tensors["model.norm.weight"]
    raw = (made[1] / ref.file).read_bytes()[ref.start : ref.start + ref.nbytes]
    assert records[ref.file].tensors["model.norm.weight"] == hashlib.sha256(raw).hexdigest()
