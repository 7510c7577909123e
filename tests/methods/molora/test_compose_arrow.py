"""Arrow's prototypes against a full singular value decomposition, and routing against PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaconvert.arch.adapters import linears
from adaconvert.arch.adaptive import config_with
from adaconvert.methods.molora.arrow import arrow_rows, router
from adaconvert.methods.molora.arrow import select as arrow_select
from adaconvert.methods.molora.config import MoloraOptions
from adaconvert.methods.molora.experts import experts
from adaconvert.methods.sources import open_source
from adaconvert.modeling.adaptive_adapters import gates_of, logits_of
from adaconvert.modeling.loading import load_model, model_class
from adaconvert.planning.evaluate import stored_parts
from adaconvert.testing.loras import make_lora

Array = numpy.ndarray[Any, Any]
EPS = float(numpy.finfo(numpy.float32).eps)


def factors(seed: int, experts: int, rank: int, inputs: int, outputs: int) -> tuple[Array, Array]:
    """Return A [E, r, n] and B [E, m, r]."""
    generator = numpy.random.Generator(numpy.random.Philox(seed))
    a = generator.standard_normal((experts, rank, inputs)).astype(numpy.float32)
    b = generator.standard_normal((experts, outputs, rank)).astype(numpy.float32)
    return a, b


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 9),
    inputs=st.integers(1, 30),
    outputs=st.integers(1, 30),
)
def test_prototypes_are_top_right_singular_vectors(
    seed: int, rank: int, inputs: int, outputs: int
) -> None:
    a, b = factors(seed, 2, rank, inputs, outputs)
    rows = arrow_rows(a, b)
    for row, one, other in zip(rows, a, b, strict=True):
        delta = other.astype(numpy.float64) @ one.astype(numpy.float64)
        sizes = numpy.linalg.svd(delta)[1]
        # what the top direction is told by, whatever the gap to the next is
        assert abs(numpy.linalg.norm(row) - 1) <= 2 * EPS
        assert abs(numpy.linalg.norm(delta @ row) - sizes[0]) <= 4 * EPS * sizes[0]
        assert row[numpy.abs(row).argmax()] > 0


def test_prototypes_do_not_depend_on_padding_sign_or_scale() -> None:
    a, b = factors(0, 3, 4, 24, 16)
    rows = arrow_rows(a, b)
    wide = numpy.concatenate((a, numpy.zeros_like(a)), axis=1)
    deep = numpy.concatenate((b, numpy.zeros_like(b)), axis=2)
    for other in (arrow_rows(-a, b), arrow_rows(4 * a, -b), arrow_rows(wide, deep)):
        assert numpy.linalg.norm(other - rows) <= 4 * EPS * numpy.linalg.norm(rows)
    assert numpy.array_equal(arrow_rows(a, b), rows)


def test_an_adapter_that_adds_nothing_has_no_direction() -> None:
    a, b = factors(0, 2, 4, 24, 16)
    b[1] = 0
    rows = arrow_rows(a, b)
    assert rows[0].any()
    assert not rows[1].any()


def test_alike_adapters_share_a_token() -> None:
    a, b = factors(0, 1, 4, 24, 16)
    rows = torch.from_numpy(arrow_rows(a.repeat(3, 0), b.repeat(3, 0)))
    logits = logits_of(torch.randn(5, 24), rows, score="abs")
    weights = gates_of(logits, arrow_select(3)).dense(3)
    assert torch.equal(weights, torch.full((5, 3), 1 / 3))


def peft_layer(rows: Array, k: int, temperature: float) -> Any:
    """Return PEFT's own routing layer with given prototypes."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer
    from peft.tuners.lora.config import ArrowConfig

    names = [f"task_{index}" for index in range(len(rows))]
    config = ArrowConfig(top_k=k, router_temperature=temperature, rng_seed=0)
    config.task_adapter_names = names
    return ArrowLoraLinearLayer(rows.shape[1], config)


@pytest.mark.parametrize(("k", "temperature"), [(3, 1.0), (1, 1.0), (2, 0.25), (5, 4.0)])
def test_gates_are_those_of_peft(k: int, temperature: float) -> None:
    a, b = factors(3, 5, 4, 24, 16)
    rows = arrow_rows(a, b)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    spec = router(temperature)
    logits = logits_of(x, torch.from_numpy(rows), score="abs", scale=float(str(spec["scale"])))
    ours = gates_of(logits, arrow_select(5, k)).dense(5)
    # as PEFT 0.21.2 computes its coefficients, in `forward`
    sim = (x @ torch.from_numpy(rows).T).abs()
    top, chosen = sim.topk(k, dim=1)
    full = sim.new_full(sim.shape, float("-inf")).scatter_(1, chosen, top)
    theirs = torch.softmax(full / temperature, dim=1)
    assert torch.equal(ours > 0, theirs > 0)
    assert (ours - theirs).norm() <= 8 * EPS * theirs.norm()


def test_power_iterations_of_peft_find_the_same_directions() -> None:
    a, b = factors(1, 3, 4, 24, 16)
    # far apart singular values, so that its 15 iterations have converged
    a[:, 0] *= 30
    rows = arrow_rows(a, b)
    layer = peft_layer(rows, 3, 1.0)
    for row, one, other in zip(rows, a, b, strict=True):
        found = layer.top_right_singular_vec_from_BA(torch.from_numpy(one), torch.from_numpy(other))
        theirs = found.numpy() * numpy.sign(found.numpy() @ row)
        assert numpy.linalg.norm(theirs - row) <= 32 * EPS


