"""Existing LoRA adapters as experts: what is read, stacked and scaled, against PEFT itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert import api
from adaconvert.arch.adapters import linears
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.fingerprint import of_source
from adaconvert.methods.molora.base_at_hand import fingerprint_of
from adaconvert.methods.molora.compose import A, B, compose, key_of
from adaconvert.methods.molora.lora_folder import LoraFolder, names_of, read_lora
from adaconvert.methods.sources import Described, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing.loras import change_config, make_lora

Dense = Callable[..., Path]


@pytest.fixture(scope="module")
def llama(dense: Dense) -> Path:
    return dense("llama")


@pytest.fixture(scope="module")
def item(llama: Path) -> Described:
    return open_source(str(llama))


def deltas(dense: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Return what PEFT adds to each weight, as a linear has it, [m, n]."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(dense), str(folder))
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").T
        if module.fan_in_fan_out
        else module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def check_deltas(dense: Path, folder: Path, other: Path, **options: Any) -> None:
    """Hold the first of two composed adapters to PEFT's own products."""
    item = open_source(str(dense))
    composed = compose([read_lora(folder), read_lora(other)], item)
    expected = deltas(dense, folder)
    assert set(expected) <= set(composed.paths)
    for path in composed.paths:
        a, b = (part[0].astype(numpy.float64) for part in composed.stack(path))
        found = composed.scaling[0] * (b @ a)
        if path not in expected:
            assert not found.any()
            continue
        wanted = expected[path].double().numpy()
        eps = float(numpy.finfo(numpy.float32).eps)
        limit = 8 * eps * numpy.linalg.norm(b) * numpy.linalg.norm(a) * abs(composed.scaling[0])
        assert numpy.linalg.norm(found - wanted) <= limit


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank": {"r": 3, "lora_alpha": 5},
    "rslora": {"use_rslora": True, "r": 3},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.1\.self_attn\.(q|o)_proj"},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {"v_proj": 3, "q_proj": 20},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_expert_adds_what_peft_adds(name: str, llama: Path, tmp_path: Path) -> None:
    other = make_lora(llama, tmp_path / "other", seed=1, target_modules=["k_proj"], r=5)
    folder = make_lora(llama, tmp_path / "first", **OPTIONS[name])
    check_deltas(llama, folder, other)


@pytest.mark.parametrize(
    ("family", "targets"),
    [("gpt2", ["c_attn", "c_fc"]), ("gpt_neox", ["query_key_value"]), ("phi3", ["qkv_proj"])],
)
def test_transposed_and_fused_linears(
    family: str, targets: list[str], dense: Dense, tmp_path: Path
) -> None:
    source = dense(family)
    fused = {"fan_in_fan_out": family == "gpt2", "target_modules": targets}
    folders = [make_lora(source, tmp_path / str(f"x{n}"), seed=n, **fused) for n in range(2)]
    check_deltas(source, *folders)


def test_ranks_are_padded_and_linears_joined(llama: Path, item: Described, tmp_path: Path) -> None:
    wide = read_lora(make_lora(llama, tmp_path / "wide", r=6, lora_alpha=12))
    thin = make_lora(llama, tmp_path / "thin", seed=1, r=2, target_modules=["v_proj", "o_proj"])
    composed = compose([wide, read_lora(thin)], item)
    assert composed.rank == 6
    assert composed.scaling == (2.0, 4.0)
    order = [path for path in linears(item.spec) if path.endswith(("q_proj", "v_proj", "o_proj"))]
    assert list(composed.paths) == order
    a, b = composed.stack("model.layers.0.self_attn.v_proj")
    assert a.shape == (2, 6, 32)
    assert b.shape == (2, 16, 6)
    assert not a[1, 2:].any()
    assert not b[1, :, 2:].any()
    a, b = composed.stack("model.layers.0.self_attn.o_proj")
    assert not a[0].any()
    assert not b[0].any()
    assert b[1].any()
    notes = " ".join(composed.notes)
    assert "ranks 2, 6 are padded with zeros to 6" in notes
    assert "adapter wide has nothing at 2 of 6 linears, such as model.layers.0" in notes
    assert "adapter thin has nothing at 2 of 6 linears" in notes