def composed_model(dense: Path, folders: list[Path], **options: Any) -> Any:
    """Return the model that a plan of composed adapters writes."""
    from transformers import AutoConfig

    from adaconvert.modeling.configuration_adaptive import made_config

    item = open_source(str(dense))
    found = experts(MoloraOptions(adapters=tuple(map(str, folders)), **options), item)
    sites = {one.linear.path: {"linear": one.slot} for one in found.adapters.placed}
    zero = {"flops_per_token": 1, "ffn_flops_per_token": 1, "length": 1}
    config = config_with(item.spec, sites, zero)
    stock: Any = type(AutoConfig.from_pretrained(dense))
    model = model_class(config)(made_config(f"Adaptive{stock.__name__}").from_dict(config))
    model.load_state_dict(load_model(dense).state_dict(), strict=False)
    fitted = found.fit(False)
    with torch.no_grad():
        for one in found.adapters.placed:
            site = model.get_submodule(one.linear.path)
            for name, value in one.values.items():
                assert value.dtype == "F32"
                target = site.get_parameter(name)
                target.copy_(torch.from_numpy(values_of(value.expr, fitted)))
    return model.eval()


def values_of(expr: Any, fitted: Any) -> Array:
    """Return what a plan computes for an expression, float32."""
    from adaconvert.planning.ops import TargetTensor

    target = TargetTensor(name="x", dtype="F32", shape=expr.shape, expr=expr, group="x")
    parts = [numpy.array(part).reshape(-1) for part in stored_parts(target, [], fitted)]
    return numpy.concatenate(parts).view(numpy.float32).reshape(expr.shape)


@pytest.mark.parametrize("k", [1, 2])
def test_a_composed_model_computes_what_peft_computes(
    k: int, dense: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import create_arrow_model
    from peft.tuners.lora.config import ArrowConfig

    llama = dense("llama")
    folders = [make_lora(llama, tmp_path / f"x{n}", seed=n) for n in range(3)]
    ours = composed_model(llama, folders, routing="arrow", k=k)
    config = ArrowConfig(top_k=k, rng_seed=0)
    base = load_model(llama)
    theirs: Any = create_arrow_model(base, [str(folder) for folder in folders], config).eval()
    ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(0))
    sites = ours.adaptive_adapters()
    with torch.no_grad():
        theirs(ids)
        for name, module in theirs.named_modules():
            if not hasattr(module, "lora_arrow"):
                continue
            path = name.removeprefix("base_model.model.")
            layer = module.lora_arrow["arrow_router"]
            # the same directions up to sign, as far as 15 iterations get
            own = sites[path].router.weight
            overlap = (layer.prototypes * own).sum(dim=1).abs()
            assert float((1 - overlap).max()) < 1e-2
            layer.prototypes.copy_(own)
        expected, found = theirs(ids).logits, ours(ids).logits
        plain = load_model(llama)(ids).logits
    assert (found - plain).norm() > 1e-2 * plain.norm()
    assert (found - expected).norm() <= 64 * EPS * expected.norm()


def test_one_adapter_is_the_lora_itself(dense: Callable[..., Path], tmp_path: Path) -> None:
    from peft import PeftModel

    llama = dense("llama")
    folder = make_lora(llama, tmp_path / "one", alpha_pattern={"v_proj": 5})
    ours = composed_model(llama, [folder], routing="arrow")
    theirs = PeftModel.from_pretrained(load_model(llama), str(folder)).eval()
    ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    assert (found - expected).norm() <= 64 * EPS * expected.norm()


def test_uniform_gates_are_the_mean_of_the_adapters(
    dense: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel

    llama = dense("llama")
    folders = [
        make_lora(llama, tmp_path / "a"),
        make_lora(llama, tmp_path / "b", seed=1, r=2, target_modules=["q_proj", "up_proj"]),
    ]
    ours = composed_model(llama, folders, routing="uniform")
    theirs: Any = PeftModel.from_pretrained(load_model(llama), str(folders[0]), adapter_name="a")
    theirs.load_adapter(str(folders[1]), adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    theirs.set_adapter("mean")
    ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = theirs.eval()(ids).logits, ours(ids).logits
    assert (found - expected).norm() <= 64 * EPS * expected.norm()


@pytest.mark.parametrize("routing", ["soft", "topk", "topp"])
@pytest.mark.parametrize("reads", ["per-module", "per-layer", "shared"])
def test_routers_to_be_trained_are_drawn(
    routing: str, reads: str, dense: Callable[..., Path], tmp_path: Path
) -> None:
    llama = dense("llama")
    folders = [make_lora(llama, tmp_path / f"x{n}", seed=n) for n in range(2)]
    options = {"routing": routing, "router": reads}
    ours = composed_model(llama, folders, **options)
    again = composed_model(llama, folders, **options)
    routers = {path: s.router for path, s in ours.adaptive_adapters().items() if s.router}
    assert len(routers) == {"per-module": 4, "per-layer": 2, "shared": 1}[reads]
    for path, made in routers.items():
        assert made.weight.any()
        assert torch.equal(made.weight, again.get_submodule(path).router.weight)
    assert set(linears(open_source(str(llama)).spec)) > set(ours.adaptive_adapters())