def test_arrays_are_read_by_key(llama: Path, item: Described, tmp_path: Path) -> None:
    lora = read_lora(make_lora(llama, tmp_path / "one"))
    composed = compose([lora], item)
    found = composed.arrays()
    assert len(found) == 2 * len(composed.paths) == len(list(found))
    path = composed.paths[1]
    a, b = composed.stack(path)
    assert numpy.array_equal(found[key_of(path, A)], a)
    assert numpy.array_equal(found[key_of(path, B)], b)
    expected = lora.read(path)
    assert numpy.array_equal(a[0], expected[0])
    assert numpy.array_equal(b[0], expected[1])


def test_scalings_of_most_linears_is_kept_and_the_rest_is_in_b(
    llama: Path, item: Described, tmp_path: Path
) -> None:
    folder = make_lora(
        llama,
        tmp_path / "one",
        target_modules=["q_proj", "k_proj", "v_proj"],
        alpha_pattern={"k_proj": 16},
    )
    composed = compose([read_lora(folder)], item)
    assert composed.scaling == (2.0,)
    assert composed.dtype == "F32"
    path = "model.layers.1.self_attn.k_proj"
    # 16 / 4 is twice 8 / 4, so nothing is rounded
    assert numpy.array_equal(composed.stack(path)[1][0], 2 * read_lora(folder).read(path)[1])
    assert "adapter one is scaled differently" in " ".join(composed.notes)


def test_dtype_is_the_adapters_own(llama: Path, item: Described, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_lora(llama, tmp_path / "one")
    weights = folder / "adapter_model.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(half, weights)
    composed = compose([read_lora(folder)], item)
    assert composed.dtype == "BF16"
    path = composed.paths[0]
    stored = half[f"base_model.model.{path}.lora_A.weight"].float().numpy()
    assert numpy.array_equal(composed.stack(path)[0][0], stored)
    full = make_lora(llama, tmp_path / "two", seed=1)
    assert compose([read_lora(folder), read_lora(full)], item).dtype == "F32"


def test_the_mean_is_taken_off(llama: Path, item: Described, tmp_path: Path) -> None:
    loras = [read_lora(make_lora(llama, tmp_path / f"x{n}", seed=n)) for n in range(3)]
    composed = compose(loras, item, subtract_mean=True)
    for path in composed.paths:
        for index, part in enumerate(composed.stack(path)):
            own = numpy.stack([lora.read(path)[index] for lora in loras])
            assert numpy.array_equal(part, own - own.mean(axis=0))
    plain = compose(loras, item)
    assert composed.digest() != plain.digest()


def test_the_mean_needs_one_rank_and_the_same_linears(
    llama: Path, item: Described, tmp_path: Path
) -> None:
    first = read_lora(make_lora(llama, tmp_path / "first"))
    rank = read_lora(make_lora(llama, tmp_path / "rank", r=2))
    where = read_lora(make_lora(llama, tmp_path / "where", target_modules=["q_proj"]))
    with pytest.raises(OptionError, match=r"--subtract-mean.*adapters of several ranks 2, 4"):
        compose([first, rank], item, subtract_mean=True)
    with pytest.raises(OptionError, match="adapters of several linears"):
        compose([first, where], item, subtract_mean=True)
    with pytest.raises(OptionError, match="a single adapter less its mean is nothing"):
        compose([first], item, subtract_mean=True)


def test_digest_is_of_what_is_computed(llama: Path, item: Described, tmp_path: Path) -> None:
    folder = make_lora(llama, tmp_path / "one")
    lora = read_lora(folder)
    moved = read_lora(Path(shutil.copytree(folder, tmp_path / "elsewhere")))
    assert moved.digest() == lora.digest()
    other = read_lora(make_lora(llama, tmp_path / "two", seed=1))
    stronger = read_lora(change_config(folder, lambda config: config.update(lora_alpha=9)))
    assert len({lora.digest(), other.digest(), stronger.digest()}) == 3
    assert compose([lora, other], item).digest() != compose([other, lora], item).digest()


def test_names_tell_folders_apart() -> None:
    assert names_of(["a/old", "a/new/"]) == ["old", "new"]
    assert names_of(["run1/best", "run2/best", "c"]) == ["run1-best", "run2-best", "c"]
    assert names_of(["a/old", "a/old"]) == ["old-1", "old-2"]
    assert names_of(["org/one", "other/one"]) == ["org-one", "other-one"]


def named(folder: Path, base: str | None) -> LoraFolder:
    return read_lora(
        change_config(folder, lambda config: config.update(base_model_name_or_path=base))
    )


def test_a_base_that_names_cannot_tell_is_noted(
    llama: Path, item: Described, tmp_path: Path
) -> None:
    folder = make_lora(llama, tmp_path / "one")
    assert compose([read_lora(folder)], item).notes == ()
    label = item.source.label
    for base in (f"/elsewhere/{label}", f"org/{label}", f"/x/models--org--{label}/snapshots/ab12"):
        (note,) = compose([named(folder, base)], item).notes
        # another model may have the same last name
        assert note.endswith(f"this one is '{label}'; only shapes were compared")
    (note,) = compose([named(folder, "org/other")], item).notes
    assert note == (
        f"adapter one was trained on a base called 'other', this one is '{label}'; only shapes "
        "were compared"
    )
    (note,) = compose([named(folder, None)], item).notes
    assert note == "adapter one does not say which base it is for; only shapes were compared"


def test_another_name_on_the_hub_is_another_base(
    llama: Path, item: Described, tmp_path: Path
) -> None:
    from dataclasses import replace

    folder = make_lora(llama, tmp_path / "one")
    hub = replace(item, source=replace(item.source, label="org/base"))
    (note,) = compose([named(folder, "mirror/base")], hub).notes
    assert "only shapes were compared" in note
    assert compose([named(folder, "org/base")], hub).notes == ()
    with pytest.raises(
        SourceError,
        match="for another base; expected base_model_name_or_path org/base, found org/chat",
    ):
        compose([named(folder, "org/chat")], hub)


def test_neurons_in_another_order(llama: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    api.convert(llama, destination=split, method="moefy", num_experts=4, verify=False)
    item = open_source(str(split))
    inside = make_lora(llama, tmp_path / "inside", target_modules=["q_proj", "up_proj"])
    with pytest.raises(SourceError, match=r"mlp.up_proj': split holds the neurons .* in another"):
        compose([read_lora(inside)], item)
    outside = make_lora(llama, tmp_path / "outside")
    assert compose([read_lora(outside)], item).sizes
    # one that was trained on the split model itself
    assert compose([named(inside, str(split))], item).notes == ()
    assert len(compose([named(inside, "/anywhere/split")], item).notes) == 1


def test_a_base_at_hand_is_compared_by_its_weights(dense: Dense, tmp_path: Path) -> None:
    source, other = (open_source(str(dense("llama", seed=seed))) for seed in (0, 1))
    lora = read_lora(make_lora(source.source.root, tmp_path / "one"))
    for item in (source, other):
        of = partial(fingerprint_of, item)
        if item is source:
            assert compose([lora], item, fingerprint=of).notes == ()
            continue
        with pytest.raises(SourceError, match="the weights of llama-1 are not those it was made"):
            compose([lora], item, fingerprint=of)


def test_the_recorded_fingerprint_decides(
    llama: Path, item: Described, dense: Dense, tmp_path: Path
) -> None:
    known = linears(item.spec)
    folder = make_lora(llama, tmp_path / "one")

    def of(source: Any) -> Callable[[Any], str | None]:
        return lambda paths: of_source(source, {path: known[path].weight for path in paths})

    own = of(item.source)(sorted(read_lora(folder).modules))
    change_config(folder, lambda config: config.update(base_fingerprint=own))
    # whatever the base is called
    lora = named(folder, "org/other")
    assert compose([lora], item, fingerprint=of(item.source)).notes == ()
    other = open_source(str(dense("llama", seed=1)))
    with pytest.raises(SourceError, match="the weights of llama-1 are not those it was made for"):
        compose([lora], other, fingerprint=of(other.source))
